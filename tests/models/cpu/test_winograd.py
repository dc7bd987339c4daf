"""Winograd's convolution matches the plain one to 1e-5, for X-rays of any size and number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax.models.cpu import conv, winograd

TOLERANCE = 1e-5  # of the largest value


def plain(x_PHWC, kernel):
    return jax.lax.conv_general_dilated(
        x_PHWC, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


def random_case(num_images=3, height=6, width=6, num_in=32, num_out=48):
    """Return X-rays after a ReLU, a kernel as initialised, and the output's gradient."""
    rng = np.random.default_rng(0)
    x_PHWC = np.maximum(rng.standard_normal((num_images, height, width, num_in)), 0)
    kernel = rng.standard_normal((3, 3, num_in, num_out)) * np.sqrt(2 / (9 * num_out))
    d_output_PHWD = rng.standard_normal((num_images, height, width, num_out))
    return [jnp.asarray(x, jnp.float32) for x in (x_PHWC, kernel, d_output_PHWD)]


def differences(x_PHWC, kernel, d_output_PHWD) -> tuple[float, float]:
    """Return the relative errors of the output and of the kernel's gradient."""
    expected, backward = jax.vjp(plain, x_PHWC, kernel)
    ours = winograd.convolve(x_PHWC, kernel), winograd.kernel_gradient(x_PHWC, d_output_PHWD)
    pairs = zip(ours, (expected, backward(d_output_PHWD)[1]), strict=True)
    return tuple(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def clear_traces():
    winograd.convolve.clear_cache()
    winograd.kernel_gradient.clear_cache()


@pytest.fixture
def fresh_traces():
    """Clear the traces around tests that change what is traced."""
    clear_traces()
    yield
    clear_traces()


@pytest.fixture
def two_images_per_part(monkeypatch, fresh_traces):
    monkeypatch.setattr(winograd, "_PIXELS_PER_PART", 2 * 6 * 6)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 7), (5, 8), (1, 1), (56, 2)])
def test_images_of_any_size(height, width):
    assert max(differences(*random_case(height=height, width=width))) < TOLERANCE


@pytest.mark.parametrize("num_images", [1, 2, 3, 5, 7, 8])
def test_any_number_of_images_in_parts(two_images_per_part, num_images):
    assert max(differences(*random_case(num_images))) < TOLERANCE


def test_parts_need_the_least_padding(two_images_per_part):
    shapes = {n: winograd._parts(jnp.zeros((n, 6, 6, 1))).shape[:2] for n in (1, 3, 5, 7, 16)}
    assert shapes == {1: (1, 1), 3: (1, 3), 5: (2, 3), 7: (4, 2), 16: (8, 2)}


def test_as_exact_as_the_plain_convolution_at_resnet_sizes():
    """The error against float64 is within twice the plain convolution's."""
    x_PHWC, kernel, _ = random_case(num_images=2, height=14, width=14, num_in=256, num_out=256)
    patches = jnp.pad(x_PHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = sum(
        np.asarray(patches[:, i : i + 14, j : j + 14], np.float64) @ np.asarray(kernel[i, j], np.float64)
        for i in range(3)
        for j in range(3)
    )
    ours, xla = (np.abs(np.asarray(fn(x_PHWC, kernel)) - exact).max() for fn in (winograd.convolve, plain))
    assert ours < 2 * xla


@pytest.mark.parametrize("transform", ["_FILTER", "_inputs_1d", "_outputs_1d"])
def test_a_wrong_transform_exceeds_the_tolerance(monkeypatch, fresh_traces, transform):
    right = getattr(winograd, transform)
    wrong = (
        right * 1.0001
        if transform == "_FILTER"
        else lambda x, **axis: [right(x, **axis)[0] * 1.0001, *right(x, **axis)[1:]]
    )
    monkeypatch.setattr(winograd, transform, wrong)
    assert max(differences(*random_case(num_images=4, height=4))) > TOLERANCE


def test_no_tiles_are_kept_from_the_forward_to_the_backward_pass(monkeypatch):
    """XLA would share them between both passes: four times the X-rays' memory for each layer."""
    x_PHWC, kernel, _ = random_case(num_images=4, height=14, width=14, num_in=64, num_out=64)

    def memory() -> int:
        def loss(kernels, x_PHWC):
            for kernel in kernels:
                x_PHWC = jax.nn.relu(conv.conv(x_PHWC, kernel, 1, 1))
            return x_PHWC.sum()

        compiled = jax.jit(jax.grad(loss)).lower([kernel] * 4, x_PHWC).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    monkeypatch.setattr(conv, "_MIN_FLOP", 0)
    with_dependency = memory()
    monkeypatch.setattr(winograd, "_after", lambda x_PHWC, _: x_PHWC)
    clear_traces()
    without = memory()
    monkeypatch.undo()
    clear_traces()
    assert with_dependency < 0.8 * without


def test_a_nan_gradient_stays_nan():
    x_PHWC, _, d_output_PHWD = random_case()
    assert jnp.isnan(winograd.kernel_gradient(x_PHWC, d_output_PHWD.at[-1, 0, 0, 0].set(jnp.nan))).any()
