"""Placements: batches gathered on the device equal those read from the shards, and train to the same numbers."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import refused

from medfuse_jax import feed, parallel
from medfuse_jax import run as run_lib
from medfuse_jax.data import batches, device_store

_TOLERANCE = 1e-5


@pytest.fixture
def config(tiny_config):
    return tiny_config


def _open(config, num_devices=2):
    """Open a run with plain gradient descent: Adam would hide a gradient that is n times too large."""
    run = run_lib.open_run(config)
    options = dataclasses.replace(run.options, optimizer=optax.identity())
    return dataclasses.replace(run, options=options, devices=run.devices[:num_devices])


def _epoch(run, start=0, stops=None, state=None, one_call=None):
    """Return (state, losses) of the first epoch from step `start` on."""
    plan = run.train_plan(epoch=1)
    how = {"mode": run.config.parallel, "placement": run.config.placement, "one_call": one_call}
    open_feed = feed.open_feed(run.dataset, run.selects("train"), run.options, run.devices, **how)
    state = parallel.replicate(run.fresh_state() if state is None else state, run.devices)
    losses = []
    for moved, loss in open_feed(state, plan, start, stops or [len(plan)], jax.random.key(3)):
        state = moved
        losses.append(np.atleast_1d(loss))
    return jax.tree.map(np.asarray, state), losses


@pytest.fixture(scope="module")
def streamed(shared_tiny_config):
    return _epoch(_open(shared_tiny_config))


def _assert_equal(a, b):
    np.testing.assert_allclose(np.concatenate(a[1]), np.concatenate(b[1]), atol=_TOLERANCE, rtol=_TOLERANCE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=_TOLERANCE), a[0].params, b[0].params)


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_placement_on_the_device_trains_to_the_same_numbers_as_the_stream(config, streamed, mode, one_call):
    config.placement, config.parallel = "device", mode
    placed = _epoch(_open(config), one_call=one_call)
    assert len(placed[1]) == (1 if one_call else len(streamed[1])) and len(streamed[1]) > 2
    _assert_equal(placed, streamed)


def test_the_tolerance_would_show_another_stay_in_one_row(config, streamed, monkeypatch):
    deal = device_store.deal

    def wrong(plan, steps, num_devices):
        rows = deal(plan, steps, num_devices)
        record = rows["record"].copy()
        record[0, 0, 0] = (record[0, 0, 0] + 1) % len(plan)
        return rows | {"record": record}

    monkeypatch.setattr(device_store, "deal", wrong)
    config.placement = "device"
    with pytest.raises(AssertionError):
        _assert_equal(_epoch(_open(config), one_call=True), streamed)


def test_an_epoch_resumes_where_it_stopped(config, streamed):
    config.placement = "device"
    run = _open(config)
    half = _epoch(run, stops=[2], one_call=True)
    assert int(half[0].step) == 2
    rest = _epoch(run, start=2, state=half[0], one_call=True)
    _assert_equal((rest[0], half[1] + rest[1]), streamed)


def test_one_program_serves_any_part_of_an_epoch(config):
    config.method, config.placement = "uni_ehr", "device"
    run = _open(config)
    fn = feed.compile_on_device(run.options, "shard_map", run.devices, in_loop=True)
    held = parallel.replicate(device_store.load(run.dataset, "train", run.selects("train")), run.devices)
    plan = run.train_plan(epoch=1)
    rows = parallel.divide(device_store.deal(plan, range(len(plan)), 2), run.devices)
    state = parallel.replicate(run.fresh_state(), run.devices)
    for start, stop in ((0, 1), (1, 3)):
        state, loss_S = fn(state, held, rows, jax.random.key(0), start, stop, int(plan.padded_length_S.max()))
        assert np.flatnonzero(np.asarray(loss_S)).tolist() == list(range(start, stop))
    assert fn._cache_size() == 1 and int(state.step) == 3


@pytest.mark.parametrize(
    ("task", "method", "num_devices"),
    [
        ("pheno", "medfuse", 1),
        ("pheno", "medfuse", 2),
        ("pheno", "medfuse_attention", 2),
        ("pheno", "uni_ehr", 2),
        ("radiology", "uni_cxr", 2),
    ],
)
def test_gathered_batches_equal_those_read(config, task, method, num_devices):
    config.task, config.method = task, method
    if method == "medfuse_attention":
        config.model.modalities = "static"
    run = _open(config, num_devices)
    plan, include_N = run.train_plan(epoch=1), run.selects("train")
    held = device_store.load(run.dataset, "train", include_N)
    assert sum(x.nbytes for x in held.values()) == device_store.num_bytes(run.dataset, "train", include_N)
    rows = device_store.deal(plan, range(len(plan)), num_devices)
    gather = jax.jit(device_store.gather, static_argnums=2)
    for step, batch in enumerate(batches.batches(run.dataset, "train", plan, num_devices=num_devices)):
        for d in range(num_devices):
            gathered = gather(held, {name: x[d, step] for name, x in rows.items()}, int(plan.padded_length_S[step]))
            assert gathered.keys() == batch.keys()
            for name in batch:
                np.testing.assert_array_equal(gathered[name], batch[name][d], err_msg=name)
                assert gathered[name].dtype == batch[name].dtype, name


def test_unused_data_is_not_held(config):
    whole, paired, ehr_only = (
        _open(_with(config, **c)) for c in ({}, {"train_stays": "paired"}, {"method": "uni_ehr"})
    )
    size = {name: _bytes(run) for name, run in (("whole", whole), ("paired", paired), ("ehr_only", ehr_only))}
    assert size["paired"] < size["whole"] and size["ehr_only"] < size["whole"]
    assert "image" not in device_store.load(ehr_only.dataset, "train", ehr_only.selects("train"))


def _with(config, train_stays="partial", method="medfuse"):
    changed = config.copy_and_resolve_references()
    changed.data.train_stays, changed.method = train_stays, method
    return changed


def _bytes(run):
    return device_store.num_bytes(run.dataset, "train", run.selects("train"))


def test_a_split_larger_than_device_memory_is_refused(config):
    run = _open(config)
    include_N = run.selects("train")
    needed = device_store.num_bytes(run.dataset, "train", include_N)
    small, large = (SimpleNamespace(memory_stats=lambda n=n: {"bytes_limit": n}) for n in (needed, 2 * needed))
    device_store.check_fits(run.dataset, "train", include_N, [large, large])
    with refused(field="config.placement", value="device"):
        device_store.check_fits(run.dataset, "train", include_N, [large, small])


def test_two_alternating_datasets_must_be_streamed(config):
    run = _open(config)
    beside = dataclasses.replace(run.dataset, cxr_dataset=run.dataset)
    with refused(field="config.placement"):
        feed.check_placement(beside, run.selects("train"), run.devices, "device")


def test_the_loop_lowers_for_a_gpu(config):
    config.placement, config.precision = "device", "bfloat16"
    run = _open(config, 1)
    plan = run.train_plan(epoch=1)
    held = jax.eval_shape(
        lambda: jax.tree.map(jnp.asarray, device_store.load(run.dataset, "train", run.selects("train")))
    )
    rows = device_store.deal(plan, range(len(plan)), 1)
    fn = feed.compile_on_device(run.options, "shard_map", run.devices, in_loop=True)
    arguments = (run.abstract_state(), held, rows, jax.random.key(0), 0, 2, int(plan.padded_length_S.max()))
    assert "stablehlo.while" in fn.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
