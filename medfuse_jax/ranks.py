"""AUROC and average precision from ranks, in numpy alone: what training, metrics and reports share.

Shape suffixes: N samples, K labels, R resamples. Values are those of scikit-learn's
`roc_auc_score` and `average_precision_score`, ties included, for all columns at once.
"""

import numpy as np

from medfuse_jax.runtime.errors import UserError

LEVEL_PERCENT = 95.0


def check(labels, scores, name: str = "scores") -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool [N, K] and scores as float [N, K]; UserError where they are not that."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    for what, values in (("labels", labels), (name, scores)):
        if not _is_real(values.dtype):
            raise UserError(f"{what} are of type {values.dtype}; they must be real numbers")
    if labels.shape != scores.shape or labels.ndim != 2:
        raise UserError(
            f"labels have shape {labels.shape} and {name} {scores.shape}: "
            "both must be [samples, labels], a row a sample in the same order"
        )
    if not labels.size:
        raise UserError(f"no samples to score: labels have shape {labels.shape}")
    wrong = np.argwhere((labels != 0) & (labels != 1))
    if len(wrong):
        row, column = wrong[0]
        raise UserError(f"labels must be 0 or 1; row {row}, label {column} is {labels[row, column]}")
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float64)  # exact for integers and the short floats
    wrong = np.argwhere(~np.isfinite(scores))
    if len(wrong):
        row, column = wrong[0]
        raise UserError(
            f"{name} must be finite; row {row}, label {column} is {scores[row, column]} "
            f"({len(wrong)} such of {scores.size}): look for a diverged run or a damaged input"
        )
    return labels.astype(bool), scores


def _is_real(dtype: np.dtype) -> bool:
    """Whether values are bool, integers or floats, jax's short floats (which numpy calls void) among them."""
    return dtype.kind in "biuf" or (dtype.kind == "V" and np.can_cast(dtype, np.float64))


def ranked(labels_NK: np.ndarray, scores_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples by falling score: their numbers, their labels, and whether a tie group ends there; each [rank, K]."""
    order = np.argsort(scores_NK, axis=0)[::-1]
    falling = np.take_along_axis(scores_NK, order, axis=0)
    is_end = np.concatenate([falling[1:] != falling[:-1], np.ones_like(falling[:1], bool)])
    return order, np.take_along_axis(labels_NK, order, axis=0), is_end


def point(labels_NK: np.ndarray, scores_NK: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and average precision [K], float64."""
    _, positive, is_end = ranked(labels_NK, scores_NK)
    # Counts stand still inside a tie group and move at its end, so the group is one step.
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
    """The mean over the last axis without the nan; nan where there is nothing else, and no warning."""
    values = np.asarray(values)
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(-1), known.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def bounds(boot_R: np.ndarray) -> np.ndarray:
    """(low, high): the 95 % percentile bounds of the resamples that have a value, float64."""
    known = boot_R[np.isfinite(boot_R)]
    if not len(known):
        return np.full(2, np.nan)
    tail = (100 - LEVEL_PERCENT) / 2
    return np.percentile(known, (tail, 100 - tail))
