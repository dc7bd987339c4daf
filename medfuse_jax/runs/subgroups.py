"""Metrics by group of patients (age, sex, race, admission type, first care unit), and the gaps between groups.

Shapes: N scored records.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from medfuse_jax import metrics, schema
from medfuse_jax.runs import calibration

_NAMES = {"age": "Age", "gender": "Sex", "race": "Race or ethnicity"}
_NAMES |= {"admission_type": "Admission type", "first_careunit": "First care unit"}
_NAMES["hour"] = "Hour of the stay"  # read by the report
_HOURS = (0, 24, 48, 72, 120, 168, 336, math.inf)  # low < hour <= high


def measure(
    scored: dict, num_bootstrap: int, seed: int, groups_N: np.ndarray | None, label_types: dict | None = None
) -> dict:
    """Return the metrics of predictions, and those of their order if the labels are exclusive bins of hours.

    label_types: as for `metrics.evaluate`.
    """
    arguments = (scored["labels"], scored["scores"])
    found = metrics.evaluate(*arguments, num_bootstrap, seed, groups_N, label_types)
    if "predicted_h" in scored:
        found |= metrics.ordinal(*arguments, _error_h(scored), num_bootstrap, seed, groups_N)
    return found


def difference(a: dict, b: dict, num_bootstrap: int, seed: int, groups_N: np.ndarray | None) -> dict:
    """Return the metrics of predictions b minus those of a, on the same records, as `measure` has them."""
    bootstrap = (num_bootstrap, seed, groups_N)
    found = metrics.compare(b["labels"], a["scores"], b["scores"], *bootstrap)
    if "predicted_h" in b:
        of_a, of_b = ((scored["scores"], _error_h(scored)) for scored in (a, b))
        found |= metrics.compare_ordinal(b["labels"], of_a, of_b, *bootstrap)
    return found


def _error_h(scored: dict) -> np.ndarray:
    return np.abs(scored["remaining_h"] - scored["predicted_h"])


def describe(scored: dict, num_bootstrap: int, seed: int, groups_N: np.ndarray | None) -> list[dict]:
    """Return one entry per attribute of the stays: 'by', 'groups' and 'gap'.

    scored: as saved with the predictions. groups_N: what the bootstrap draws whole, or None. A group has its 'name',
    the metrics' macro values with bounds, num_samples, num_positive, brier and ece; a small one is only {'name',
    'withheld': True}. 'groups' is empty where all are small. gap: the largest difference of macro AUROC between two
    groups, with the 'worst' group's name and its interval; None with fewer than two groups.
    """
    entries = []
    for field, title in _NAMES.items():
        if field not in scored:
            continue
        groups, is_known = [], False
        for name, include_N in _groups(field, scored[field]):
            is_known |= bool(include_N.any())
            part = {key: values[include_N] for key, values in scored.items()}
            labels_NK, scores_NK = part["labels"], part["scores"]
            if is_small(part):
                groups.append({"name": name, "withheld": True})
                continue
            of = measure(part, num_bootstrap, seed, None if groups_N is None else groups_N[include_N])
            calibrated = calibration.describe(labels_NK, scores_NK)
            kept = macro(of) | {name: calibrated[f"{name}_macro"] for name in ("brier", "ece")}
            counts = {"num_samples": of["num_samples"], "num_positive": int(np.sum(of["num_positive"]))}
            groups.append({"name": name} | counts | kept)
        if any(not group.get("withheld") for group in groups):
            entries.append({"by": title, "groups": groups, "gap": _gap(groups)})
        elif is_known:
            entries.append({"by": title, "groups": [], "gap": None})
    return entries


def macro(evaluated: dict) -> dict:
    """Return the means over labels, with bounds, of a result of `measure`, and its kappa."""
    means = {key: value for key, value in evaluated.items() if "_macro" in key and "released" not in key}
    return means | {key: evaluated[key] for key in ("kappa", "kappa_ci") if key in evaluated}


def _groups(field: str, values_N: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each group's name and its records; those of an unknown value are in none."""
    if field == "age":
        for low, high in schema.AGE_GROUPS:
            name = f"{low} to {high - 1} years" if math.isfinite(high) else f"{low} years and over"
            yield name, (values_N >= low) & (values_N < high)
        return
    if field == "hour":
        for low, high in itertools.pairwise(_HOURS):
            name = f"{low + 1} to {high}" if math.isfinite(high) else f"after {low}"
            yield name, (values_N > low) & (values_N <= high)
        return
    for name in sorted(set(values_N.tolist()) - {""}):
        yield name, values_N == name


def is_small(scored: dict) -> bool:
    """Return whether the numbers of a group could point to single patients. A stay counts once, whatever its hours."""
    positive_NK = scored["labels"] == 1
    negative_NK = ~positive_NK
    if "hour" in scored and len(positive_NK):
        _, stay_N = np.unique(scored["stay_id"], return_inverse=True)
        shape = (stay_N.max() + 1, positive_NK.shape[1])
        positive_NK, negative_NK = (_any_of(stay_N, label_NK, shape) for label_NK in (positive_NK, negative_NK))
    return min(len(positive_NK), positive_NK.sum(), negative_NK.sum()) < schema.FEWEST_SHOWN


def _any_of(stay_N: np.ndarray, label_NK: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    any_SK = np.zeros(shape, bool)
    np.logical_or.at(any_SK, stay_N, label_NK)
    return any_SK


def _gap(groups: list[dict]) -> dict | None:
    known = [g for g in groups if not g.get("withheld") and math.isfinite(g["auroc_macro"])]
    if len(known) < 2:
        return None
    worst, best = (pick(known, key=lambda g: g["auroc_macro"]) for pick in (min, max))
    return {
        "auroc_macro": best["auroc_macro"] - worst["auroc_macro"],
        "best": best["name"],
        "worst": worst["name"],
        "worst_ci": worst["auroc_macro_ci"],
    }
