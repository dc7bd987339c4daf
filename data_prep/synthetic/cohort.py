"""Synthetic patients, admissions, ICU stays and diagnoses, as in MIMIC-IV 2.2's `hosp` and `icu`.

Stays of kind 'kept' pass the cohort filters. The filters drop the others: 'transfer' (ends in another unit), 'twin'
(two stays in one admission), 'minor' (under 18), 'empty' (no usable event).
"""

import numpy as np
import polars as pl

from data_prep.synthetic import events, signal
from data_prep.synthetic import tables as definitions
from medfuse_jax import schema

DROPPED_SHARES = {"transfer": 0.03, "twin": 0.02, "minor": 0.005, "empty": 0.005}  # relative to the kept stays
RETURNING_SHARE = 0.12  # of the stays: a later admission of the previous patient
MEDIAN_LOS_H, LOS_SPREAD, SHORTEST_H, LONGEST_H = 60.0, 0.9, 5.0, 27 * 24.0
UNDATED_DEATH_SHARE = 0.05  # of the deaths: only `dod` records them
FIRST_DAY = np.datetime64("2110-01-01", "ms")
UNITS = (
    "Medical Intensive Care Unit (MICU)",
    "Surgical Intensive Care Unit (SICU)",
    "Cardiac Vascular Intensive Care Unit (CVICU)",
    "Medical/Surgical Intensive Care Unit (MICU/SICU)",
    "Trauma SICU (TSICU)",
    "Coronary Care Unit (CCU)",
    "Neuro Surgical Intensive Care Unit (Neuro SICU)",
)
LAB_NORMAL = {50931: (70.0, 100.0), 50809: (70.0, 105.0), 50820: (7.35, 7.45), 50912: (0.5, 1.2), 51222: (12.0, 17.5)}
_HOUR = np.timedelta64(3_600_000, "ms")


def unique_ids(rng: np.random.Generator, first: int, num: int, taken: np.ndarray | None = None) -> np.ndarray:
    """Draw `num` distinct ids from [first, first + 10,000,000), excluding `taken`."""
    ids = first + rng.choice(10_000_000, num + (0 if taken is None else len(taken)), replace=False)
    return ids[:num] if taken is None else ids[~np.isin(ids, taken)][:num]


def _hours(hours: np.ndarray) -> np.ndarray:
    """Convert hours to durations in whole seconds (stored as ms: polars does not read numpy seconds)."""
    return (np.round(np.asarray(hours) * 3600) * 1000).astype("timedelta64[ms]")


def _whole_minutes(time: np.ndarray) -> np.ndarray:
    return time.astype("datetime64[m]").astype("datetime64[ms]")


def _kinds(num_stays: int) -> np.ndarray:
    kinds = ["kept"] * num_stays
    for kind, share in DROPPED_SHARES.items():
        count = max(1, round(share * num_stays))
        kinds += [kind] * (2 * count if kind == "twin" else count)
    return np.array(kinds)


def _patients_and_times(rng, kind: np.ndarray, died: np.ndarray, los_h: np.ndarray) -> dict[str, np.ndarray]:
    """Draw the patient, admission and start of each stay; nobody returns after death.

    The stays of a patient are neighbours, as are those of an admission: a cumulative sum numbers them.
    """
    num = len(kind)
    second_twin = (kind == "twin") & (np.cumsum(kind == "twin") % 2 == 0)
    returning = (rng.random(num) < RETURNING_SHARE) & (kind == "kept") & ~np.roll(died, 1)
    returning[0] = False
    patient = np.cumsum(~(returning | second_twin)) - 1
    admission = np.cumsum(~second_twin) - 1
    first_of_patient = np.searchsorted(patient, patient)  # the row of the patient's first stay
    opened = FIRST_DAY + _hours(rng.uniform(0, 90 * 365 * 24, num))[first_of_patient]
    visit = np.arange(num) - first_of_patient
    intime = opened + _hours(visit * 330 * 24 + rng.uniform(0, 60 * 24, num))
    before_h = np.minimum(rng.exponential(8, num), 72)
    before_h = np.where(rng.random(num) < 0.05, 0.0, before_h)  # admitted straight to the ICU
    first_twin = np.flatnonzero(second_twin) - 1
    intime[second_twin] = intime[first_twin] + _hours(los_h[first_twin] + rng.uniform(12, 60, len(first_twin)))
    return {
        "subject_id": unique_ids(rng, 10_000_000, patient[-1] + 1)[patient],
        "hadm_id": unique_ids(rng, 20_000_000, admission[-1] + 1)[admission],
        "stay_id": unique_ids(rng, 30_000_000, num),
        "intime": intime,
        "admittime": _whole_minutes(intime - _hours(before_h)),
    }


def draw_stays(rng: np.random.Generator, num_stays: int) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """Draw all ICU stays, in order of patient and time, and the latents and labels planted in them.

    The frame: kind, ids, times, los_h, died, age, gender, units, icd_version. The dict: the latents 'vitals' [N, V] and
    'cxr' [N, E]; for each task the true probabilities ('pheno', 'mortality'), as `signal.probabilities` returns them,
    and the labels drawn from them ('pheno_label', 'mortality_label': bool [N, K]).
    """
    kind = _kinds(num_stays)
    num = len(kind)
    vitals, image = signal.draw_latents(rng, num)
    planted = {"vitals": vitals, "cxr": image}
    for task in signal.RULES:
        planted[task] = signal.probabilities(task, vitals, image)
        planted[f"{task}_label"] = rng.random(planted[task]["both"].shape) < planted[task]["both"]
    planted["mortality_label"][kind == "twin"] = False
    died = planted["mortality_label"][:, 0]
    los_h = np.exp(rng.normal(np.log(MEDIAN_LOS_H), LOS_SPREAD, num)).clip(SHORTEST_H, LONGEST_H)
    columns = _patients_and_times(rng, kind, died, los_h)
    unit = rng.integers(len(UNITS), size=num)
    later_unit = (unit + rng.integers(1, len(UNITS), num)) % len(UNITS)
    age = np.where(kind == "minor", rng.integers(12, 18, num), rng.normal(64, 16, num).clip(18, 91).astype(int))
    of_patient = pl.col("age", "gender").first().over("subject_id")
    of_admission = pl.col("icd_version", "admittime").first().over("hadm_id")
    stays = pl.DataFrame(
        {
            "kind": kind,
            **columns,
            "outtime": columns["intime"] + _hours(los_h),
            "los_h": los_h,
            "died": died,
            "age": age,
            "gender": rng.choice(["F", "M"], num),
            "first_careunit": np.array(UNITS)[unit],
            "last_careunit": np.array(UNITS)[np.where(kind == "transfer", later_unit, unit)],
            "icd_version": rng.choice([9, 10], num),
        }
    )
    return stays.with_columns(of_patient, of_admission), planted


def admissions(rng: np.random.Generator, stays: pl.DataFrame) -> pl.DataFrame:
    """Return one row per admission, with the columns of the real table and `dod`."""
    by_admission = stays.group_by("hadm_id", maintain_order=True)
    stays = by_admission.agg(pl.all().exclude("outtime").first(), pl.col("outtime").last())
    num = len(stays)
    died, outtime, admittime = (stays[name].to_numpy() for name in ("died", "outtime", "admittime"))
    in_unit = rng.random(num) < 0.75
    death = _whole_minutes(outtime + _hours(np.where(in_unit, rng.uniform(-0.5, 0, num), rng.uniform(4, 96, num))))
    discharge = _whole_minutes(outtime + _hours(rng.exponential(96, num)))
    dated = (rng.random(num) >= UNDATED_DEATH_SHARE) | (death.astype("datetime64[D]") <= admittime)
    emergency = rng.random(num) < 0.6
    last_visit = (pl.Series(stays["subject_id"]) != stays["subject_id"].shift(-1).fill_null(-1)).to_numpy()
    dies_later = ~died & last_visit & (rng.random(num) < 0.15)
    dod = np.where(died, death, discharge + _hours(rng.uniform(3, 300, num) * 24)).astype("datetime64[D]")
    never = np.datetime64("NaT", "ms")
    letters = rng.integers(0, 36, (num, 5))
    alphabet = np.array(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    return pl.DataFrame(
        {
            "subject_id": stays["subject_id"],
            "hadm_id": stays["hadm_id"],
            "admittime": admittime,
            "dischtime": np.where(died, death, discharge),
            "deathtime": np.where(died & dated, death, never),
            "admission_type": np.where(emergency, "EW EMER.", rng.choice(["URGENT", "OBSERVATION ADMIT"], num)),
            "admit_provider_id": ["P" + "".join(row) for row in alphabet[letters]],
            "admission_location": np.where(emergency, "EMERGENCY ROOM", "TRANSFER FROM HOSPITAL"),
            "discharge_location": np.where(died, "DIED", rng.choice(["HOME", "HOME HEALTH CARE", "REHAB"], num)),
            "insurance": rng.choice(["Medicare", "Medicaid", "Other"], num, p=[0.4, 0.1, 0.5]),
            "language": rng.choice(["ENGLISH", "?"], num, p=[0.9, 0.1]),
            "marital_status": rng.choice(["MARRIED", "SINGLE", "WIDOWED", "DIVORCED"], num),
            "race": rng.choice(["WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "UNKNOWN"], num, p=[0.7, 0.15, 0.05, 0.1]),
            "edregtime": np.where(emergency, admittime - _HOUR * 5, never),
            "edouttime": np.where(emergency, admittime + _HOUR, never),
            "hospital_expire_flag": died.astype(int),
            "dod": np.where(died | dies_later, dod, np.datetime64("NaT", "D")),
        }
    )


def patients(rng: np.random.Generator, stays: pl.DataFrame, admission_rows: pl.DataFrame) -> pl.DataFrame:
    """Return one row per patient, with the columns of the real table."""
    people = stays.group_by("subject_id", maintain_order=True).first()
    died = admission_rows.group_by("subject_id").agg(pl.col("dod").max())
    groups = [f"{year} - {year + 2}" for year in range(2008, 2020, 3)]
    return people.join(died, on="subject_id", how="left", maintain_order="left").select(
        "subject_id",
        "gender",
        anchor_age="age",
        anchor_year=pl.col("intime").dt.year(),
        anchor_year_group=pl.Series(rng.choice(groups, len(people))),
        dod="dod",
    )


def diagnoses(rng: np.random.Generator, stays: pl.DataFrame, label_NK: np.ndarray) -> pl.DataFrame:
    """Return codes for each admission's phenotype labels, mixed with codes that belong to no phenotype."""
    rows = []
    stays = stays.with_row_index("row").group_by("hadm_id", maintain_order=True).first()
    columns = stays.select("subject_id", "hadm_id", "row", "icd_version")
    for subject_id, hadm_id, row, version in columns.iter_rows():
        codes = []
        for phenotype, present in zip(schema.PHENOTYPES, label_NK[row], strict=True):
            if present:
                known = definitions.CODES[phenotype.ccs, version]
                codes += rng.permutation([code for code, _ in known])[: 1 + int(rng.random() < 0.2)].tolist()
        others = [code for code, _ in definitions.CODES[0, version]]
        codes += rng.permutation(others)[: rng.integers(1, len(others))].tolist()
        for place, code in enumerate(rng.permutation(codes).tolist(), start=1):
            rows.append((subject_id, hadm_id, place, code, version))
    return pl.DataFrame(rows, schema=["subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"], orient="row")


def _timed(rows: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """Add the stay's ids and a `charttime` in whole minutes to event rows."""
    start = stays["intime"].dt.truncate("1m")
    row = rows["row"]
    return rows.with_columns(
        *(stays[name].gather(row) for name in ("subject_id", "hadm_id", "stay_id")),
        charttime=start.gather(row) + pl.duration(minutes="minute"),
    )


def tables(rng: np.random.Generator, stays: pl.DataFrame, planted: dict[str, np.ndarray]) -> dict[str, pl.DataFrame]:
    """Return every MIMIC-IV table of the cohort, by its path without suffix."""
    courses = events.draw_courses(rng, planted["vitals"])
    admission_rows = admissions(rng, stays)
    codes = [(code, version, title) for (_, version), known in definitions.CODES.items() for code, title in known]
    codes = pl.DataFrame(codes, schema=["icd_code", "icd_version", "long_title"], orient="row")
    items = pl.DataFrame(definitions.ITEMS, schema=dict.fromkeys(definitions.ITEM_COLUMNS, pl.String), orient="row")
    lab_items = pl.DataFrame(
        definitions.LAB_ITEMS, schema=dict.fromkeys(definitions.LAB_ITEM_COLUMNS, pl.String), orient="row"
    )
    return {
        "hosp/patients": patients(rng, stays, admission_rows),
        "hosp/admissions": admission_rows.drop("dod"),
        "hosp/diagnoses_icd": diagnoses(rng, stays, planted["pheno_label"]),
        "hosp/d_icd_diagnoses": codes.sort("icd_code", "icd_version"),
        "hosp/d_labitems": lab_items,
        "hosp/labevents": _lab_table(rng, _timed(events.lab_rows(rng, stays, courses), stays)),
        "icu/icustays": stays.select(
            *("subject_id", "hadm_id", "stay_id", "first_careunit", "last_careunit", "intime", "outtime"),
            los=(pl.col("outtime") - pl.col("intime")).dt.total_seconds() / 86400,
        ),
        "icu/chartevents": _icu_table(
            _timed(events.chart_rows(rng, stays, courses), stays), 7, "valuenum", "valueuom", warning=pl.lit(0)
        ),
        "icu/outputevents": _icu_table(_timed(events.output_rows(rng, stays), stays), 3, "valueuom"),
        "icu/d_items": items.with_columns(pl.all().replace("", None)),
    }


def _icu_table(rows: pl.DataFrame, stored_min: int, *columns: str, **added: pl.Expr) -> pl.DataFrame:
    """Return rows with the columns that ICU tables share, and others. stored_min: minutes until a row is stored."""
    return rows.select(
        *("subject_id", "hadm_id", "stay_id"),
        (10_000 + pl.col("row") % 997).alias("caregiver_id"),
        "charttime",
        (pl.col("charttime") + pl.duration(minutes=stored_min)).alias("storetime"),
        *("itemid", "value", *columns),
        **added,
    )


def _lab_table(rng: np.random.Generator, rows: pl.DataFrame) -> pl.DataFrame:
    """Return laboratory rows with the real columns: no stay_id, and no admission in one row of twenty."""
    number = pl.col("valuenum").cast(pl.Float64)
    lower, upper = (
        pl.col("itemid").replace_strict({item: b[i] for item, b in LAB_NORMAL.items()}, default=None) for i in (0, 1)
    )
    outpatient = pl.Series(rng.random(len(rows)) < 0.05)
    return rows.with_row_index("n").select(
        (pl.col("n") + 1).alias("labevent_id"),
        "subject_id",
        pl.when(~outpatient).then("hadm_id").alias("hadm_id"),
        (1_000_000 + (pl.col("row") * 100_003 + pl.col("minute")).abs() % 98_000_000).alias("specimen_id"),
        "itemid",
        pl.lit(None, pl.String).alias("order_provider_id"),
        "charttime",
        (pl.col("charttime") + pl.duration(minutes=55)).alias("storetime"),
        *("value", "valuenum", "valueuom"),
        ref_range_lower=lower,
        ref_range_upper=upper,
        flag=pl.when((number < lower) | (number > upper)).then(pl.lit("abnormal")),
        priority=pl.lit("ROUTINE"),
        comments="comments",
    )
