"""Sweeps: a trial has the numbers of a run alone; a failed one fails alone; a stopped sweep gives the same table."""

import contextlib
import csv
import functools
import json
import re
import runpy
import time
import types
import weakref
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from medfuse_jax import checkpoints, experiment, optim, parallel, records, starts, step, train
from medfuse_jax import config as config_lib
from medfuse_jax import workdir as workdir_lib
from medfuse_jax.errors import UserError
from medfuse_jax.models import methods
from medfuse_jax.sweep import command, heads, keep, population, results, search
from medfuse_jax.sweep import run as run_lib

_CONFIG_FILE = Path(__file__).parent.parent / "configs" / "pheno.py"  # lists no trials of its own
_RATES = ["lr:loguniform(1e-3,1e-2)"]


def sweep(config, workdir, specs, num_trials=3, lanes=None, **more):
    command.run(
        config.copy_and_resolve_references(),
        _CONFIG_FILE,
        workdir,
        specs=specs,
        num_trials=num_trials,
        seed=0,
        lanes=lanes,
        started_s=time.perf_counter(),
        **more,
    )
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def stop_at_save(monkeypatch, number) -> list:
    """Interrupts a sweep right after its so many-th save of a trial; returns a list of the keepers that saved."""
    save, saved = keep.WholeKeeper.save, []

    def stop(keeper, *args):
        save(keeper, *args)
        saved.append(keeper)
        if len(saved) == number:
            keeper.finish()
            raise KeyboardInterrupt

    monkeypatch.setattr(keep.WholeKeeper, "save", stop)
    return saved


@pytest.fixture
def ehr_config(tiny_config):
    """Without films: compiled in a second."""
    tiny_config.method = "uni_ehr"
    return tiny_config


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _train(config, workdir, encoders=None):
    run = experiment.open_experiment(config)
    workdir_lib.claim(workdir, run)
    train.train(run, workdir, encoders)


def _best(workdir):
    config = config_lib.load(workdir / "config.json")
    return checkpoints.restore_best(workdir, experiment.open_experiment(config).abstract_state())


def _difference(a, b) -> float:
    """The largest difference of two states' parameters, statistics and means of gradients."""
    trees = [(s.params, s.batch_stats, s.opt_state) for s in (a, b)]
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *trees)))


def _assert_as_alone(trial_dir, alone_dir, monkeypatch, tolerance):
    """The trial's own config, run by train.train on one device, gives its numbers."""
    config = config_lib.load(trial_dir / "config.json")
    encoders = {name: (Path(path), workdir_lib.open_run(Path(path))) for name, path in config.init.items() if path}
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "devices", lambda num=None: jax.local_devices()[:1])
        _train(config, alone_dir, encoders)
    assert _difference(_best(trial_dir), _best(alone_dir)) < tolerance
    for mine, theirs in zip(_lines(trial_dir), _lines(alone_dir), strict=True):
        for field in theirs.keys() - {"phase", "time_s", "samples_per_s"}:
            assert mine[field] == pytest.approx(theirs[field], rel=1e-4), field


@pytest.mark.parametrize(
    ("method", "lanes"),
    [
        ("uni_ehr", 2),
        pytest.param("medfuse", 1, marks=pytest.mark.slow),
        pytest.param("medfuse", 2, marks=pytest.mark.slow),
    ],
)
def test_a_trial_is_the_run_alone_with_its_config(tiny_config, tmp_path, monkeypatch, method, lanes):
    """Rates, dropouts and seeds differ; four trials on two devices, one or two lanes each, augmentation and all.

    Plain gradient descent: Adam makes a difference of rounding in a gradient near zero a whole step.
    """
    monkeypatch.setattr(optim, "adam", lambda beta2: optax.identity())
    tiny_config.method, tiny_config.film.crop = method, "random"
    specs = ["lr:loguniform(0.03,0.3)", "dropout:uniform(0.0,0.5)", "seed:int(0,100)"]
    rows = sweep(tiny_config, tmp_path / "sweep", specs, num_trials=4, lanes=lanes)
    assert [row["status"] for row in rows] == ["finished"] * 4
    best, second = (results.trial_dir(tmp_path / "sweep", int(row["trial"])) for row in rows[:2])
    _assert_as_alone(best, tmp_path / "alone", monkeypatch, tolerance=5e-6)
    assert _difference(_best(best), _best(second)) > 1e-2  # the tolerance shows a trial that got another's numbers


@pytest.mark.slow  # its shorter sibling is test_heads_of_every_method_that_freezes_its_encoders
def test_trials_of_frozen_encoders_are_runs_alone_and_encode_once(tiny_config, tmp_path, monkeypatch):
    for name, changes in {
        "ehr": {"method": "uni_ehr", "seed": 5},
        "cxr": {"method": "uni_cxr", "task": "radiology", "seed": 6},
    }.items():
        pretrained = tiny_config.copy_and_resolve_references()
        pretrained.update_from_flattened_dict(changes | {"num_epochs": 1})
        _train(pretrained, tmp_path / name)
        tiny_config.init[name] = str(tmp_path / name)
    tiny_config.method = "early"
    specs = [*_RATES, "dropout:uniform(0.0,0.5)", "seed:int(0,100)"]
    rows = sweep(tiny_config, tmp_path / "sweep", specs, num_trials=5)
    assert [row["status"] for row in rows] == ["finished"] * 5
    chosen = results.trial_dir(tmp_path / "sweep", int(rows[0]["trial"]))
    _assert_as_alone(chosen, tmp_path / "alone", monkeypatch, tolerance=2e-5)
    with_checkpoint = [path.parent for path in (tmp_path / "sweep" / "trials").glob("*/checkpoints")]
    assert with_checkpoint == [chosen], "a head is written with its encoders only where it is chosen"


def test_the_sweep_chooses_by_validation_and_tests_once(ehr_config, tmp_path):
    rows = sweep(ehr_config, tmp_path, _RATES, num_trials=4)
    aurocs = [float(row["val_auroc"]) for row in rows]
    assert aurocs == sorted(aurocs, reverse=True) and len(set(aurocs)) > 1
    assert [row["chosen"] for row in rows] == ["yes", "", "", ""]
    chosen = results.trial_dir(tmp_path, int(rows[0]["trial"]))
    assert [path.parent for path in (tmp_path / "trials").glob("*/result*.json")] == [chosen]
    assert [path.parent for path in (tmp_path / "trials").glob("*/predictions*.npz")] == [chosen]
    config = runpy.run_path(str(tmp_path / "best_config.py"))["get_config"]()
    config_lib.validate(config)
    assert config_lib.difference(config, config_lib.load(chosen / "config.json")) == ""
    page = (tmp_path / "sweep.html").read_text()
    assert f"trial {rows[0]['trial']}: {aurocs[0]:.3f}" in page and "scored for this trial only" in page
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "trials").rglob("*.json*")}
    assert sweep(ehr_config, tmp_path, _RATES, num_trials=4) == rows
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a finished sweep trains and tests nothing"


def test_a_sweep_goes_on_with_more_trials(ehr_config, tmp_path):
    ehr_config.num_epochs = 1
    (first,) = sweep(ehr_config, tmp_path, _RATES, num_trials=1, lanes=1)
    folder = results.trial_dir(tmp_path, 0)
    trained = (folder / "metrics.jsonl").stat().st_mtime_ns
    record = json.loads((folder / "trial.json").read_text())
    (folder / "trial.json").write_text(json.dumps(record | {"val_auroc": 0.01}))  # so that another is chosen
    other, again = sweep(ehr_config, tmp_path, _RATES, num_trials=2, lanes=1)
    assert (other["trial"], other["chosen"]) == ("1", "yes") and (again["trial"], again["lr"]) == ("0", first["lr"])
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == trained
    assert "scored for this trial and, chosen of fewer before, trial 0, is" in (tmp_path / "sweep.html").read_text()
    with pytest.raises(UserError, match=r"holds another sweep \(--trials is 2 there and 1 here\)"):
        sweep(ehr_config, tmp_path, _RATES, num_trials=1, lanes=1)


def test_a_trace_of_trials_is_refused(ehr_config, tmp_path):
    ehr_config.profile_steps = "1:2"
    with pytest.raises(UserError, match=r"config\.profile_steps is of a run alone"):
        sweep(ehr_config, tmp_path / "sweep", _RATES)
    assert not (tmp_path / "sweep").exists()


def test_two_sweeps_do_not_share_a_folder(ehr_config, tmp_path):
    with workdir_lib.locked(tmp_path), pytest.raises(UserError, match="another process is at work in"):
        sweep(ehr_config, tmp_path, _RATES)


@pytest.mark.slow
def test_rounds_of_optuna_are_trials_like_any(ehr_config, tmp_path):
    pytest.importorskip("optuna")
    ehr_config.num_epochs = 1
    rows = sweep(ehr_config, tmp_path, _RATES, num_trials=5, algorithm="optuna", per_round=2)
    assert [row["status"] for row in rows] == ["finished"] * 5 and [row["chosen"] for row in rows].count("yes") == 1
    assert len(list((tmp_path / "rounds").iterdir())) == 3
    assert sweep(ehr_config, tmp_path, _RATES, num_trials=5, algorithm="optuna", per_round=2) == rows
    with pytest.raises(UserError, match="holds another sweep"):
        sweep(ehr_config, tmp_path, _RATES, num_trials=5)


def test_a_stopped_sweep_goes_on_to_the_same_table(ehr_config, tmp_path, monkeypatch):
    """Stopped between two trials' saves in the second epoch: one trial is then an epoch ahead."""
    ehr_config.num_epochs = 3
    whole = sweep(ehr_config, tmp_path / "whole", _RATES, lanes=1)
    with monkeypatch.context() as patched:
        stop_at_save(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            sweep(ehr_config, tmp_path / "stopped", _RATES, lanes=1)
    assert not (tmp_path / "stopped" / "sweep.csv").exists()
    assert sweep(ehr_config, tmp_path / "stopped", _RATES, lanes=1) == whole
    for number in range(3):
        assert len(_lines(results.trial_dir(tmp_path / "stopped", number))) == 6


@pytest.mark.slow
def test_a_stopped_sweep_of_heads_goes_on(tmp_path):
    """A head's file keeps the latest and the best state apart."""
    _, progress = _head(0.0), keep.optim.Progress(epoch=1, learning_rate=0.1, best_auroc=0.6, best_epoch=1)
    keeper = keep.FileKeeper(tmp_path)
    assert keeper.latest(_head(0.0)) is None
    keeper.save(_head(1.0), progress, True)
    keep.FileKeeper(tmp_path).latest(_head(0.0))
    again = keep.FileKeeper(tmp_path)
    again.latest(_head(0.0))
    again.save(_head(2.0), progress, False)
    (latest, _), (best, reached) = again.latest(_head(0.0)), again.best(_head(0.0))
    assert float(latest.params["classifier"]["bias"][0]) == 2.0 and float(best.params["classifier"]["bias"][0]) == 1.0
    assert reached == progress
    (tmp_path / "state.npz").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"state\.npz cannot be read"):
        again.latest(_head(0.0))


def _head(value):
    params = {"classifier": {"bias": np.full(3, value, np.float32)}}
    return population.step_lib.TrainState(np.int32(value), params, {}, params, np.float32(0.1))


@pytest.mark.slow
def test_a_trial_that_diverges_fails_alone(ehr_config, tmp_path, monkeypatch):
    fresh_states = experiment.Experiment.fresh_states

    def broken_for_seed_1(self, seeds):
        for seed, state in zip(seeds, fresh_states(self, seeds)):
            yield jax.tree.map(lambda x: x * np.nan if x.ndim == 2 else x, state) if seed == 1 else state

    whole = sweep(ehr_config, tmp_path / "whole", ["seed:choice(0,2)"], num_trials=2, lanes=2)
    monkeypatch.setattr(experiment.Experiment, "fresh_states", broken_for_seed_1)
    rows = sweep(ehr_config, tmp_path / "broken", ["seed:choice(0,1,2)"], num_trials=3, lanes=2)
    by_seed = {row["seed"]: row for row in rows}
    assert by_seed["1"]["status"].startswith("failed: experiment: the loss of step 1 is nan; try a lower")
    assert rows[-1]["seed"] == "1" and rows[-1]["chosen"] == ""
    for row in whole:
        assert float(by_seed[row["seed"]]["val_auroc"]) == pytest.approx(float(row["val_auroc"]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [2, 0])
def test_where_memory_is_short_fewer_trials_run_at_once(ehr_config, tmp_path, monkeypatch, largest):
    train_all, sizes = population.train_all, []

    def limited(train_fn, stacks, batch, on):
        sizes.append(sum(one.num_trials for one in stacks))
        if sizes[-1] > largest:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return train_all(train_fn, stacks, batch, on)

    monkeypatch.setattr(population, "train_all", limited)
    ehr_config.num_epochs = 1
    if largest:
        rows = sweep(ehr_config, tmp_path, _RATES, num_trials=5, lanes=1)
        assert [row["status"] for row in rows] == ["finished"] * 5 and sizes[0] == 5 and sizes[-1] <= 2
    else:
        with pytest.raises(UserError, match=r"no trial of .* finished"):
            sweep(ehr_config, tmp_path, _RATES, num_trials=3, lanes=1)
        reasons = [json.loads(path.read_text())["reason"] for path in (tmp_path / "trials").glob("*/trial.json")]
        assert reasons == ["out of memory"] * 3


@pytest.mark.parametrize(
    ("where", "name", "error", "reason"),
    [
        (heads, "can_cache", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "out of memory before the first"),
        (population, "stack", MemoryError("Unable to allocate"), "out of memory"),
    ],
)
def test_memory_may_end_anywhere(ehr_config, tmp_path, monkeypatch, where, name, error, reason):
    """While frozen encoders run; on the host."""
    trials = [search.Trial(i, {"learning_rate": 1e-3}) for i in range(2)]
    experiments = run_lib.Sweep(ehr_config, tmp_path, {})
    shared = experiments.config_of(trials[0])
    monkeypatch.setattr(run_lib.Sweep, "config_of", lambda self, trial: shared)

    def fails(*args):
        raise error

    monkeypatch.setattr(where, name, fails)
    run_lib.train_group(experiments, trials, run_lib.Costs())
    assert all(results.record(tmp_path, trial)["reason"].startswith(reason) for trial in trials)


def test_another_error_is_no_failed_trial(ehr_config, tmp_path, monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(population, "train_all", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        sweep(ehr_config, tmp_path, _RATES, num_trials=2, lanes=1)


@pytest.mark.slow
def test_trials_that_stop_early_free_their_place(ehr_config, tmp_path, monkeypatch):
    def stops_by_its_rate(progress, early_stop_epochs):
        return progress.epoch >= (1 if progress.learning_rate > 5e-3 else 3)

    stack, sizes = population.stack, []

    def seen(states, *args):
        sizes.append(len(states))
        return stack(states, *args)

    monkeypatch.setattr(population, "stack", seen)
    monkeypatch.setattr(optim.Progress, "should_stop", stops_by_its_rate)
    ehr_config.num_epochs = 4
    rows = sweep(ehr_config, tmp_path, _RATES, num_trials=5, lanes=3)
    epochs = [int(row["epochs"]) for row in rows]
    assert epochs == [1 if float(row["lr"]) > 5e-3 else 3 for row in rows] and set(epochs) == {1, 3}
    assert sizes == [5, epochs.count(3)]


@pytest.mark.parametrize(
    ("num_trials", "most", "num_devices", "lanes"),
    [(10, 10, 1, 10), (9, 10, 1, 10), (8, 10, 1, 8), (5, 10, 1, 8), (1, 10, 1, 1), (10, 1, 1, 1), (10, 5, 2, 5)],
)
def test_lanes_shrink_by_powers_of_two(num_trials, most, num_devices, lanes):
    assert population.lanes_for(num_trials, most, num_devices) == lanes


def test_trials_that_need_other_programs_or_data_are_groups_of_their_own(tiny_config, tmp_path):
    values = [
        {"learning_rate": 1e-3},
        {"method": "mmtm3"},
        {"learning_rate": 1e-4, "seed": 4, "model.dropout": 0.1},
        {"data.ehr_only_ratio": 0.2},
        {"method": "mmtm3", "seed": 1},
    ]
    trials = [search.Trial(i, v) for i, v in enumerate(values)]
    groups = run_lib.groups(run_lib.Sweep(tiny_config, tmp_path, {}), trials)
    assert [[trial.number for trial in group] for group in groups] == [[0, 2], [1, 4], [3]]


def test_groups_share_the_programs_of_equal_steps_and_keep_none_that_no_trial_needs(ehr_config, tmp_path, monkeypatch):
    together, costs = run_lib.Sweep(ehr_config, tmp_path, {}, in_rounds=True), run_lib.Costs()
    values = [{}, {"data.ehr_only_ratio": 0.5}, {"batch_size": 16, "model.dropout": 0.1}, {"beta2": 0.9}]
    trials = [search.Trial(i, changed) for i, changed in enumerate(values)]
    programs = [run_lib._program(together, trial, costs) for trial in trials]
    assert [program.train_fn is programs[0].train_fn for program in programs] == [True, True, True, False]
    assert [program.eval_fn is programs[0].eval_fn for program in programs] == [True, True, True, False]

    def train(sweep, program, wave, costs):
        for trial in wave:
            results.write_record(sweep.workdir, trial, results.FAILED, "")

    monkeypatch.setattr(run_lib, "_train_wave", train)
    once = run_lib.Sweep(ehr_config, tmp_path, {})
    run_lib.train_group(once, trials[:1], costs)
    run_lib.train_group(together, trials[1:2], costs)
    assert len(once.programs) == 0 and len(together.programs) == len(values)


@pytest.mark.parametrize(
    ("step_s", "tried"),
    [
        ({1: 5.0, 2: 4.0, 3: 3.0, 5: 2.0, 10: 1.0}, [1, 2, 3, 5, 10]),
        ({1: 5.0, 2: 4.0, 3: 4.5}, [1, 2, 3]),  # slower: no more are tried
        ({1: 5.0, 2: 4.0, 3: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")}, [1, 2]),
        ({1: MemoryError()}, []),
    ],
)
def test_numbers_of_lanes_are_tried_one_by_one_while_they_are_faster(monkeypatch, step_s, tried):
    class Stacked:
        """Stands for the trials' states in the device's memory."""

    alive = weakref.WeakSet()

    def stack_with(lanes):
        assert not alive, "one stack at a time"
        alive.add(stacked := Stacked())
        stacked.lanes = lanes
        return stacked

    def time_step(train_fn, stacked, batch, on):
        if isinstance(step_s[stacked.lanes], Exception):
            raise step_s[stacked.lanes]
        return step_s[stacked.lanes]

    monkeypatch.setattr(population, "_time_step", time_step)
    assert list(population.measure_lanes(None, stack_with, 10, {}, [])) == tried


def test_lanes_are_measured_on_trials_that_are_thrown_away(ehr_config):
    run = experiment.open_experiment(ehr_config, jax.local_devices()[:1])
    states = [jax.device_get(run.fresh_state())] * 2
    batch = next(run.batches("train", run.train_plan(epoch=1)))
    train_fn, on = population.compile_train(run.options, run.devices), run.devices
    times_s = population.measure_lanes(
        train_fn, lambda lanes: population.stack(states, [0, 1], [0.1] * 2, lanes, on), 2, batch, on
    )
    assert set(times_s) == {1, 2} and all(0 < step_s < 60 for step_s in times_s.values())


@pytest.mark.slow
def test_a_group_measures_its_lanes_once(ehr_config, tmp_path, monkeypatch):
    """Later rounds of it, and a resumed sweep whose first trial is done, take what was measured."""
    measured = []

    def measure(train_fn, stack_with, most, batch, on):
        measured.append(most)
        return {1: 1.0, most: 0.5}

    monkeypatch.setattr(population, "measure_lanes", measure)
    ehr_config.num_epochs = 1
    trials = [search.Trial(i, {"learning_rate": 1e-3 * (i + 1)}) for i in range(9)]
    first = run_lib.Sweep(ehr_config, tmp_path, {}, in_rounds=True)
    run_lib.train_group(first, trials[:3], run_lib.Costs())
    run_lib.train_group(first, trials[3:6], run_lib.Costs())
    run_lib.train_group(run_lib.Sweep(ehr_config, tmp_path, {}), trials[2:9], run_lib.Costs())
    assert measured == [2]
    (path,) = (tmp_path / "lanes").iterdir()
    path.write_text('{"lanes": 5}')
    (program,) = first.programs.values()
    lives = [types.SimpleNamespace(trial=trial) for trial in trials[:5]]
    assert run_lib._choose_lanes(first, program, lives) == 5  # of a wave that lost trials, as before a resume
    program.at_once = 5
    assert run_lib._choose_lanes(first, program, lives) == 3, "out of memory: no lanes beyond the trials that fit"
    path.write_text(path.read_text()[:5])
    for number in range(3):
        trials.append(search.Trial(9 + number, {"learning_rate": 1e-2 * (number + 1)}))
    with pytest.raises(UserError, match=r"lanes/\w+\.json cannot be read .* delete it"):
        run_lib.train_group(first, trials, run_lib.Costs())


def test_a_folder_of_something_else_is_refused(ehr_config, tmp_path, monkeypatch):
    ehr_config.num_epochs = 1
    sweep(ehr_config, tmp_path / "sweep", _RATES, num_trials=1, lanes=1)
    with pytest.raises(UserError, match=r"holds another sweep \(trial 0 is .* there and"):
        sweep(ehr_config, tmp_path / "sweep", ["lr:loguniform(1e-3,1e-1)"], num_trials=1)
    with monkeypatch.context() as rebuilt, pytest.raises(UserError, match="is no longer the build that the sweep in"):
        rebuilt.setattr(records, "digest", lambda *args: "of other shards")
        sweep(ehr_config, tmp_path / "sweep", _RATES, num_trials=1)
    ehr_config.batch_size = 16
    with pytest.raises(UserError, match=r"holds another sweep \(config\.batch_size is 32 there and 16 here\)"):
        sweep(ehr_config, tmp_path / "sweep", _RATES, num_trials=1)
    with pytest.raises(UserError, match="holds a run, not a sweep"):
        sweep(ehr_config, results.trial_dir(tmp_path / "sweep", 0), _RATES, num_trials=1)


def test_a_trial_that_cannot_run_is_refused_before_any_is_trained(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"trial \d \(method uni_crx\): config\.method is 'uni_crx'.*Did you mean"):
        sweep(tiny_config, tmp_path, ["method:choice(medfuse,uni_crx)"], num_trials=2)
    assert not any(tmp_path.iterdir())


def test_ways_of_augmenting_are_refused_where_films_are_encoded_once(tiny_config, tmp_path):
    tiny_config.method = "early"
    tiny_config.pretrain.ehr = {"method": "uni_ehr"}
    tiny_config.pretrain.cxr = {"method": "uni_cxr", "task": "radiology"}
    with pytest.raises(UserError, match=r"trial 0 \(film\.rotation_deg .*\): film\.rotation_deg changes nothing"):
        sweep(tiny_config, tmp_path, ["film.rotation_deg:uniform(0,45)"])
    assert not any(tmp_path.iterdir())


_PRETRAIN = {"ehr": {"method": "uni_ehr"}, "cxr": {"method": "uni_cxr", "task": "radiology"}}


def _stages_and_trials(config, workdir, specs, monkeypatch, **more) -> tuple[dict, dict]:
    """The pre-training of a sweep of two trials, and the encoders that each starts from, by method; trains nothing."""
    stages, started = {}, {}

    def note(sweep, trials, costs):
        for of_trial in map(sweep.config_of, trials):
            started[of_trial.method] = {name: Path(path).name for name, path in of_trial.init.items() if path}

    monkeypatch.setattr(command.train, "pretrain", stages.update)
    monkeypatch.setattr(run_lib, "train_group", note)
    monkeypatch.setattr(command, "_are_recorded", lambda workdir, trials: [True])
    monkeypatch.setattr(command, "_conclude", lambda sweep, trials: (workdir / "sweep.csv").touch())
    sweep(config, workdir, specs, num_trials=2, **more)
    return stages, started


@pytest.mark.parametrize("method", ["uni_ehr", "medfuse"])
def test_each_trial_starts_from_the_encoders_that_it_alone_would_have_trained(
    tiny_config, tmp_path, monkeypatch, method
):
    """Whatever the config's own method. That of uni_ehr would be trained as the run itself is."""
    tiny_config.method = method
    for name, changes in _PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    stages, started = _stages_and_trials(tiny_config, tmp_path, ["method:choice(uni_ehr,medfuse)"], monkeypatch)
    assert sorted(stages) == ["cxr", "ehr"] and stages["cxr"][1].config.method == "uni_cxr"
    assert started == {"uni_ehr": {}, "medfuse": {"ehr": "pretrain_ehr", "cxr": "pretrain_cxr"}}


def test_processes_wait_for_an_encoder_that_only_trials_added_later_start_from(tiny_config, tmp_path, monkeypatch):
    for name, changes in _PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    _stages_and_trials(tiny_config, tmp_path, ["method:choice(uni_ehr,medfuse)"], monkeypatch)
    waited = []
    monkeypatch.setattr(command.pods, "wait_for", lambda are_there, what: waited.append(list(are_there())))
    (tmp_path / "pretrain_cxr" / "trained.json").unlink()
    _stages_and_trials(
        tiny_config, tmp_path, ["method:choice(uni_ehr,medfuse)"], monkeypatch, process=1, num_processes=2
    )
    assert waited[0].count(False) == 1 and len(waited[0]) == 3


@pytest.mark.parametrize(
    ("method", "spec", "said"),
    [
        ("medfuse", "method:choice(early,medfuse)", "method early"),
        ("early", "method:choice(early,medfuse)", "method early"),
        ("medfuse", "model.freeze_encoders:choice(true,false)", "model.freeze_encoders True"),
    ],
)
def test_a_trial_that_freezes_random_encoders_is_refused(tiny_config, tmp_path, method, spec, said):
    tiny_config.method, tiny_config.encoders = method, "random"
    for name, changes in _PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    with pytest.raises(UserError, match=rf"trial \d \({said}\): the ehr encoder is frozen .* would stay random"):
        sweep(tiny_config, tmp_path, [spec], num_trials=2)
    assert not any(tmp_path.iterdir())


def _untrained(config, workdir):
    """A run as train.train leaves it, with its first weights."""
    run = experiment.open_experiment(config)
    workdir_lib.claim(workdir, run)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        checkpoints.save(manager, run.fresh_state(), optim.Progress(epoch=1, learning_rate=0.1, best_epoch=1), True)
    return workdir, run


@pytest.fixture(scope="module")
def encoders(shared_tiny_config, tmp_path_factory):
    runs = {"ehr": {"method": "uni_ehr"}, "cxr": {"method": "uni_cxr", "task": "radiology"}}
    made = {}
    for name, changes in runs.items():
        config = shared_tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        made[name] = _untrained(config, tmp_path_factory.mktemp("encoders") / name)
    return made


@pytest.fixture
def frozen_config(tiny_config, encoders):
    tiny_config.method, tiny_config.model.freeze_encoders = "medfuse", True
    for name, (folder, _) in encoders.items():
        tiny_config.init[name] = str(folder)
    return tiny_config


_CAN_FREEZE = [name for name, (module, _) in methods.METHODS.items() if hasattr(module, "frozen_encoders")]


def test_heads_of_every_method_that_freezes_its_encoders_run_or_are_no_heads(frozen_config, encoders, tmp_path):
    """One encoding serves them all, but for the one whose batches hold a modality more."""
    trials = [search.Trial(i, {"method": name}) for i, name in enumerate(_CAN_FREEZE)]
    trials.append(search.Trial(len(trials), {"method": "medfuse", "model.modalities": "static"}))
    together, costs, of_heads = run_lib.Sweep(frozen_config, tmp_path, encoders), run_lib.Costs(), []
    for trial in trials:
        if not heads.can_cache(trial.config(frozen_config), encoders):
            continue
        of_heads.append(trial.values["method"])
        run = run_lib._program(together, trial, costs).run
        (state,) = heads.fresh_heads(run, [0])
        score_BK = _scores_of_first_batch(run, state)
        assert np.isfinite(score_BK).all()
    assert of_heads == ["early", "joint", "joint_zeros", "joint_learnable", "medfuse", "medfuse"]
    assert len(together.features) == 2 and costs.encode_s > 0
    whole = experiment.open_experiment(together.config_of(trials[-1]), jax.local_devices()[:1])
    whole_state = starts.begin(whole.fresh_state(), encoders)
    np.testing.assert_allclose(_scores_of_first_batch(whole, whole_state), score_BK, atol=1e-5)


def _scores_of_first_batch(run, state):
    plan = run.eval_plans("val", run.selects("val"))[0]
    batch = parallel.merge(next(run.batches("val", plan)))
    return np.asarray(jax.jit(functools.partial(step.eval_step, run.options))(state, batch)[0])


def _precisions(jaxpr) -> list:
    """Of each product and convolution, those of the programs within among them."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(equation.params["precision"])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += _precisions(inner)
    return found


def test_features_are_as_precise_as_the_whole_model_makes_them(frozen_config):
    """In float32, accelerators round what a product multiplies unless it says not to."""
    frozen_config.precision = "float32"
    run = experiment.open_experiment(frozen_config, jax.local_devices()[:1])
    batch = parallel.merge(next(run.batches("val", run.eval_plans("val", run.selects("val"))[0])))
    variables = jax.eval_shape(lambda: {k: getattr(run.fresh_state(), k) for k in ("params", "batch_stats")})
    encode = functools.partial(heads.encode_step, run.options)
    precisions = _precisions(jax.make_jaxpr(encode)(variables, batch).jaxpr)
    assert len(precisions) > 8 and set(precisions) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_features_are_computed_once_for_all_that_shares_them(frozen_config, encoders, tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(heads, "encode", lambda run, encoders: encoded.append(run.config) or {})
    values = [{}, {"beta2": 0.9}, {"data.ehr_only_ratio": 0.5}, {"batch_size": 16}, {"model.fusion_hidden": 4}]
    values += [{"method": "early"}, {"film.resize_px": 48, "film.crop_px": 48}, {"data.val_stays": "paired"}]
    together, costs = run_lib.Sweep(frozen_config, tmp_path, encoders), run_lib.Costs()
    for i, changed in enumerate(values):
        run_lib._program(together, search.Trial(i, changed), costs)
    assert [config.film.resize_px for config in encoded] == [32, 48, 32] and len(together.programs) == len(values)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("model.ehr_hidden:choice(8,16)", r"trial \d \(model.ehr_hidden 16\): the ehr encoder .* has other sizes"),
        ("method:choice(uni_ehr,joint)", r"trial \d \(method uni_ehr\): .* the method uni_ehr has no cxr_encoder"),
    ],
)
def test_a_trial_that_the_shared_encoders_do_not_fit_is_refused_before_any_is_trained(
    frozen_config, tmp_path, spec, said
):
    frozen_config.method, frozen_config.model.freeze_encoders = "joint", False
    with pytest.raises(UserError, match=said):
        sweep(frozen_config, tmp_path, [spec], num_trials=2)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trial_runs_on_one_device_whatever_the_batch(ehr_config, tmp_path):
    """A batch of 31 divides over no two devices."""
    ehr_config.batch_size = ehr_config.eval.batch_size = 31
    ehr_config.num_epochs = 1
    assert [row["status"] for row in sweep(ehr_config, tmp_path, _RATES, num_trials=2, lanes=1)] == ["finished"] * 2


def test_groups_of_one_are_dealt_to_all_processes(ehr_config, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(run_lib, "train_group", lambda sweep, trials, costs: trained.extend(t.number for t in trials))
    monkeypatch.setattr(command, "_are_recorded", lambda workdir, trials: [True])
    monkeypatch.setattr(command, "_conclude", lambda sweep, trials: (tmp_path / "sweep.csv").touch())
    shares = []
    for process in range(4):
        sweep(ehr_config, tmp_path, ["ehr_only_ratio:uniform(0,1)"], 8, process=process, num_processes=4)
        shares.append(trained[:])
        trained.clear()
    assert [len(share) for share in shares] == [2] * 4 and sorted(
        number for share in shares for number in share
    ) == list(range(8))


@pytest.mark.slow
def test_what_is_said_of_the_costs_is_of_this_start(tiny_config, tmp_path, capsys, monkeypatch):
    """Pre-training beside start-up, and no trial that an earlier start had trained."""
    monkeypatch.setattr(command, "_conclude", lambda sweep, trials: (tmp_path / "sweep.csv").touch())
    monkeypatch.setattr(command.train, "pretrain", lambda stages: time.sleep(1))
    tiny_config.method, tiny_config.num_epochs = "uni_ehr", 1
    said = []
    for num_trials in (2, 2):
        sweep(tiny_config, tmp_path, _RATES, num_trials, lanes=1)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("once for "))
        said.append([float(number) for number in re.findall(r"[\d.]+(?= s|\b trials)", line)])
    (trials, pretrain_s, *_), (trials_again, pretrain_again_s, startup_again_s, *_) = said
    assert (trials, trials_again) == (2, 0) and pretrain_s == pretrain_again_s == 1.0
    assert startup_again_s < 1.0, "pre-training is no part of it"
