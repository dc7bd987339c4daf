"""Select the ICU stays of the cohort."""

import hashlib
from pathlib import Path

import polars as pl

from data_prep import progress
from data_prep.labels import mortality
from data_prep.profiles import PAPER, Rules
from data_prep.raw import invalid, known_words, parse, tables, times
from medfuse_jax.runtime.errors import UserError

VERSION = 8  # increment when the same tables give other stays, deaths or splits (splits.py)
MIN_AGE_YEARS, _MAX_AGE_YEARS = 18, 120  # MIMIC-IV gives 91 to everyone over 89; a larger number is a year
_MANY_STAYS = 50  # a cohort this large should have a death; the MIMIC-IV demo has 9 in 112 stays
_MAX_UNLIKE_FLAG = 0.05
LOS_SLACK_H = 1 / 60  # `los` is outtime - intime in days; in the MIMIC-IV demo they differ by 6e-14 h at most
MIN_ROUNDED = 0.9  # a column `los` is rounded to so many decimals if this fraction of its values has no more
MAX_LOS_H = 366 * 24.0  # a longer stay has a wrong date, and its time steps would fill the memory
_LASTS_H = (pl.col("outtime") - pl.col("intime")).dt.total_seconds() / 3600.0
_COLUMNS = (
    *("stay_id", "subject_id", "hadm_id", "intime", "outtime", "los_h"),
    *("age", "gender", "race", "admission_type", "first_careunit", "died", "death_h", "expire_flag"),
    *("alive_until", "has_diagnosis"),
)


def read_stays(raw: dict[str, tables.Table], rules: Rules = PAPER) -> tuple[pl.DataFrame, list[dict]]:
    """Return the cohort's stays, sorted by `stay_id`, and how many stays each filter kept.

    Columns: stay_id, subject_id, hadm_id, intime, outtime, los_h, age (years), gender, race, admission_type,
    first_careunit (known_words.py), died and death_h (mortality.py), expire_flag (the table's own label of death, 0, 1
    or null), alive_until (time of death, null if none is known or the rules ignore it), has_diagnosis (a row in
    diagnoses_icd). Raises UserError if no stay is left.
    """
    flow = []

    def count(what: str, frame: pl.DataFrame) -> pl.DataFrame:
        flow.append({"filter": what, "stays": len(frame)})
        return frame

    stays = raw["icustays"].read(*tables.MIMIC_IV["icustays"][1])
    invalid.check_ids(raw["icustays"].path, stays, "subject_id", "hadm_id", "stay_id")
    stays = count("rows of icustays", stays).with_columns(
        parse.integer("subject_id"),
        parse.integer("hadm_id"),
        parse.integer("stay_id"),
        times.time("intime"),
        times.time("outtime"),
        los_h=parse.number("los") * 24.0,
    )
    stays = _without_rounding(stays, raw["icustays"].path)
    stays = count("with ids", stays.drop_nulls(["subject_id", "hadm_id", "stay_id"]))
    stays = count("not a duplicate", stays.unique("stay_id", keep="first", maintain_order=True))
    stays = count("no transfer between units", stays.filter(_unit("first_careunit") == _unit("last_careunit")))
    # This follows the removal of transfers, as in the benchmark (extract_subjects of arXiv 1703.07771). It precedes the
    # check of times, because an admission has two stays even if the end of one was never recorded.
    stays = count("one such stay in the admission", stays.filter(pl.len().over("hadm_id") == 1))
    timed = stays.drop_nulls(["los_h", "intime", "outtime"])
    timed = timed.filter(pl.col("los_h") > 0, pl.col("outtime") > pl.col("intime"))
    lost = "lack a valid intime, outtime or los, or end before they begin"
    _warn_of_lost(raw["icustays"].path, stays, timed, lost)
    stays = count("with times and a length of stay", timed)
    # `los` decides how many time steps a stay has, `outtime` which X-rays it gets: both must agree.
    agreeing = stays.filter((pl.col("los_h") - _LASTS_H).abs() <= LOS_SLACK_H)
    _warn_of_lost(raw["icustays"].path, stays, agreeing, "have a los that is not outtime - intime in days")
    stays = count("with a length of stay that is outtime - intime", agreeing)
    stays = count("of at most a year", stays.filter(pl.col("los_h") <= MAX_LOS_H))
    admissions, patients = _read_admissions(raw), read_patients(raw)
    known = stays.join(admissions, on="hadm_id").join(patients, on="subject_id")
    _warn_of_lost(raw["icustays"].path, stays, known, "have no row in patients or in admissions")
    stays = count("with a patient and an admission", known)
    stays = count("with the patient's own admission", stays.filter(pl.col("subject_id") == pl.col("admitted_id")))
    stays = count("with a readable age", stays.drop_nulls("age"))
    stays = count(f"{MIN_AGE_YEARS} years or older", stays.filter(pl.col("age") >= MIN_AGE_YEARS))
    stays = stays.join(mortality.alive_until(admissions, patients), on="subject_id", how="left")
    if rules.after_death:
        stays = stays.with_columns(alive_until=pl.lit(None, pl.Datetime("us")))
    else:
        living = (pl.col("intime") < pl.col("alive_until")).fill_null(True)
        stays = count("begins before the patient's death", stays.filter(living))
    diagnosed = _read_diagnosed(raw)
    stays = stays.join(diagnosed, on=["subject_id", "hadm_id"], how="left")
    stays = stays.with_columns(pl.col("has_diagnosis").fill_null(False))
    _warn_of_undiagnosed(raw["diagnoses_icd"].path, stays)
    if not rules.undiagnosed and len(diagnosed):  # an empty table, of which the build warns, would leave no stay
        stays = count("with a diagnosis", stays.filter("has_diagnosis"))
    if stays.is_empty():
        emptied_by = next(step["filter"] for step in flow if not step["stays"])
        path = raw["icustays"].path
        message = f"{path}: no stay is left after the filter {emptied_by!r}; are the tables complete?"
        raise UserError(message, path=path, value=emptied_by)
    stays = mortality.add_deaths(stays).with_columns(known_words.word("first_careunit"))
    _warn_of_deaths(raw["admissions"].path, stays)
    known_words.warn_of_others(stays)
    return stays.sort("stay_id").select(_COLUMNS), flow


def _unit(column: str) -> pl.Expr:
    return pl.col(column).str.strip_chars().str.to_lowercase()


def _warn_of_undiagnosed(path: Path, stays: pl.DataFrame) -> None:
    undiagnosed = int((~stays["has_diagnosis"]).sum())
    if invalid.MAX_SHARE * len(stays) < undiagnosed < len(stays):  # if all, the labels give a warning
        progress.say(
            f"warning: {path}: {undiagnosed:,} of {len(stays):,} stays have no diagnosis; is the table complete?"
        )


def _warn_of_deaths(path: Path, stays: pl.DataFrame) -> None:
    if len(stays) >= _MANY_STAYS and not stays["died"].any():
        progress.say(f"warning: {path}: no patient dies in hospital, so mortality has no positive label")
    unlike = int((stays["expire_flag"] != stays["died"]).sum())
    if unlike > max(invalid.FEW, _MAX_UNLIKE_FLAG * len(stays)):
        progress.say(
            f"warning: {path}: {unlike:,} of {len(stays):,} stays have a hospital_expire_flag that disagrees with "
            "deathtime and dod; the flag is not used"
        )


def _without_rounding(stays: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Replace `los_h` by outtime - intime where the two differ only because `los` was rounded or cut off.

    It counts as rounded if nearly all of its values have at most two decimals. MIMIC-IV's have up to 16; from three on,
    rounding costs less than a minute. Trailing zeros do not count, except the one in 2.0.
    """
    value = stays["los"].str.strip_chars()
    own = value.str.extract(r"^\d+\.(\d+?)0*$", 1).str.len_chars()
    own = own.zip_with(value.str.contains(r"^\d+(\.\d+)?$"), pl.Series([99], dtype=own.dtype)).fill_null(0)
    usual = next((n for n in range(3) if len(own) and (own <= n).mean() >= MIN_ROUNDED), None)
    if usual is None:
        return stays
    late_h = pl.col("los_h") - _LASTS_H
    unit_h = 24.0 * 10.0 ** -own.clip(usual).cast(pl.Float64)
    rounds = late_h.is_between(-unit_h - LOS_SLACK_H, unit_h / 2 + LOS_SLACK_H) & (own <= 2)
    rounded = stays.select((rounds & (late_h.abs() > LOS_SLACK_H)).sum()).item()
    if rounded > invalid.MAX_SHARE * len(stays):
        progress.say(f"warning: {path}: 'los' of {rounded:,} stays is rounded; their length is outtime - intime")
    return stays.with_columns(los_h=pl.when(rounds).then(_LASTS_H).otherwise("los_h"))


def _warn_of_lost(path: Path, stays: pl.DataFrame, kept: pl.DataFrame, why: str) -> None:
    """Warn if `kept` lacks more than 1 % of `stays`. The audit counts every one."""
    lost = len(stays) - len(kept)
    if lost > invalid.MAX_SHARE * len(stays):
        progress.say(f"warning: {path}: {lost:,} of {len(stays):,} stays {why}, and are left out")


def digest(stays: pl.DataFrame) -> str:
    """Hash the columns that decide which stay an event belongs to, and at which time in the stay."""
    hashed = hashlib.sha256()
    for column in ("stay_id", "subject_id", "hadm_id", "intime", "los_h", "alive_until"):
        hashed.update(stays[column].to_numpy().tobytes())
    return hashed.hexdigest()


def read_patients(raw: dict[str, tables.Table]) -> pl.DataFrame:
    """Return subject_id, age (anchor age, years), gender (a known word) and dod (a date at 00:00) of all patients."""
    patients = raw["patients"].read(*tables.MIMIC_IV["patients"][1])
    invalid.check_ids(raw["patients"].path, patients, "subject_id")
    age = pl.when(parse.number("anchor_age").is_between(0, _MAX_AGE_YEARS)).then(parse.number("anchor_age"))
    ages = invalid.Tally(invalid.AGES).add(patients["anchor_age"], patients.select(age.is_not_null()).to_series())
    ages.check(raw["patients"].path, "anchor_age")
    return (
        patients.select(
            parse.integer("subject_id"),
            age=age.cast(pl.Float32),
            gender=known_words.word("gender"),
            dod=times.date("dod"),
        )
        .drop_nulls("subject_id")
        .unique("subject_id", keep="first", maintain_order=True)
    )


def _read_admissions(raw: dict[str, tables.Table]) -> pl.DataFrame:
    columns = raw["admissions"].columns
    flag = [name for name in ("hospital_expire_flag",) if name in columns]
    race = [name for name in ("race", "ethnicity") if name in columns][:1]  # ethnicity in MIMIC-IV 1.0
    admissions = raw["admissions"].read(*tables.MIMIC_IV["admissions"][1], *flag, *race)
    invalid.check_ids(raw["admissions"].path, admissions, "hadm_id", "subject_id")
    return admissions.select(
        parse.integer("hadm_id"),
        parse.integer("subject_id").alias("admitted_id"),
        times.time("admittime"),
        times.time("dischtime"),
        times.time("deathtime"),
        known_words.word("admission_type"),
        race=known_words.race(race[0]) if race else pl.lit(""),
        expire_flag=parse.integer("hospital_expire_flag") if flag else pl.lit(None, pl.Int64),
    ).unique("hadm_id", keep="first", maintain_order=True)


def _read_diagnosed(raw: dict[str, tables.Table]) -> pl.DataFrame:
    """Return subject_id, hadm_id and has_diagnosis=True of the admissions in diagnoses_icd."""
    rows = raw["diagnoses_icd"].read("subject_id", "hadm_id")
    invalid.check_ids(raw["diagnoses_icd"].path, rows, "subject_id", "hadm_id")
    return rows.select(parse.integer("subject_id"), parse.integer("hadm_id"), has_diagnosis=True).unique()
