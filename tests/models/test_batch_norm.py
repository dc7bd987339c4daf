"""Batch normalisation: torch's statistics, over the valid X-rays of all devices; gradients as of the plain formula."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import equations

from medfuse_jax.models import batch_norm

TOLERANCE = 1e-5


def _norm_case(num_images: int = 5, size_px: int = 4, channels: int = 3):
    rng = np.random.default_rng(0)
    x_PHWC = (2 + 3 * rng.standard_normal((num_images, size_px, size_px, channels))).astype(np.float32)
    variables = {
        "params": {"scale": np.array([0.5, 1, 2], np.float32), "bias": np.array([0.1, 0, -3], np.float32)},
        "batch_stats": {"mean": np.array([1, 0, -1], np.float32), "var": np.array([2, 1, 0.5], np.float32)},
    }
    return x_PHWC, variables


def _train_norm(variables, x_PHWC, valid_P=None, axis_name=None, ops="plain"):
    out, updated = batch_norm.BatchNorm(ops=ops).apply(
        variables, x_PHWC, True, valid_P, axis_name, mutable=["batch_stats"]
    )
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
    np.testing.assert_allclose(batch_norm.BatchNorm().apply(variables, x_PHWC), expected, atol=TOLERANCE)


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
    np.testing.assert_allclose(out, batch_norm.BatchNorm().apply(variables, x_PHWC), atol=1e-6)


_VALID = {"all": [True] * 5, "some": [True, False, True, True, False], "none": [False] * 5}


def _norm_loss(norm, x_PHWC, params):
    weight = np.cos(np.arange(x_PHWC.size)).reshape(x_PHWC.shape)
    return jnp.sum(jnp.sin(norm(x_PHWC, params)) * weight)


def _plain_norm(x_PHWC, params, valid_P, stats, pixels=None):
    """Normalise x, or other pixels, by the moments of the valid X-rays of x, written plainly."""
    valid = np.asarray(valid_P)
    mean_C, var_C = stats["mean"], stats["var"]
    if valid.any():
        mean_C, var_C = x_PHWC[valid].mean((0, 1, 2)), x_PHWC[valid].var((0, 1, 2))
    pixels = x_PHWC if pixels is None else pixels
    return (pixels - mean_C) / jnp.sqrt(var_C + batch_norm.EPSILON) * params["scale"] + params["bias"]


@pytest.mark.parametrize("ops", ["plain", "gpu"])
@pytest.mark.parametrize("which", _VALID)
def test_the_gradient_matches_a_plain_normalisation(which, ops):
    x_PHWC, variables = _norm_case()
    params, stats, valid_P = variables["params"], variables["batch_stats"], np.array(_VALID[which])

    def ours(x_PHWC, params, valid_P=valid_P):
        variables = {"params": params, "batch_stats": stats}
        return batch_norm.BatchNorm(ops=ops).apply(variables, x_PHWC, True, valid_P, mutable=["batch_stats"])[0]

    expected = jax.grad(lambda *a: _norm_loss(lambda x, p: _plain_norm(x, p, valid_P, stats), *a), (0, 1))(
        x_PHWC, params
    )
    got = jax.grad(lambda *a: _norm_loss(ours, *a), (0, 1))(x_PHWC, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE), got, expected)
    other = jax.grad(lambda *a: _norm_loss(lambda x, p: ours(x, p, ~valid_P), *a), (0, 1))(x_PHWC, params)
    assert np.abs(other[0] - expected[0]).max() > 100 * TOLERANCE, "other statistics exceed the tolerance"


@pytest.mark.parametrize("ops", ["plain", "gpu"])
def test_the_gradient_over_an_axis_matches_the_whole_batch(ops):
    x_PHWC, variables = _norm_case(num_images=4)
    params, valid_P = variables["params"], np.array([True, False, True, True])

    def loss(params, x_PHWC, valid_P, weight, axis_name=None):
        variables_ = {**variables, "params": params}
        y = batch_norm.BatchNorm(ops=ops).apply(variables_, x_PHWC, True, valid_P, axis_name, mutable=["batch_stats"])[
            0
        ]
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


@pytest.mark.parametrize(("running", "rtol"), [(0, 1e-2), (97, 1e-4)])  # in a run's first step, and later
def test_moments_of_bfloat16_in_one_pass_match_those_of_the_pixels(running, rtol):
    x_PHWC, variables = _norm_case(size_px=16)
    x_PHWC = jnp.asarray(x_PHWC + np.float32(100), jnp.bfloat16)
    before = {"mean": np.full(3, running, np.float32), "var": variables["batch_stats"]["var"]}
    valid_P = np.array(_VALID["some"])
    _, stats = _train_norm({**variables, "batch_stats": before}, x_PHWC, valid_P)
    pixels = np.asarray(x_PHWC, np.float64)[valid_P].reshape(-1, 3)
    np.testing.assert_allclose(stats["mean"], 0.9 * before["mean"] + 0.1 * pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * before["var"] + 0.1 * pixels.var(0, ddof=1), rtol=rtol)


def test_equal_pixels_have_no_variance():
    x_PHWC, variables = _norm_case()
    out, stats = _train_norm(variables, np.full_like(x_PHWC, 3.3))
    np.testing.assert_allclose(stats["var"], 0.9 * variables["batch_stats"]["var"], atol=1e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("ops", ["plain", "gpu"])
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_relu_and_shortcut_match_the_plain_formula_and_its_gradient(with_shortcut, ops):
    x_PHWC, variables = _norm_case()
    shortcut_PHWC = np.random.default_rng(1).standard_normal(x_PHWC.shape).astype(np.float32)
    stats, valid_P = variables["batch_stats"], np.array(_VALID["some"])

    def ours(x_PHWC, params, shortcut_PHWC):
        norm, args = batch_norm.BatchNorm(True, ops), {"params": params, "batch_stats": stats}
        shortcut_PHWC = shortcut_PHWC if with_shortcut else None
        return norm.apply(args, x_PHWC, True, valid_P, None, shortcut_PHWC, mutable=["batch_stats"])[0]

    def plain(x_PHWC, params, shortcut_PHWC):
        y_PHWC = _plain_norm(x_PHWC, params, valid_P, stats)
        return jnp.maximum(y_PHWC + shortcut_PHWC if with_shortcut else y_PHWC, 0)

    args = (x_PHWC, variables["params"], shortcut_PHWC)
    np.testing.assert_allclose(ours(*args), plain(*args), atol=TOLERANCE)

    def gradients(fn):
        return jax.grad(lambda *a: jnp.sum(fn(*a) * np.cos(np.arange(x_PHWC.size)).reshape(x_PHWC.shape)), (0, 1, 2))(
            *args
        )

    got, expected = gradients(ours), gradients(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=TOLERANCE), got, expected)
    assert (np.abs(got[2]).max() > 0.1) == with_shortcut


_SCALES = [-1.0, 0.0, -0.0, 0.0, -2.0, 1.5]  # the last two channels are constant, so that all of their outputs are 0


def _scales_case():
    rng = np.random.default_rng(2)
    x_PHWC = (1 + rng.standard_normal((5, 5, 6, len(_SCALES)))).astype(np.float32)
    x_PHWC[..., -2:] = 3
    params = {"scale": np.array(_SCALES, np.float32), "bias": np.array([0.2, 0.3, 0.3, -0.3, 0, 0], np.float32)}
    stats = {"mean": np.zeros(len(_SCALES), np.float32), "var": np.ones(len(_SCALES), np.float32)}
    return x_PHWC, params, stats, rng.standard_normal(x_PHWC.shape).astype(np.float32)


def _assert_equal_gradients(ours, plain, args, weight):
    """Compare outputs and gradients of the two functions of (x, params), and notice a planted error."""
    np.testing.assert_allclose(ours(*args), plain(*args), atol=TOLERANCE)
    got, expected = (jax.grad(lambda *a, fn=fn: jnp.sum(fn(*a) * weight), (0, 1))(*args) for fn in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=TOLERANCE), got, expected)
    flipped = jax.grad(lambda *a: jnp.sum(plain(*a) * -weight), (0, 1))(*args)
    assert all(np.abs(x - y).max() > 0.1 for x, y in zip(flipped[1].values(), expected[1].values(), strict=True))


@pytest.mark.parametrize("ops", ["plain", "gpu"])
def test_a_relu_passes_no_gradient_where_its_output_is_zero_whatever_the_scale(ops):
    x_PHWC, params, stats, weight = _scales_case()

    def ours(x_PHWC, params):
        args = {"params": params, "batch_stats": stats}
        return batch_norm.BatchNorm(True, ops).apply(args, x_PHWC, True, mutable=["batch_stats"])[0]

    def plain(x_PHWC, params):
        return jax.nn.relu(_plain_norm(x_PHWC, params, _VALID["all"], stats))

    _assert_equal_gradients(ours, plain, (x_PHWC, params), weight)


@pytest.mark.parametrize("ops", ["gpu", "tpu"])
@pytest.mark.parametrize("which", _VALID)
def test_normalising_and_pooling_under_one_rule_match_the_parts(which, ops):
    x_PHWC, params, stats, _ = _scales_case()
    valid_P = np.array(_VALID[which])
    weight = np.random.default_rng(3).standard_normal((5, 3, 3, len(_SCALES))).astype(np.float32)
    norm = batch_norm.BatchNorm(ops=ops, pool=True)

    def ours(x_PHWC, params):
        args = {"params": params, "batch_stats": stats}
        return norm.apply(args, x_PHWC, True, valid_P, mutable=["batch_stats"])[0]

    def pool(x_PHWC):
        return nn.max_pool(x_PHWC, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def plain(x_PHWC, params):
        # In this order, as pixels whose scale is 0 tie after it, and any of them may count in the scale's gradient.
        sign_C = jnp.where(params["scale"] < 0, -1, 1)
        return jax.nn.relu(_plain_norm(x_PHWC, params, valid_P, stats, pool(x_PHWC * sign_C) * sign_C))

    normalised_first = jax.nn.relu(pool(_plain_norm(x_PHWC, params, valid_P, stats)))
    np.testing.assert_allclose(ours(x_PHWC, params), normalised_first, atol=TOLERANCE)
    _assert_equal_gradients(ours, plain, (x_PHWC, params), weight)
    variables = {"params": params, "batch_stats": stats}
    _, updated = norm.apply(variables, x_PHWC, True, valid_P, mutable=["batch_stats"])
    _, expected = batch_norm.BatchNorm().apply(variables, x_PHWC, True, valid_P, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updated, expected)
    evaluated = jax.nn.relu(pool(batch_norm.BatchNorm().apply(variables, x_PHWC)))
    np.testing.assert_allclose(norm.apply(variables, x_PHWC), evaluated, atol=TOLERANCE)


@pytest.mark.parametrize("ops", ["plain", "gpu"])
def test_several_devices_sum_once_each_way(ops):
    x_PHWC, variables = _norm_case(num_images=4)
    x_PHWC, valid_P = jnp.asarray(x_PHWC, jnp.bfloat16), np.ones(2, bool)

    def loss(x_PHWC):
        return jnp.sum(jnp.sin(_train_norm(variables, x_PHWC, valid_P, "device", ops)[0]))

    program = jax.make_jaxpr(jax.grad(loss), axis_env=[("device", 2)])(x_PHWC[:2])
    sums = [equation for equation in equations(program.jaxpr) if equation.primitive.name.startswith("psum")]
    assert [len(equation.invars) for equation in sums] == [1, 1]
    assert sums[0].invars[0].aval.shape == (7,) and sums[1].invars[0].aval.size >= 6


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
