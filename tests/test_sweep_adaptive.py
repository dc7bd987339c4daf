"""Rounds of trials by Optuna: the same for every process and start, and better than chance."""

import math
from pathlib import Path

import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax.errors import UserError
from medfuse_jax.sweep import adaptive, command, results, search

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install optuna")

_BEST_RATE = 2e-4
_PHENO = Path(__file__).parent.parent / "configs" / "pheno.py"


def _search(*specs, num_trials):
    parameters = search.parse(list(specs), config_lib.default())
    return parameters, search.draw(parameters, num_trials, seed=0)


def _run(workdir, parameters, at_random, per_round, seed=0, draws=True, stop_after=None):
    """Goes through the rounds; a trial's AUROC falls with its rate's distance to the best one."""
    made = []
    for number, trials in enumerate(adaptive.rounds(workdir, parameters, at_random, per_round, seed, draws)):
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
    for trials in adaptive.rounds(tmp_path, parameters, at_random, per_round=2, seed=0, draws=True):
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
    wanted = {"specs": [], "num_trials": 3, "seed": 0, "algorithm": "random", "per_round": None} | given
    with pytest.raises(UserError, match=said):
        command._plan(config_lib.default(), _PHENO, tmp_path, is_first=True, **wanted)


def test_a_damaged_round_is_named(tmp_path):
    parameters, at_random = _search("lr:loguniform(1e-5,1e-3)", num_trials=2)
    results.write_whole(tmp_path / "rounds" / "000.json", "[")
    with pytest.raises(UserError, match=r"rounds/000\.json cannot be read"):
        next(adaptive.rounds(tmp_path, parameters, at_random, 2, 0, True))
