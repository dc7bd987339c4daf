"""Divide the stays (or X-rays) of existing shards anew, by patient: fold i of k.

A hash of the patient alone decides, so all tasks are divided alike: what a pre-training stage sees of another task is
training data there too. Each patient is tested in exactly one fold; of the others, an eighth validates. So five folds
divide patients 70 : 10 : 20, as the paper does. The shards' own splits play no part.

Shapes: N records of a split, M records of all splits, F EHR channels.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

_VAL_SHARE = 1 / 8  # of the patients that are not tested
_FIELD = "config.data.folds"


@dataclasses.dataclass(frozen=True)
class Fold:
    """Fold `number`, from 0, of `count`."""

    number: int
    count: int

    def split_of(self, subject_id_M: np.ndarray) -> np.ndarray:
        """Return the split of each record, str [M]."""
        subjects, of_M = np.unique(subject_id_M, return_inverse=True)
        return np.array([self._split(subject) for subject in subjects.tolist()], dtype="<U5")[of_M]

    def _split(self, subject_id: int) -> str:
        if int(hash_fraction(f"fold of {subject_id}") * self.count) == self.number:
            return "test"
        return "val" if hash_fraction(f"validation of {subject_id} in {self.number}") < _VAL_SHARE else "train"


def of_config(config) -> Fold | None:
    """Return the fold that a run's config asks for; None for the shards' own splits."""
    return Fold(config.data.fold, config.data.folds) if config.data.folds else None


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def hash_fractions(stay_id_N: np.ndarray) -> np.ndarray:
    """Return `hash_fraction` of each stay, [N]: the stays below a share include those below any smaller share."""
    return np.array([hash_fraction(str(stay_id)) for stay_id in stay_id_N.tolist()])


def places(index: Mapping[str, dict], fold: Fold, folder: Path) -> dict[str, np.ndarray]:
    """Return the places [N] of each split's records in a fold, among the shards' records of all splits.

    index: of the shards' own splits. folder: theirs, for messages. Raise UserError if there are more folds than
    patients, or if the fold leaves a split empty.
    """
    subject_id_M = np.concatenate([index[split]["subject_id"] for split in schema.SPLITS])
    if (num_patients := len(np.unique(subject_id_M))) < fold.count:
        message = f"{fold.count} folds of {folder}, which has only {num_patients} patients: use fewer folds"
        raise UserError(message, field=_FIELD, path=folder, value=fold.count)
    split_M = fold.split_of(subject_id_M)
    for split in schema.SPLITS:
        if not (split_M == split).any():
            message = f"fold {fold.number} of {fold.count} of {folder} has no {split} patients: use fewer folds"
            raise UserError(message, field=_FIELD, path=folder, value=fold.count)
    return {split: np.flatnonzero(split_M == split) for split in schema.SPLITS}


def take(index: Mapping[str, dict], place: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the index of each split of a fold, from that of the shards' own. place: from `places`."""
    joined = _joined(index)
    return {split: {name: values[place[split]] for name, values in joined.items()} for split in schema.SPLITS}


def take_parts(parts: Mapping[str, dict], place: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return what records.hours, image_times or dicom_ids has, of each split of a fold. place: from `places`."""
    joined, taken = _joined(parts), {}
    counts = {"label_time_h": "num_hours", "label": "num_hours", "cxr_time_h": "num_images", "dicom_id": "num_images"}
    for split in schema.SPLITS:
        of = {name: _ragged(joined[counts[name]], place[split]) for name in joined if name in counts}
        taken[split] = {name: values[of.get(name, place[split])] for name, values in joined.items()}
    return taken


def take_records(stored: Mapping[str, Sequence], place: dict[str, np.ndarray]) -> dict[str, Sequence]:
    """Return the records of each split of a fold, in the order of its index."""
    parts = [stored[split] for split in schema.SPLITS]
    return {split: _Pooled(parts, place[split]) for split in schema.SPLITS}


def _joined(by_split: Mapping[str, dict]) -> dict[str, np.ndarray]:
    names = by_split["train"]
    return {name: np.concatenate([by_split[split][name] for split in schema.SPLITS]) for name in names}


def _ragged(count_M: np.ndarray, place_N: np.ndarray) -> np.ndarray:
    """Return the places of some records' parts, where the parts of all records lie one after another."""
    first_M = np.cumsum(count_M) - count_M
    parts = [np.arange(first_M[i], first_M[i] + count_M[i]) for i in place_N.tolist()]
    return np.concatenate([np.zeros(0, int), *parts])


class _Pooled(Sequence):
    """Some records of several sequences, which lie one after another."""

    def __init__(self, parts: list[Sequence], place_N: np.ndarray):
        self._parts, self._place_N = parts, place_N
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return len(self._place_N)

    def __getitem__(self, i: int) -> dict:
        place = int(self._place_N[i])
        part = int(np.searchsorted(self._ends, place, side="right"))
        return self._parts[part][place - (int(self._ends[part - 1]) if part else 0)]
