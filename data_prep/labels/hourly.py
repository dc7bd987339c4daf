"""Labels at every hour of a stay: decompensation and length of stay.

Harutyunyan et al. 2019 (arXiv 1703.07771) and its published code define them: one prediction at each whole hour after
the fourth, up to death or the end of the stay, once something has been observed.
decompensation: death within 24 h. length_of_stay: remaining time, in ten bins of days.

Shape key: N stays with a prediction, H prediction times of one stay, K labels.
"""

import dataclasses

import numpy as np
import polars as pl

from data_prep.ehr.arrays import EPSILON_H, Arrays
from medfuse_jax import schema

AFTER_H = 4  # exclusive, like `shortest_length` in the benchmark's scripts (docs/data.md)
HORIZON_H = 24.0
VERSION = 4  # increment when the same arrays give other labels, or hours_<split>.npz


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of an hourly task.

    position_N: each stay's position in the task's arrays; times: float32 [H]; labels: int8 [H, K].
    """

    position_N: np.ndarray
    times: list[np.ndarray]
    labels: list[np.ndarray]

    def any_label(self) -> np.ndarray:
        """Return int8 [N, K]: 1 if positive at any prediction time of the stay."""
        return np.stack([label_HK.max(0) for label_HK in self.labels])


def predictions(
    task: schema.Task, stays: pl.DataFrame, arrays: Arrays, timestep_h: float
) -> tuple[Predictions, list[dict]]:
    """Return a task's predictions, and how many stays each filter kept.

    stays: the cohort, with intime, los_h, died, death_h (hours since intime, null if unknown) and alive_until.
    """
    rows = stays[arrays.row]
    los_h, death_h = rows["los_h"].to_numpy(), rows["death_h"].fill_null(np.inf).to_numpy()
    died = rows["died"].to_numpy()
    alive_h = (rows["alive_until"] - rows["intime"]).dt.total_seconds() / 3600.0
    end_h, usable, flow = np.minimum(los_h, alive_h.fill_null(np.inf).to_numpy()), np.ones(len(rows), bool), []
    if task.name == "decompensation":
        # Differs from the benchmark, which treats a death without an hour (dod alone) as survival.
        usable = ~(died & np.isinf(death_h))
        end_h = np.minimum(end_h, death_h)
        flow.append({"filter": "no death without a known hour", "stays": int(usable.sum())})
    positions, times, labels = [], [], []
    for i in np.flatnonzero(usable).tolist():
        times_H = np.arange(AFTER_H + 1, int(max(end_h[i] + EPSILON_H, 0)) + 1, dtype=np.float64)
        # Keep only times by which a completed time step holds an observation.
        times_H = times_H[np.floor(times_H / timestep_h + EPSILON_H) > arrays.first_step[i]]
        if len(times_H):
            positions.append(i)
            times.append(times_H.astype(np.float32))
            labels.append(_labels(task, los_h[i], death_h[i], bool(died[i]), times_H))
    flow.append({"filter": f"with a prediction time (after {AFTER_H} h and an observation)", "stays": len(positions)})
    return Predictions(np.array(positions, np.int64), times, labels), flow


def _labels(task: schema.Task, los_h: float, death_h: float, died: bool, times_H: np.ndarray) -> np.ndarray:
    if task.name == "decompensation":
        return ((death_h - times_H < HORIZON_H) & died).astype(np.int8)[:, None]
    assert task.name == "length_of_stay", task.name
    remaining_days_H = np.maximum(los_h - times_H, 0) / 24.0
    bin_H = np.searchsorted(schema.LENGTH_OF_STAY_EDGES_DAYS, remaining_days_H, side="right") - 1
    return np.eye(len(task.labels), dtype=np.int8)[bin_H]


def counts(predicted: Predictions, split_N: np.ndarray, labels: tuple[str, ...]) -> dict[str, dict]:
    """Count prediction times, and positives of each label, by split."""
    result = {}
    for split in schema.SPLITS:
        label_HK = [predicted.labels[i] for i in np.flatnonzero(split_N == split)]
        all_HK = np.concatenate(label_HK or [np.zeros((0, len(labels)), np.int8)])
        positives = dict(zip(labels, all_HK.sum(0, dtype=np.int64).tolist(), strict=True))
        result[split] = {"times": len(all_HK), "positives": positives}
    return result
