"""Metrics by group of patients (age, sex, admission type, first care unit), and the gaps between groups.

Shapes: N scored records.
"""

import math
from collections.abc import Iterator

import numpy as np

from medfuse_jax import metrics, schema
from medfuse_jax.runs import calibration

_NAMES = {"age": "Age", "gender": "Sex", "admission_type": "Admission type", "first_careunit": "First care unit"}


def describe(scored: dict, num_bootstrap: int, seed: int, groups_N: np.ndarray | None) -> list[dict]:
    """Return one entry per attribute of the stays: 'by', 'groups' and 'gap'.

    scored: as saved with the predictions. groups_N: what the bootstrap draws whole, or None. A group has its 'name',
    the metrics' macro values with bounds, num_samples, num_positive, brier and ece; a small one is only {'name',
    'withheld': True}. gap: the largest difference of macro AUROC between two groups, with the 'worst' group's name and
    its interval; None with fewer than two groups.
    """
    entries = []
    for field, title in _NAMES.items():
        if field not in scored:
            continue
        groups = []
        for name, include_N in _groups(field, scored[field]):
            labels_NK, scores_NK = scored["labels"][include_N], scored["scores"][include_N]
            if is_small(labels_NK):
                groups.append({"name": name, "withheld": True})
                continue
            of = metrics.evaluate(
                labels_NK, scores_NK, num_bootstrap, seed, None if groups_N is None else groups_N[include_N]
            )
            calibrated = calibration.describe(labels_NK, scores_NK)
            kept = macro(of) | {name: calibrated[f"{name}_macro"] for name in ("brier", "ece")}
            counts = {"num_samples": of["num_samples"], "num_positive": int(np.sum(of["num_positive"]))}
            groups.append({"name": name} | counts | kept)
        if any(not group.get("withheld") for group in groups):
            entries.append({"by": title, "groups": groups, "gap": _gap(groups)})
    return entries


def macro(evaluated: dict) -> dict:
    """Return the means over labels, with bounds, of a result of `metrics.evaluate`."""
    return {key: value for key, value in evaluated.items() if "_macro" in key and "released" not in key}


def _groups(field: str, values_N: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each group's name and its records; those of an unknown value are in none."""
    if field == "age":
        for low, high in schema.AGE_GROUPS:
            name = f"{low} to {high - 1} years" if math.isfinite(high) else f"{low} years and over"
            yield name, (values_N >= low) & (values_N < high)
        return
    for name in sorted(set(values_N.tolist()) - {""}):
        yield name, values_N == name


def is_small(labels_NK: np.ndarray) -> bool:
    """Return whether the numbers of records with labels [N, K] could point to single patients."""
    if len(labels_NK) < schema.FEWEST_SHOWN:
        return True
    num_positive = int(labels_NK.sum())
    return num_positive < schema.FEWEST_SHOWN or labels_NK.size - num_positive < schema.FEWEST_SHOWN


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
