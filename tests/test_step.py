"""The step gives the same numbers under pmap, under shard_map and on one device, and ignores padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_cases import TINIER, equations

from medfuse_jax import augment, losses, optim, parallel
from medfuse_jax import config as config_lib
from medfuse_jax import step as step_lib
from medfuse_jax.models import registry

_D, _B, _T, _P, _K = 2, 4, 9, 2, 3
# Plain gradients: Adam would hide a gradient that is n times too large. One object, so that equal options are equal.
_PLAIN = optax.identity()


def _merge(batch: dict) -> dict:
    """Fold the device axis of a batch into its rows: [D, B, ...] -> [D * B, ...]."""
    num_devices, rows = batch["row_id"].shape
    merged = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
    if "image_row" in batch:  # a row number within the device
        first_D1 = rows * np.arange(num_devices)[:, None]
        merged["image_row"] = (batch["image_row"] + first_D1).reshape(-1)
    return merged


def _batch(seed=0):
    """Return a batch for two devices of four rows: X-rays for rows 0, 2 and 1; one padded row, one empty X-ray slot."""
    rng = np.random.default_rng(seed)
    return {
        "label": (rng.random((_D, _B, _K)) < 0.4).astype(np.float32),
        "valid": np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool),
        "row_id": np.arange(8, dtype=np.int32).reshape(_D, _B),
        "length": np.array([[9, 3, 5, 2], [4, 6, 1, 0]], np.int32),
        "ehr": rng.normal(size=(_D, _B, _T, 76)).astype(np.float32),
        "image": rng.integers(0, 256, (_D, _P, 64, 64), np.uint8),
        "image_row": np.array([[0, 2], [1, 0]], np.int32),
        "image_mask": np.array([[True, True], [True, False]]),
    }


def _options(optimizer=None, method="medfuse", **model_options):
    return step_lib.StepOptions(
        model=registry.build(method, _K, **(TINIER | model_options)),
        optimizer=optimizer or _PLAIN,
        image=augment.ImageOptions(**config_lib.section("image", resize_px=64, crop_px=56)),
        weights=losses.Weights(**config_lib.section("loss")),
        mean_F=(0.5,) * 76,
        std_F=(2.0,) * 76,
    )


@pytest.fixture(scope="module")
def fresh():
    return step_lib.state_maker(_options())(jax.random.key(0, impl="rbg"), 0.5)


def test_a_fresh_optimizer_state_is_the_optimizers_own(fresh):
    jax.tree.map(np.testing.assert_array_equal, fresh.opt_state, _options().optimizer.init(fresh.params))


@functools.cache
def _train_fn(options, mode, num_devices):
    return parallel.compile_train(options, mode, parallel.devices(num_devices))


def _run(options, state, mode, num_devices, batch, steps=2):
    if num_devices == 1:
        batch = {name: np.asarray(x)[None] for name, x in _merge(batch).items()}
    on = parallel.devices(num_devices)
    state = parallel.replicate(jax.tree.map(jnp.copy, state), on)
    train_fn, eval_fn = _train_fn(options, mode, num_devices), parallel.compile_eval(options, mode, on)
    for sent in parallel.prefetch([batch] * steps, on):
        state, metrics = train_fn(state, sent, jax.random.key(1))
    scores, loss = eval_fn(state, next(parallel.prefetch([batch], on)))
    outputs = {"params": state.params, "stats": state.batch_stats, "metrics": metrics}
    outputs |= {"scores": scores.reshape(8, _K), "loss": loss.reshape(8)}
    return jax.tree.map(np.asarray, outputs)


@pytest.fixture(scope="module")
def on_one_device(fresh):
    return _run(_options(), fresh, "shard_map", 1, _batch())


def test_one_device_sums_nothing(fresh):
    """XLA would copy all gradients for a sum over one device."""
    batch = _batch()

    def num_sums(num_devices: int) -> int:
        sent = {name: np.asarray(x)[None] for name, x in _merge(batch).items()} if num_devices == 1 else batch
        step = _train_fn(_options(), "pmap", num_devices)
        return step.lower(fresh, sent, jax.random.key(1)).as_text().count("stablehlo.all_reduce")

    assert num_sums(1) == 0 < num_sums(2)


def test_devices_sum_no_single_number_but_the_loss(fresh):
    """XLA sends the loss with the gradients; the counts of rows go together, in one message."""
    step = functools.partial(step_lib.train_step, _options(), axis="device")
    part = {name: x[0] for name, x in _batch().items()}
    program = jax.make_jaxpr(step, axis_env=[("device", 2)])(fresh, part, jax.random.key(1))
    sums = [equation for equation in equations(program.jaxpr) if equation.primitive.name.startswith("psum")]
    assert len(sums) > 50 and sum(equation.invars[0].aval.shape == () for equation in sums) == 1


def test_float32_products_are_not_rounded_on_an_accelerator(fresh):
    """Accelerators would otherwise round the factors to 10 bits; bfloat16 products keep that default."""
    batch = _merge({name: jnp.asarray(x) for name, x in _batch().items()})

    def rounded(dtype):
        step = jax.jit(lambda s, b: step_lib.train_step(_options(dtype=dtype), s, b, jax.random.key(0)))
        text = step.trace(fresh, batch).lower(lowering_platforms=("cuda",)).as_text()
        products = [x for x in text.splitlines() if "stablehlo.dot_general" in x or "stablehlo.convolution" in x]
        assert len(products) > 20
        return [x for x in products if "HIGHEST" not in x]

    assert not rounded(jnp.float32) and rounded(jnp.bfloat16)


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_two_devices_give_the_numbers_of_one(fresh, on_one_device, mode):
    """Two steps of SGD on raw gradients, with augmentation, dropout and batch statistics."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        _run(_options(), fresh, mode, 2, _batch()),
        on_one_device,
    )


@pytest.mark.parametrize(
    ("method", "mode", "fields"),
    [
        pytest.param("metra", "pmap", {}, marks=pytest.mark.nightly),
        pytest.param("drfuse", "shard_map", {}, marks=pytest.mark.slow),
        pytest.param("shaspec", "pmap", {}, marks=pytest.mark.nightly),
        pytest.param("healnet", "shard_map", {}, marks=pytest.mark.nightly),
        pytest.param("m3care", "pmap", {}, marks=pytest.mark.slow),
        pytest.param("medfuse", "pmap", {"ehr_kind": "transformer", "cxr_kind": "resnet50"}, marks=pytest.mark.nightly),
    ],
)
def test_two_devices_give_the_numbers_of_one_with_further_losses_and_a_bank(method, mode, fields):
    """Two steps: in the second one, M3Care has neighbours. A padded row and an empty slot change nothing."""
    options, batch = _options(method=method, **fields), _batch()
    state = step_lib.state_maker(options)(jax.random.key(0, impl="rbg"), 0.5)
    one = _run(options, state, "shard_map", 1, batch)
    batch["ehr"][1, 3], batch["image"][1, 1], batch["label"][1, 3] = np.nan, 255, 1
    two = _run(options, state, mode, 2, batch)
    for out in (one, two):
        out["scores"] = out["scores"][:7]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), two, one)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one["params"], state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_the_tolerance_would_show_a_gradient_twice_too_large(fresh, on_one_device):
    doubled = _run(_options(), fresh.replace(learning_rate=2 * fresh.learning_rate), "shard_map", 1, _batch())
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), doubled["params"], on_one_device["params"])
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_padding_values_change_no_number(fresh, on_one_device):
    batch = _batch()
    batch["ehr"][1, 3] = np.nan  # the padded row
    batch["ehr"][0, 1, 3:] = np.nan  # beyond a stay's length
    batch["image"][1, 1] = 255  # the empty X-ray slot
    batch["label"][1, 3] = 1
    out = _run(_options(), fresh, "shard_map", 1, batch)
    jax.tree.map(np.testing.assert_array_equal, out["params"], on_one_device["params"])
    np.testing.assert_array_equal(out["scores"][:7], on_one_device["scores"][:7])
    assert out["loss"][7] == 0


def test_an_x_ray_changes_only_its_own_row_in_evaluation(fresh):
    batch, other = _batch(), _batch()
    other["image"][0, 1] = 255 - other["image"][0, 1]
    eval_fn = parallel.compile_eval(_options(), "pmap", parallel.devices(2))
    scores = [np.asarray(eval_fn(fresh, b)[0]).reshape(8, _K) for b in (batch, other)]
    changed = np.abs(scores[0] - scores[1]).max(1) > 0
    np.testing.assert_array_equal(np.flatnonzero(changed), [2])


def test_the_learning_rate_is_an_argument_not_a_constant(fresh):
    half, full = (
        _run(_options(), fresh.replace(learning_rate=jnp.float32(rate)), "shard_map", 1, _batch(), steps=1)["params"]
        for rate in (0.25, 0.5)
    )
    assert _train_fn(_options(), "shard_map", 1)._cache_size() == 1
    jax.tree.map(lambda p, h, f: np.testing.assert_allclose(2 * (h - p), f - p, atol=1e-6), fresh.params, half, full)


def test_adam_lowers_the_loss_of_a_batch(fresh):
    options = _options(optim.adam(0.999), dropout=0.0)
    state = fresh.replace(opt_state=options.optimizer.init(fresh.params), learning_rate=jnp.float32(1e-2))
    step = jax.jit(lambda s, b, k: step_lib.train_step(options, s, b, k))
    batch, losses = _merge(_batch()), []
    for _ in range(150):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
