"""The benchmark: what it imports, what its numbers mean, and that every preset can be run."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_prep.synthetic import cohort as synthetic_cohort
from medfuse_jax import parallel, schema
from medfuse_jax.bench import bootstrap, cases, clock, cohort, lstm, machine, parts, step, sweep, table, trials
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.models import ehr_encoder, registry
from medfuse_jax.models.recurrence import chunks, pallas
from medfuse_jax.runtime import compilation
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep.costs import Costs

_ROOT = Path(__file__).parents[2]
_TINY = {case.kind: dataclasses.replace(case, peers=()) for case in cases.preset("tiny")[0]}

# Finds no module of these names, as on a machine that has none of them.
_WITHOUT = """
import runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

ABSENT = {absent!r}
sys.meta_path = [Without(finder) for finder in sys.meta_path]
sys.argv = ["bench"] + {arguments!r}
runpy.run_module("medfuse_jax.bench", run_name="__main__")
"""
_NOT_NEEDED = (
    *("ml_collections", "orbax", "grain", "polars", "sklearn", "tensorflow_datasets", "array_record"),
    *("torch", "matplotlib", "PIL", "tqdm", "tensorboardX", "data_prep"),
)


def _bench(*arguments: str, absent=()) -> subprocess.CompletedProcess:
    code = _WITHOUT.format(absent=tuple(absent), arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True)


def test_it_runs_with_jax_flax_optax_and_numpy_alone(tmp_path):
    json_file = tmp_path / "new" / "bench.json"
    done = _bench("--repeats=1", "--only=^(step|feed|lstm)", f"--json={json_file}", absent=_NOT_NEEDED)
    assert done.returncode == 0, done.stderr
    assert "grain is not installed" in done.stderr
    rows = [json.loads(line) for line in json_file.read_text().splitlines()]
    assert [(row["settings"]["kind"], row["contender"]) for row in rows] == [
        ("step", "ours"),
        ("lstm", "ours"),
        ("lstm", "plain_scan"),
    ]
    assert all(row["environment"]["jax"] == jax.__version__ and row["input"] == "made up" for row in rows)
    assert str(tmp_path) not in json_file.read_text(), "a record names no folder"
    assert done.stdout.count("samples/s") == 3


def test_the_block_on_imports_blocks():
    done = _bench(absent=["jax"])
    assert done.returncode and "No module named 'jax'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset=h20"], "did you mean 'h200'"),
        (["--only=nothing like it"], "matches no case"),
        (["--only=("], "not a regular expression"),
        (["--json=/dev/null/x.json"], "cannot be written"),
        (["--repeats=0"], "repeats"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, said):
    done = _bench(*arguments, absent=["jax"])  # and it is said before jax is asked for
    assert done.returncode and said in done.stderr.lower() and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def step_rows():
    case = dataclasses.replace(_TINY["step"], max_buckets=2, num_batches=6, repeats=2)
    return case, step.measure(case)


def test_a_record_of_the_step_adds_up(step_rows):
    case, (row,) = step_rows
    plan = cohort.train_plan(case, cohort.dataset(case))
    sampled = cohort.sample(plan, cohort.dataset(case).lengths("train"), 6)
    assert row["samples_per_repeat"] == (sampled.paired_SP >= 0).sum() + (sampled.unpaired_SU >= 0).sum()
    assert row["images_per_repeat"] == (sampled.paired_SP >= 0).sum()
    assert row["samples_per_s"] == pytest.approx(row["samples_per_repeat"] / row["seconds"], rel=1e-3)
    assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"] and len(row["seconds_all"]) == 2
    assert row["compilations"] == len(set(sampled.padded_length_S)) == 2
    assert row["tflop_per_s_device"] > 0 and 0 < row["share_of_matrix_rate"] < 1.5
    assert row["step_memory_gb"] > 0 and 0 < row["padded_share_run"] < row["padded_share_bucket"] < 1


@pytest.mark.parametrize("mode", ["pmap", pytest.param("jit", marks=pytest.mark.slow)])
def test_two_devices_share_the_batch(mode):
    case = dataclasses.replace(_TINY["step"], method="uni_ehr", num_devices=2, parallel=mode, repeats=1, num_batches=1)
    (row,) = step.measure(case)
    assert row["samples_per_s_device"] == pytest.approx(row["samples_per_s"] / 2, rel=1e-2)
    assert "2 devices" in case.name and case.name.endswith("jit") == (mode == "jit")


@pytest.mark.parametrize("placement", ["stream", pytest.param("device", marks=pytest.mark.slow)])
def test_feeding_is_set_beside_the_step_alone(placement):
    rows = step.measure(dataclasses.replace(_TINY["feed"], method="uni_ehr", repeats=1, placement=placement))
    assert [row["contender"] for row in rows] == ["ours", "end_to_end", "input"]
    assert all("time_over_ours" in row for row in rows[1:])


@pytest.mark.slow
def test_trials_are_set_beside_runs_alone(monkeypatch):
    passes = []
    monkeypatch.setattr(step.Trainer, "run", lambda trainer: passes.append("alone"))
    monkeypatch.setattr(trials.Trials, "run", lambda trials: passes.append("together"))
    case = dataclasses.replace(_TINY["trials"], method="uni_ehr", repeats=2, num_batches=1, num_trials=3)
    ours, alone, one = trials.measure(case)
    assert [row["contender"] for row in (ours, alone, one)] == ["ours", "runs_alone", "one_run"]
    assert {"1"} < set(ours["lanes_step_s"]) <= {"1", "2", "3"} and str(ours["lanes"]) in ours["lanes_step_s"]
    # A warm-up and two repeats: three runs and one run, beside one pass of all.
    assert case.warm_up == 1 and passes.count("alone") == 3 * (3 + 1) and passes.count("together") == 3


def test_what_a_sweep_says_of_its_costs_is_read():
    compiled = compilation.Count(seconds=2.0)
    costs = Costs(64, startup_s=8.1, encode_s=1.5, compiled=compiled, input_s=0.4, train_s=3.5, steps=12)
    assert sweep.once(f"epoch 1/1\n{costs.summary()}\n") == (8.1, 1.5, 2.0, 0.4, 12.0, 3.5)


@pytest.mark.slow
def test_every_kind_of_case_runs_by_the_command_and_its_records_make_a_page(tmp_path):
    """With the peers in torch where it is installed, and the first step's processes."""
    records = tmp_path / "results" / "2026-01-01_tiny" / "tiny.json"
    bench = ["medfuse_jax.bench", "--preset=tiny", "--repeats=1", f"--json={records}"]
    page = ["medfuse_jax.bench.page", f"--results={tmp_path / 'results'}", f"--out={tmp_path / 'PAGE.md'}"]
    for command in (bench, page):
        done = subprocess.run([sys.executable, "-m", *command], cwd=_ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    assert {row["settings"]["kind"] for row in rows} == {case.kind for case in cases.preset("tiny")[0]}
    peers = {row["contender"] for row in rows} & set(cases.PEERS)
    assert peers == (set(cases.PEERS) if importlib.util.find_spec("torch") else set())
    text = (tmp_path / "PAGE.md").read_text()
    assert all(f"| {row['case']} | " in text for row in rows)


@pytest.mark.slow
def test_the_parts_of_a_step_are_set_beside_it():
    case = dataclasses.replace(_TINY["parts"], repeats=1, num_batches=1)
    rows = parts.measure(case)
    assert [row["contender"] for row in rows] == ["ours", *parts.PARTS]
    data = cohort.dataset(case)
    plan = cohort.sample(cohort.train_plan(case, data), data.lengths("train"), 1)
    longest = data.lengths("train")[np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)].max()
    assert {row["time_steps_per_repeat"] for row in rows} == {chunks.steps_run(longest)}


def test_half_the_image_encoder_is_half():
    """Its gradient reaches the first stage, and not the second."""
    case = _TINY["parts"]
    data = cohort.dataset(case)
    batches = cohort.collate_all(data, cohort.sample(cohort.train_plan(case, data), data.lengths("train"), 1), 1)
    options = step.step_options(case, data)
    state, batch = step.fresh_state(options), parts._with_prepared_images(batches[0], case)
    gradient = parts._parts(options)["cxr_half"](state, batch)
    largest = {name: max(float(np.abs(x).max()) for x in jax.tree.leaves(g)) for name, g in gradient.items()}
    assert largest["stage1_block0"] > 0 == largest["stage2_block0"]


@pytest.mark.slow
def test_batches_of_shards_are_measured_as_made_up_ones_are(shards):
    from medfuse_jax.data import batches

    case = dataclasses.replace(_TINY["step"], method="uni_ehr", repeats=1, num_batches=1)
    data = batches.open_dataset(shards, "pheno", use_cxr=False)
    (row,) = step.measure(case, data)
    assert row["steps_per_epoch"] == -(-len(data.splits["train"]) // case.batch_size)
    assert 0 < row["samples_per_repeat"] <= case.batch_size and row["images_per_repeat"] == 0


def test_contenders_take_turns_and_the_first_changes():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = clock.interleave(runs, warm_up=1, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_slower_contender_has_the_larger_time():
    seconds = clock.interleave({"fast": lambda: None, "slow": lambda: time.sleep(0.02)}, 0, 3)
    assert clock.ratio(seconds["slow"], seconds["fast"])["median"] > 2
    ratio = clock.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert ratio == {"median": 3.0, "min": 2.0, "max": 4.0, "of_best": 2.0}
    assert clock.summary([3.0, 1.0, 2.0])["seconds"] == 2.0


def test_compilations_are_counted_where_they_happen():
    @jax.jit
    def triple(x):
        return 3 * x

    with compilation.counted() as seen:
        triple(np.ones(7))
        triple(np.ones(7))
        triple(np.ones(8))
    triple(np.ones(9))
    assert seen.number == 2 and seen.seconds > 0


def test_lengths_are_those_of_the_synthetic_cohort():
    names = ("MEDIAN_LOS_H", "LOS_SPREAD", "SHORTEST_H", "LONGEST_H")
    assert [getattr(cohort, n) for n in names] == [getattr(synthetic_cohort, n) for n in names]
    data = cohort.dataset(cases.Case(num_stays=20_000))
    assert np.median(2 * data.index["train"]["length"]) == pytest.approx(cohort.MEDIAN_LOS_H, rel=0.05)
    assert data.index["train"]["has_cxr"].mean() == pytest.approx(0.19)


def test_a_made_up_record_is_what_its_index_says():
    data = cohort.dataset(_TINY["step"])
    for i in (0, 7, 299):
        record = data.splits["train"][i]
        assert record["ehr"].shape == (data.index["train"]["length"][i], len(schema.CHANNELS))
        assert (record["image"] is not None) == data.index["train"]["has_cxr"][i]


def test_the_sample_stands_for_the_epoch():
    case = cases.Case(num_stays=20_000)
    data = cohort.dataset(case)
    length_N, plan = data.lengths("train"), cohort.train_plan(case, data)

    def mean_longest(part):
        rows_SB = np.concatenate([part.paired_SP, part.unpaired_SU], 1)
        return np.where(rows_SB < 0, 0, length_N[rows_SB]).max(1).mean()

    assert mean_longest(cohort.sample(plan, length_N, 8)) == pytest.approx(mean_longest(plan), rel=0.15)


def test_padding_that_is_run_counts_whole_chunks():
    plan = plan_lib.Plan(np.array([[0], [2]]), np.array([[1], [plan_lib.PADDING]]), np.array([40, 40]))
    assert cohort.padded_share_run(plan, np.array([17, 3, 16]), 16) == pytest.approx(1 - 36 / (2 * 32 + 2 * 16))


def test_the_count_of_the_recurrence_is_that_of_its_products():
    width, rows = 8, 3

    def forward(w, x, h):  # one step of two layers: what is counted, times three with the backward pass
        return x @ w[0] + h @ w[1], h @ w[2] + h @ w[3]

    w = [jnp.zeros((n, 4 * width)) for n in (len(schema.CHANNELS), width, width, width)]
    lowered = jax.jit(forward).lower(w, jnp.zeros((rows, len(schema.CHANNELS))), jnp.zeros((rows, width)))
    products = sum(2 * rows * n * 4 * width for n in (len(schema.CHANNELS), width, width, width))
    assert step.recurrence_flops([{"length": np.ones((1, rows), int)}], width) == 3 * products
    assert products <= lowered.cost_analysis()["flops"] <= 1.1 * products


def test_the_recurrences_that_are_timed_are_equal():
    data = cohort.dataset(_TINY["lstm"])
    plan = cohort.sample(cohort.train_plan(_TINY["lstm"], data), data.lengths("train"), 1)
    (batch,) = cohort.collate_all(data, plan, 1)
    weights = lstm._weights(8)[0]
    fast, plain = (
        f(weights, batch["ehr"][0], batch["length"][0], jnp.float32)[1] for f in (ehr_encoder.lstm, lstm._plain)
    )
    np.testing.assert_allclose(fast, plain, atol=1e-5)


def test_on_a_gpu_the_other_forms_take_part_but_for_one_that_fails_or_is_wrong(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel\nand many more words")

    def wrong(*args):
        hidden_BTD, last_BD = ehr_encoder.FORMS["chunks"](*args)
        return 1.1 * hidden_BTD, last_BD

    right = functools.partial(pallas.pallas_lstm, interpret=True)
    forms = {**ehr_encoder.FORMS, "pallas": right, "cudnn": fails, "wrong": wrong}
    monkeypatch.setattr(ehr_encoder, "FORMS", forms)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    said = []
    case = dataclasses.replace(_TINY["lstm"], repeats=1, peers=())
    rows = lstm.measure(case, say=lambda text, end="\r": said.append(text))
    assert [row["contender"] for row in rows] == ["ours", "plain_scan", "pallas"]
    assert all(row["difference_from_plain_scan"] < 1e-5 for row in rows)
    assert "cudnn: left out: RuntimeError: no such kernel" in said
    assert any(re.match(r"wrong: left out: its gradients are 0\.\d+ from the plain scan's", text) for text in said)


def test_a_default_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(lstm, "_FARTHEST", {"float32": 0.0})
    with pytest.raises(AssertionError, match=r"ours: its gradients are .* from the plain scan's"):
        lstm.measure(dataclasses.replace(_TINY["lstm"], repeats=1, peers=()))


def test_a_form_that_is_another_recurrence_would_show():
    gradients = ({"bias": np.array([1.0, -2.0])}, {"kernel": np.array([4.0, 4.0])})
    other = ({"bias": np.array([1.0, -2.0])}, {"kernel": np.array([4.0, 3.0])})
    assert lstm._difference(other, gradients) == 0.25


def test_the_bootstrap_is_scaled_to_all_resamples():
    pytest.importorskip("sklearn")
    case = dataclasses.replace(_TINY["bootstrap"], num_stays=2000, repeats=1)
    assert len(bootstrap.measure(case)) == 1, "--ours_only leaves the loop out"
    ours, loop = bootstrap.measure(dataclasses.replace(case, peers=cases.PEERS))
    assert ours["num_bootstrap"] == bootstrap.NUM_BOOTSTRAP and loop["scaled_from_resamples"] == 1
    assert loop["time_over_ours"]["median"] > 1


@pytest.mark.parametrize("preset", cases.PRESETS)
def test_a_preset_can_be_planned(preset):
    chosen, _ = cases.preset(preset)
    assert len({case.name for case in chosen}) == len(chosen), "names tell cases apart"
    for case in chosen:
        assert case.kind in cases.KINDS and case.method in registry.METHODS and set(case.peers) <= set(cases.PEERS)
        if case.kind == "bootstrap":
            continue
        data = cohort.dataset(dataclasses.replace(case, num_stays=min(case.num_stays, 40 * case.batch_size)))
        plan = cohort.train_plan(case, data)
        assert plan.batch_size == case.batch_size and len(np.unique(plan.padded_length_S)) <= case.max_buckets
        assert len(plan) >= case.num_batches and case.batch_size % case.num_devices == 0
        assert data.use_cxr == bool(plan.images_per_batch)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'cpu'"):
        cases.preset("cpuu")


@pytest.mark.parametrize(
    "method", ["medfuse", *(pytest.param(m, marks=pytest.mark.slow) for m in ("uni_cxr", "uni_ehr", "mmtm3", "daft3"))]
)
def test_the_steps_of_the_h200_preset_lower_for_a_gpu(method):
    sizes = dict(_TINY["step"].sizes) | {"resnet_stage_sizes": (1, 1, 1, 1)}
    case = dataclasses.replace(
        _TINY["step"], method=method, precision="bfloat16", parallel="jit", num_batches=1, sizes=tuple(sizes.items())
    )
    data = cohort.dataset(case)
    batches = cohort.collate_all(data, cohort.sample(cohort.train_plan(case, data), data.lengths("train"), 1), 1)
    options = step.step_options(case, data)
    state = jax.eval_shape(lambda: step.fresh_state(options))
    compiled = parallel.compile_train(options, case.parallel, parallel.devices(1))
    text = compiled.trace(state, batches[0], jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    assert "bf16" in text and ("stablehlo.convolution" in text) == data.use_cxr


def test_the_environment_names_what_is_needed_and_no_place():
    environment = machine.environment()
    assert {"jax", "flax", "commit", "device", "cores", "cpu", "variables"} <= environment.keys()
    assert str(_ROOT) not in json.dumps(environment)


@pytest.mark.slow
def test_a_line_fits_the_screen(step_rows):
    case, (row,) = step_rows
    row = {"case": case.name, **row}
    assert all(part in table.line(row) for part in ("ours", "samples/s", "of matrix rate"))
    longest = {"case": cases.preset("h200")[0][0].name, "contender": "torch_released", "samples_per_s": 12345.6}
    longest |= {"seconds": 1.234, "seconds_min": 0.1234, "seconds_max": 12.34}
    assert len(table.line(longest | {"time_over_ours": {"median": 12.34}})) <= 132


def test_a_run_at_phenotyping_lengths_pads_less_than_a_tenth_with_at_most_four_programs():
    case = cases.Case()
    data = cohort.dataset(case)
    facts = step.padding_facts(cohort.train_plan(case, data), data.lengths("train"))
    assert 0 < facts["padded_share_run"] < 0.1 and len(data.buckets) <= 4


def test_a_run_of_one_chunk_more_is_seen():
    few, more = (cohort.padded_share_run(_plan_of(n), np.array([n]), chunks.CHUNK_STEPS[-1]) for n in (16, 17))
    assert few == 0 < more


def _plan_of(num_steps: int) -> plan_lib.Plan:
    return plan_lib.Plan(np.array([[0]]), np.zeros((1, 0), int), np.array([num_steps]))


def test_names_are_short():
    names = itertools.chain.from_iterable((case.name for case in cases.preset(p)[0]) for p in cases.PRESETS)
    assert max(map(len, names)) <= 70
