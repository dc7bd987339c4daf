"""Rounds of trials by Optuna: the same for every process and start, and better than chance."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import adaptive, command, results, search

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna")

_BEST_RATE = 2e-4
_PHENO = Path(__file__).parents[2] / "configs" / "pheno.py"


def _search(*specs, num_trials):
    parameters = search.parse(list(specs), config_lib.default())
    return parameters, search.draw(parameters, num_trials, seed=0)


def _any(trial):
    """Every trial can run."""


def _run(workdir, parameters, at_random, per_round, seed=0, draws=True, stop_after=None, check=_any):
    """Goes through the rounds; a trial's AUROC falls with its rate's distance to the best one."""
    made = []
    for number, trials in enumerate(adaptive.rounds(workdir, parameters, at_random, per_round, seed, draws, check)):
        if number == stop_after:
            break
        made.append(trials)
        for trial in trials:
            away = abs(math.log10(trial.values.get("learning_rate", 1) / _BEST_RATE))
            results.write_record(workdir, trial, results.FINISHED, val_auroc=0.9 - 0.1 * away, best_epoch=1, epochs=1)
    return made


def test_later_rounds_lie_nearer_to_the_best_than_chance(tmp_path):
    parameters, at_random = _search("lr:loguniform(1e-6,1e-1)", num_trials=30)
    made = _run(tmp_path, parameters, at_random, per_round=5)
    assert [len(trials) for trials in made] == [5] * 6
    assert [trial.number for trials in made for trial in trials] == list(range(30))

    def distance(trials):
        return np.median([abs(math.log10(trial.values["learning_rate"] / _BEST_RATE)) for trial in trials])

    assert distance(made[4] + made[5]) < 0.5 * distance(at_random)


def test_a_stopped_search_goes_on_with_the_same_trials_and_others_read_them(tmp_path):
    parameters, at_random = _search("lr:loguniform(1e-5,1e-3)", "dropout:uniform(0,0.5)", num_trials=8)
    whole = _run(tmp_path / "whole", parameters, at_random, per_round=3)
    assert [len(trials) for trials in whole] == [3, 3, 2]
    stopped = _run(tmp_path / "stopped", parameters, at_random, per_round=3, stop_after=1)
    assert stopped == whole[:1]
    assert _run(tmp_path / "stopped", parameters, at_random, per_round=3) == whole
    assert _run(tmp_path / "stopped", parameters, at_random, per_round=3, draws=False) == whole
    assert _run(tmp_path / "other", parameters, at_random, per_round=3, seed=1) != whole


def test_every_trial_is_new_and_a_failed_one_is_no_hindrance(tmp_path):
    parameters, at_random = _search("seed:int(0,3)", "method:choice(mmtm3,mmtm4)", num_trials=8)
    made = []
    for trials in adaptive.rounds(tmp_path, parameters, at_random, per_round=2, seed=0, draws=True, check=_any):
        made += trials
        results.write_record(tmp_path, trials[0], results.FAILED, "the loss is nan")
        results.write_record(tmp_path, trials[1], results.FINISHED, val_auroc=0.5, best_epoch=1, epochs=1)
    assert len({tuple(trial.values.values()) for trial in made}) == 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"algorithm": "tpe"}, "--algorithm is 'tpe'"),
        ({"per_round": 3}, "--round is of --algorithm=optuna"),
        ({"algorithm": "optuna", "specs": ["seed:int(0,3)"], "num_trials": 5}, "only 4 different trials"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, given, said):
    request = command.Request(config_lib.default(), _PHENO, tmp_path, **{"specs": [], "num_trials": 3} | given)
    with pytest.raises(UserError, match=said):
        command._search(request, draws=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "Expecting value"),
        ("[]", "it does not list 2 trials"),
        ('{"a": 1}', "it does not list 2 trials"),
        ('[{"learning_rate": 1e-4}]', "it does not list 2 trials"),
        ('[1, {"learning_rate": 1e-4}]', "1 does not give each parameter"),
        ('[{"learning_rate": 1e-4}, {"lr": 1e-4}]', "{'lr': 0.0001} does not give each parameter"),
        ('[{"learning_rate": 1e-4}, {"learning_rate": "x"}]', "draws no learning_rate of 'x'"),
        ('[{"learning_rate": 1e-4}, {"learning_rate": 0.5}]', "draws no learning_rate of 0.5"),
        ('[{"learning_rate": 1e-4}, {"learning_rate": NaN}]', "draws no learning_rate of nan"),
    ],
)
def test_a_damaged_round_is_named(tmp_path, content, said):
    parameters, at_random = _search("lr:loguniform(1e-5,1e-3)", num_trials=3)
    results.write_whole(tmp_path / "rounds" / "000.json", content)
    with pytest.raises(UserError) as refused:
        next(adaptive.rounds(tmp_path, parameters, at_random, 2, 0, True, _any))
    assert re.search(
        r"rounds/000\.json cannot be read \(.*\): delete it, and the round is drawn again", str(refused.value)
    )
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_was_drawn_is_read_back_whatever_its_type(tmp_path):
    specs = ["seed:int(0,9)", "dropout:uniform(0,0.5)", "image.flip:choice(true,false)", "method:choice(mmtm3,mmtm4)"]
    parameters, at_random = _search(*specs, num_trials=6)
    assert sum(map(len, _run(tmp_path, parameters, at_random, per_round=2))) == 6


def test_a_proposal_that_cannot_run_is_drawn_again(tmp_path):
    """The higher the rate the better it does, up to a limit of the config's within the range."""
    parameters, at_random = _search("lr:uniform(0,1)", num_trials=20)

    def check(trial):
        if trial.values["learning_rate"] > 0.5:
            raise UserError("config.learning_rate is too high")

    at_random = [search.Trial(t.number, {"learning_rate": t.values["learning_rate"] / 2}) for t in at_random]
    assert max(t.values["learning_rate"] for r in _run(tmp_path / "any", parameters, at_random, 5) for t in r) > 0.5
    made = _run(tmp_path / "checked", parameters, at_random, 5, check=check)
    assert [len(trials) for trials in made] == [5] * 4
    assert max(trial.values["learning_rate"] for trials in made for trial in trials) <= 0.5
    results.write_whole(tmp_path / "checked" / "rounds" / "000.json", '[{"learning_rate": 0.6}]')
    with pytest.raises(UserError, match="too high"):  # what another process drew is checked too
        next(adaptive.rounds(tmp_path / "checked", parameters, at_random[:1], 5, 0, False, check))


def test_a_sweep_goes_on_with_its_own_rounds_on_more_devices(tmp_path, monkeypatch):
    config = config_lib.default()

    def plan(**more):
        request = command.Request(config, _PHENO, tmp_path, [], num_trials=20, algorithm="optuna", **more)
        return command._search(request, draws=True).identity

    begun = plan()
    assert begun["round"] == 5
    results.claim(tmp_path, config, "digest", begun)
    monkeypatch.setattr(command.jax, "devices", lambda: list(range(8)))
    assert plan() == begun and plan(per_round=8)["round"] == 8
    (tmp_path / "sweep.json").unlink()
    assert plan()["round"] == 8
