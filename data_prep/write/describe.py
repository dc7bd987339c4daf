"""What a task's arrays hold, as counts: observations, values, lengths.

These are exact and go into the manifest, which is for the same eyes as the records beside it; what may be
shown to others is decided in audit.py.

Shape key: R steps of many stays, N stays, V 17 variables, F 76 channels, C classes of one, G grid cells.
"""

import itertools

import numpy as np

from data_prep.ehr import cleaning
from data_prep.ehr.discretize import Arrays
from medfuse_jax import schema

VERSION = 4  # raise it when a manifest says more, or other things, of the same arrays
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LENGTH_EDGES_H = (0, 12, 24, 36, 48, 72, 96, 120, 168, 240, 336, 504)
_GRID = 8192  # cells from 0 to the largest possible value: 0.3 mg/dL of glucose


def variables(arrays: Arrays) -> dict[str, dict]:
    """Variable -> observed_steps, observed_stays, and percentiles of what was observed, or steps and stays by class.

    A percentile is that of the grid's cell it falls in, and is None where fewer than 10 observations lie
    on either side of it.
    """
    facts = {}
    observed_steps_V = np.zeros(len(schema.VARIABLES), np.int64)
    observed_stays_V = np.zeros(len(schema.VARIABLES), np.int64)
    tally = [np.zeros(len(v.classes) or _GRID, np.int64) for v in schema.VARIABLES]
    class_stays = [np.zeros(len(v.classes), np.int64) for v in schema.VARIABLES]
    top = [0.0 if v.classes else cleaning.RANGES[v.name][3] for v in schema.VARIABLES]
    for ehr_RF, start_N in arrays.buckets():
        mask_RV = ehr_RF[:, len(schema.VALUE_CHANNELS) :] > 0
        observed_steps_V += mask_RV.sum(0)
        observed_stays_V += np.logical_or.reduceat(mask_RV, start_N, axis=0).sum(0)
        channel = 0
        for place, variable in enumerate(schema.VARIABLES):
            width = len(variable.classes) or 1
            seen_RC = np.asarray(ehr_RF[:, channel : channel + width])
            values = seen_RC[mask_RV[:, place]]
            if variable.classes:
                tally[place] += values.sum(0).astype(np.int64)
                seen_RC = (seen_RC > 0) & mask_RV[:, place : place + 1]
                class_stays[place] += np.logical_or.reduceat(seen_RC, start_N, axis=0).sum(0)
            else:
                cell = np.clip(values[:, 0] / top[place] * _GRID, 0, _GRID - 1).astype(np.int64)
                tally[place] += np.bincount(cell, minlength=_GRID)
            channel += width
    for place, variable in enumerate(schema.VARIABLES):
        fact = {"observed_steps": int(observed_steps_V[place]), "observed_stays": int(observed_stays_V[place])}
        if variable.classes:
            fact["classes"] = dict(zip(variable.classes, tally[place].tolist(), strict=True))
            fact["class_stays"] = dict(zip(variable.classes, class_stays[place].tolist(), strict=True))
        else:
            fact["percentiles"] = _percentiles(tally[place], top[place])
        facts[variable.name] = fact
    return facts


def _percentiles(tally_G: np.ndarray, top: float) -> dict[str, float | None]:
    cumulative_G, total = np.cumsum(tally_G), int(tally_G.sum())
    found = {}
    for percent in PERCENTILES:
        enough = total * min(percent, 100 - percent) >= 100 * 10
        cell = int(np.searchsorted(cumulative_G, total * percent / 100.0, side="left"))
        found[str(percent)] = round((cell + 0.5) / len(tally_G) * top, 4) if enough else None
    return found


def histogram(values: np.ndarray, edges: tuple[float, ...]) -> dict[str, int]:
    """Counts by interval, the last one open: '0-12', '12-24', ... '504-'."""
    names = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]:g}-"]
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 1)
    return dict(zip(names, np.bincount(place, minlength=len(names)).tolist(), strict=True))
