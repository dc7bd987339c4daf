"""Trials side by side: results of single runs, failures of one trial alone, and the same table after a restart."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from sweep_cases import RATES, assert_as_alone, assert_resumes, best_state, difference, read_lines, sweep

from medfuse_jax import optim
from medfuse_jax import run as run_lib
from medfuse_jax.runs import checkpoints
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import watchdog
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import caching, groups, results, stacked_step, wave
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.sweep import Sweep
from medfuse_jax.sweep.trial import Trial

_PLAIN = optax.identity()  # one object, so that equal options are equal, and runs share a program


@pytest.mark.parametrize(
    ("method", "encoder", "lanes"),
    [
        ("uni_ehr", "lstm", 2),
        pytest.param("uni_ehr", "transformer", 2, marks=pytest.mark.nightly),
        pytest.param("medfuse", "lstm", 1, marks=pytest.mark.nightly),
        pytest.param("medfuse", "lstm", 2, marks=pytest.mark.slow),
    ],
)
def test_a_trial_has_the_results_of_a_single_run_with_its_config(
    tiny_config, tmp_path, monkeypatch, method, encoder, lanes
):
    """Four trials on two devices, with one or two lanes, different rates, dropouts and seeds, and augmentation.

    By plain gradient descent: Adam turns the rounding of a gradient near zero into a whole step.
    """
    monkeypatch.setattr(optim, "adam", lambda beta2: _PLAIN)
    tiny_config.method, tiny_config.model.ehr_encoder, tiny_config.image.crop = method, encoder, "random"
    specs = ["lr:loguniform(0.03,0.3)", "dropout:uniform(0.0,0.5)", "seed:int(0,100)"]
    rows = sweep(tiny_config, tmp_path / "sweep", specs, num_trials=4, lanes=lanes)
    assert [row["status"] for row in rows] == ["finished"] * 4
    best, second = (results.trial_dir(tmp_path / "sweep", int(row["trial"])) for row in rows[:2])
    assert_as_alone(best, tmp_path / "alone", monkeypatch, tolerance=5e-6)
    assert difference(best_state(best), best_state(second)) > 1e-2, "trials differ by more than the tolerance"


def test_a_stopped_sweep_resumes_to_the_same_table(ehr_config, tmp_path, monkeypatch):
    assert_resumes(ehr_config, tmp_path, monkeypatch, RATES, lanes=1, num_trials=2)


def test_a_sweep_stopped_by_signals_resumes_to_the_same_table(ehr_config, tmp_path, monkeypatch):
    """Within an epoch, and in a validation, which the resumed sweep then does first."""
    whole = sweep(ehr_config, tmp_path / "whole", RATES, 2, lanes=1)
    reached = []
    for module, name in ((stacked_step, "train_all"), (wave, "_validate"), (wave, "_validate")):
        call = getattr(module, name)

        def signalled(*args, call=call):
            monkeypatch.setattr(watchdog, "_signalled_s", 0.0)
            return call(*args)

        with monkeypatch.context() as patched, pytest.raises(watchdog.Stopped, match="2 trials are saved"):
            patched.setattr(module, name, signalled)
            sweep(ehr_config, tmp_path / "stopped", RATES, 2, lanes=1)
        monkeypatch.setattr(watchdog, "_signalled_s", None)
        reached.append(checkpoints.open_manager(results.trial_dir(tmp_path / "stopped", 0)).latest_step())
    assert reached[0] == 1 < reached[1] == reached[2]
    assert sweep(ehr_config, tmp_path / "stopped", RATES, 2, lanes=1) == whole
    for number in range(2):
        lines = [read_lines(results.trial_dir(tmp_path / folder, number)) for folder in ("whole", "stopped")]
        a, b = ([(line["phase"], line["step"], line.get("val_loss")) for line in of_one] for of_one in lines)
        assert a == b


@pytest.mark.slow
def test_a_trial_that_diverges_fails_alone(ehr_config, tmp_path, monkeypatch):
    fresh_states = run_lib.Run.fresh_states

    def broken_for_seed_1(self, seeds):
        for seed, state in zip(seeds, fresh_states(self, seeds)):
            yield jax.tree.map(lambda x: x * np.nan if x.ndim == 2 else x, state) if seed == 1 else state

    whole = sweep(ehr_config, tmp_path / "whole", ["seed:choice(0,2)"], num_trials=2, lanes=2)
    monkeypatch.setattr(run_lib.Run, "fresh_states", broken_for_seed_1)
    rows = sweep(ehr_config, tmp_path / "broken", ["seed:choice(0,1,2)"], num_trials=3, lanes=2)
    by_seed = {row["seed"]: row for row in rows}
    assert by_seed["1"]["status"].startswith("failed: experiment: the loss of step 1 is nan")
    assert rows[-1]["seed"] == "1" and rows[-1]["chosen"] == ""
    for row in whole:
        assert float(by_seed[row["seed"]]["val_auroc"]) == pytest.approx(float(row["val_auroc"]), abs=1e-6)


def _limit_memory(monkeypatch, fits) -> list:
    """Fail steps unless fits(trials at once, lanes); return a list that collects these numbers for each step."""
    train_all, tried = stacked_step.train_all, []

    def limited(train_fn, stacks, batch, devices):
        tried.append((sum(one.num_trials for one in stacks), stacks[0].dropout.shape[1]))
        if not fits(*tried[-1]):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return train_all(train_fn, stacks, batch, devices)

    monkeypatch.setattr(stacked_step, "train_all", limited)
    return tried


@pytest.mark.slow
def test_out_of_memory_fewer_trials_run_at_once(ehr_config, tmp_path, monkeypatch):
    """In the next start from the first step on."""
    ehr_config.num_epochs = 1
    tried = _limit_memory(monkeypatch, lambda trials, lanes: trials <= 2)
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 5 and tried[0] == (5, 1) and tried[-1][0] <= 2
    tried.clear()
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=9, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 9 and max(tried) == (2, 1)


@pytest.mark.nightly
def test_out_of_memory_fewer_lanes_run_together_first(ehr_config, tmp_path, monkeypatch):
    ehr_config.num_epochs = 1
    tried = _limit_memory(monkeypatch, lambda trials, lanes: lanes < 2)
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, lanes=3)
    assert [row["status"] for row in rows] == ["finished"] * 5
    assert list(dict.fromkeys(tried)) == [(5, 3), (5, 2), (5, 1)]


@pytest.mark.nightly
def test_a_trial_that_ran_out_of_memory_can_be_tried_again(ehr_config, tmp_path, monkeypatch):
    ehr_config.num_epochs = 1
    with monkeypatch.context() as small:
        _limit_memory(small, lambda trials, lanes: False)
        with pytest.raises(UserError) as error:
            sweep(ehr_config, tmp_path, RATES, num_trials=3, lanes=1)
        assert error.value.path == tmp_path / "sweep.csv"
    for number in range(3):
        reason = json.loads((results.trial_dir(tmp_path, number) / "trial.json").read_text())["reason"]
        assert reason.startswith(f"out of memory: with more memory, delete trials/{number:03d}/trial.json and rerun")
    (results.trial_dir(tmp_path, 1) / "trial.json").unlink()
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=3, lanes=1)
    assert [row["trial"] for row in rows if row["status"] == "finished"] == ["1"]


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (caching, "can_cache", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB")),
        (stacked_step, "stack", MemoryError("Unable to allocate")),
    ],
    ids=["while frozen encoders run", "on the host"],
)
def test_trials_fail_wherever_memory_runs_out(ehr_config, tmp_path, monkeypatch, module, name, error):
    trials = [Trial(i, {"learning_rate": 1e-3}) for i in range(2)]
    sweep = Sweep(ehr_config, tmp_path, {})
    config = sweep.config_of(trials[0])
    monkeypatch.setattr(Sweep, "config_of", lambda self, trial: config)

    def fails(*args):
        raise error

    monkeypatch.setattr(module, name, fails)
    groups.train_group(sweep, trials, Costs())
    assert all(results.record(tmp_path, trial)["reason"].startswith("out of memory") for trial in trials)


def test_other_errors_are_raised(ehr_config, tmp_path, monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(stacked_step, "train_all", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)


@pytest.mark.slow
def test_trials_that_stop_early_free_their_lanes(ehr_config, tmp_path, monkeypatch):
    def should_stop(progress, early_stop_epochs):
        return progress.epoch >= (1 if progress.learning_rate > 5e-3 else 3)

    stack, sizes = stacked_step.stack, []

    def recorded(states, *args):
        sizes.append(len(states))
        return stack(states, *args)

    monkeypatch.setattr(stacked_step, "stack", recorded)
    monkeypatch.setattr(Progress, "should_stop", should_stop)
    ehr_config.num_epochs = 4
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, lanes=3)
    epochs = [int(row["epochs"]) for row in rows]
    assert epochs == [1 if float(row["lr"]) > 5e-3 else 3 for row in rows] and set(epochs) == {1, 3}
    assert sizes == [5, epochs.count(3)]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"method": "unified"}, marks=pytest.mark.nightly),  # alternates batches of stays and of X-rays
        pytest.param({"method": "uni_cxr", "task": "radiology"}, marks=pytest.mark.nightly),  # has no series
        pytest.param(
            {"method": "medfuse_attention", "model.modalities": "static", "checkpoint_every_steps": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_other_methods_can_be_swept(tiny_config, tmp_path, changes):
    tiny_config.update_from_flattened_dict(changes | {"num_epochs": 1})
    rows = sweep(tiny_config, tmp_path, RATES, num_trials=2, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 2 and rows[0]["chosen"] == "yes"
    assert (results.trial_dir(tmp_path, int(rows[0]["trial"])) / "result.json").exists()


def test_trials_that_differ_in_model_or_data_are_in_different_groups(tiny_config, tmp_path):
    values = [
        {"learning_rate": 1e-3},
        {"method": "mmtm3"},
        {"learning_rate": 1e-4, "seed": 4, "model.dropout": 0.1},
        {"data.ehr_only_ratio": 0.2},
        {"method": "mmtm3", "seed": 1},
    ]
    trials = [Trial(i, v) for i, v in enumerate(values)]
    split = groups.split_into_groups(Sweep(tiny_config, tmp_path, {}), trials)
    assert [[trial.number for trial in group] for group in split] == [[0, 2], [1, 4], [3]]


def test_a_group_keeps_its_key_if_the_sweep_and_the_shards_are_moved(tiny_config, tmp_path):
    """Its lanes are then found again. Other encoders are another group."""
    tiny_config.pretrain.ehr = {"method": "uni_ehr"}
    trial, keys = Trial(0, {"learning_rate": 1e-3}), []
    for folder in ("before", "after"):
        tiny_config.data.dir = str(tmp_path / folder / "shards")
        tiny_config.data.cxr_features = str(tmp_path / folder / "features.npz")
        encoders = {"ehr": (tmp_path / folder / "pretrain_ehr", None)}
        keys.append(Sweep(tiny_config, tmp_path / folder, encoders).group_key(trial))
    assert keys[0] == keys[1] and "pretrain_ehr" in keys[0]
    files = [Trial(i, {"data.cxr_features": f"{i}.npz"}) for i in range(2)]  # a search over files
    of_files = Sweep(tiny_config, tmp_path, encoders)
    assert of_files.config_of(files[0]).data.cxr_features == str(Path("0.npz").absolute())
    assert len({of_files.group_key(trial) for trial in files}) == 2
    tiny_config.init.cxr = str(tmp_path / "given")
    encoders["cxr"] = (tmp_path / "given", None)
    assert Sweep(tiny_config, tmp_path / "after", encoders).group_key(trial) != keys[1]


def _open(sweep, trial):
    return groups.open_program(sweep, trial, Costs(), wave.devices_for(sweep, [trial]))


def test_groups_with_equal_steps_share_their_programs(ehr_config, tmp_path):
    sweep = Sweep(ehr_config, tmp_path, {})
    values = [{}, {"data.ehr_only_ratio": 0.5}, {"batch_size": 16, "model.dropout": 0.1}, {"beta2": 0.9}]
    programs = [_open(sweep, Trial(i, changed)) for i, changed in enumerate(values)]
    assert [program.train_fn is programs[0].train_fn for program in programs] == [True, True, True, False]
    assert [program.eval_fn is programs[0].eval_fn for program in programs] == [True, True, True, False]


@pytest.mark.parametrize(
    ("num_devices", "num_trials", "sizes", "expected"),
    [
        (8, 1, (16, 32), [8]),
        (8, 2, (16, 32), [4, 4]),
        (8, 3, (16, 32), [2, 2, 2, 2]),
        (8, 5, (16, 32), [1] * 8),
        (8, 20, (16, 32), [1] * 8),
        (8, 1, (16, 30), [2, 2, 2, 2]),
        (8, 1, (15, 30), [1] * 8),
        (6, 2, (12, 24), [3, 3]),
    ],
)
def test_devices_are_divided_evenly_over_few_trials(num_devices, num_trials, sizes, expected):
    divided = stacked_step.sets(list(range(num_devices)), num_trials, sizes)
    assert [len(one) for one in divided] == expected
    assert [device for one in divided for device in one] == list(range(num_devices))


@pytest.mark.parametrize("method", ["uni_ehr", pytest.param("medfuse", marks=pytest.mark.nightly)])
def test_a_divided_trial_has_the_results_of_one_device(tiny_config, tmp_path, monkeypatch, method):
    """Up to rounding, by plain gradient descent; with augmentation and dropout."""
    monkeypatch.setattr(optim, "adam", lambda beta2: _PLAIN)
    tiny_config.method, tiny_config.image.crop, tiny_config.num_epochs = method, "random", 2
    opened, open_program = [], groups.open_program

    def recorded(*args):
        opened.append([len(one) for one in args[-1]])
        return open_program(*args)

    monkeypatch.setattr(groups, "open_program", recorded)
    specs, states = ["lr:loguniform(0.03,0.3)"], []
    for name, divides in (("whole", False), ("divided", True)):
        (row,) = sweep(tiny_config, tmp_path / name, specs, num_trials=1, lanes=1, divide_trials=divides)
        states.append(best_state(results.trial_dir(tmp_path / name, 0)))
        assert row["status"] == "finished"
    assert opened == [[1, 1], [2]]
    assert difference(*states) < 5e-6
    fresh = run_lib.open_run(tiny_config).fresh_state()
    assert difference(states[0], fresh) > 1e-3, "training moves the weights by more than the tolerance"


@pytest.mark.slow
def test_the_last_trial_takes_the_devices_of_those_that_ended(ehr_config, tmp_path, monkeypatch):
    """Three of four trials stop after an epoch; the last goes on with both devices, from its last save."""

    def should_stop(progress, early_stop_epochs):
        return progress.epoch > 0 and progress.learning_rate > 5e-3

    monkeypatch.setattr(Progress, "should_stop", should_stop)
    ehr_config.num_epochs = 3
    tables = [
        sweep(ehr_config, tmp_path / str(divides), RATES, num_trials=4, lanes=1, divide_trials=divides)
        for divides in (False, True)
    ]
    assert len({row["epochs"] for row in tables[0]}) == 2, "some trials stop and some do not"
    for whole, divided in zip(*(sorted(rows, key=lambda row: row["trial"]) for rows in tables)):
        assert (whole["epochs"], whole["lr"]) == (divided["epochs"], divided["lr"])
        assert float(divided["val_auroc"]) == pytest.approx(float(whole["val_auroc"]), abs=0.01)
    for row in tables[1]:
        lines = (results.trial_dir(tmp_path / "True", int(row["trial"])) / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2 * int(row["epochs"]), "no epoch is trained twice"


@pytest.mark.nightly
def test_the_batch_need_not_divide_over_the_devices(ehr_config, tmp_path):
    """A trial runs on one device."""
    ehr_config.batch_size = ehr_config.eval.batch_size = 31
    ehr_config.num_epochs = 1
    assert [row["status"] for row in sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)] == ["finished"] * 2


class _Others:
    """Leases of a process beside others, of which `idle` are idle."""

    def __init__(self, idle=1, taken=()):
        self.idle, self.taken, self.held, self.released = idle, set(taken), [], []

    def is_free(self, name):
        return name not in self.taken

    def claim(self, name):
        self.held.append(name)
        return True

    def holds(self, name):
        return name in self.held

    def release(self, name):
        if name in self.held:
            self.held.remove(name)
            self.released.append(name)

    def num_idle(self):
        return self.idle


@pytest.mark.parametrize(
    ("idle", "divides", "taken", "claimed"),
    [
        (1, False, (), range(8)),  # alone
        (2, False, (), range(4)),
        (2, False, (0, 2), (1, 3, 4)),
        (8, False, (), range(2)),  # one for each of the two devices
        (8, True, (), range(1)),
        (3, False, range(8), range(8, 12)),  # the first group is taken
    ],
)
def test_a_process_claims_its_share(ehr_config, tmp_path, idle, divides, taken, claimed):
    trials = [Trial(i, {"beta2": 0.9 if i < 8 else 0.99}) for i in range(20)]
    leases = _Others(idle, [Trial(i, {}).lease for i in taken])
    sweep = Sweep(ehr_config, tmp_path, {}, leases, divides=divides)
    assert [trial.number for trial in groups.claim(sweep, [trials[:8], trials[8:]])] == list(claimed)
    assert leases.held == [trials[i].lease for i in claimed]


@pytest.mark.slow
def test_trials_are_given_up_to_idle_processes_and_can_be_resumed(ehr_config, tmp_path):
    """After the first save. A trial that this process does not hold is not trained."""
    trials = [Trial(i, {"learning_rate": 1e-3 * (i + 1)}) for i in range(6)]
    leases = _Others(idle=1)
    sweep = Sweep(ehr_config, tmp_path, {}, leases, lanes=1)
    for trial in trials[:5]:
        leases.claim(trial.lease)
    ehr_config.num_epochs = 2
    groups.train_group(sweep, trials, Costs())
    assert [results.record(tmp_path, trial) is not None for trial in trials] == [True, True, True, False, False, False]
    assert leases.released[:2] == [trials[3].lease, trials[4].lease], "half of five, at the first save"
    epochs = [json.loads(line)["epoch"] for line in (results.trial_dir(tmp_path, 4) / "metrics.jsonl").open()]
    assert epochs == [1, 1] and not results.trial_dir(tmp_path, 5).exists()
    groups.train_group(Sweep(ehr_config, tmp_path, {}), trials[4:5], Costs())
    assert len((results.trial_dir(tmp_path, 4) / "metrics.jsonl").read_text().splitlines()) == 4
