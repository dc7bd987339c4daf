"""Which ICU stays count, who died, and who is in which split."""

import hashlib
import re
from pathlib import Path

import polars as pl

from data_prep import progress
from data_prep.raw import known_words, tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

VERSION = 1  # raise it when the same tables give other stays, deaths or splits
MIN_AGE_YEARS = 18
LOS_SLACK_H = 1 / 60  # `los` is outtime - intime in days; in the demo they differ by 6e-14 h at most
MAX_LOS_H = 366 * 24.0  # a longer one is a mistake in its dates, whose steps would fill the memory
MAX_UNREADABLE = 0.01
SPLIT_SHARES = {"test": 0.2, "val": 0.1}  # of the patients; the rest trains (paper, section 4.1.2)


def read_stays(raw: dict[str, tables.Table]) -> tuple[pl.DataFrame, list[dict]]:
    """The stays that count, sorted by `stay_id`, and how many each filter left.

    Columns: stay_id, subject_id, hadm_id, intime, outtime, los_h, age (years), gender, admission_type,
    first_careunit (known words: vocabulary.py), died (in this admission), death_h (hours from intime to a death in
    this admission, null where none or no hour is known). UserError where none is left.
    """
    flow = []

    def count(what: str, frame: pl.DataFrame) -> pl.DataFrame:
        flow.append({"filter": what, "stays": len(frame)})
        return frame

    stays = raw["icustays"].read(*tables.MIMIC_IV["icustays"][1])
    stays = count("rows of icustays", stays).with_columns(
        tables.integer("subject_id"),
        tables.integer("hadm_id"),
        tables.integer("stay_id"),
        tables.time("intime"),
        tables.time("outtime"),
        los_h=tables.number("los") * 24.0,
    )
    stays = count("with ids", stays.drop_nulls(["subject_id", "hadm_id", "stay_id"]))
    stays = count("not given twice", stays.unique("stay_id", keep="first", maintain_order=True))
    stays = count("no transfer between units", stays.filter(pl.col("first_careunit") == pl.col("last_careunit")))
    # Counted after transfers are removed, as the benchmark does (extract_subjects of arXiv 1703.07771), and before
    # times are looked at: a second stay is one whether or not anybody wrote down when it ended.
    stays = count("one such stay in the admission", stays.filter(pl.len().over("hadm_id") == 1))
    known = stays.drop_nulls(["los_h", "intime", "outtime"])
    known = known.filter(pl.col("los_h") > 0, pl.col("outtime") > pl.col("intime"))
    stays = count("with times and a length of stay", known)
    # Steps are counted by `los`, X-rays by `outtime`: where they contradict each other, neither can be trusted.
    lasts_h = (pl.col("outtime") - pl.col("intime")).dt.total_seconds() / 3600.0
    agrees = (pl.col("los_h") - lasts_h).abs() <= LOS_SLACK_H
    stays = count("with a length of stay that is outtime - intime", stays.filter(agrees))
    stays = count("of a year at most", stays.filter(pl.col("los_h") <= MAX_LOS_H))
    stays = count("with a patient and an admission", _join_people(stays, raw))
    stays = count("the admission is the same patient's", stays.filter(pl.col("subject_id") == pl.col("admitted_id")))
    stays = count(f"{MIN_AGE_YEARS} years or older", stays.filter(pl.col("age") >= MIN_AGE_YEARS))
    if stays.is_empty():
        lost = next(step["filter"] for step in flow if not step["stays"])
        raise UserError(f"{raw['icustays'].path}: no stay is left after the filter {lost!r}; are the tables complete?")
    stays = stays.with_columns(known_words.word("first_careunit"))
    known_words.report(stays)
    return stays.sort("stay_id").select(
        "stay_id",
        "subject_id",
        "hadm_id",
        "intime",
        "outtime",
        "los_h",
        "age",
        "gender",
        "admission_type",
        "first_careunit",
        "died",
        "death_h",
    ), flow


def digest(stays: pl.DataFrame) -> str:
    """A hash of all that an event is placed by."""
    hashed = hashlib.sha256()
    for column in ("stay_id", "subject_id", "hadm_id", "intime", "los_h"):
        hashed.update(stays[column].to_numpy().tobytes())
    return hashed.hexdigest()


def unreadable_times(raw: dict[str, tables.Table]) -> dict[str, int]:
    """Table and column -> cells that are not empty and hold no time, of those that say who died in an admission.

    Each would be no death, or no admission to die in. UserError where they are more than 1 % of a column's.
    """
    counts = {}
    for name, columns in {"admissions": ("admittime", "dischtime", "deathtime"), "patients": ("dod",)}.items():
        table = raw[name].read(*columns)
        for column in columns:
            given = table.filter(pl.col(column).str.strip_chars().fill_null("") != "").select(column)
            read = given.select(tables.date(column) if column == "dod" else tables.time(column))
            counts[f"{name}.{column}"] = failed = read[column].null_count()
            if failed > MAX_UNREADABLE * len(given):
                raise UserError(
                    f"{raw[name].path}: {failed:,} of the {len(given):,} times in the column {column!r} cannot be "
                    "read, more than 1 %: write them as MIMIC does, YYYY-MM-DD HH:MM:SS (dod: YYYY-MM-DD)"
                )
    return counts


def read_patients(raw: dict[str, tables.Table]) -> pl.DataFrame:
    """subject_id, age (anchor age, years), gender (a known word), dod (a date at 00:00) of every patient."""
    patients = raw["patients"].read(*tables.MIMIC_IV["patients"][1])
    return (
        patients.select(
            tables.integer("subject_id"),
            age=tables.number("anchor_age").cast(pl.Float32),
            gender=known_words.word("gender"),
            dod=tables.date("dod"),
        )
        .drop_nulls("subject_id")
        .unique("subject_id", keep="first", maintain_order=True)
    )


def _join_people(stays: pl.DataFrame, raw: dict[str, tables.Table]) -> pl.DataFrame:
    admissions = raw["admissions"].read(*tables.MIMIC_IV["admissions"][1])
    admissions = admissions.select(
        tables.integer("hadm_id"),
        tables.integer("subject_id").alias("admitted_id"),
        tables.time("admittime"),
        tables.time("dischtime"),
        tables.time("deathtime"),
        known_words.word("admission_type"),
    ).unique("hadm_id", keep="first", maintain_order=True)

    def inside(column: str) -> pl.Expr:
        return pl.col(column).is_between("admittime", "dischtime").fill_null(False)

    joined = stays.join(admissions, on="hadm_id").join(read_patients(raw), on="subject_id")
    death_h = (pl.col("deathtime") - pl.col("intime")).dt.total_seconds() / 3600.0
    joined = joined.with_columns(died=inside("deathtime") | inside("dod"))
    # Of many who die, MIMIC-IV writes the discharge as 00:00 of the day: it is `dod` then that says they died in this
    # admission, and `deathtime`, hours after the discharge, that says when.
    return joined.with_columns(death_h=pl.when("died").then(death_h))


def assign_splits(
    subjects: pl.Series, val_ids: str | Path | None = None, test_ids: str | Path | None = None, seed: int = 0
) -> dict[int, str]:
    """subject_id -> 'train', 'val' or 'test': by the lists where given, else by a seeded hash."""
    subjects = sorted(set(subjects.to_list()))
    if (val_ids is None) != (test_ids is None):
        raise UserError("--val_ids and --test_ids go together: give both or neither")
    if val_ids is None:
        return {subject: _hashed_split(subject, seed) for subject in subjects}
    val, test = read_id_list(val_ids), read_id_list(test_ids)
    if both := val & test:
        raise UserError(f"subject {min(both)} is in both {val_ids} and {test_ids}: a patient belongs to one split")
    for path, members in ((val_ids, val), (test_ids, test)):
        if not members & set(subjects):
            progress.say(f"warning: none of the {len(members)} patients of {path} is in the cohort")
    named = dict.fromkeys(subjects, "train") | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")
    if not any(named[subject] != "train" for subject in subjects):
        raise UserError(f"{val_ids} and {test_ids} name no patient of the cohort: are they lists of subject_id?")
    return named


def _hashed_split(subject_id: int, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{subject_id}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < SPLIT_SHARES["test"]:
        return "test"
    return "val" if place < SPLIT_SHARES["test"] + SPLIT_SHARES["val"] else "train"


def read_id_list(path: str | Path) -> set[int]:
    """The patients a list names: rows `subject_id` or `subject_id,0/1` (1: in the split), a header allowed."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {path} cannot be read ({error})") from None
    members = set()
    for row, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split(",")]
        if not any(cells) or (row == 1 and cells[0] == "subject_id"):
            continue
        found = re.fullmatch(r"([0-9]+)(?:\.0*)?(?:,([01])(?:\.0*)?)?", ",".join(cells))  # a dot: pandas' floats
        if not found:
            raise UserError(f"{path} row {row} is {line!r}; a row is subject_id or subject_id,0/1")
        if found[2] != "0":
            members.add(int(found[1]))
    return members


def mortality_labels(stays: pl.DataFrame):
    """int8 [N, 1]: died in this admission."""
    return stays.select(pl.col("died").cast(pl.Int8)).to_numpy()


def window_h(task: schema.Task, pheno_window_h: float | None) -> float | None:
    """Hours from `intime` that a task's inputs may come from; None for the whole stay."""
    return pheno_window_h if task.name == "pheno" else task.window_h
