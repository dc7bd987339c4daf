"""The training step's cases: the step alone, fed, in parts, and as the trials of a sweep."""

import dataclasses
import sys
import time

import jax
import numpy as np
import pytest

from medfuse_jax import parallel
from medfuse_jax import step as step_lib
from medfuse_jax.bench import bootstrap, cases, cohort, feed, parts, step, trials
from medfuse_jax.models.recurrence import chunks

_TINY = {case.kind: dataclasses.replace(case, peers=()) for case in cases.preset("tiny")[0]}


def _case(kind, **changes):
    return dataclasses.replace(_TINY[kind], **{"repeats": 1, **changes})


@pytest.mark.slow
def test_record_of_the_step_is_consistent():
    case = _case("step", max_buckets=2, num_batches=6, repeats=2)
    (row,) = step.measure(case)
    plan = cohort.sample(case).plan
    assert row["samples_per_repeat"] == (plan.paired_SP >= 0).sum() + (plan.unpaired_SU >= 0).sum()
    assert row["images_per_repeat"] == (plan.paired_SP >= 0).sum()
    assert row["samples_per_s"] == pytest.approx(row["samples_per_repeat"] / row["seconds"], rel=1e-3)
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"] and len(row["seconds_all"]) == 2
    assert row["compilations"] == len(set(plan.padded_length_S)) == 2
    assert row["gb_per_repeat_device"] > 0 and row["recurrence"] == "chunks" and row["augmentation"] == "in all"
    assert row["tflop_per_s_device"] > 0 and 0 < row["share_of_matrix_rate"] < 1.5
    assert row["step_memory_gb"] > 0 and 0 < row["padded_share_run"] < row["padded_share_bucket"] < 1


def test_operations_are_those_of_the_compiled_program_where_a_plug_in_counts_no_lowered_one(monkeypatch):
    case = _case("step", method="uni_ehr", num_batches=1)
    (expected,) = step.measure(case)
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda lowered: None)
    (row,) = step.measure(case)
    # The compiled program has its own count of elementwise operations.
    assert row["tflop_per_repeat_device"] == pytest.approx(expected["tflop_per_repeat_device"], rel=0.3)
    assert row["gb_per_repeat_device"] > 0 and row["measured_roofline_s"] > 0
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda compiled: None)
    (row,) = step.measure(case)
    assert row["seconds"] > 0 and row["tflop_per_s_device"] is None and row["measured_roofline_s"] is None


@pytest.mark.parametrize("mode", ["pmap", pytest.param("shard_map", marks=pytest.mark.nightly)])
def test_two_devices_share_the_batch(mode):
    case = _case("step", method="uni_ehr", num_devices=2, parallel=mode, num_batches=1)
    (row,) = step.measure(case)
    assert row["samples_per_s_device"] == pytest.approx(row["samples_per_s"] / 2, rel=1e-2)
    assert "2 devices" in case.name and case.name.endswith("shard_map") == (mode == "shard_map")


@pytest.mark.parametrize("placement", ["stream", pytest.param("device", marks=pytest.mark.nightly)])
def test_feed_is_compared_with_the_step_alone(placement):
    rows = feed.measure(_case("feed", method="uni_ehr", placement=placement))
    assert [row["contender"] for row in rows] == ["ours", "end_to_end", "input"]
    assert all("time_over_ours" in row for row in rows[1:])


@pytest.mark.slow
def test_trials_are_compared_with_single_runs(monkeypatch):
    passes = []

    def note(name: str) -> None:
        passes.append(name)
        time.sleep(0.001)  # a time that is not rounded to 0

    monkeypatch.setattr(step.Trainer, "run", lambda trainer: note("single"))
    monkeypatch.setattr(trials.Trials, "run", lambda trials: note("together"))
    case = _case("trials", method="uni_ehr", repeats=2, num_batches=1, num_trials=3)
    ours, alone, one = trials.measure(case)
    assert ours["samples_per_s"] == pytest.approx(3 * ours["samples_per_repeat"] / ours["seconds"], rel=0.01)
    assert [row["contender"] for row in (ours, alone, one)] == ["ours", "runs_alone", "one_run"]
    assert {"1"} < set(ours["lanes_step_s"]) <= {"1", "2", "3"} and str(ours["lanes"]) in ours["lanes_step_s"]
    # A warm-up and two repeats, each with three runs, one run, and one pass of all trials.
    assert case.warm_up == 1 and passes.count("single") == 3 * (3 + 1) and passes.count("together") == 3


@pytest.mark.nightly
def test_lanes_may_be_given():
    case = _case("trials", method="uni_ehr", num_batches=1, num_trials=3, lanes=2)
    ours, one = trials.measure(case)
    assert (ours["lanes"], ours["lanes_step_s"], one["contender"]) == (2, {}, "one_run")
    assert "2 at once" in case.name


def test_threads_read_what_grain_reads(monkeypatch):
    case = _case("feed", num_batches=3)
    sample = cohort.sample(case)
    read = [list(feed._batches(case, sample))]
    monkeypatch.setitem(sys.modules, "grain.python", None)
    read.append(list(feed._batches(case, sample)))
    assert len(read[0]) == 3
    jax.tree.map(np.testing.assert_array_equal, *read)


@pytest.mark.nightly
def test_parts_are_compared_with_the_whole_step():
    case = _case("parts", num_batches=1)
    rows = parts.measure(case)
    assert [row["contender"] for row in rows] == ["ours", *parts.PARTS]
    sample = cohort.sample(case)
    longest = max(int(batch["length"].max()) for batch in sample.batches)
    assert {row["time_steps_per_repeat"] for row in rows} == {chunks.time_steps_run(longest)}


def test_half_of_the_image_encoder_excludes_the_later_stages():
    """Its gradient reaches the first stage, but not the second."""
    case = _case("parts", num_batches=1)
    sample = cohort.sample(case)
    options = step.step_options(case, sample.data)
    batch = parts.with_prepared_images(sample.batches[0], case)
    gradient = jax.jit(parts.part_fns(options)["cxr_half"])(step.fresh_state(options), batch)
    largest = {name: max(float(np.abs(x).max()) for x in jax.tree.leaves(g)) for name, g in gradient.items()}
    assert largest["stage1_block0"] > 0 == largest["stage2_block0"]


@pytest.mark.nightly
def test_batches_of_shards_are_measured(shards):
    from medfuse_jax.data import dataset

    case = _case("step", method="uni_ehr", num_batches=1)
    data = dataset.open_dataset(shards, "pheno", use_cxr=False)
    (row,) = step.measure(case, data)
    assert row["steps_per_epoch"] == -(-len(data.splits["train"]) // case.batch_size)
    assert 0 < row["samples_per_repeat"] <= case.batch_size and row["images_per_repeat"] == 0


@pytest.mark.parametrize(
    "method",
    ["medfuse", *(pytest.param(m, marks=pytest.mark.nightly) for m in ("uni_cxr", "uni_ehr", "mmtm3", "daft3"))],
)
def test_steps_of_the_gpu_preset_lower_for_a_gpu(method, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sizes = dict(_TINY["step"].sizes) | {"resnet_stage_sizes": (1, 1, 1, 1)}
    changes = {"precision": "bfloat16", "parallel": "shard_map", "num_batches": 1, "sizes": tuple(sizes.items())}
    case = _case("step", method=method, **changes)
    sample = cohort.sample(case)
    options = step.step_options(case, sample.data)
    make_state = step_lib.state_maker(options)
    state = jax.eval_shape(lambda: make_state(jax.random.key(0), 1e-4))
    compiled = parallel.compile_train(options, case.parallel, parallel.devices(1))
    text = compiled.trace(state, sample.batches[0], jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    assert "bf16" in text and ("stablehlo.convolution" in text) == sample.data.use_cxr


@pytest.mark.parametrize("peers", [(), cases.PEERS])
def test_sklearn_loop_is_scaled_to_all_resamples(monkeypatch, peers):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(bootstrap, "NUM_BOOTSTRAP", 50)
    ours, *others = bootstrap.measure(_case("bootstrap", num_stays=1000, peers=peers))
    assert ours["num_bootstrap"] == 50 and [row["contender"] for row in others] == ["sklearn_loop"] * bool(peers)
    for loop in others:
        assert loop["scaled_from_resamples"] == 1 and loop["time_over_ours"]["median"] > 1
