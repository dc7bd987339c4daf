"""The best expected AUROC from what a stay's records show, which is less than its latents say.

A patient's own offset hides a latent in each series (events.Signal.patient_sd), and an X-ray is not quite its stay's
(cxr.IMAGE_NOISE). A model is told more here than there is: the slow waves, every series of every stay, exact readings
twice an hour, an X-ray's own latents. So this too is an upper bound, apart from the chance of the noise drawn here.

Shapes: N stays, V vital latents, E image latents, K labels, Q quadrature nodes.
"""

import numpy as np
from scipy.special import expit

from data_prep.synthetic import cxr, draw, events, signal

_STEP_H = 0.5
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def scores(task: str, vitals_NV: np.ndarray, image_NE: np.ndarray, hours_N: np.ndarray, seed: int = 0) -> dict:
    """Return E[p | records], each [N, K], given 'both' modalities, 'ehr_only' and 'cxr_only'. hours_N: of each stay."""
    rng = np.random.default_rng(seed)
    seen_v = _posterior(rng, vitals_NV, _information(hours_N))
    seen_x = _posterior(rng, image_NE, np.full(image_NE.shape, cxr.IMAGE_NOISE**-2))
    no_v, no_x = ((np.zeros(a.shape), np.ones(a.shape)) for a in (vitals_NV, image_NE))
    by_input = {"both": (seen_v, seen_x), "ehr_only": (seen_v, no_x), "cxr_only": (no_v, seen_x)}
    return {name: _probabilities(task, *of) for name, of in by_input.items()}


def _posterior(rng: np.random.Generator, latents: np.ndarray, information: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw what records show of standard normal latents; return the latents' mean and variance given that.

    information: 1 / variance of the noise with which the records show a latent.
    """
    shown = latents + rng.standard_normal(latents.shape) / np.sqrt(information)
    return shown * information / (1 + information), 1 / (1 + information)


def _information(hours_N: np.ndarray) -> np.ndarray:
    """Return what the series of stays of these lengths tell of each vital latent [N, V]."""
    told_NV = np.zeros((len(hours_N), len(signal.VITAL_LATENTS)))
    for of in events.SIGNALS.values():
        ((latent, shift),) = of.shifts.items()
        noise, offset = (events.READING_SHARE * of.noise_sd) ** 2, of.patient_sd**2
        by_length = {}
        for length in np.unique(hours_N):
            gain = shift * of.growth(np.arange(0, length, _STEP_H)) * np.ones(int(length / _STEP_H))
            by_length[length] = (gain @ gain - offset * gain.sum() ** 2 / (noise + offset * len(gain))) / noise
        told_NV[:, signal.VITAL_LATENTS.index(latent)] += np.vectorize(by_length.get)(hours_N)
    return told_NV


def _probabilities(task: str, seen_v: tuple, seen_x: tuple) -> np.ndarray:
    """Return E[p] [N, K] of latents with these (mean, variance)."""
    columns = []
    for rule in signal.RULES[task]:
        u_v = _along(rule.vitals, signal.VITAL_LATENTS, *seen_v)
        u_x = _along(rule.image, draw.IMAGE_LATENTS, *seen_x)
        p_NQQ = expit(signal.logit(rule, u_v[:, :, None], u_x[:, None, :]) + signal.find_bias(rule))
        columns.append(np.einsum("nij,i,j->n", p_NQQ, _WEIGHTS, _WEIGHTS))
    return np.stack(columns, axis=1)


def _along(weights: dict, names: tuple, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return the weighted latents at the quadrature's nodes [N, Q]; zeros without weights."""
    unit = signal.projection(weights, names, np.eye(len(names)))
    return (mean @ unit)[:, None] + np.sqrt(variance @ unit**2)[:, None] * _NODES
