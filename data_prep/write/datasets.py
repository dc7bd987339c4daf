"""Assemble a task's dataset: which arrays, X-rays and labels each record has, and its index.

Each function returns, by split, the fields of records.INDEX_FIELDS and a function that yields the records in the
index's order.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import polars as pl

from data_prep import progress
from data_prep.ehr.arrays import Arrays
from data_prep.images.store import ImageStore
from data_prep.labels.hourly import Predictions
from medfuse_jax import schema

_NO_IMAGE = np.zeros((0, schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX), np.uint8)
_NO_STEPS = np.zeros((0, len(schema.CHANNELS)), np.float32)
_STATIC = ("stay_id", "subject_id", "age", *schema.STATIC_TEXTS)


def stay_dataset(
    stays: pl.DataFrame,
    splits: list[str],
    arrays: Arrays,
    labels: np.ndarray | Predictions,
    pairs: pl.DataFrame,
    store: ImageStore | None,
    all_images: bool,
) -> tuple[dict, dict]:
    """Return the index and records of a task on stays, by split.

    stays, splits: the cohort. labels: int8 [cohort, K], or an hourly task's predictions; then only stays
    with a prediction get a record. pairs: stay_id, dicom_id, cxr_time of each record's X-rays, by time. all_images:
    whether these are all X-rays of a stay, so that records hold their times too.
    """
    predicted = labels if isinstance(labels, Predictions) else None
    position_N = predicted.position_N if predicted else np.arange(len(arrays.row))
    row_N = arrays.row[position_N]
    label_NK = labels.any_label() if isinstance(labels, Predictions) else labels[row_N]
    static = stays.select(*_STATIC, schema.RACE, *(["los_h"] if predicted else []))[row_N].to_dicts()
    images_of = images_by_stay(stays, pairs)

    def record(i: int) -> dict:
        images = images_of.get(static[i]["stay_id"], [])
        fields = {
            "ehr": arrays[int(position_N[i])],
            "label": label_NK[i],
            "has_cxr": bool(images),
            "dicom_id": " ".join(dicom_id for dicom_id, _ in images),
            "image": np.stack([store[dicom_id] for dicom_id, _ in images]) if images else _NO_IMAGE,
        }
        if predicted:
            fields |= {"label": predicted.labels[i], "label_time_h": predicted.times[i]}
        if all_images:
            fields["cxr_time_h"] = np.array([time_h for _, time_h in images], np.float32)
        return fields

    has_cxr = [row["stay_id"] in images_of for row in static]
    return _by_split(np.array(splits)[row_N], static, arrays.length[position_N], has_cxr, label_NK, record)


def images_by_stay(stays: pl.DataFrame, pairs: pl.DataFrame) -> dict[int, list[tuple[str, np.float32]]]:
    """Map stay_id to its X-rays' (dicom_id, hours since intime) by time, as records store them."""
    timed = pairs.join(stays.select("stay_id", "intime"), on="stay_id", maintain_order="left").with_columns(
        cxr_time_h=(pl.col("cxr_time") - pl.col("intime")).dt.total_milliseconds() / 3.6e6
    )
    images_of: dict[int, list] = {}
    for stay_id, dicom_id, cxr_time_h in timed.select("stay_id", "dicom_id", "cxr_time_h").iter_rows():
        images_of.setdefault(stay_id, []).append((dicom_id, _stored_time(cxr_time_h)))
    return images_of


def _stored_time(time_h: float) -> np.float32:
    """Round a time to float32, but not from after a whole hour to that hour: a prediction then would see the X-ray."""
    stored_h = np.float32(time_h)
    hour = np.floor(time_h)
    return np.nextafter(stored_h, np.float32(np.inf)) if stored_h == hour and time_h > hour else stored_h


def image_dataset(
    images: pl.DataFrame, splits: list[str], patients: pl.DataFrame, store: ImageStore
) -> tuple[dict, dict]:
    """Return the index and records of a task on X-rays, by split.

    images: dicom_id, subject_id and the 14 labels, sorted by dicom_id. splits: in the same order. patients: subject_id,
    age, gender; an X-ray of any other patient has age NaN and gender ''.
    """
    images = images.join(
        patients.select("subject_id", "age", "gender"), on="subject_id", how="left", maintain_order="left"
    )
    none = {"stay_id": -1, "admission_type": pl.lit(""), "first_careunit": pl.lit("")}
    images = images.with_columns(pl.col("age").fill_null(math.nan), pl.col("gender").fill_null(""), **none)
    label_NK = images.select(schema.RADIOLOGY_LABELS).to_numpy().astype(np.int8)
    static = images.select(*_STATIC, "dicom_id").to_dicts()

    def record(i: int) -> dict:
        image = store[static[i]["dicom_id"]][None]
        return {"ehr": _NO_STEPS, "label": label_NK[i], "has_cxr": True, "image": image}

    return _by_split(np.array(splits), static, np.zeros(len(static)), [True] * len(static), label_NK, record)


def _by_split(
    split_N: np.ndarray,
    static: list[dict],
    length_N: np.ndarray,
    has_cxr: list[bool],
    label_NK: np.ndarray,
    record: Callable[[int], dict],
) -> tuple[dict, dict]:
    """Return each split's index and record generator.

    static: for each record, the fields that its index has too, and its race, which is taken out: it goes to the index
    alone. record: position -> the record's other fields.
    """
    race = [row.pop(schema.RACE, "") for row in static]
    fields = {
        "stay_id": np.array([row["stay_id"] for row in static], np.int64),
        "subject_id": np.array([row["subject_id"] for row in static], np.int64),
        "length": length_N.astype(np.int32),
        "has_cxr": np.array(has_cxr, bool),
        "age": np.array([row["age"] for row in static], np.float32),
        "label": label_NK,
    }
    index, records_of = {}, {}
    for split in schema.SPLITS:
        chosen = np.flatnonzero(split_N == split)
        index[split] = {name: values[chosen] for name, values in fields.items()}
        for field in schema.STATIC_TEXTS:
            index[split][field] = np.array([static[i][field] for i in chosen], str)
        index[split][schema.RACE] = np.array([race[i] for i in chosen], str)

        def generate(positions: Iterable[int] = chosen.tolist(), split: str = split) -> Iterator[dict]:
            for i in progress.bar(positions, f"shards of {split}", "records"):
                yield {**static[i], **record(i)}

        records_of[split] = generate
    return index, records_of


def split_counts(index: dict[str, dict], labels: tuple[str, ...]) -> dict[str, dict]:
    """Count each split's records, paired records, patients, time steps, and positives of each label."""
    return {
        split: {
            "records": len(fields["stay_id"]),
            "paired": int(fields["has_cxr"].sum()),
            "patients": len(np.unique(fields["subject_id"])),
            "steps": int(fields["length"].sum()),
            "positives": {name: int(n) for name, n in zip(labels, fields["label"].sum(0, dtype=np.int64), strict=True)},
        }
        for split, fields in index.items()
    }


def check_splits_disjoint(index: dict[str, dict]) -> None:
    """Raise AssertionError if a patient is in two splits, also under `python -O`."""
    split_of: dict[int, str] = {}
    for split, fields in index.items():
        for subject in np.unique(fields["subject_id"]).tolist():
            if split_of.setdefault(subject, split) != split:
                raise AssertionError(f"a patient is in the splits {split_of[subject]} and {split}")
