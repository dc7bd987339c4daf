"""Stays from which a modality is taken away, to train and to score where it is missing (Hayat et al. 2022, Figure A2).

Shapes: N records.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from medfuse_jax.data.batches import Dataset
from medfuse_jax.runtime.errors import UserError


def drop_modalities(dataset: Dataset, drop_ehr: float, drop_cxr: float) -> Dataset:
    """The dataset without the EHR, or without the X-ray, of a share of the stays that have both.

    Which stays, a hash of stay_id decides: those of a smaller share are among those of a larger one, whatever the
    seed, and no stay loses both. The index says what a stay had before, in had_ehr and had_cxr. UserError where the
    shares are not such.
    """
    if not (drop_ehr >= 0 and drop_cxr >= 0 and drop_ehr + drop_cxr <= 1):
        raise UserError(
            f"drop_ehr is {drop_ehr} and drop_cxr {drop_cxr}: give shares from 0 to 1, of stays that have both and "
            "lose one, so together at most 1"
        )
    if not drop_ehr and not drop_cxr:
        return dataset
    index, splits = {}, {}
    for split, part in dataset.index.items():
        has_both_N = part["has_cxr"] & (part["length"] > 0)
        place_N = np.array([_place(stay_id) for stay_id in part["stay_id"].tolist()])
        without_cxr_N = has_both_N & (place_N < drop_cxr)
        without_ehr_N = has_both_N & (place_N >= 1 - drop_ehr)
        had = {"had_ehr": part["length"] > 0, "had_cxr": part["has_cxr"]}
        index[split] = (had | part) | {  # of a dataset that has been thinned before, what was there at first
            "has_cxr": part["has_cxr"] & ~without_cxr_N,
            "length": np.where(without_ehr_N, 0, part["length"]).astype(part["length"].dtype),
        }
        splits[split] = WithoutModality(dataset.splits[split], without_ehr_N, without_cxr_N)
    return dataclasses.replace(dataset, index=index, splits=splits)


class WithoutModality(Sequence):
    """Records as `records.Split` gives them, some without their series, some without their X-ray."""

    def __init__(self, inner: Sequence, without_ehr_N: np.ndarray, without_cxr_N: np.ndarray):
        self._inner, self._without_ehr_N, self._without_cxr_N = inner, without_ehr_N, without_cxr_N

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, i: int) -> dict:
        record = self._inner[i]
        if self._without_ehr_N[i]:
            record = record | {"ehr": record["ehr"][:0]}
        if self._without_cxr_N[i]:
            record = record | {"image": None, "has_cxr": False, "dicom_id": ""}
        return record


def _place(stay_id: int) -> float:
    """A stay's own number, from 0 to 1."""
    return int.from_bytes(hashlib.sha256(str(stay_id).encode()).digest()[:8]) / 2**64
