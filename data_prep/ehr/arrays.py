"""A task's arrays on disk: one series of regular time steps per stay, many stays in a file.

Shapes: N stays, T time steps of one stay, R time steps of all stays of a file.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

EPSILON_H = 1e-6  # tolerance at both ends of a stay and at time-step edges, as in the benchmark (arXiv 1703.07771)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A task's arrays. See `discretize.write_arrays` for row, bucket, start, length and first_step, int64 [N]."""

    folder: Path
    row: np.ndarray
    bucket: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first_step: np.ndarray
    num_long_enough: int
    num_died: int  # of those, stays whose patient dies before the end of the window
    num_stored_late: int  # events measured during a stay's period but stored after it
    num_duplicates: int  # events dropped because another has the same time, item and value
    # Holds only the latest bucket, so that pages of earlier ones do not fill memory.
    _open: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Arrays":
        with np.load(folder / "index.npz") as stored:
            return cls(folder, **{name: stored[name] if stored[name].ndim else int(stored[name]) for name in stored})

    def of_bucket(self, bucket: int) -> np.ndarray:
        """Return ehr [R, 76] of all stays of a bucket."""
        if bucket not in self._open:
            self._open.clear()
            self._open[bucket] = np.load(self.folder / f"ehr_{bucket:05d}.npy", mmap_mode="r")
        return self._open[bucket]

    def __getitem__(self, i: int) -> np.ndarray:
        """Return ehr [T, 76] of the i-th stay."""
        return np.asarray(self.of_bucket(int(self.bucket[i]))[self.start[i] : self.start[i] + self.length[i]])

    def buckets(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ehr [R, 76], first row of each of its stays), bucket by bucket."""
        for bucket in np.unique(self.bucket).tolist():
            yield self.of_bucket(bucket), self.start[self.bucket == bucket]
