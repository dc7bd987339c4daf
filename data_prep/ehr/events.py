"""Stream raw chart and laboratory rows to cleaned events of the 17 variables.

Tables are read in batches, so memory does not grow with their size. Events go to one folder of parquet files per
bucket of stays; a bucket is small enough to be discretised at once.

Event columns: stay (row of the cohort, uint32), time_s (seconds since intime, int32), variable (index in
schema.VARIABLES, uint8), value (float32; of a class, its index), item (int32) and, if the rules need them, `text` and
stored_s (seconds since intime, int32, null if unknown).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from data_prep import progress
from data_prep.ehr import cleaning, readable
from data_prep.ehr.arrays import EPSILON_H
from data_prep.ehr.cleaning import VARIABLE
from data_prep.profiles import Rules
from data_prep.raw import parse, tables
from medfuse_jax import schema
from medfuse_jax.runtime import files

VERSION = 11  # increment when the same input gives other events
# Fates of kept rows; every other fate is a reason to drop a row.
KEPT, CLIPPED, UNDATED = "kept", "clipped (and kept)", "stored at no known time (and kept)"
_OUTSIDE = "before or after the stay"
STAYS_PER_BUCKET = 1024
ROWS_PER_BATCH = 200_000
ROWS_PER_WRITE = 1_000_000
_INT32 = np.iinfo(np.int32)

# MIMIC-IV item ids of each variable.
CHART_ITEMS = {
    "Capillary refill rate": (223951, 224308),
    "Diastolic blood pressure": (220051, 225310, 220180, 224643),
    "Fraction inspired oxygen": (223835,),
    "Glascow coma scale eye opening": (220739,),
    "Glascow coma scale motor response": (223901,),
    "Glascow coma scale verbal response": (223900,),
    "Glucose": (225664, 220621, 226537),
    "Heart Rate": (220045,),
    "Height": (226707, 226730),
    "Mean blood pressure": (220052, 225312, 224322, 220181),
    "Oxygen saturation": (220227, 220277),
    "Respiratory rate": (220210, 224689, 224422, 224690),
    "Systolic blood pressure": (220050, 225309, 220179, 224167, 227243),
    "Temperature": (223762, 223761),
    "Weight": (224639, 226512, 226531),
    "pH": (223830, 220274),
}
LAB_ITEMS = {"Glucose": (50931, 50809, 51478), "Oxygen saturation": (50817,), "pH": (50820, 51491, 50831, 51094)}

# Variables whose raw numbers the released extraction sorts as text (it parses the numbers of other variables first).
SORTED_AS_TEXT = ("Heart Rate", "Mean blood pressure", "Respiratory rate")


def num_buckets(num_stays: int) -> int:
    """Return the number of buckets that `num_stays` stays need."""
    return -(-num_stays // STAYS_PER_BUCKET)


def extract(raw: dict[str, tables.Table], stays: pl.DataFrame, rules: Rules, folder: Path) -> None:
    """Write every bucket's events, `counts.json` (rows by fate and variable) and `unreadable_times.json` to `folder`.

    Raises UserError if more than 1 % of a column's times or ids cannot be read.
    """
    lookup = stays.with_row_index("stay").select(
        "stay",
        "hadm_id",
        "intime",
        "los_h",
        "alive_until",
        own_subject_id=pl.col("subject_id"),
        own_stay_id=pl.col("stay_id"),
    )
    counts: dict[str, Counter] = {}
    unreadable: dict[str, int] = {}
    for part, frame in enumerate(_joined(_batches(raw, rules, lookup, counts, unreadable), ROWS_PER_WRITE)):
        _write(frame, folder, part)
    files.write_json(folder / "counts.json", counts)
    files.write_json(folder / "unreadable_times.json", unreadable)


def read_counts(folder: Path) -> dict[str, dict[str, int]]:
    """Return fate -> variable -> rows."""
    return files.read_json(folder / "counts.json", "delete the folder and build again")


def read_unreadable_times(folder: Path) -> dict[str, int]:
    """Return 'table.column' -> times that cannot be read."""
    return files.read_json(folder / "unreadable_times.json", "delete the folder and build again")


def read_bucket(folder: Path, bucket: int) -> pl.DataFrame | None:
    """Return a bucket's events in the order they were read; None if it has none."""
    parts = sorted(folder.glob(f"bucket={bucket:05d}/*.parquet"))
    return pl.concat([pl.read_parquet(part) for part in parts]) if parts else None


def _write(frame: pl.DataFrame, folder: Path, part: int) -> None:
    frame = frame.with_columns(bucket=pl.col("stay") // STAYS_PER_BUCKET)
    for (bucket,), rows in frame.partition_by("bucket", as_dict=True, include_key=False).items():
        target = folder / f"bucket={bucket:05d}"
        target.mkdir(exist_ok=True)
        rows.write_parquet(target / f"{part:06d}.parquet", compression="lz4")


def _batches(
    raw: dict[str, tables.Table],
    rules: Rules,
    lookup: pl.DataFrame,
    counts: dict[str, Counter],
    unreadable: dict[str, int],
) -> Iterator[pl.DataFrame]:
    """Yield cleaned events of both tables in batches, adding to `counts` and `unreadable`."""
    for name, items in (("chartevents", CHART_ITEMS), ("labevents", LAB_ITEMS)):
        if not rules.capillary_refill:
            items = {variable: ids for variable, ids in items.items() if variable != "Capillary refill rate"}
        table = raw[name]
        # Laboratory rows have no stay, and may have no admission. A chart row without a stay_id is placed by its
        # admission.
        extra, optional = ("valuenum", "hadm_id") if name == "labevents" else ("stay_id", "stay_id")
        item_variable = {item: VARIABLE[variable] for variable, ids in items.items() for item in ids}
        columns = ["subject_id", "hadm_id", "charttime", "itemid", "value", extra]
        if rules.stored_in_time:
            columns.append("storetime")
        compared = ["valuenum"] if name == "chartevents" and "valuenum" in table.columns else []
        number = pl.col("itemid").cast(pl.Int64, strict=False)  # null also for '220045.0', which is read below
        wanted = table.scan(*columns, *compared, with_is_long=True).filter(
            number.is_in(list(item_variable)) | number.is_null() | pl.col("is_long")
        )
        # Stays may have no laboratory row.
        watch = readable.Watch(table, columns, optional, num_stays=len(lookup) if name == "chartevents" else 0)
        for batch in progress.bar(_raw_batches(table, wanted), f"events of {table.name}", "batches"):
            batch = watch.known_items(batch, list(item_variable))
            if "valuenum" in batch.columns:
                watch.compare_numbers(batch)
            batch = batch.drop(compared)
            yield _events(batch, item_variable, rules, lookup, counts, watch)
        unreadable.update({f"{name}.{column}": number for column, number in watch.check().items()})


def _raw_batches(table: tables.Table, wanted: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """Yield the wanted rows in file order, at least ROWS_PER_BATCH at a time, because each batch has a fixed cost."""
    with tables.reading(table.path):
        yield from _joined(wanted.collect_batches(), ROWS_PER_BATCH)


def _joined(frames: Iterable[pl.DataFrame], num_rows: int) -> Iterator[pl.DataFrame]:
    """Join consecutive frames to at least `num_rows` rows each, but for the last."""
    pending = []
    for frame in frames:
        pending.append(frame)
        if sum(map(len, pending)) >= num_rows:
            yield pl.concat(pending)
            pending = []
    if any(map(len, pending)):
        yield pl.concat(pending)


def _events(
    batch: pl.DataFrame,
    item_variable: dict[int, int],
    rules: Rules,
    lookup: pl.DataFrame,
    counts: dict,
    watch: readable.Watch,
) -> pl.DataFrame:
    """Turn a batch of raw rows into events, and count every row by its fate."""
    located = _locate(batch, item_variable, lookup)
    _count(located.filter(pl.col("fate").is_not_null()), counts)
    named = located.filter("names_stay")["fate"]
    watch.add_named(num_inside=named.null_count(), num_outside=(named == _OUTSIDE).sum())
    cleaned = cleaning.clean(located.filter(pl.col("fate").is_null()).drop("names_stay"), rules)
    watch.add_values(cleaned)
    _count(cleaned.with_columns(pl.col("fate").fill_null(KEPT)), counts)
    kept = cleaned.filter(pl.col("fate").is_null())
    _count(kept.filter("clipped").with_columns(fate=pl.lit(CLIPPED)), counts)
    columns = ["stay", "time_s", "variable", pl.col("value").cast(pl.Float32), pl.col("itemid").alias("item")]
    if rules.stored_in_time:
        _count(kept.filter(pl.col("stored_s").is_null()).with_columns(fate=pl.lit(UNDATED)), counts)
        columns.append("stored_s")
    if rules.same_time == "largest":
        sorted_as_text = pl.col("variable").is_in([VARIABLE[name] for name in SORTED_AS_TEXT])
        columns.append(pl.when(sorted_as_text).then("text").otherwise(pl.lit("")).alias("text"))
    return kept.select(columns)


def _count(frame: pl.DataFrame, counts: dict) -> None:
    for variable, fate, rows in frame.group_by("variable", "fate").len().iter_rows():
        counts.setdefault(fate, Counter())[schema.VARIABLES[variable].name] += rows


def _locate(batch: pl.DataFrame, item_variable: dict[int, int], lookup: pl.DataFrame) -> pl.DataFrame:
    """Add each row's stay, time and variable, and its `fate`: why it belongs to no stay, or null.

    `names_stay` says whether a row has a stay_id.
    """
    for column in ("stay_id", "valuenum"):
        if column not in batch.columns:
            batch = batch.with_columns(pl.lit(None, pl.String).alias(column))
    frame = batch.with_columns(
        parse.integer("subject_id"),
        parse.integer("hadm_id"),
        parse.integer("stay_id"),
        no_hadm_id=parse.missing(pl.col("hadm_id")),
        invalid_stay_id=parse.integer("stay_id").is_null() & ~parse.missing(pl.col("stay_id")),
        variable=pl.col("itemid").replace_strict(item_variable, return_dtype=pl.UInt8),
        itemid=pl.col("itemid").cast(pl.Int32),
        text=pl.col("value").str.strip_chars(),
    ).join(lookup, on="hadm_id", how="left", maintain_order="left")
    seconds = (pl.col("charttime") - pl.col("intime")).dt.total_seconds()
    stored = pl.lit(None, pl.Int64)
    if "storetime" in batch.columns:
        stored = (pl.col("storetime") - pl.col("intime")).dt.total_seconds()
    hours = seconds / 3600.0
    outside = (hours <= -EPSILON_H) | (hours >= pl.col("los_h") + EPSILON_H)
    reasons = (
        # Laboratory rows of MIMIC-IV often lack it; as in the released extraction, nothing assigns them by time.
        (pl.col("no_hadm_id"), "no hadm_id"),
        (pl.col("stay").is_null(), "no stay of the cohort"),
        (pl.col("subject_id").ne_missing(pl.col("own_subject_id")), "another patient"),
        (pl.col("invalid_stay_id"), "no valid stay_id"),
        (pl.col("stay_id") != pl.col("own_stay_id"), "another stay"),  # without a stay_id, the admission decides
        (seconds.is_null(), "no valid time"),
        # time_s is an int32: a time outside its range would be null.
        (outside | ~seconds.is_between(_INT32.min, _INT32.max), _OUTSIDE),
        (pl.col("charttime") > pl.col("alive_until"), "after death"),
    )
    return frame.select(
        "stay",
        "variable",
        "itemid",
        "text",
        "valuenum",
        time_s=seconds.cast(pl.Int32, strict=False),
        names_stay=pl.col("stay_id").is_not_null(),
        stored_s=stored.clip(_INT32.min, _INT32.max).cast(pl.Int32),
        fate=pl.coalesce(pl.when(condition).then(pl.lit(reason)) for condition, reason in reasons),
    )
