"""Hopeless trials end early: by the median of finished trials, or by successive halving."""

import json

import pytest
from sweep_cases import sweep

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import command, pruning, results
from medfuse_jax.sweep.trial import Trial

_APART = ["lr:choice(0.00001,0.001,0.01)"]  # no two trials reach the same AUROC


def _write(workdir, number, aurocs, status=None):
    """Write a trial that has validated with these AUROCs, one an epoch."""
    folder = results.trial_dir(workdir, number)
    folder.mkdir(parents=True)
    lines = [{"phase": "val", "epoch": epoch, "val_auroc": auroc} for epoch, auroc in enumerate(aurocs, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"phase": "tr')
    if status:
        reached = {"val_auroc": max(aurocs), "best_epoch": 1, "epochs": len(aurocs)}
        results.write_record(workdir, Trial(number, {}), status, **reached)


def _pruned(workdir, rule, epoch):
    reached = pruning.read(workdir)
    numbers = (n for n, by_epoch in reached.items() if epoch in by_epoch)
    return sorted(n for n in numbers if pruning.is_hopeless(rule, workdir, reached, n, epoch))


def test_median_ends_trials_below_the_median_of_those_that_have_finished(tmp_path):
    for number, auroc in enumerate((0.6, 0.7, 0.8, 0.9)):
        _write(tmp_path, number, [0.5, auroc, 0.95], results.FINISHED)
    _write(tmp_path, 4, [0.5, 0.74])
    _write(tmp_path, 5, [0.76, 0.5])  # its best counts
    _write(tmp_path, 6, [None, 0.76])
    assert [n for n in _pruned(tmp_path, pruning.MEDIAN, 2) if n > 3] == [4]
    assert [n for n in _pruned(tmp_path, pruning.MEDIAN, 1) if n > 3] == [6], "a NaN is the worst"
    (results.trial_dir(tmp_path, 3) / "trial.json").unlink()
    assert _pruned(tmp_path, pruning.MEDIAN, 2) == [], "too few have finished"


def test_asha_lets_the_best_third_go_on_at_each_rung(tmp_path):
    for number in range(9):
        _write(tmp_path, number, [0.5 + number / 100] * 3)
    assert [_pruned(tmp_path, pruning.ASHA, epoch) for epoch in (1, 2, 3)] == [[], [], [0, 1, 2, 3, 4, 5]]
    assert [epoch for epoch in range(100) if pruning._is_rung(epoch)] == [3, 9, 27, 81]


def test_asha_never_ends_the_only_or_the_best_trial(tmp_path):
    _write(tmp_path, 0, [0.5, 0.5, 0.5])
    assert _pruned(tmp_path, pruning.ASHA, 3) == []
    _write(tmp_path, 1, [0.5, 0.5, 0.6])
    assert _pruned(tmp_path, pruning.ASHA, 3) == [0]


def test_no_trial_is_compared_without_pruning_or_before_its_first_epoch(tmp_path):
    for number in range(9):
        _write(tmp_path, number, [0.5, 0.5, 0.51 + number / 100])
    assert _pruned(tmp_path, pruning.NONE, 3) == []
    assert not pruning.is_hopeless(pruning.ASHA, tmp_path, pruning.read(tmp_path), 0, 0)


@pytest.mark.slow
def test_a_sweep_ends_trials_singly_in_their_lanes(ehr_config, tmp_path):
    """Two of three trials end at epoch 3, in one stack; the others keep the numbers that they have without pruning."""
    ehr_config.num_epochs, ehr_config.early_stop_epochs = 4, 100
    whole = sweep(ehr_config, tmp_path / "whole", _APART, num_trials=3, lanes=3)
    rows = sweep(ehr_config, tmp_path / "pruned", _APART, num_trials=3, lanes=3, pruning="asha")
    assert sorted(row["status"] for row in rows) == ["finished", "pruned: by asha", "pruned: by asha"]
    assert [row["epochs"] for row in rows if row["status"] != "finished"] == ["3", "3"]
    (kept,) = [row for row in rows if row["status"] == "finished"]
    assert kept["chosen"] == "yes"
    same = next(row for row in whole if row["trial"] == kept["trial"])
    assert float(kept["val_auroc"]) == pytest.approx(float(same["val_auroc"]), abs=1e-3)
    with pytest.raises(UserError) as error:
        sweep(ehr_config, tmp_path / "pruned", _APART, num_trials=3, lanes=3)
    assert error.value.path == tmp_path / "pruned" and "--pruning was asha" in str(error.value)


@pytest.mark.parametrize(("rule", "num_epochs", "value"), [("best", 50, "best"), ("asha", 3, 3)])
def test_a_rule_that_cannot_work_is_refused(tmp_path, rule, num_epochs, value):
    config = config_lib.default()
    config.num_epochs = num_epochs
    with pytest.raises(UserError) as error:
        command._pruning_identity(command.Request(config, tmp_path, tmp_path, [], pruning=rule))
    assert (error.value.field, error.value.value) == ("--pruning", value)
