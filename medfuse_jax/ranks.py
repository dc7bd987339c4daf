"""AUROC and average precision from ranks, in numpy alone, for training, metrics and reports.

Shape suffixes: N samples, K labels, R resamples. Values equal scikit-learn's `roc_auc_score` and
`average_precision_score`, ties included, for all columns at once.
"""

import numpy as np

from medfuse_jax.runtime.errors import UserError

LEVEL_PERCENT = 95.0


def check(labels, scores, name: str = "scores") -> tuple[np.ndarray, np.ndarray]:
    """Return labels as bool [N, K] and scores as float [N, K]. Raise UserError for any other shape or value."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    for what, values in (("labels", labels), (name, scores)):
        # numpy gives jax's short floats, such as bfloat16, the kind "V"
        is_real = values.dtype.kind in "biuf" or (values.dtype.kind == "V" and np.can_cast(values.dtype, np.float64))
        if not is_real:
            raise UserError(f"{what} are of type {values.dtype}; they must be real numbers", field=what)
    if labels.shape != scores.shape or labels.ndim != 2:
        shapes = f"labels have shape {labels.shape} and {name} {scores.shape}"
        raise UserError(f"{shapes}; both must be [samples, labels]", field=name, value=scores.shape)
    if not labels.size:
        raise UserError(f"no samples to score: labels have shape {labels.shape}", field="labels", value=labels.shape)
    _check_cells("labels", labels, (labels == 0) | (labels == 1), "0 or 1")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)  # exact for integers and short floats
    _check_cells(name, scores, np.isfinite(scores), "finite; did training diverge?")
    return labels.astype(bool), scores


def _check_cells(name: str, values_NK: np.ndarray, is_valid_NK: np.ndarray, expected: str) -> None:
    wrong = np.argwhere(~is_valid_NK)
    if len(wrong):
        row, column = (int(i) for i in wrong[0])
        where = f"row {row}, label {column} of {name} is {values_NK[row, column]}"
        count = f"{len(wrong)} of {values_NK.size} are wrong"
        raise UserError(f"{where} ({count}); it must be {expected}", field=name, value=(row, column))


def ranked(labels_NK: np.ndarray, scores_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort each label's samples by descending score.

    Returns, each [rank, K]: the sample numbers, their labels, and whether a group of tied scores ends there.
    """
    order = np.argsort(scores_NK, axis=0)[::-1]
    descending = np.take_along_axis(scores_NK, order, axis=0)
    is_end = np.concatenate([descending[1:] != descending[:-1], np.ones_like(descending[:1], bool)])
    return order, np.take_along_axis(labels_NK, order, axis=0), is_end


def point(labels_NK: np.ndarray, scores_NK: np.ndarray) -> dict[str, np.ndarray]:
    """Return AUROC and average precision [K], float64; NaN for a label with one class."""
    _, positive, is_end = ranked(labels_NK, scores_NK)
    # Counts change only at the end of a tie group, so a group counts as one step.
    seen = np.maximum.accumulate(np.where(is_end, np.arange(1, len(positive) + 1)[:, None], 0))
    true = np.maximum.accumulate(np.where(is_end, np.cumsum(positive, axis=0), 0))
    new_seen, new_true = (np.diff(count, axis=0, prepend=0) for count in (seen, true))
    num_positive, num_negative = true[-1], len(true) - true[-1]
    pairs = ((new_seen - new_true) * (true - new_true / 2)).sum(0)
    precision = true / np.maximum(seen, 1)
    with np.errstate(invalid="ignore"):
        auroc_K = pairs / (num_positive * num_negative)
        auprc_K = (new_true * precision).sum(0) / num_positive
    return {"auroc": auroc_K, "auprc": np.where(num_negative > 0, auprc_K, np.nan)}


def nanmean(values) -> np.ndarray:
    """Return the mean over the last axis, ignoring NaN; NaN, without a warning, if all values are NaN."""
    values = np.asarray(values)
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(-1), known.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def bounds(boot_R: np.ndarray) -> np.ndarray:
    """Return the 95 % percentile bounds (low, high) of the finite resamples, float64."""
    known = boot_R[np.isfinite(boot_R)]
    if not len(known):
        return np.full(2, np.nan)
    tail = (100 - LEVEL_PERCENT) / 2
    return np.percentile(known, (tail, 100 - tail))
