"""Rounds of trials by Optuna: the same in every process and after every restart, and better than random search."""

import math
from pathlib import Path

import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import adaptive, command, results, search
from medfuse_jax.sweep.trial import Trial

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna")

_BEST_RATE = 2e-4
_PHENO = Path(__file__).parents[2] / "configs" / "pheno.py"


def _search(*specs, num_trials):
    parameters = search.parse(list(specs), config_lib.default())
    return parameters, search.draw(parameters, num_trials, seed=0)


def _accept(trial):
    pass


def _run(workdir, parameters, random_trials, per_round, seed=0, num_rounds=None, check=_accept):
    """Run the rounds; the AUROC of a trial falls with the distance of its rate to the best one."""
    trained = []
    for number, trials in enumerate(adaptive.rounds(workdir, parameters, random_trials, per_round, seed, check)):
        if number == num_rounds:
            break
        trained.append(trials)
        for trial in trials:
            distance = abs(math.log10(trial.values.get("learning_rate", 1) / _BEST_RATE))
            auroc = 0.9 - 0.1 * distance
            results.write_record(workdir, trial, results.FINISHED, val_auroc=auroc, best_epoch=1, epochs=1)
    return trained


def test_later_rounds_are_closer_to_the_best_than_random_search(tmp_path):
    parameters, random_trials = _search("lr:loguniform(1e-6,1e-1)", num_trials=30)
    rounds = _run(tmp_path, parameters, random_trials, per_round=5)
    assert [len(trials) for trials in rounds] == [5] * 6
    assert [trial.number for trials in rounds for trial in trials] == list(range(30))

    def distance(trials):
        return np.median([abs(math.log10(trial.values["learning_rate"] / _BEST_RATE)) for trial in trials])

    assert distance(rounds[4] + rounds[5]) < 0.5 * distance(random_trials)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_leaves_a_region_where_trials_fail(tmp_path, seed):
    """Three quarters of random trials fail, those above 1e-3: of six rounds of five, hardly any in the last two."""
    parameters = search.parse(["lr:loguniform(1e-4,1)"], config_lib.default())
    num_failed = []
    for trials in adaptive.rounds(tmp_path, parameters, search.draw(parameters, 30, seed), 5, seed, _accept):
        rates = [trial.values["learning_rate"] for trial in trials]
        for trial, rate in zip(trials, rates):
            if rate > 1e-3:
                results.write_record(tmp_path, trial, results.FAILED, "the loss is nan", epochs=0)
            else:
                auroc = 0.8 - abs(math.log10(rate / 3e-4)) / 10
                results.write_record(tmp_path, trial, results.FINISHED, val_auroc=auroc, best_epoch=1, epochs=1)
        num_failed.append(sum(rate > 1e-3 for rate in rates))
    assert sum(num_failed[4:]) <= 4 < 6 <= sum(num_failed[:2]), num_failed


def test_a_resumed_search_has_the_same_trials(tmp_path):
    parameters, random_trials = _search("lr:loguniform(1e-5,1e-3)", "dropout:uniform(0,0.5)", num_trials=8)
    whole = _run(tmp_path / "whole", parameters, random_trials, per_round=3)
    assert [len(trials) for trials in whole] == [3, 3, 2]
    assert list(whole[0][0].values) == ["learning_rate", "model.dropout"], "in the order of --search"
    assert _run(tmp_path / "stopped", parameters, random_trials, per_round=3, num_rounds=1) == whole[:1]
    assert _run(tmp_path / "stopped", parameters, random_trials, per_round=3) == whole
    assert _run(tmp_path / "other", parameters, random_trials, per_round=3, seed=1) != whole


def test_all_trials_are_different_even_if_some_fail(tmp_path):
    parameters, random_trials = _search("seed:int(0,3)", "method:choice(mmtm3,mmtm4)", num_trials=8)
    drawn = []
    for trials in adaptive.rounds(tmp_path, parameters, random_trials, per_round=2, seed=0, check=_accept):
        drawn += trials
        results.write_record(tmp_path, trials[0], results.FAILED, "the loss is nan")
        results.write_record(tmp_path, trials[1], results.FINISHED, val_auroc=0.5, best_epoch=1, epochs=1)
    assert len({tuple(trial.values.values()) for trial in drawn}) == 8


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"algorithm": "tpe"}, "--algorithm"),
        ({"per_round": 3}, "--round"),
        ({"algorithm": "optuna", "specs": ["seed:int(0,3)"], "num_trials": 5}, "--trials"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, given, field):
    request = command.Request(config_lib.default(), _PHENO, tmp_path, **{"specs": [], "num_trials": 3} | given)
    with pytest.raises(UserError) as error:
        command._plan_trials(request)
    assert error.value.field == field


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "[]",
        '{"a": 1}',
        '[{"learning_rate": 1e-4}]',
        '[1, {"learning_rate": 1e-4}]',
        '[{"learning_rate": 1e-4}, {"lr": 1e-4}]',
        '[{"learning_rate": 1e-4}, {"learning_rate": "x"}]',
        '[{"learning_rate": 1e-4}, {"learning_rate": 0.5}]',
        '[{"learning_rate": 1e-4}, {"learning_rate": NaN}]',
    ],
)
def test_a_damaged_round_is_refused(tmp_path, content):
    parameters, random_trials = _search("lr:loguniform(1e-5,1e-3)", num_trials=3)
    path = tmp_path / "rounds" / "000.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError) as error:
        next(adaptive.rounds(tmp_path, parameters, random_trials, 2, 0, _accept))
    assert error.value.path == path and "\n" not in str(error.value)


def test_values_of_every_type_are_read_back(tmp_path):
    specs = ["seed:int(0,9)", "dropout:uniform(0,0.5)", "image.flip:choice(true,false)", "method:choice(mmtm3,mmtm4)"]
    parameters, random_trials = _search(*specs, num_trials=6)
    assert sum(map(len, _run(tmp_path, parameters, random_trials, per_round=2))) == 6


def test_a_proposal_that_cannot_run_is_drawn_again(tmp_path):
    """The AUROC rises with the rate, but rates above 0.5 cannot run."""
    parameters, random_trials = _search("lr:uniform(0,1)", num_trials=20)

    def check(trial):
        if trial.values["learning_rate"] > 0.5:
            raise UserError("too high", field="config.learning_rate")

    random_trials = [Trial(t.number, {"learning_rate": t.values["learning_rate"] / 2}) for t in random_trials]
    unchecked = _run(tmp_path / "unchecked", parameters, random_trials, 5)
    assert max(trial.values["learning_rate"] for trials in unchecked for trial in trials) > 0.5
    rounds = _run(tmp_path / "checked", parameters, random_trials, 5, check=check)
    assert [len(trials) for trials in rounds] == [5] * 4
    assert max(trial.values["learning_rate"] for trials in rounds for trial in trials) <= 0.5
    results.write_json(tmp_path / "checked" / "rounds" / "000.json", [{"learning_rate": 0.6}])
    with pytest.raises(UserError) as error:  # rounds drawn by another host are checked too
        next(adaptive.rounds(tmp_path / "checked", parameters, random_trials[:1], 5, 0, check))
    assert error.value.field == "config.learning_rate"


def test_a_sweep_resumed_on_more_devices_keeps_its_round_size(tmp_path, monkeypatch):
    config = config_lib.default()

    def identity(**more):
        request = command.Request(config, _PHENO, tmp_path, [], num_trials=20, algorithm="optuna", **more)
        return command._plan_trials(request).identity

    first = identity()
    assert first["round"] == 5
    results.claim(tmp_path, config, "digest", first)
    monkeypatch.setattr(command.jax, "devices", lambda: list(range(8)))
    assert identity() == first and identity(per_round=8)["round"] == 8
    (tmp_path / "sweep.json").unlink()
    assert identity()["round"] == 8
