"""Files of precomputed features for tests: a few numbers for each dicom_id, which depend on it alone."""

from pathlib import Path

import numpy as np

from medfuse_jax import records, schema
from medfuse_jax.data.folds import hash_fraction

WIDTH = 5


def of(dicom_id: str) -> np.ndarray:
    """Return the features [E] of an X-ray, of means and sizes that differ."""
    drawn = [hash_fraction(f"{e} of {dicom_id}") for e in range(WIDTH)]
    return (np.array(drawn) * 10.0 ** np.arange(-3, WIDTH - 3) + np.arange(WIDTH)).astype(np.float32)


def names(data_dir, *tasks: str) -> list[str]:
    """Return the names of all X-rays of these tasks."""
    read = [records.dicom_ids(data_dir, task, split)["dicom_id"] for task in tasks for split in schema.SPLITS]
    return np.unique(np.concatenate(read)).tolist()


def write(path: Path, dicom_ids: list[str]) -> Path:
    np.savez(path, dicom_id=dicom_ids, features=np.stack([of(name) for name in dicom_ids]))
    return path
