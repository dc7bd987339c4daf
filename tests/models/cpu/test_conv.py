"""Each form of the CPU convolution has the values and gradients of XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import equations

from medfuse_jax.models.cpu import conv, winograd

NUM_IMAGES, SIZE_PX = 5, 8
_SHAPES = ((NUM_IMAGES, SIZE_PX, SIZE_PX, 3), (7, 7, 3, 4))  # X-rays, and the largest kernel
# Limits that choose each form for these small X-rays: (_FEW_PIXELS, _WINOGRAD_CHANNELS).
_FORMS = {"product": (SIZE_PX**2, 99), "winograd": (0, 1), "parts": (0, 99)}


@pytest.fixture
def two_images_per_part(monkeypatch):
    monkeypatch.setattr(conv, "_PIXELS_PER_PART", 2 * SIZE_PX**2)
    choose(monkeypatch, "parts")


def choose(monkeypatch, form):
    few_pixels, winograd_channels = _FORMS[form]
    monkeypatch.setattr(conv, "_MIN_FLOP", 0)
    monkeypatch.setattr(conv, "_FEW_PIXELS", few_pixels)
    monkeypatch.setattr(conv, "_WINOGRAD_CHANNELS", winograd_channels)


def values_and_gradients(fn, stride: int, size_px: int = 3):
    """Return the output and the gradients of the input [P, H, W, C] and the kernel, for random values."""
    rng = np.random.default_rng(0)
    x_PHWC, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in _SHAPES)
    kernel = kernel[:size_px, :size_px]
    output, backward = jax.vjp(lambda x, k: fn(x, k, stride, size_px // 2), x_PHWC, kernel)
    return output, *backward(jnp.asarray(rng.standard_normal(output.shape), jnp.float32))


def plain(x_PHWC, kernel, stride, padding):
    return conv._xla_conv(stride, padding, x_PHWC, kernel)


def largest_difference(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def test_half_precision_stays_half_and_avoids_winograd(monkeypatch):
    monkeypatch.setattr(conv, "_MIN_FLOP", 0)
    monkeypatch.setattr(conv, "_WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(winograd, "convolve", None)  # a call would fail
    for few_pixels in (0, 64):
        monkeypatch.setattr(conv, "_FEW_PIXELS", few_pixels)
        x_PHWC, kernel = jnp.ones((2, 8, 8, 3), jnp.bfloat16), jnp.ones((3, 3, 3, 4), jnp.bfloat16)
        output, backward = jax.vjp(lambda x, k: conv.conv(x, k, 1, 1), x_PHWC, kernel)
        assert {x.dtype for x in (output, *backward(output))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("form", "size_px"), [("product", 1), ("product", 3), ("winograd", 3), ("parts", 1), ("parts", 3), ("parts", 7)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_form_gives_the_convolution_and_its_gradients(monkeypatch, form, stride, size_px):
    choose(monkeypatch, form)
    expected = values_and_gradients(plain, stride, size_px)
    assert largest_difference(values_and_gradients(conv.conv, stride, size_px), expected) < 1e-4


def test_a_small_convolution_is_xlas_own(monkeypatch):
    monkeypatch.setattr(conv, "_xla_conv", None)
    with pytest.raises(TypeError):
        values_and_gradients(conv.conv, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_parts_match_the_whole(two_images_per_part, stride):
    assert largest_difference(values_and_gradients(conv.conv, stride), values_and_gradients(plain, stride)) < 1e-4


def test_leaving_out_an_image_exceeds_the_tolerance(two_images_per_part, monkeypatch):
    in_parts = conv._kernel_gradient_in_parts

    def without_the_last(stride, padding, x_PHWC, kernel, d_output_PHWC):
        return in_parts(stride, padding, x_PHWC, kernel, d_output_PHWC.at[-1].set(0))

    monkeypatch.setattr(conv, "_kernel_gradient_in_parts", without_the_last)
    assert largest_difference(values_and_gradients(conv.conv, 1), values_and_gradients(plain, 1)) > 1e-2


def test_vmap_over_kernels_unrolls_into_sequential_convolutions():
    x_PHWC, kernels = jnp.ones(_SHAPES[0]), jnp.ones((2, 3, 3, 3, 4))
    gradient = jax.vmap(jax.grad(lambda k: conv.conv(x_PHWC, k, 1, 1).sum()))
    convolutions = [e for e in equations(jax.make_jaxpr(gradient)(kernels).jaxpr) if "conv_general" in e.primitive.name]
    assert convolutions and all(e.params["feature_group_count"] == 1 for e in convolutions)
    assert all(e.params["batch_group_count"] == 1 for e in convolutions)
    together = gradient(kernels)
    np.testing.assert_allclose(together[1], jax.grad(lambda k: conv.conv(x_PHWC, k, 1, 1).sum())(kernels[1]), rtol=1e-5)
