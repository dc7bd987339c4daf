"""How AUROC and average precision change as X-rays, EHR-only stays or hours of EHR go.

The first two curves are Figures A2 and A3 of Hayat et al. 2022. Shapes: N scored stays, K labels.
"""

import numpy as np

from medfuse_jax import metrics
from medfuse_jax.data import folds
from medfuse_jax.runs import subgroups

FILE = "robustness.json"  # in a run's workdir
SHARES = tuple(round(0.1 * n, 1) for n in range(11))
TITLES = {
    "cxr_dropped": "Share of X-rays dropped, stays with an X-ray",
    "ehr_only": "Share of stays without an X-ray added to those with one",
    "ehr_hours": "First hours of EHR read, all stays",
}
HOURS = (2, 4, 8, 16, 24, 48, 96, 192)


def by_share(scored: dict, without_cxr: dict | None, options: tuple[int, int, str]) -> list[dict]:
    """Return the curves over shares of stays: 'cxr_dropped' and 'ehr_only'; only those that this run can have.

    scored: as saved with the predictions. without_cxr: the same stays scored without their X-rays, or None if some of
    them cannot be. options: number of resamples, seed, what they draw (`result.RESAMPLES`).
    """
    paired_N = scored["has_cxr"] & scored["has_ehr"]
    draw_N = folds.hash_fractions(scored["stay_id"])
    curves = []
    if without_cxr is not None and paired_N.any():
        points = []
        for share in SHARES:
            scores_NK = np.where((draw_N < share)[:, None], without_cxr["scores"], scored["scores"])
            points += point(share, scored | {"scores": scores_NK}, paired_N, options)
        curves.append({"name": "cxr_dropped", "points": points})
    if paired_N.any() and not scored["has_cxr"].all():
        points = []
        for share in SHARES:
            points += point(share, scored, paired_N | ~scored["has_cxr"] & (draw_N < share), options)
        curves.append({"name": "ehr_only", "points": points})
    return curves


def point(at: float, scored: dict, include_N: np.ndarray, options: tuple[int, int, str]) -> list[dict]:
    """Return one point of a curve: 'at', num_samples and the macro metrics with bounds; [] of too few stays to show."""
    num_bootstrap, seed, resample = options
    part = {name: scored[name][include_N] for name in ("labels", "scores", "subject_id")}
    if subgroups.is_small(part):
        return []
    groups = part["subject_id"] if resample == "patient" else None
    of = metrics.evaluate(part["labels"], part["scores"], num_bootstrap, seed, groups)
    return [{"at": at, "num_samples": of["num_samples"]} | subgroups.macro(of)]
