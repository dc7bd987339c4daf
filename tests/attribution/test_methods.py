"""Attributions of functions whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax.attribution import methods


def _curved(x):
    return jnp.tanh(x[0] * x[1]) + jnp.sin(3 * x[2]) + 0.0 * x[3]


def test_integrated_gradients_add_up_to_the_difference():
    x, baseline = np.array([1.5, -0.7, 1.0, 5.0]), np.array([0.1, 0.2, -1.0, 0.0])
    given, gap = methods.integrated_gradients(_curved, x, baseline)
    difference = float(_curved(x) - _curved(baseline))
    assert given.sum() == pytest.approx(difference, abs=0.01 * abs(difference)) and abs(gap) < 0.01 * abs(difference)
    assert given[3] == 0  # what the function ignores has no share

    # Likely mistakes are outside the tolerance: the gradient at the input alone, and the left ends of few parts.
    gradient = jax.grad(_curved)
    alone = float((gradient(x) * (x - baseline)).sum())
    left = float(np.mean([(gradient(baseline + s * (x - baseline)) * (x - baseline)).sum() for s in (0.0, 0.5)]))
    assert all(abs(wrong - difference) > 0.05 * abs(difference) for wrong in (alone, left))


def test_shares_of_a_linear_function_are_its_terms():
    weight = np.array([2.0, -1.0, 0.5])
    given, _ = methods.integrated_gradients(lambda x: (weight * x).sum(), np.ones(3), np.zeros(3))
    np.testing.assert_allclose(given, weight, rtol=1e-5)


def test_a_gap_that_stays_is_returned():
    """The gradient of a step is 0 wherever it is computed."""
    given, gap = methods.integrated_gradients(lambda x: jnp.where(x[0] > 0.3, 1.0, 0.0), np.ones(1), np.zeros(1))
    assert given.sum() == 0 and gap == -1


@pytest.mark.parametrize("corner", [(0, 0), (8, 20), (20, 4)])
def test_occlusion_finds_a_planted_patch(corner):
    image = np.random.default_rng(0).uniform(0.4, 0.6, (28, 28)).astype(np.float32)
    window = slice(corner[0], corner[0] + 8), slice(corner[1], corner[1] + 8)
    image[window] = 1.0
    fallen = methods.occlusion(lambda x: x[window].mean(), image, patch_px=7, stride_px=3)
    assert fallen.shape == image.shape
    y, x = np.unravel_index(fallen.argmax(), fallen.shape)
    assert corner[0] <= y < corner[0] + 8 and corner[1] <= x < corner[1] + 8
    outside = np.ones_like(fallen, bool)
    outside[max(corner[0] - 7, 0) : corner[0] + 15, max(corner[1] - 7, 0) : corner[1] + 15] = False
    assert np.abs(fallen[outside]).max() < 1e-6 < fallen[window].mean()
