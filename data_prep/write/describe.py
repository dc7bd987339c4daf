"""Count what a task's arrays contain: observations, values, lengths.

The counts are exact and go into the manifest, which is as confidential as the records; data_prep/audit decides what
may be shown to others.

Shape key: R time steps of many stays, N stays, V 17 variables, F 76 channels, C classes of one, G grid cells.
"""

import itertools

import numpy as np

from data_prep.ehr import cleaning
from data_prep.ehr.arrays import Arrays
from medfuse_jax import schema

VERSION = 7  # increment when the manifest of the same arrays changes
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LENGTH_EDGES_H = (0, 12, 24, 36, 48, 72, 96, 120, 168, 240, 336, 504)
_GRID = 8192  # cells from 0 to the largest possible value; one is 0.3 mg/dL of glucose


def variables(arrays: Arrays) -> dict[str, dict]:
    """Return each variable's observed steps and stays, and percentiles of its values, or steps and stays by class.

    A percentile is accurate to one grid cell, and None if fewer than 10 observations lie on either side of it.
    """
    observed_steps_V = np.zeros(len(schema.VARIABLES), np.int64)
    observed_stays_V = np.zeros(len(schema.VARIABLES), np.int64)
    counts = [np.zeros(len(v.classes) or _GRID, np.int64) for v in schema.VARIABLES]  # by class, or by grid cell
    class_stays = [np.zeros(len(v.classes), np.int64) for v in schema.VARIABLES]
    top = [0.0 if v.classes else cleaning.RANGES[v.name][3] for v in schema.VARIABLES]
    for ehr_RF, start_N in arrays.buckets():
        mask_RV = ehr_RF[:, len(schema.VALUE_CHANNELS) :] > 0
        observed_steps_V += mask_RV.sum(0)
        observed_stays_V += np.logical_or.reduceat(mask_RV, start_N, axis=0).sum(0)
        channel = 0
        for i, variable in enumerate(schema.VARIABLES):
            width = len(variable.classes) or 1
            value_RC = np.asarray(ehr_RF[:, channel : channel + width])
            observed_RC = value_RC[mask_RV[:, i]]
            if variable.classes:
                counts[i] += observed_RC.sum(0).astype(np.int64)
                in_class_RC = (value_RC > 0) & mask_RV[:, i : i + 1]
                class_stays[i] += np.logical_or.reduceat(in_class_RC, start_N, axis=0).sum(0)
            else:
                cell = np.clip(observed_RC[:, 0] / top[i] * _GRID, 0, _GRID - 1).astype(np.int64)
                counts[i] += np.bincount(cell, minlength=_GRID)
            channel += width
    described = {}
    for i, variable in enumerate(schema.VARIABLES):
        entry = {"observed_steps": int(observed_steps_V[i]), "observed_stays": int(observed_stays_V[i])}
        if variable.classes:
            entry["classes"] = dict(zip(variable.classes, counts[i].tolist(), strict=True))
            entry["class_stays"] = dict(zip(variable.classes, class_stays[i].tolist(), strict=True))
        else:
            entry["percentiles"] = _percentiles(counts[i], top[i])
        described[variable.name] = entry
    return described


def _percentiles(count_G: np.ndarray, top: float) -> dict[str, float | None]:
    cumulative_G, total = np.cumsum(count_G), int(count_G.sum())
    percentiles = {}
    for percent in PERCENTILES:
        enough = total * min(percent, 100 - percent) >= 100 * 10
        cell = int(np.searchsorted(cumulative_G, total * percent / 100.0, side="left"))
        percentiles[str(percent)] = round((cell + 0.5) / len(count_G) * top, 4) if enough else None
    return percentiles


def histogram(values: np.ndarray, edges: tuple[float, ...]) -> dict[str, int]:
    """Count values by interval, the last one open: '0-12', '12-24', ... '504-'."""
    names = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]:g}-"]
    counts, _ = np.histogram(np.maximum(values, edges[0]), [*edges, np.inf])
    return dict(zip(names, counts.tolist(), strict=True))
