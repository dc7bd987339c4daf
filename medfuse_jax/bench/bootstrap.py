"""Time the bootstrap intervals of `metrics.evaluate` against a loop over scikit-learn's functions.

A repeat of the loop is one resample; its time is multiplied by NUM_BOOTSTRAP, since all resamples cost the same.
Shapes: N samples, K labels.
"""

import importlib.util
from collections.abc import Callable

import numpy as np

from medfuse_jax import metrics
from medfuse_jax.bench import clock
from medfuse_jax.bench.cases import Case
from medfuse_jax.runtime import compilation

NUM_BOOTSTRAP = 1000
NUM_LABELS = 25


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return one record per contender, for the scores of `case.num_stays` stays and 25 labels. `data` is ignored."""
    rng = np.random.default_rng(0)
    label_NK = (rng.random((case.num_stays, NUM_LABELS)) < np.linspace(0.05, 0.45, NUM_LABELS)).astype(np.int8)
    score_NK = rng.standard_normal(label_NK.shape).astype(np.float32) + label_NK
    runs: dict[str, Callable] = {clock.OURS: lambda: metrics.evaluate(label_NK, score_NK, NUM_BOOTSTRAP)}
    if case.peers and importlib.util.find_spec("sklearn") is not None:
        runs["sklearn_loop"] = lambda: _one_resample(label_NK, score_NK, rng)
    with compilation.counted() as compiled:
        seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    if "sklearn_loop" in seconds:
        seconds["sklearn_loop"] = [NUM_BOOTSTRAP * s for s in seconds["sklearn_loop"]]
    rows = clock.records(seconds)
    rows[clock.OURS] |= {
        "num_bootstrap": NUM_BOOTSTRAP,
        "compilations": compiled.number,
        "compile_s": round(compiled.seconds, 2),
    }
    if "sklearn_loop" in rows:
        rows["sklearn_loop"]["scaled_from_resamples"] = 1
    return list(rows.values())


def _one_resample(label_NK: np.ndarray, score_NK: np.ndarray, rng: np.random.Generator) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    drawn_N = rng.integers(0, len(label_NK), len(label_NK))
    for label_N, score_N in zip(label_NK[drawn_N].T, score_NK[drawn_N].T):
        roc_auc_score(label_N, score_N)
        average_precision_score(label_N, score_N)
