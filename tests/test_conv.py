"""The convolution: its gradients by parts are those of the whole, on a CPU alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax.models import conv

NUM_FILMS, SIZE_PX = 5, 8
_SHAPES = ((NUM_FILMS, SIZE_PX, SIZE_PX, 3), (3, 3, 3, 4))  # of the films and of the kernel


@pytest.fixture
def two_films_a_part(monkeypatch):
    monkeypatch.setattr(conv, "_PIXELS_A_PART", 2 * SIZE_PX**2)


def gradients(fn, stride: int):
    """Those of the input [P, H, W, C] and the kernel, for made-up values."""
    rng = np.random.default_rng(0)
    x_PHWC, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in _SHAPES)
    output, backward = jax.vjp(lambda x, k: fn(x, k, stride, 1), x_PHWC, kernel)
    return backward(jnp.asarray(rng.standard_normal(output.shape), jnp.float32))


def plain(x_PHWC, kernel, stride, padding):
    return conv._conv(stride, padding, x_PHWC, kernel)


def largest_difference(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_by_parts_are_those_of_the_whole(two_films_a_part, stride):
    assert largest_difference(gradients(conv.conv, stride), gradients(plain, stride)) < 1e-4


def test_the_tolerance_notices_a_film_left_out(two_films_a_part, monkeypatch):
    by_parts = conv._gradients_by_parts

    def without_the_last(stride, padding, x_PHWC, kernel, d_output_PHWC):
        return by_parts(stride, padding, x_PHWC, kernel, d_output_PHWC.at[-1].set(0))

    monkeypatch.setattr(conv, "_gradients_by_parts", without_the_last)
    assert largest_difference(gradients(conv.conv, 1), gradients(plain, 1)) > 1e-2


def test_only_a_cpu_sums_the_kernels_gradient_over_parts(two_films_a_part):
    x_PHWC, kernel = (jnp.zeros(shape) for shape in _SHAPES)
    gradient = jax.jit(jax.grad(lambda k: conv.conv(x_PHWC, k, 1, 1).sum())).trace(kernel)

    def num_parts(platform: str) -> int:
        lines = gradient.lower(lowering_platforms=(platform,)).as_text().splitlines()
        return sum("stablehlo.convolution" in line and line.endswith("-> tensor<3x3x3x4xf32>") for line in lines)

    assert (num_parts("cpu"), num_parts("cuda")) == (3, 1)
