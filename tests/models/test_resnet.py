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


@pytest.mark.parametrize("ops", ["plain", "cpu", "gpu", "tpu"])
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


@pytest.fixture(scope="module")
def tiny_50():
    net = resnet.ResNet(stage_sizes=(1, 2, 1, 1), width=4, kind="resnet50")
    image_PHWC = np.random.default_rng(0).standard_normal((3, 32, 32, 1)).astype(np.float32)
    return net, fast_jit(net.init)(jax.random.key(0), image_PHWC), image_PHWC


def test_the_stages_of_a_resnet_50_are_four_times_as_wide(tiny_50):
    net, variables, image_PHWC = tiny_50
    shapes = [
        jax.eval_shape(lambda v, i=i: net.apply(v, i, image_PHWC, method="until"), variables) for i in range(1, 5)
    ]
    assert [s.shape[1:] for s in shapes] == [(8, 8, 16), (4, 4, 32), (2, 2, 64), (1, 1, 128)]
    assert resnet.num_features("resnet50", net.stage_sizes, net.width) == 128
    block = variables["params"]["stage2_block0"]
    assert [block[f"conv{n}"]["kernel"].shape for n in (1, 2, 3)] == [(1, 1, 16, 8), (3, 3, 8, 8), (1, 1, 8, 32)]


def _num_params(kind: str) -> int:
    net = resnet.ResNet(kind=kind)
    made = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32))
    return sum(leaf.size for leaf in jax.tree.leaves(made["params"]))


def test_parameter_counts_are_torchvisions_without_the_classifier():
    assert _num_params("resnet34") == 21_797_672 - (512 * 1000 + 1000)
    assert _num_params("resnet50") == 25_557_032 - (2048 * 1000 + 1000)


def test_the_3x3_convolution_of_a_bottleneck_has_the_stride():
    """He et al. give it to the first 1x1 convolution, and an output then reads every second pixel of five by five."""
    block, x_PHWC = resnet.BottleneckBlock(2, stride=2), np.random.default_rng(1).standard_normal((1, 6, 6, 3), "f4")
    variables = block.init(jax.random.key(0), x_PHWC)
    read = fast_jit(jax.grad(lambda x: block.apply(variables, x)[0, 1, 1].sum()))(x_PHWC)
    pixels = np.abs(np.asarray(read)[0]).sum(axis=-1) > 0
    assert pixels.sum() == 9 and pixels[1:4, 1:4].all()


@pytest.mark.parametrize("ops", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_every_form_of_a_resnet_50_gives_the_same_features_and_gradients(tiny_50, ops):
    _assert_same_as_plain(tiny_50, ops)


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


@pytest.mark.parametrize("ops", ["cpu", "gpu", "tpu"])
def test_every_form_gives_the_same_features_and_gradients(tiny, ops):
    _assert_same_as_plain(tiny, ops)


def _assert_same_as_plain(tiny, ops: str):
    net, variables, image_PHWC = tiny

    def run(ops):
        def loss(params):
            variables_ = {**variables, "params": params}
            features_PE, _ = net.clone(ops=ops).apply(variables_, image_PHWC, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(features_PE))

        return fast_jit(jax.value_and_grad(loss))(variables["params"])

    plain, other = run("plain"), run(ops)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_less(np.linalg.norm(a - b), 2e-3 * np.linalg.norm(a)), plain, other
    )
