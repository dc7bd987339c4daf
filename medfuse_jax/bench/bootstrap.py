"""The metrics' bootstrap bounds against a plain loop over scikit-learn's functions.

The loop is timed for one resample a repeat and scaled to all: it does the same work for each.
Shapes: N samples, K labels.
"""

import importlib.util

import numpy as np

from medfuse_jax import metrics
from medfuse_jax.bench import clock, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.runtime import compilation

NUM_BOOTSTRAP = 1000
NUM_LABELS = 25


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """One record a contender: `metrics.evaluate` of num_stays x 25 scores, and the loop. data is not read."""
    rng = np.random.default_rng(0)
    label_NK = (rng.random((case.num_stays, NUM_LABELS)) < np.linspace(0.05, 0.45, NUM_LABELS)).astype(np.int8)
    score_NK = rng.standard_normal(label_NK.shape).astype(np.float32) + label_NK
    runs = {step.OURS: lambda: metrics.evaluate(label_NK, score_NK, NUM_BOOTSTRAP)}
    if case.peers and importlib.util.find_spec("sklearn") is not None:
        runs["sklearn_loop"] = lambda: _one_resample(label_NK, score_NK, rng)
    with compilation.counted() as compiled:
        seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    if "sklearn_loop" in seconds:
        seconds["sklearn_loop"] = [NUM_BOOTSTRAP * s for s in seconds["sklearn_loop"]]
    rows = [{"contender": name} | clock.summary(taken) for name, taken in seconds.items()]
    rows[0] |= {
        "num_bootstrap": NUM_BOOTSTRAP,
        "compilations": compiled.number,
        "compile_s": round(compiled.seconds, 2),
    }
    for row in rows[1:]:
        row["scaled_from_resamples"] = 1
        row["time_over_ours"] = clock.ratio(seconds[row["contender"]], seconds[step.OURS])
    return rows


def _one_resample(label_NK: np.ndarray, score_NK: np.ndarray, rng: np.random.Generator) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    drawn_N = rng.integers(0, len(label_NK), len(label_NK))
    for label_N, score_N in zip(label_NK[drawn_N].T, score_NK[drawn_N].T):
        roc_auc_score(label_N, score_N)
        average_precision_score(label_N, score_N)
