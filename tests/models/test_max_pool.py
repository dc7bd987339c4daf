"""The max pool against XLA's own: values and gradients, ties, odd sizes, both precisions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax.models.max_pool import max_pool


def _xla(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _case(height, width, dtype, step):
    """Return values that are multiples of `step` (a coarse one makes ties) and random weights."""
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((2, height, width, 3)) / step) * step
    weight = rng.standard_normal(_xla(x).shape)
    return jnp.asarray(np.maximum(x, 0), dtype), jnp.asarray(weight, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("step", [1e-4, 0.5, 10.0])  # no ties, many, all
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (1, 3)])
def test_values_and_gradients_match_xla(height, width, step, dtype):
    x, weight = _case(height, width, dtype, step)
    ours, ours_vjp = jax.vjp(max_pool, x)
    theirs, theirs_vjp = jax.vjp(_xla, x)
    np.testing.assert_array_equal(ours, theirs)
    (ours_d,), (theirs_d,) = ours_vjp(weight), theirs_vjp(weight)
    assert ours_d.dtype == dtype and ours_d.shape == x.shape
    # sums of at most four terms, in another order
    tolerance = 1e-6 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(ours_d.astype(np.float32), theirs_d.astype(np.float32), atol=tolerance)


def test_a_tie_won_by_another_pixel_exceeds_the_tolerance():
    x, weight = _case(8, 8, jnp.float32, 0.5)
    (right,), (wrong,) = jax.vjp(max_pool, x)[1](weight), jax.vjp(lambda x: max_pool(x[:, ::-1])[:, ::-1], x)[1](weight)
    assert np.abs(right - wrong).max() > 0.1
