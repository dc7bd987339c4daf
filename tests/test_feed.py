"""Placements: batches gathered on the device equal those read from the shards, and train to the same numbers."""

import dataclasses
from types import SimpleNamespace

import feature_cases
import jax
import numpy as np
import optax
import pytest
from refusals import refused

from medfuse_jax import feed, parallel, schema
from medfuse_jax import run as run_lib
from medfuse_jax.data import batches, device_store
from medfuse_jax.runtime import hosts

_TOLERANCE = 1e-5
_STAGES = (1, 1)  # half of what a ResNet takes to compile
_PLAIN = optax.identity()  # one object, so that equal options are equal, and runs share a program


@pytest.fixture
def config(tiny_config):
    tiny_config.model.resnet_stage_sizes = _STAGES
    return tiny_config


def _open(config, num_devices=2):
    """Open a run with plain gradient descent: Adam would hide a gradient that is n times too large."""
    run = run_lib.open_run(config)
    options = dataclasses.replace(run.options, optimizer=_PLAIN)
    return dataclasses.replace(run, options=options, devices=run.devices[:num_devices])


def _epoch(run, start=0, stops=None, state=None, one_call=None):
    """Return (state, losses) of the first epoch from step `start` on."""
    plan = run.train_plan(epoch=1)
    open_feed = feed.open_feed(feed.place(run), one_call)
    state = parallel.replicate(run.fresh_state() if state is None else state, run.devices)
    losses = []
    for moved, loss in open_feed(state, plan, start, stops or [len(plan)], jax.random.key(3)):
        state = moved
        losses.append(np.atleast_1d(loss))
    return jax.tree.map(np.asarray, state), losses


@pytest.fixture(scope="module")
def streamed(shared_tiny_config):
    config = shared_tiny_config.copy_and_resolve_references()
    config.placement, config.model.resnet_stage_sizes = "stream", _STAGES
    return _epoch(_open(config))


def _assert_equal(a, b):
    np.testing.assert_allclose(np.concatenate(a[1]), np.concatenate(b[1]), atol=_TOLERANCE, rtol=_TOLERANCE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=_TOLERANCE), a[0].params, b[0].params)


@pytest.mark.parametrize(
    ("method", "encoder", "one_call"),
    [
        ("medfuse", "lstm", True),
        ("metra", "lstm", False),
        ("healnet", "lstm", False),
        ("medfuse", "transformer", False),
    ],
)
def test_steps_of_attention_over_padding_have_their_own_padded_length(config, method, encoder, one_call):
    config.method, config.placement, config.model.ehr_encoder = method, "device", encoder
    opened = feed.open_feed(feed.place(_open(config)), one_call=True)
    assert opened.func is (feed._calls if one_call else feed._steps)


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_placement_on_the_device_trains_to_the_same_numbers_as_the_stream(
    config, streamed, mode, one_call, num_parts, monkeypatch
):
    config.placement, config.parallel = "device", mode
    monkeypatch.setattr(feed, "choose_parts", lambda run, splits: num_parts)
    placed = _epoch(_open(config), one_call=one_call)
    assert len(placed[1]) == (1 if one_call else len(streamed[1])) and len(streamed[1]) > 2
    _assert_equal(placed, streamed)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_features_of_x_rays_train_to_the_same_numbers_in_both_placements(config, tmp_path, num_parts, monkeypatch):
    names = feature_cases.names(config.data.dir, "pheno")
    config.data.cxr_features = str(feature_cases.write(tmp_path / "features.npz", names))
    config.model.cxr_encoder, config.placement, config.learning_rate = "features", "stream", 0.5
    streamed = _epoch(_open(config))
    config.placement = "device"
    monkeypatch.setattr(feed, "choose_parts", lambda run, splits: num_parts)
    _assert_equal(_epoch(_open(config), one_call=True), streamed)
    other = _open(config)
    zeros = {s: dataclasses.replace(of, feature_JE=0 * of.feature_JE) for s, of in other.dataset.cxr_features.items()}
    other = dataclasses.replace(other, dataset=dataclasses.replace(other.dataset, cxr_features=zeros))
    moved = np.abs(_epoch(other)[0].params["projection"]["kernel"] - streamed[0].params["projection"]["kernel"])
    assert moved.max() > 20 * _TOLERANCE


@pytest.mark.parametrize("weighting", [pytest.param("hour", marks=pytest.mark.slow), "stay"])
def test_hourly_training_has_the_same_numbers_on_one_device_and_on_two_and_in_both_placements(
    hourly_config, weighting, monkeypatch
):
    """Raw gradients of the first steps; two devices hold the images together."""
    hourly_config.loss.weighting, hourly_config.batch_size = weighting, 64
    if weighting == "stay":
        hourly_config.method = "uni_ehr"
    hourly_config.placement = "stream"
    streamed = _epoch(_open(hourly_config, 1))
    hourly_config.placement = "device"
    monkeypatch.setattr(feed, "choose_parts", lambda run, splits: 2)
    placed = _epoch(_open(hourly_config, 2))
    assert len(placed[1]) == len(streamed[1]) > 1
    _assert_equal(placed, streamed)


@pytest.mark.parametrize(
    ("task", "method"),
    [
        pytest.param("pheno", "medfuse", marks=pytest.mark.nightly),
        pytest.param("pheno", "medfuse_attention", marks=pytest.mark.nightly),
        pytest.param("decompensation", "medfuse_attention", marks=pytest.mark.slow),
    ],
)
def test_all_images_train_to_the_same_numbers_on_one_device_and_on_two_and_in_both_placements(
    images_config, task, method, monkeypatch
):
    """Raw gradients of the first steps; two devices hold the images together."""
    images_config.task, images_config.method, images_config.batch_size = task, method, 64
    images_config.placement, images_config.parallel = "stream", "shard_map"
    streamed = _epoch(_open(images_config, 1))
    images_config.placement, images_config.parallel = "device", "pmap"
    monkeypatch.setattr(feed, "choose_parts", lambda run, splits: 2)
    placed = _epoch(_open(images_config, 2))
    assert len(placed[1]) == len(streamed[1]) > 1
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
    config.method, config.placement, config.parallel = "uni_ehr", "device", "shard_map"
    run = feed.place(_open(config))
    held, plan = run.held["train"], run.train_plan(epoch=1)
    fn = feed.compile_epoch(run.options, "shard_map", run.devices, num_parts=1)
    rows = parallel.divide(device_store.deal(plan, range(len(plan)), 2), run.devices)
    state = parallel.replicate(run.fresh_state(), run.devices)
    for start, stop in ((0, 1), (1, 3)):
        arguments = (held.shared, held.divided, rows, jax.random.key(0), start, stop, int(plan.padded_length_S.max()))
        state, loss_S = fn(state, *arguments)
        assert np.flatnonzero(np.asarray(loss_S)).tolist() == list(range(start, stop))
    assert fn._cache_size() == 1 and int(state.step) == 3


@pytest.mark.parametrize(
    ("task", "method", "num_devices", "num_parts"),
    [
        ("pheno", "medfuse", 1, 1),
        ("pheno", "medfuse", 2, 1),
        ("pheno", "medfuse", 2, 2),
        ("pheno", "medfuse_attention", 2, 1),
        ("pheno", "uni_ehr", 2, 1),
        ("radiology", "uni_cxr", 2, 2),
        ("decompensation", "medfuse", 2, 2),
        ("mortality", "medfuse", 2, 2),
        ("decompensation", "medfuse_attention", 2, 1),
        ("length_of_stay", "uni_ehr", 1, 1),
    ],
)
def test_gathered_batches_equal_those_read(config, task, method, num_devices, num_parts, monkeypatch, hourly_shards):
    config.task, config.method = task, method
    if schema.TASKS[task].hourly:
        config.data.dir = str(hourly_shards)
    if task == "mortality" or (task, method) == ("decompensation", "medfuse_attention"):
        config.data.images, config.data.dir = "all", str(hourly_shards)
    if method == "medfuse_attention":
        config.model.modalities = "static"
    monkeypatch.setattr(feed, "choose_parts", lambda run, splits: num_parts)
    run = feed.place(_open(config, num_devices))
    for split, plans in (("train", [run.train_plan(epoch=1)]), ("val", run.eval_plans("val", run.selects("val")))):
        held = run.held[split]
        assert held.divided.get("image", np.zeros(0)).shape[:1] in ((num_devices,), (0,))
        size = sum(x.nbytes for x in held.shared.values()) + sum(x.nbytes // num_devices for x in held.divided.values())
        assert size == device_store.num_bytes(run.dataset, split, run.selects(split), num_parts)
        for plan in plans:
            read = batches.batches(run.dataset, split, plan, num_devices=num_devices)
            for gathered, batch in zip(run.batches(split, plan), read, strict=True):
                assert gathered.keys() == batch.keys()
                for name in batch:
                    np.testing.assert_array_equal(gathered[name], batch[name], err_msg=name)
                    assert gathered[name].dtype == batch[name].dtype, name


def test_a_device_holds_its_own_images_alone(config):
    """As in one of two processes: the other one's images are not read."""
    config.task, config.method = "radiology", "uni_cxr"
    run = _open(config)
    include_N = run.selects("train")
    numbers, reads = np.flatnonzero(include_N), []

    class Records:
        def __getitem__(self, i):
            reads.append(i)
            return run.dataset.splits["train"][i]

    dataset = dataclasses.replace(run.dataset, splits={"train": Records()})
    _, images = device_store.load(dataset, "train", include_N, num_parts=2, parts=[1])
    assert reads == numbers[1::2].tolist() and images.keys() == {1}
    for place, i in enumerate(reads):
        np.testing.assert_array_equal(images[1][place], run.dataset.splits["train"][i]["image"])


def test_unused_data_is_not_held(config):
    whole, paired, ehr_only = (
        _open(_with(config, **c)) for c in ({}, {"train_stays": "paired"}, {"method": "uni_ehr"})
    )
    size = {name: _bytes(run) for name, run in (("whole", whole), ("paired", paired), ("ehr_only", ehr_only))}
    assert size["paired"] < size["whole"] and size["ehr_only"] < size["whole"]
    assert device_store.load(ehr_only.dataset, "train", ehr_only.selects("train"))[1] == {}


def _with(config, train_stays="partial", method="medfuse"):
    changed = config.copy_and_resolve_references()
    changed.data.train_stays, changed.method = train_stays, method
    return changed


def _bytes(run):
    return device_store.num_bytes(run.dataset, "train", run.selects("train"))


def _devices(*sizes):
    return [SimpleNamespace(memory_stats=lambda n=n: {"bytes_limit": n}) for n in sizes]


def test_the_fewest_devices_that_have_the_memory_hold_the_images(config, monkeypatch):
    run = _open(config)
    needed = [
        sum(device_store.num_bytes(run.dataset, split, run.selects(split), n) for split in ("train", "val"))
        for n in (1, 2)
    ]
    assert needed[1] < needed[0]
    for placement, fraction in device_store.MAX_FRACTION.items():
        config.placement = placement
        for num_parts, size in ((1, needed[0]), (2, needed[1])):
            enough = dataclasses.replace(run, devices=_devices(10 * size, size / fraction))
            assert feed.choose_parts(enough) == num_parts
        with monkeypatch.context() as patch:  # a host that cannot hold what it reads for both
            patch.setattr(hosts, "memory_bytes", lambda: 3 * needed[1])
            assert feed.choose_parts(enough) == (0 if placement == "auto" else 2)
        too_small = dataclasses.replace(run, devices=_devices(1e12, needed[1] / fraction - 8))
        if placement == "auto":
            assert feed.choose_parts(too_small) == 0
        else:
            with refused(field="config.placement", value="device"):
                feed.choose_parts(too_small)
    config.placement = "stream"
    assert feed.choose_parts(run) == 0


def test_a_cpu_holds_what_is_small_or_what_it_is_told_to(config, monkeypatch):
    run = _open(config)
    assert feed.choose_parts(run) == 1
    monkeypatch.setattr(device_store, "_CPU_BYTES", 1e6)
    assert feed.choose_parts(run) == 0 and feed.place(run) is run
    config.placement = "device"
    assert feed.choose_parts(run) == 1


def test_two_alternating_datasets_must_be_streamed(config):
    run = _open(config)
    beside = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, cxr_dataset=run.dataset))
    assert feed.choose_parts(beside) == 0
    config.placement = "device"
    with refused(field="config.placement"):
        feed.choose_parts(beside)


def test_the_loop_lowers_for_a_gpu(config):
    config.placement, config.precision = "device", "bfloat16"
    run = _open(config, 1)
    plan, include_N = run.train_plan(epoch=1), run.selects("train")
    shared, divided = device_store.shapes(run.dataset, "train", include_N, num_parts=1, num_devices=1)
    rows = device_store.deal(plan, range(len(plan)), 1)
    fn = feed.compile_epoch(run.options, "shard_map", run.devices, num_parts=1)
    state, longest = run.abstract_state(), int(plan.padded_length_S.max())
    traced = fn.trace(state, shared, divided, rows, jax.random.key(0), 0, 2, longest)
    assert "stablehlo.while" in traced.lower(lowering_platforms=("cuda",)).as_text()
