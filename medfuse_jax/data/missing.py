"""Drop a modality from paired stays (Hayat et al. 2022, Figure A2), or end every stay's EHR early.

Shapes: N records.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from medfuse_jax.data import folds
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.runtime.errors import UserError


def drop_modalities(dataset: Dataset, drop_ehr: float, drop_cxr: float) -> Dataset:
    """Drop the EHR, or the X-ray, of a fraction of the stays that have both.

    A hash of stay_id chooses the stays, for any seed: a larger fraction includes the stays of a smaller one, and no
    stay loses both. The index keeps what a stay had before as had_ehr and had_cxr. Raise UserError unless the fractions
    add up to at most 1.
    """
    if not (drop_ehr >= 0 and drop_cxr >= 0 and drop_ehr + drop_cxr <= 1):
        raise UserError(
            f"drop_ehr is {drop_ehr} and drop_cxr {drop_cxr}: give fractions from 0 to 1 of the stays that have both, "
            "together at most 1",
            field="drop_ehr",
        )
    if not drop_ehr and not drop_cxr:
        return dataset
    if drop_ehr and dataset.hours:
        what = (
            f"drop_ehr is {drop_ehr}, and {dataset.task.name} cannot be predicted at an hour without EHR: leave it out"
        )
        raise UserError(what, field="drop_ehr", value=drop_ehr)
    index, splits = {}, {}
    for split, part in dataset.index.items():
        has_both_N = part["has_cxr"] & (part["length"] > 0)
        hash_N = folds.hash_fractions(part["stay_id"])
        without_cxr_N = has_both_N & (hash_N < drop_cxr)
        without_ehr_N = has_both_N & (hash_N >= 1 - drop_ehr)
        had = {"had_ehr": part["length"] > 0, "had_cxr": part["has_cxr"]}
        length_N = np.where(without_ehr_N, 0, part["length"]).astype(part["length"].dtype)
        kept = {"has_cxr": part["has_cxr"] & ~without_cxr_N, "length": length_N}
        index[split] = (had | part) | kept  # keeps the had_* of a dataset thinned before
        splits[split] = _Thinned(dataset.splits[split], length_N, without_cxr_N)
    return dataclasses.replace(dataset, index=index, splits=splits)


def cut_ehr(dataset: Dataset, num_steps: int) -> Dataset:
    """End the EHR of every stay after its first `num_steps` time steps."""
    index, splits = {}, {}
    for split, part in dataset.index.items():
        length_N = np.minimum(part["length"], num_steps).astype(part["length"].dtype)
        index[split] = part | {"length": length_N}
        splits[split] = _Thinned(dataset.splits[split], length_N, np.zeros(len(length_N), bool))
    return dataclasses.replace(dataset, index=index, splits=splits)


class _Thinned(Sequence):
    """The records of `Dataset.splits`, with series of the given lengths, some without their image."""

    def __init__(self, records: Sequence, length_N: np.ndarray, without_cxr_N: np.ndarray):
        self._records, self._length_N, self._without_cxr_N = records, length_N, without_cxr_N

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        record = self._records[i]
        record = record | {"ehr": record["ehr"][: self._length_N[i]]}
        if self._without_cxr_N[i]:
            record = record | {"image": None}
        return record
