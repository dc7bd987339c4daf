"""The X-ray encoder: torch's padding, the folded stem, batch statistics of the valid X-rays only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import equations, fast_jit

from medfuse_jax.models import resnet

TOLERANCE = 1e-5


def _numpy_conv(x_PHWC: np.ndarray, kernel: np.ndarray, stride: int, padding: tuple[int, int]) -> np.ndarray:
    """Convolve with a square kernel, pixel by pixel."""
    size = len(kernel)
    x_PHWC = np.pad(x_PHWC, ((0, 0), padding, padding, (0, 0)))
    count = (x_PHWC.shape[1] - size) // stride + 1
    out = np.zeros((len(x_PHWC), count, count, kernel.shape[-1]), np.float32)
    for row in range(count):
        for column in range(count):
            y, x = row * stride, column * stride
            out[:, row, column] = np.einsum("phwc,hwcd->pd", x_PHWC[:, y : y + size, x : x + size], kernel)
    return out


@pytest.mark.parametrize(("size_px", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_convolutions_pad_as_torch_does(size_px, stride):
    rng = np.random.default_rng(0)
    x_PHWC = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    kernel = rng.standard_normal((size_px, size_px, 3, 4)).astype(np.float32)
    got = resnet.Conv(4, size_px, stride).apply({"params": {"kernel": kernel}}, x_PHWC)
    pad = size_px // 2
    np.testing.assert_allclose(got, _numpy_conv(x_PHWC, kernel, stride, (pad, pad)), atol=TOLERANCE)
    if (size_px, stride) == (3, 2):  # flax's SAME
        assert np.abs(got - _numpy_conv(x_PHWC, kernel, stride, (0, 1))).max() > 100 * TOLERANCE


def _stem(kernel, image_PHWC):
    return np.asarray(resnet.StemConv(kernel.shape[-1]).apply({"params": {"kernel": kernel}}, image_PHWC))


def _stem_case():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((7, 7, 3, 4)).astype(np.float32)
    return kernel, rng.random((2, 16, 16, 1)).astype(np.float32)


def test_one_channel_equals_three_equal_ones():
    kernel, grey_PHW1 = _stem_case()
    three = _stem(kernel, np.repeat(grey_PHW1, 3, axis=-1))
    np.testing.assert_allclose(_stem(kernel, grey_PHW1), three, atol=1e-4)
    np.testing.assert_allclose(three, _numpy_conv(np.repeat(grey_PHW1, 3, axis=-1), kernel, 2, (3, 3)), atol=1e-4)


def test_grey_and_ones_equal_standardised_channels_borders_included():
    kernel, grey_PHW1 = _stem_case()
    standardised_PHWC = (grey_PHW1 - np.array(resnet.IMAGENET_MEAN)) / np.array(resnet.IMAGENET_STD)
    expected = _stem(kernel, standardised_PHWC.astype(np.float32))
    got = _stem(kernel, np.concatenate([grey_PHW1, np.ones_like(grey_PHW1)], axis=-1))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    # A constant instead of the ones channel is right inside and wrong at the border.
    ones_as_bias = _stem(kernel, np.concatenate([grey_PHW1, np.zeros_like(grey_PHW1)], axis=-1))
    ones_as_bias = ones_as_bias + (expected - ones_as_bias)[:, 4, 4][:, None, None]
    np.testing.assert_allclose(ones_as_bias[:, 3:5, 3:5], expected[:, 3:5, 3:5], atol=1e-3)
    assert np.abs(ones_as_bias - expected)[:, 0].max() > 0.1


def _norm_case(num_images: int = 5, size_px: int = 4, channels: int = 3):
    rng = np.random.default_rng(0)
    x_PHWC = (2 + 3 * rng.standard_normal((num_images, size_px, size_px, channels))).astype(np.float32)
    variables = {
        "params": {"scale": np.array([0.5, 1, 2], np.float32), "bias": np.array([0.1, 0, -3], np.float32)},
        "batch_stats": {"mean": np.array([1, 0, -1], np.float32), "var": np.array([2, 1, 0.5], np.float32)},
    }
    return x_PHWC, variables


def _train_norm(variables, x_PHWC, valid_P=None, axis_name=None):
    out, updated = resnet.BatchNorm().apply(variables, x_PHWC, True, valid_P, axis_name, mutable=["batch_stats"])
    return out, updated["batch_stats"]


def test_batch_statistics_match_torch():
    x_PHWC, variables = _norm_case()
    out, stats = _train_norm(variables, x_PHWC)
    pixels = x_PHWC.reshape(-1, 3).astype(np.float64)
    params = variables["params"]
    expected = (x_PHWC - pixels.mean(0)) / np.sqrt(pixels.var(0) + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)
    before = variables["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * before["mean"] + 0.1 * pixels.mean(0), atol=TOLERANCE)
    np.testing.assert_allclose(stats["var"], 0.9 * before["var"] + 0.1 * pixels.var(0, ddof=1), atol=TOLERANCE)
    # the biased variance would fail
    assert np.abs(stats["var"] - (0.9 * before["var"] + 0.1 * pixels.var(0))).max() > 100 * TOLERANCE


def test_evaluation_uses_the_running_statistics():
    x_PHWC, variables = _norm_case()
    params, stats = variables["params"], variables["batch_stats"]
    expected = (x_PHWC - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(resnet.BatchNorm().apply(variables, x_PHWC), expected, atol=TOLERANCE)


def test_empty_slots_do_not_enter_the_statistics():
    x_PHWC, variables = _norm_case()
    valid_P = np.array([True, False, True, True, False])
    out, stats = _train_norm(variables, x_PHWC, valid_P)
    out_alone, stats_alone = _train_norm(variables, x_PHWC[valid_P])
    np.testing.assert_allclose(out[valid_P], out_alone, atol=TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stats, stats_alone)
    _, stats_of_all = _train_norm(variables, x_PHWC)
    assert np.abs(stats["mean"] - stats_of_all["mean"]).max() > 1e-3


def test_without_an_image_the_running_statistics_are_used_and_kept():
    x_PHWC, variables = _norm_case()
    out, stats = _train_norm(variables, x_PHWC, np.zeros(5, bool))
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
    np.testing.assert_allclose(out, resnet.BatchNorm().apply(variables, x_PHWC), atol=1e-6)


_VALID = {"all": [True] * 5, "some": [True, False, True, True, False], "none": [False] * 5}


def _norm_loss(norm, x_PHWC, params):
    weight = np.cos(np.arange(x_PHWC.size)).reshape(x_PHWC.shape)
    return jnp.sum(jnp.sin(norm(x_PHWC, params)) * weight)


def _plain_norm(x_PHWC, params, valid_P, stats):
    """Normalise by the moments of the valid X-rays, written plainly."""
    valid = np.asarray(valid_P)
    mean_C, var_C = stats["mean"], stats["var"]
    if valid.any():
        mean_C, var_C = x_PHWC[valid].mean((0, 1, 2)), x_PHWC[valid].var((0, 1, 2))
    return (x_PHWC - mean_C) / jnp.sqrt(var_C + resnet.BATCH_NORM_EPSILON) * params["scale"] + params["bias"]


@pytest.mark.parametrize("which", _VALID)
def test_the_gradient_matches_a_plain_normalisation(which):
    x_PHWC, variables = _norm_case()
    params, stats, valid_P = variables["params"], variables["batch_stats"], np.array(_VALID[which])

    def ours(x_PHWC, params, valid_P=valid_P):
        variables = {"params": params, "batch_stats": stats}
        return resnet.BatchNorm().apply(variables, x_PHWC, True, valid_P, mutable=["batch_stats"])[0]

    expected = jax.grad(lambda *a: _norm_loss(lambda x, p: _plain_norm(x, p, valid_P, stats), *a), (0, 1))(
        x_PHWC, params
    )
    got = jax.grad(lambda *a: _norm_loss(ours, *a), (0, 1))(x_PHWC, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE), got, expected)
    other = jax.grad(lambda *a: _norm_loss(lambda x, p: ours(x, p, ~valid_P), *a), (0, 1))(x_PHWC, params)
    assert np.abs(other[0] - expected[0]).max() > 100 * TOLERANCE, "other statistics exceed the tolerance"


def test_the_gradient_over_an_axis_matches_the_whole_batch():
    x_PHWC, variables = _norm_case(num_images=4)
    params, valid_P = variables["params"], np.array([True, False, True, True])

    def loss(params, x_PHWC, valid_P, weight, axis_name=None):
        variables_ = {**variables, "params": params}
        y = resnet.BatchNorm().apply(variables_, x_PHWC, True, valid_P, axis_name, mutable=["batch_stats"])[0]
        return jnp.sum(jnp.sin(y) * weight)

    weight = np.cos(np.arange(x_PHWC.size)).reshape(x_PHWC.shape)
    whole = jax.grad(loss, (0, 1))(params, x_PHWC, valid_P, weight)

    def part(x_PHWC, valid_P, weight):
        d_params, d_x_PHWC = jax.grad(loss, (0, 1))(params, x_PHWC, valid_P, weight, "device")
        return jax.lax.psum(d_params, "device"), d_x_PHWC

    halves = (x.reshape(2, 2, *x.shape[1:]) for x in (x_PHWC, valid_P, weight))
    d_params, d_x = jax.vmap(part, axis_name="device")(*halves)
    np.testing.assert_allclose(d_x.reshape(x_PHWC.shape), whole[1], atol=TOLERANCE, rtol=TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-4, rtol=TOLERANCE), d_params, whole[0])


def test_variance_survives_a_large_mean():
    x_PHWC, variables = _norm_case()
    _, stats = _train_norm(variables, x_PHWC + np.float32(30_000))
    expected = 0.9 * variables["batch_stats"]["var"] + 0.1 * x_PHWC.reshape(-1, 3).var(0, ddof=1)
    np.testing.assert_allclose(stats["var"], expected, rtol=1e-2)
    pixels = x_PHWC.reshape(-1, 3) + np.float32(30_000)
    cancelling_C = np.mean(pixels**2, axis=0, dtype=np.float32) - np.mean(pixels, axis=0, dtype=np.float32) ** 2
    assert np.abs(0.1 * (cancelling_C - x_PHWC.reshape(-1, 3).var(0))).max() > 0.01 * expected.max()


def test_statistics_over_an_axis_match_the_whole_batch():
    x_PHWC, variables = _norm_case(num_images=6)
    valid_P = np.array([True, True, False, True, False, False])  # uneven: 2 X-rays on one device, 1 on the other

    def loss(params, x_PHWC, valid_P, axis_name):
        out, stats = _train_norm({**variables, "params": params}, x_PHWC, valid_P, axis_name)
        return jnp.sum(jnp.where(valid_P[:, None, None, None], jnp.sin(out), 0)), stats

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (whole, stats), gradients = run(variables["params"], x_PHWC, valid_P, None)
    split = jax.vmap(lambda x, valid: run(variables["params"], x, valid, "device"), axis_name="device")
    (parts, part_stats), part_gradients = split(x_PHWC.reshape(2, 3, 4, 4, 3), valid_P.reshape(2, 3))
    np.testing.assert_allclose(parts.sum(), whole, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-6), part_stats, stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, atol=1e-4), part_gradients[0], gradients[0])
    np.testing.assert_allclose(part_gradients[1].reshape(x_PHWC.shape), gradients[1], atol=1e-5)


@pytest.fixture(scope="module")
def tiny():
    net = resnet.ResNet(stage_sizes=(1, 2, 1, 1), width=4)
    image_PHWC = np.random.default_rng(0).standard_normal((3, 32, 32, 1)).astype(np.float32)
    return net, fast_jit(net.init)(jax.random.key(0), image_PHWC), image_PHWC


def test_shapes_and_stages(tiny):
    net, variables, image_PHWC = tiny

    @fast_jit
    def run(variables):
        def stages(net):
            maps = [net.stem(image_PHWC)]
            for i in range(1, 5):
                maps.append(net.stage(i, maps[-1]))
            return maps, net.until(2, image_PHWC)

        return net.apply(variables, image_PHWC), *net.apply(variables, method=stages)

    features_PE, maps, until_2 = run(variables)
    assert [m.shape[1:] for m in maps] == [(8, 8, 4), (8, 8, 4), (4, 4, 8), (2, 2, 16), (1, 1, 32)]
    np.testing.assert_allclose(features_PE, np.mean(maps[-1], axis=(1, 2)), atol=1e-6)
    np.testing.assert_array_equal(until_2, maps[2])
    assert set(variables["params"]) >= {"stem_conv", "stem_norm", "stage1_block0", "stage2_block1", "stage4_block0"}


@pytest.mark.parametrize("ops", ["plain", "cpu"])
def test_the_stem_pools_as_torch_does(ops):
    net = resnet.ResNet(width=1, ops=ops)
    kernel = np.zeros((7, 7, 3, 1), np.float32)
    kernel[3, 3, 0] = 1  # takes every second pixel
    variables = {
        "params": {"stem_conv": {"kernel": kernel}, "stem_norm": {"scale": np.ones(1), "bias": np.zeros(1)}},
        "batch_stats": {"stem_norm": {"mean": np.zeros(1), "var": np.full(1, 1 - 1e-5, np.float32)}},
    }
    image_PHWC = np.random.default_rng(0).random((1, 16, 16, 1)).astype(np.float32)
    got = net.apply(variables, image_PHWC, method="stem")

    def pool(before: int, after: int) -> np.ndarray:
        padded = np.pad(image_PHWC[:, ::2, ::2], ((0, 0), (before, after), (before, after), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        return windows[:, ::2, ::2].max(axis=(-2, -1))

    np.testing.assert_allclose(got, pool(1, 1)[:, :4, :4], atol=1e-6)
    assert np.abs(got - pool(0, 1)).max() > 0.01  # SAME


def test_frozen_statistics_are_used_and_kept_in_training(tiny):
    _, variables, image_PHWC = tiny
    frozen = resnet.ResNet(stage_sizes=(1, 2, 1, 1), width=4, frozen_stats=True)

    @fast_jit
    def run(variables):
        trained, updated = frozen.apply(variables, image_PHWC, train=True, mutable=["batch_stats"])
        return trained, updated["batch_stats"], frozen.apply(variables, image_PHWC)

    trained_PE, stats, evaluated_PE = run(variables)
    np.testing.assert_allclose(trained_PE, evaluated_PE, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])


def test_bfloat16_compute_keeps_float32_statistics(tiny):
    exact_net, variables, image_PHWC = tiny
    rounded_net = resnet.ResNet(stage_sizes=(1, 2, 1, 1), width=4, dtype=jnp.bfloat16)

    @fast_jit
    def run(variables):
        _, updated = rounded_net.apply(variables, image_PHWC, train=True, mutable=["batch_stats"])
        return exact_net.apply(variables, image_PHWC), rounded_net.apply(variables, image_PHWC), updated

    exact_PE, rounded_PE, updated = run(variables)
    assert rounded_PE.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype(jnp.float32)}
    assert 1e-5 < np.linalg.norm(exact_PE - rounded_PE) / np.linalg.norm(exact_PE) < 0.03


def _custom_rules(net, variables, image_PHWC) -> set[str]:
    def loss(params):
        variables_ = {**variables, "params": params}
        return net.apply(variables_, image_PHWC, train=True, mutable=["batch_stats"])[0].sum()

    names = {e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(loss))(variables["params"]).jaxpr)}
    forward = {e.primitive.name for e in equations(jax.make_jaxpr(net.apply)(variables, image_PHWC).jaxpr)}
    return {name for name in names | forward if "custom_v" in name or "platform" in name or "custom_lin" in name}


def test_the_plain_program_has_no_custom_rule(tiny):
    net, variables, image_PHWC = tiny
    assert not _custom_rules(net, variables, image_PHWC)
    assert _custom_rules(net.clone(ops="cpu"), variables, image_PHWC)


def test_both_ops_give_the_same_features_and_gradients(tiny):
    net, variables, image_PHWC = tiny

    def run(ops):
        def loss(params):
            variables_ = {**variables, "params": params}
            features_PE, _ = net.clone(ops=ops).apply(variables_, image_PHWC, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(features_PE))

        return fast_jit(jax.value_and_grad(loss))(variables["params"])

    plain, cpu = run("plain"), run("cpu")
    jax.tree.map(lambda a, b: np.testing.assert_array_less(np.linalg.norm(a - b), 2e-3 * np.linalg.norm(a)), plain, cpu)
