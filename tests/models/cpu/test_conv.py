"""The convolution: each way a CPU takes has the values and gradients of XLA's own, on a CPU alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax.models.cpu import conv, winograd

NUM_IMAGES, SIZE_PX = 5, 8
_SHAPES = ((NUM_IMAGES, SIZE_PX, SIZE_PX, 3), (7, 7, 3, 4))  # of the X-rays and of the largest kernel
# Limits under which the small X-rays here take a way: (few pixels, the least channels of Winograd's).
_WAYS = {"product": (SIZE_PX**2, 99), "winograd": (0, 1), "parts alone": (0, 99)}


@pytest.fixture
def two_images_a_part(monkeypatch):
    monkeypatch.setattr(conv, "_PIXELS_A_PART", 2 * SIZE_PX**2)
    take(monkeypatch, "parts alone")


def take(monkeypatch, way):
    few_pixels, winograd_channels = _WAYS[way]
    monkeypatch.setattr(conv, "_FEW_PIXELS", few_pixels)
    monkeypatch.setattr(conv, "_WINOGRAD_CHANNELS", winograd_channels)


def values_and_gradients(fn, stride: int, size_px: int = 3):
    """Output, and the gradients of the input [P, H, W, C] and the kernel, for made-up values."""
    rng = np.random.default_rng(0)
    x_PHWC, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in _SHAPES)
    kernel = kernel[:size_px, :size_px]
    output, backward = jax.vjp(lambda x, k: fn(x, k, stride, size_px // 2), x_PHWC, kernel)
    return output, *backward(jnp.asarray(rng.standard_normal(output.shape), jnp.float32))


def plain(x_PHWC, kernel, stride, padding):
    return conv._plain(stride, padding, x_PHWC, kernel)


def largest_difference(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def test_half_precision_stays_half_and_is_not_winograds(monkeypatch):
    monkeypatch.setattr(conv, "_WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(winograd, "convolve", None)  # a call would fail
    for few_pixels in (0, 64):
        monkeypatch.setattr(conv, "_FEW_PIXELS", few_pixels)
        x_PHWC, kernel = jnp.ones((2, 8, 8, 3), jnp.bfloat16), jnp.ones((3, 3, 3, 4), jnp.bfloat16)
        output, backward = jax.vjp(lambda x, k: conv.conv(x, k, 1, 1), x_PHWC, kernel)
        assert {x.dtype for x in (output, *backward(output))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("size_px", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("way", _WAYS)
def test_every_way_gives_the_convolution_and_its_gradients(monkeypatch, way, stride, size_px):
    take(monkeypatch, way)
    expected = values_and_gradients(plain, stride, size_px)
    assert largest_difference(values_and_gradients(conv.conv, stride, size_px), expected) < 1e-4


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_by_parts_are_those_of_the_whole(two_images_a_part, stride):
    assert largest_difference(values_and_gradients(conv.conv, stride), values_and_gradients(plain, stride)) < 1e-4


def test_the_tolerance_notices_a_image_left_out(two_images_a_part, monkeypatch):
    by_parts = conv._kernel_gradient_by_parts

    def without_the_last(stride, padding, x_PHWC, kernel, d_output_PHWC):
        return by_parts(stride, padding, x_PHWC, kernel, d_output_PHWC.at[-1].set(0))

    monkeypatch.setattr(conv, "_kernel_gradient_by_parts", without_the_last)
    assert largest_difference(values_and_gradients(conv.conv, 1), values_and_gradients(plain, 1)) > 1e-2


def test_only_a_cpu_sums_the_kernels_gradient_over_parts(two_images_a_part):
    x_PHWC, kernel = jnp.zeros(_SHAPES[0]), jnp.zeros((3, 3, 3, 4))
    gradient = jax.jit(jax.grad(lambda k: conv.conv(x_PHWC, k, 1, 1).sum())).trace(kernel)

    def num_parts(platform: str) -> int:
        lines = gradient.lower(lowering_platforms=(platform,)).as_text().splitlines()
        return sum("stablehlo.convolution" in line and line.endswith("-> tensor<3x3x3x4xf32>") for line in lines)

    assert (num_parts("cpu"), num_parts("cuda")) == (3, 1)


@pytest.mark.parametrize("way", ["product", "winograd"])
def test_only_a_cpu_takes_another_way(monkeypatch, way):
    take(monkeypatch, way)
    said = "stablehlo.dot_general"
    x_PHWC, kernel = jnp.zeros(_SHAPES[0]), jnp.zeros((3, 3, 3, 4))
    traced = jax.jit(lambda x, k: conv.conv(x, k, 1, 1)).trace(x_PHWC, kernel)
    on_cpu, on_gpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda"))
    assert said in on_cpu and said not in on_gpu
