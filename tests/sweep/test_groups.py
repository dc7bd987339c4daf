"""Trials side by side: the numbers of runs alone; a failed one fails alone; a stopped sweep gives the same table."""

import json

import jax
import numpy as np
import optax
import pytest
from sweep_cases import (
    RATES,
    assert_as_alone,
    assert_goes_on_as_whole,
    best_state,
    difference,
    sweep,
)

from medfuse_jax import experiment, optim
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import frozen_encoders, results, search, stacked_step
from medfuse_jax.sweep import groups as run_lib
from medfuse_jax.sweep.costs import Costs


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
    tiny_config.method, tiny_config.image.crop = method, "random"
    specs = ["lr:loguniform(0.03,0.3)", "dropout:uniform(0.0,0.5)", "seed:int(0,100)"]
    rows = sweep(tiny_config, tmp_path / "sweep", specs, num_trials=4, lanes=lanes)
    assert [row["status"] for row in rows] == ["finished"] * 4
    best, second = (results.trial_dir(tmp_path / "sweep", int(row["trial"])) for row in rows[:2])
    assert_as_alone(best, tmp_path / "alone", monkeypatch, tolerance=5e-6)
    # The tolerance shows a trial that got another's numbers.
    assert difference(best_state(best), best_state(second)) > 1e-2


def test_a_stopped_sweep_goes_on_to_the_same_table(ehr_config, tmp_path, monkeypatch):
    assert_goes_on_as_whole(ehr_config, tmp_path, monkeypatch, RATES, lanes=1)


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


def _limit(monkeypatch, fits) -> list:
    """Steps run out of memory unless fits(trials at once, lanes); returns what ran or tried to, step by step."""
    train_all, tried = stacked_step.train_all, []

    def limited(train_fn, stacks, batch, on):
        tried.append((sum(one.num_trials for one in stacks), stacks[0].dropout.shape[1]))
        if not fits(*tried[-1]):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return train_all(train_fn, stacks, batch, on)

    monkeypatch.setattr(stacked_step, "train_all", limited)
    return tried


@pytest.mark.slow
def test_where_memory_is_short_fewer_trials_run_at_once(ehr_config, tmp_path, monkeypatch):
    """In the next start from the first step on."""
    ehr_config.num_epochs = 1
    tried = _limit(monkeypatch, lambda trials, lanes: trials <= 2)
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 5 and tried[0] == (5, 1) and tried[-1][0] <= 2
    tried.clear()
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=9, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 9 and max(tried) == (2, 1)


@pytest.mark.slow
def test_where_memory_is_short_fewer_lanes_run_together_before_trials_wait(ehr_config, tmp_path, monkeypatch):
    ehr_config.num_epochs = 1
    tried = _limit(monkeypatch, lambda trials, lanes: lanes < 2)
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, lanes=3)
    assert [row["status"] for row in rows] == ["finished"] * 5
    assert list(dict.fromkeys(tried)) == [(5, 3), (5, 2), (5, 1)]


@pytest.mark.slow
def test_a_trial_without_memory_says_how_it_is_tried_again(ehr_config, tmp_path, monkeypatch):
    ehr_config.num_epochs = 1
    with monkeypatch.context() as small:
        _limit(small, lambda trials, lanes: False)
        with pytest.raises(UserError, match=r"no trial of .* finished"):
            sweep(ehr_config, tmp_path, RATES, num_trials=3, lanes=1)
    for number in range(3):
        reason = json.loads((results.trial_dir(tmp_path, number) / "trial.json").read_text())["reason"]
        assert reason.startswith(f"out of memory: where there is more, delete trials/{number:03d}/trial.json and start")
    (results.trial_dir(tmp_path, 1) / "trial.json").unlink()
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=3, lanes=1)
    assert [row["trial"] for row in rows if row["status"] == "finished"] == ["1"]


@pytest.mark.parametrize(
    ("where", "name", "error", "reason"),
    [
        (
            frozen_encoders,
            "can_cache",
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"),
            "out of memory before the first",
        ),
        (stacked_step, "stack", MemoryError("Unable to allocate"), "out of memory"),
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
    run_lib.train_group(experiments, trials, Costs())
    assert all(results.record(tmp_path, trial)["reason"].startswith(reason) for trial in trials)


def test_another_error_is_no_failed_trial(ehr_config, tmp_path, monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(stacked_step, "train_all", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)


@pytest.mark.slow
def test_trials_that_stop_early_free_their_place(ehr_config, tmp_path, monkeypatch):
    def stops_by_its_rate(progress, early_stop_epochs):
        return progress.epoch >= (1 if progress.learning_rate > 5e-3 else 3)

    stack, sizes = stacked_step.stack, []

    def seen(states, *args):
        sizes.append(len(states))
        return stack(states, *args)

    monkeypatch.setattr(stacked_step, "stack", seen)
    monkeypatch.setattr(Progress, "should_stop", stops_by_its_rate)
    ehr_config.num_epochs = 4
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, lanes=3)
    epochs = [int(row["epochs"]) for row in rows]
    assert epochs == [1 if float(row["lr"]) > 5e-3 else 3 for row in rows] and set(epochs) == {1, 3}
    assert sizes == [5, epochs.count(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "unified"},  # alternates batches of stays and of X-rays
        {"method": "uni_cxr", "task": "radiology"},  # has no series
        {"method": "medfuse_attention", "model.modalities": "static", "checkpoint_every_steps": 2},
    ],
    ids=str,
)
def test_other_models_are_swept(tiny_config, tmp_path, changes):
    tiny_config.update_from_flattened_dict(changes | {"num_epochs": 1})
    rows = sweep(tiny_config, tmp_path, RATES, num_trials=2, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 2 and rows[0]["chosen"] == "yes"
    assert (results.trial_dir(tmp_path, int(rows[0]["trial"])) / "result.json").exists()


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


def test_a_group_is_the_same_where_the_sweep_and_the_shards_were_moved(tiny_config, tmp_path):
    """lanes/ is found again. Encoders from elsewhere are others."""
    tiny_config.pretrain.ehr = {"method": "uni_ehr"}
    trial, shared = search.Trial(0, {"learning_rate": 1e-3}), []
    for folder in ("before", "after"):
        tiny_config.data.dir = str(tmp_path / folder / "shards")
        encoders = {"ehr": (tmp_path / folder / "pretrain_ehr", None)}
        shared.append(run_lib.Sweep(tiny_config, tmp_path / folder, encoders).shared_by(trial))
    assert shared[0] == shared[1] and "pretrain_ehr" in shared[0]
    tiny_config.init.cxr = str(tmp_path / "given")
    encoders["cxr"] = (tmp_path / "given", None)
    assert run_lib.Sweep(tiny_config, tmp_path / "after", encoders).shared_by(trial) != shared[1]


def test_groups_share_the_programs_of_equal_steps_and_keep_none_that_no_trial_needs(ehr_config, tmp_path, monkeypatch):
    together, costs = run_lib.Sweep(ehr_config, tmp_path, {}, in_rounds=True), Costs()
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


@pytest.mark.slow
def test_a_trial_runs_on_one_device_whatever_the_batch(ehr_config, tmp_path):
    """A batch of 31 divides over no two devices."""
    ehr_config.batch_size = ehr_config.eval.batch_size = 31
    ehr_config.num_epochs = 1
    assert [row["status"] for row in sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)] == ["finished"] * 2
