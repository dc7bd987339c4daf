"""One task's shards on disk, divided into splits as they were built, or anew by a fold (data/folds.py).

Shapes: N records of a split.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from medfuse_jax import records, schema
from medfuse_jax.data import folds
from medfuse_jax.runtime.errors import UserError


class Shards:
    """One task's shards, by split; those of a fold if one is given.

    Raise UserError if there are none, or if a file that is read is not the manifest's.
    """

    def __init__(self, data_dir: str | Path, task: str, fold: folds.Fold | None = None):
        self.data_dir, self.task, self.fold = data_dir, task, fold
        self.folder = records.task_dir(data_dir, task)
        self.manifest = records.manifest(data_dir, task)

    @functools.cached_property
    def index(self) -> dict[str, dict[str, np.ndarray]]:
        """The index (records.index) of each split. Raise UserError if a fold leaves a split empty."""
        return folds.take(self._own_index, self._place) if self.fold else self._own_index

    def check_fold(self) -> None:
        """Raise UserError if the fold leaves a split empty."""
        if self.fold:
            folds.places(self._own_index, self.fold, self.folder)

    @functools.cached_property
    def _own_index(self) -> dict[str, dict[str, np.ndarray]]:
        return {split: records.index(self.data_dir, self.task, split) for split in schema.SPLITS}

    @functools.cached_property
    def _place(self) -> dict[str, np.ndarray]:
        """The places of each split's records in a fold, among the records of all splits."""
        return folds.places(self._own_index, self.fold, self.folder)

    @property
    def digest(self) -> str:
        """The hash of the shards, whatever the fold."""
        return records.digest(self.data_dir, self.task)

    def parts(self, read: Callable) -> dict[str, dict[str, np.ndarray]]:
        """Return what `read` (records.hours, image_times or dicom_ids) knows of each split."""
        parts = {split: read(self.data_dir, self.task, split) for split in schema.SPLITS}
        return folds.take_parts(parts, self._place) if self.fold else parts

    def open(self, only: tuple[str, ...] = ()) -> dict[str, Sequence]:
        """Return the records (records.open_split) of each split, in the order of the index. only: fields to decode."""
        splits: dict[str, Sequence] = {
            split: records.open_split(self.data_dir, self.task, split, only) for split in schema.SPLITS
        }
        for split, stored in splits.items():
            if len(stored) != (num_records := len(self._own_index[split]["stay_id"])):
                raise UserError(
                    f"{self.folder} holds {len(stored)} {split} records, its index {num_records}: the folder mixes two "
                    "builds; build it again",
                    path=self.folder,
                )
        return folds.take_records(splits, self._place) if self.fold else splits

    def all_images(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the times of all X-rays of each stay; raise UserError if the shards hold the last alone."""
        if self.manifest.get("images") != records.ALL_IMAGES:
            raise UserError(
                f"config.data.images is 'all', and {self.folder} holds at most the last X-ray of each stay: build it "
                "with `python -m data_prep.build --images=all ...`, into another --out, or train with 'last'",
                field="config.data.images",
                path=self.folder,
                value="all",
            )
        return self.parts(records.image_times)

    def train_statistics(self) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation of each channel over the train split, which a fold has to read."""
        if not self.fold:
            return self.manifest["train_mean"], self.manifest["train_std"]
        return _fold_statistics(str(self.data_dir), self.task, self.fold, self.digest)

    @property
    def digest_of_fold(self) -> str:
        """The hash of the shards and of the fold."""
        return hashlib.sha256(f"{self.digest} {self.fold}".encode()).hexdigest() if self.fold else self.digest


@functools.cache  # a process opens the same fold for several runs
def _fold_statistics(data_dir: str, task: str, fold: folds.Fold, digest: str) -> tuple[list[float], list[float]]:
    """digest: of the shards, which may be built again meanwhile."""
    train = Shards(data_dir, task, fold).open(("ehr",))["train"]
    return records.train_statistics(train[i]["ehr"] for i in range(len(train)))
