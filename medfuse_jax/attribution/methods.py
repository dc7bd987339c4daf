"""How much each part of an input contributes to a score: integrated gradients, and occlusion of an image.

Both take any scalar function, so that they are tested without a model.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_FEWEST_POINTS, _MOST_POINTS = 64, 1024  # on the path; doubled until the sum fits
_TOLERANCE = 0.01  # of the difference between the scores, at least of _SMALL
_SMALL = 0.1
_TOGETHER = 16  # points, or positions, computed in one call


def integrated_gradients(fn: Callable, x: np.ndarray, baseline: np.ndarray) -> tuple[np.ndarray, float]:
    """Return attributions, shaped like x, and the gap: their sum minus (fn(x) - fn(baseline)), which should be 0.

    An attribution is (x - baseline) times the mean gradient on the straight path between the two (Sundararajan et al.
    2017), at the midpoints of equal parts. There are as many as it takes for a gap below 1 %, at most 1024.
    """
    x, baseline = jnp.asarray(x, jnp.float32), jnp.asarray(baseline, jnp.float32)
    difference = float(fn(x) - fn(baseline))
    gradient = jax.jit(lambda share: jax.grad(fn)(baseline + share * (x - baseline)))
    num_points = _FEWEST_POINTS
    while True:
        share_S = (np.arange(num_points, dtype=np.float32) + 0.5) / num_points
        mean = _mean(gradient, share_S)
        given = np.asarray(mean, np.float64) * np.asarray(x - baseline, np.float64)
        gap = float(given.sum() - difference)
        if abs(gap) <= _TOLERANCE * max(abs(difference), _SMALL) or num_points >= _MOST_POINTS:
            return given.astype(np.float32), gap
        num_points *= 2


def _mean(gradient: Callable, share_S: np.ndarray) -> np.ndarray:
    total = 0.0
    for share in share_S:
        total = total + np.asarray(gradient(share), np.float64)
    return total / len(share_S)


def occlusion(fn: Callable, image_CC: np.ndarray, patch_px: int, stride_px: int) -> np.ndarray:
    """Return [C, C]: by how much fn falls, on average over the patches that cover a pixel, if a patch is made grey.

    image_CC: the grey values, as fn takes them. A grey patch has the image's mean value. Positive: the score needs it.
    """
    image_CC = jnp.asarray(image_CC, jnp.float32)
    size = len(image_CC)
    patch_px = min(patch_px, size)
    starts = np.unique([*range(0, size - patch_px + 1, stride_px), size - patch_px])
    corners_N2 = np.array([(y, x) for y in starts for x in starts], np.int32)
    grey, at = image_CC.mean(), jnp.arange(size)

    def without(corner_2):
        y, x = ((at >= start) & (at < start + patch_px) for start in corner_2)
        return fn(jnp.where(y[:, None] & x[None, :], grey, image_CC))

    whole = float(fn(image_CC))
    fallen_N = whole - np.asarray(_in_turn(without, corners_N2), np.float64)
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for (y, x), fallen in zip(corners_N2, fallen_N):
        window = slice(y, y + patch_px), slice(x, x + patch_px)
        total[window] += fallen
        count[window] += 1
    return (total / count).astype(np.float32)


def _in_turn(fn: Callable, arguments_N: np.ndarray) -> jax.Array:
    return jax.jit(functools.partial(jax.lax.map, fn, batch_size=_TOGETHER))(arguments_N)
