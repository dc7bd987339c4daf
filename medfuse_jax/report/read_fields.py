"""Read fields of results, configs and metrics that may be missing or damaged. Never imports jax."""

import math
import numbers

import numpy as np

SUBSETS = ("all", "paired", "unpaired", "cxr_only", "had_both")
HOUR = "Hour of the stay"  # the name of a result's subgroups by hour


def scores_all(result: dict | None) -> bool:
    """Return whether a run scores every record of its split, so that its 'all' is comparable across runs."""
    return not (result or {}).get("num_left_out")


def comparable_subsets(result: dict) -> dict[str, dict]:
    """Return scores by subset, without 'all' if the run cannot score all records and has another subset."""
    subsets = {name: section(result["subsets"], name) for name in SUBSETS}
    subsets = {name: scores for name, scores in subsets.items() if scores}
    if not scores_all(result) and len(subsets) > 1:
        subsets.pop("all", None)
    return subsets


def comparisons(result: dict) -> list[dict]:
    """Return differences from other runs on known subsets; on 'all' only if both runs score all records."""
    num_all = section(result["subsets"], "all").get("num_samples")
    known = [other for other in result.get("comparisons") or [] if other.get("subset") in SUBSETS]
    return [
        other
        for other in known
        if other["subset"] != "all" or (scores_all(result) and other.get("num_samples") == num_all)
    ]


def subgroups(result: dict | None) -> list[dict]:
    """Return a result's entries by group of patients, without damaged ones."""
    entries = (result or {}).get("subgroups")
    known = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    known = [e for e in known if isinstance(e.get("groups"), list)]
    return [e for e in known if all(isinstance(group, dict) for group in e["groups"])]


def is_outside_its_ci(scores: dict) -> bool:
    """Return whether a mean is outside its own percentile interval, as an AUPRC with few positives can be."""
    means = ((scores.get(f"{name}_macro"), *pair(scores.get(f"{name}_macro_ci"))) for name in ("auroc", "auprc"))
    known = [values for values in means if all(map(is_number, values))]
    return any(not low <= mean <= high for mean, low, high in known)


def series(lines: dict[int, dict], field: str) -> dict[int, float]:
    """Return one field by epoch, without missing and non-finite values."""
    values = {epoch: line.get(field) for epoch, line in sorted(lines.items())}
    return {epoch: v for epoch, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def section(content: dict, name: str) -> dict:
    """Return a nested object of a config or a result; {} if missing."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def pair(ends) -> tuple:
    """Return (low, high) of an interval; (None, None) if there is none."""
    return tuple(ends) if isinstance(ends, list | tuple | np.ndarray) and len(ends) == 2 else (None, None)


def is_number(value) -> bool:
    """Return whether a value is a finite number: scores may be None or NaN."""
    return isinstance(value, numbers.Real) and math.isfinite(value)
