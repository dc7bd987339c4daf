"""Whether scores can be read as probabilities, and what acting on them would bring. Never imports jax.

Shapes: N samples, K labels, C bins, H thresholds.
"""

import numpy as np
from scipy import optimize, special

_NUM_BINS = 10
_THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))  # of the net benefit
_SENSITIVITIES = (0.8, 0.9, 0.95)  # of the operating points
_LOG_TEMPERATURE = (-3.0, 3.0)  # searched


def describe(labels_NK: np.ndarray, scores_NK: np.ndarray, stay_id_N: np.ndarray | None = None) -> dict:
    """Return how well scores [N, K] in 0..1 are calibrated to labels [N, K] of 0 and 1.

    brier, ece: per label, and as `brier_macro` and `ece_macro`. curve: of all labels together, one entry per bin of
    equal width: num_samples, mean score, fraction of positives (None in an empty bin). Brier score: mean squared error
    (Brier 1950). ECE: expected calibration error, the bins' |mean score - fraction of positives|, weighted by their
    samples (Guo et al. 2017). stay_id_N: of samples that are hours; a bin then also has num_stays.
    """
    labels_NK, scores_NK = np.asarray(labels_NK, np.float64), np.asarray(scores_NK, np.float64)
    brier_K = np.square(scores_NK - labels_NK).mean(0)
    ece_K = np.array([_ece(*_bins(labels_N, scores_N)) for labels_N, scores_N in zip(labels_NK.T, scores_NK.T)])
    count_C, score_C, positive_C = _bins(labels_NK.reshape(-1), scores_NK.reshape(-1))
    stays: list[dict] = [{}] * _NUM_BINS
    if stay_id_N is not None:
        bin_NK = _bin(scores_NK)
        stays = [{"num_stays": len(np.unique(stay_id_N[(bin_NK == c).any(1)]))} for c in range(_NUM_BINS)]
    return {
        "brier": brier_K,
        "ece": ece_K,
        "brier_macro": float(brier_K.mean()),
        "ece_macro": float(ece_K.mean()),
        "curve": [
            {"num_samples": int(n), "score": float(s / n) if n else None, "positive": float(p / n) if n else None} | of
            for n, s, p, of in zip(count_C, score_C, positive_C, stays)
        ],
    }


def _bins(labels_N: np.ndarray, scores_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each bin's number of samples, sum of scores and number of positives, [C]."""
    bin_N = _bin(scores_N)
    count_C, score_C, positive_C = (
        np.bincount(bin_N, weights, minlength=_NUM_BINS) for weights in (None, scores_N, labels_N)
    )
    return count_C, score_C, positive_C


def _bin(scores: np.ndarray) -> np.ndarray:
    return np.minimum((scores * _NUM_BINS).astype(int), _NUM_BINS - 1)


def _ece(count_C: np.ndarray, score_C: np.ndarray, positive_C: np.ndarray) -> float:
    return float(np.abs(score_C - positive_C).sum() / count_C.sum())


def fit_temperature(labels_NK: np.ndarray, scores_NK: np.ndarray) -> float | None:
    """Return the temperature whose scaled scores have the lowest binary cross-entropy (Guo et al. 2017).

    None if no label has both classes: the best temperature would then approach 0.
    """
    if (labels_NK == labels_NK[:1]).all():
        return None
    logit_NK = _logit(scores_NK)

    def loss(log_temperature: float) -> float:
        scaled_NK = logit_NK / np.exp(log_temperature)
        return float((np.logaddexp(0, scaled_NK) - labels_NK * scaled_NK).mean())

    return float(np.exp(optimize.minimize_scalar(loss, bounds=_LOG_TEMPERATURE, method="bounded").x))


def scale(scores_NK: np.ndarray, temperature: float) -> np.ndarray:
    """Return the scores [N, K] at a temperature: above 1, nearer to 0.5. Their order does not change."""
    return special.expit(_logit(scores_NK) / temperature)


def _logit(scores_NK: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(np.asarray(scores_NK, np.float64), 1e-7, 1 - 1e-7))


def operating_points(label_N: np.ndarray, score_N: np.ndarray) -> list[dict]:
    """Return the highest threshold that reaches each sensitivity, with its specificity and positive predictive value.

    A sample is predicted positive if its score is at least the threshold. [] without both classes.
    """
    positive_N, negative_N = np.sort(score_N[label_N == 1])[::-1], score_N[label_N == 0]
    if not len(positive_N) or not len(negative_N):
        return []
    points = []
    for sensitivity in _SENSITIVITIES:
        threshold = positive_N[int(np.ceil(sensitivity * len(positive_N))) - 1]
        true, false = int((positive_N >= threshold).sum()), int((negative_N >= threshold).sum())
        points.append(
            {
                "threshold": float(threshold),
                "sensitivity": true / len(positive_N),
                "specificity": 1 - false / len(negative_N),
                "ppv": true / (true + false),
            }
        )
    return points


def net_benefit(label_N: np.ndarray, score_N: np.ndarray) -> list[dict]:
    """Return the net benefit of acting on scores at or above each threshold, and of acting on everyone.

    The threshold is the probability at which acting just pays; benefit is in true positives per sample (Vickers and
    Elkin 2006). Acting on nobody has 0.
    """
    prevalence, rows = float(np.mean(label_N)), []
    for threshold in _THRESHOLDS:
        weight = threshold / (1 - threshold)
        acts_N = score_N >= threshold
        true, false = np.mean(acts_N & (label_N == 1)), np.mean(acts_N & (label_N == 0))
        rows.append(
            {
                "threshold": threshold,
                "model": float(true - weight * false),
                "everyone": prevalence - weight * (1 - prevalence),
            }
        )
    return rows
