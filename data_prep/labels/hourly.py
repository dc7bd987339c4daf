"""Tasks with a label at every hour of a stay: decompensation and length of stay.

Both as Harutyunyan et al. 2019 (arXiv 1703.07771) and its published code define them: a prediction at each whole hour
after the fourth (5, 6, ... up to the end of the stay, or to death), once something has been observed.
decompensation: death within the next 24 h. length_of_stay: the hours that are left, in ten bins of days.

Shape key: H prediction times of one stay, K labels, N stays.
"""

import dataclasses

import numpy as np
import polars as pl

from data_prep.ehr.discretize import Arrays
from data_prep.ehr.events import EPSILON_H
from medfuse_jax import schema

AFTER_H = 4  # exclusive, as `shortest_length` in the benchmark's scripts (docs/data.md)
HORIZON_H = 24.0
VERSION = 2  # raise it when the same arrays give other labels


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Of each stay that has a prediction time: its place in the arrays, the times [H] and the labels [H, K]."""

    place_N: np.ndarray
    times: list[np.ndarray]
    labels: list[np.ndarray]

    def any_label(self) -> np.ndarray:
        """int8 [N, K]: positive at any of the stay's prediction times."""
        return np.stack([label_HK.max(0) for label_HK in self.labels])


def predictions(task: schema.Task, stays: pl.DataFrame, arrays: Arrays, timestep_h: float) -> tuple[Predictions, list]:
    """The prediction times and labels of a task, and how many stays each condition left.

    stays: the cohort, with los_h, died and death_h (hours since intime; null where no hour is known).
    """
    rows = stays[arrays.row]
    los_h, death_h = rows["los_h"].to_numpy(), rows["death_h"].fill_null(np.inf).to_numpy()
    usable = np.ones(len(rows), bool)
    flow = []
    if task.name == "decompensation":
        # Differs from the benchmark, which takes a death without an hour (dod alone) for no death.
        usable = ~(rows["died"].to_numpy() & np.isinf(death_h))
        flow.append({"filter": "no death without a known hour", "stays": int(usable.sum())})
    found = Predictions(np.flatnonzero(usable), [], [])
    keep = []
    for place in found.place_N.tolist():
        end_h = min(los_h[place], death_h[place]) if task.name == "decompensation" else los_h[place]
        times_H = np.arange(AFTER_H + 1, int(max(end_h + EPSILON_H, 0)) + 1, dtype=np.float64)
        # Once a step that may be seen at that time holds an observation.
        times_H = times_H[np.floor(times_H / timestep_h + EPSILON_H) > arrays.first_step[place]]
        if not len(times_H):
            continue
        keep.append(place)
        found.times.append(times_H.astype(np.float32))
        found.labels.append(_labels(task, los_h[place], death_h[place], bool(rows["died"][place]), times_H))
    flow.append({"filter": f"with a prediction time (after {AFTER_H} h and an observation)", "stays": len(keep)})
    return dataclasses.replace(found, place_N=np.array(keep, np.int64)), flow


def _labels(task: schema.Task, los_h: float, death_h: float, died: bool, times_H: np.ndarray) -> np.ndarray:
    if task.name == "decompensation":
        return ((death_h - times_H < HORIZON_H) & died).astype(np.int8)[:, None]
    assert task.name == "length_of_stay", task.name
    left_days_H = np.maximum(los_h - times_H, 0) / 24.0
    place_H = np.searchsorted(schema.LENGTH_OF_STAY_EDGES_DAYS, left_days_H, side="right") - 1
    return np.eye(len(task.labels), dtype=np.int8)[place_H]


def counts(found: Predictions, split_N: np.ndarray, labels: tuple[str, ...]) -> dict[str, dict]:
    """Per split: prediction times, and positives of each label."""
    result = {}
    for split in schema.SPLITS:
        picked = [found.labels[i] for i in np.flatnonzero(split_N == split)]
        all_LK = np.concatenate(picked or [np.zeros((0, len(labels)), np.int8)])
        positives = dict(zip(labels, all_LK.sum(0, dtype=np.int64).tolist(), strict=True))
        result[split] = {"times": len(all_LK), "positives": positives}
    return result
