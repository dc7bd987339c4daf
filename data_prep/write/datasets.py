"""A task's dataset put together: which record has which arrays, X-ray and labels, and what is said of it."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from data_prep import progress
from data_prep.ehr.discretize import Arrays
from data_prep.images import store as image_store
from data_prep.labels.hourly import Predictions
from medfuse_jax import records, schema

NO_IMAGE = np.zeros((0, schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX), np.uint8)
NO_STEPS = np.zeros((0, len(schema.CHANNELS)), np.float32)


def stay_dataset(
    stays: pl.DataFrame,
    splits: list[str],
    arrays: Arrays,
    label_NK: np.ndarray,
    pairs: pl.DataFrame,
    store: image_store.ImageStore | None,
) -> tuple[dict, dict]:
    """Index and record generators, by split, of a task whose records are stays.

    stays, splits, label_NK: in the cohort's order. pairs: stay_id, dicom_id of the paired stays.
    """
    image_of = dict(pairs.select("stay_id", "dicom_id").iter_rows())
    static = stays.select("stay_id", "subject_id", "age", *records.STATIC_TEXTS).to_dicts()
    split_N = np.array(splits)[arrays.row]
    index, records_of = {}, {}
    for split in schema.SPLITS:
        picked = np.flatnonzero(split_N == split)
        rows = arrays.row[picked]
        stay_id = np.array([static[row]["stay_id"] for row in rows], np.int64)
        index[split] = {
            "stay_id": stay_id,
            "subject_id": np.array([static[row]["subject_id"] for row in rows], np.int64),
            "length": arrays.length[picked].astype(np.int32),
            "has_cxr": np.array([stay in image_of for stay in stay_id.tolist()], bool),
            "age": np.array([static[row]["age"] for row in rows], np.float32),
            **{field: np.array([static[row][field] for row in rows], str) for field in records.STATIC_TEXTS},
            "label": label_NK[rows],
        }
        records_of[split] = _stay_records(picked, static, arrays, label_NK, image_of, store, split)
    return index, records_of


def _stay_records(picked, static, arrays, label_NK, image_of, store, split) -> Callable[[], Iterator[dict]]:
    def make() -> Iterator[dict]:
        for i in progress.bar(picked.tolist(), f"shards of {split}", "stays"):
            row = int(arrays.row[i])
            dicom_id = image_of.get(static[row]["stay_id"], "")
            yield {
                **static[row],
                "ehr": arrays.of(i),
                "label": label_NK[row],
                "has_cxr": bool(dicom_id),
                "dicom_id": dicom_id,
                "image": store[dicom_id][None] if dicom_id else NO_IMAGE,
            }

    return make


def step_dataset(
    stays: pl.DataFrame,
    splits: list[str],
    arrays: Arrays,
    found: Predictions,
    pairs: pl.DataFrame,
    store: image_store.ImageStore | None,
) -> tuple[dict, dict]:
    """Index and record generators, by split, of a task whose labels are per step.

    stays, splits: in the cohort's order. pairs: stay_id, dicom_id, cxr_time of every X-ray of a stay, by time.
    """
    images_of = images_by_stay(stays, pairs)
    static = stays.select("stay_id", "subject_id", "age", "los_h", *records.STATIC_TEXTS).to_dicts()
    split_N = np.array(splits)[arrays.row[found.place_N]]
    any_NK = found.any_label()
    index, records_of = {}, {}
    for split in schema.SPLITS:
        picked = np.flatnonzero(split_N == split)
        rows = [static[row] for row in arrays.row[found.place_N[picked]]]
        index[split] = {
            "stay_id": np.array([row["stay_id"] for row in rows], np.int64),
            "subject_id": np.array([row["subject_id"] for row in rows], np.int64),
            "length": arrays.length[found.place_N[picked]].astype(np.int32),
            "has_cxr": np.array([row["stay_id"] in images_of for row in rows], bool),
            "age": np.array([row["age"] for row in rows], np.float32),
            **{field: np.array([row[field] for row in rows], str) for field in records.STATIC_TEXTS},
            "label": any_NK[picked],
        }
        records_of[split] = _step_records(picked, static, arrays, found, images_of, store, split)
    return index, records_of


def images_by_stay(stays: pl.DataFrame, pairs: pl.DataFrame) -> dict[int, list[tuple[str, np.float32]]]:
    """stay_id -> its X-rays' dicom_id and hours since intime, as records hold them, by time."""
    timed = pairs.join(stays.select("stay_id", "intime"), on="stay_id", maintain_order="left").with_columns(
        cxr_time_h=(pl.col("cxr_time") - pl.col("intime")).dt.total_milliseconds() / 3.6e6
    )
    found: dict[int, list] = {}
    for stay_id, dicom_id, cxr_time_h in timed.select("stay_id", "dicom_id", "cxr_time_h").iter_rows():
        found.setdefault(stay_id, []).append((dicom_id, np.float32(cxr_time_h)))
    return found


def _step_records(picked, static, arrays, found, images_of, store, split) -> Callable[[], Iterator[dict]]:
    def make() -> Iterator[dict]:
        for i in progress.bar(picked.tolist(), f"shards of {split}", "stays"):
            place = int(found.place_N[i])
            row = static[int(arrays.row[place])]
            images = images_of.get(row["stay_id"], [])
            yield {
                **row,
                "ehr": arrays.of(place),
                "label": found.labels[i],
                "label_time_h": found.times[i],
                "has_cxr": bool(images),
                "dicom_id": " ".join(dicom_id for dicom_id, _ in images),
                "cxr_time_h": np.array([time_h for _, time_h in images], np.float32),
                "image": np.stack([store[dicom_id] for dicom_id, _ in images]) if images else NO_IMAGE,
            }

    return make


def image_dataset(
    images: pl.DataFrame, splits: list[str], patients: pl.DataFrame, store: image_store.ImageStore
) -> tuple[dict, dict]:
    """Index and record generators, by split, of a task whose records are X-rays.

    X-rays: dicom_id, subject_id and the 14 labels, sorted by dicom_id; splits in its order.
    patients: subject_id, age, gender; a patient who is not in it has age NaN and gender ''.
    """
    images = images.join(
        patients.select("subject_id", "age", "gender"), on="subject_id", how="left", maintain_order="left"
    )
    images = images.with_columns(pl.col("age").fill_null(math.nan), pl.col("gender").fill_null(""))
    label_NK = images.select(schema.RADIOLOGY_LABELS).to_numpy().astype(np.int8)
    images = images.with_columns(admission_type=pl.lit(""), first_careunit=pl.lit(""))  # an X-ray is of no stay
    static = images.select("dicom_id", "subject_id", "age", *records.STATIC_TEXTS).to_dicts()
    index, records_of = {}, {}
    for split in schema.SPLITS:
        picked = np.flatnonzero(np.array(splits) == split)
        index[split] = {
            "stay_id": np.full(len(picked), -1, np.int64),
            "subject_id": images["subject_id"].to_numpy()[picked],
            "length": np.zeros(len(picked), np.int32),
            "has_cxr": np.ones(len(picked), bool),
            "age": images["age"].to_numpy()[picked].astype(np.float32),
            **{field: np.array([static[i][field] for i in picked], str) for field in records.STATIC_TEXTS},
            "label": label_NK[picked],
        }
        records_of[split] = _image_records(picked, static, label_NK, store, split)
    return index, records_of


def _image_records(picked, static, label_NK, store, split) -> Callable[[], Iterator[dict]]:
    no_stay = {"stay_id": -1, "ehr": NO_STEPS, "has_cxr": True}

    def make() -> Iterator[dict]:
        for i in progress.bar(picked.tolist(), f"shards of {split}", "images"):
            yield {**no_stay, **static[i], "label": label_NK[i], "image": store[static[i]["dicom_id"]][None]}

    return make


def split_counts(index: dict[str, dict], labels: tuple[str, ...]) -> dict[str, dict]:
    """Per split: records, paired ones, patients, steps, and positives of each label."""
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


def check_patients_stay_put(index: dict[str, dict]) -> None:
    """No patient is in two splits, of this task."""
    seen: dict[int, str] = {}
    for split, fields in index.items():
        for subject in np.unique(fields["subject_id"]).tolist():
            assert seen.setdefault(subject, split) == split, f"subject {subject} is in {seen[subject]} and {split}"
