"""What a sweep writes down of itself: one sweep a folder, one build of the data a sweep, one record a trial."""

import json
import runpy

import pytest

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results
from medfuse_jax.sweep.search import Trial

_SEARCH = {"algorithm": "random", "trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e-4}]}
_TRIAL = Trial(1, {"learning_rate": 1e-3, "image.scale": (0.9, 1.1)})


@pytest.fixture
def config():
    return config_lib.default()


def _refused(workdir, config, said, digest="digest", search=_SEARCH):
    with pytest.raises(UserError) as refused:
        results.claim(workdir, config, digest, search)
    assert said in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_sweep_goes_on_with_the_build_of_the_data_that_it_began_with(config, tmp_path):
    results.claim(tmp_path, config, "digest", _SEARCH)
    _refused(tmp_path, config, "is no longer the build that the sweep in", digest="another")


def test_a_folder_of_runs_does_not_become_a_sweeps(config, tmp_path):
    """They could not be resumed there."""
    (tmp_path / "pheno").mkdir()
    config_lib.save(config, tmp_path / "pheno" / "config.json")
    _refused(tmp_path, config, "holds other runs, such as pheno: choose another --workdir")
    assert not (tmp_path / "sweep.json").exists()


def test_what_changes_no_number_is_no_other_sweep(config, tmp_path):
    results.claim(tmp_path, config, "digest", _SEARCH)
    config.data.dir, config.placement = "elsewhere", "device"
    results.claim(tmp_path, config, "digest", _SEARCH)
    config.batch_size = 8
    _refused(tmp_path, config, "config.batch_size is 16 there and 8 here")


def test_more_trials_go_on_and_fewer_or_others_do_not(config, tmp_path):
    results.claim(tmp_path, config, "digest", _SEARCH)
    longer = _SEARCH | {"trials": [*_SEARCH["trials"], {"learning_rate": 1e-5}]}
    results.claim(tmp_path, config, "digest", longer, writes=False)
    assert results.claimed(tmp_path)["search"] == _SEARCH
    results.claim(tmp_path, config, "digest", longer)
    assert results.claimed(tmp_path)["search"] == longer
    _refused(tmp_path, config, "--trials is 3 there and 2 here")
    others = _SEARCH | {"trials": [{"learning_rate": i / 1000} for i in range(1, 200)]}
    _refused(tmp_path, config, "trial 1 is {'learning_rate': 0.0001} there and {'learning_rate': 0.002}", search=others)
    by_optuna = {"algorithm": "optuna", "search": ["lr"], "round": 2, "trials": 3, "seed": 0}
    _refused(tmp_path, config, "--algorithm is random there and optuna here", search=by_optuna)


def test_rounds_are_not_extended(config, tmp_path):
    """The last round of the shorter search may be a part of one."""
    search = {"algorithm": "optuna", "search": ["lr"], "round": 2, "trials": 3, "seed": 0}
    results.claim(tmp_path, config, "digest", search)
    _refused(tmp_path, config, "--trials is 3 there and 4 here", search=search | {"trials": 4})


@pytest.mark.parametrize("left", ["trials/000/trial.json", "rounds/000.json"])
def test_trials_of_nobody_knows_which_sweep_are_not_taken_over(config, tmp_path, left):
    results.write_whole(tmp_path / left, "[]")
    _refused(tmp_path, config, f"holds {left.partition('/')[0]}/ and no sweep.json to say whose")
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        "{}",
        '{"search": []}',
        '{"search": {}, "data": "digest", "config": []}',
        '{"search": {}, "data": "digest", "config": {"data.dir": ""}}',
        '{"search": {"round": "x"}, "data": "digest", "config": {}}',
    ],
)
def test_a_damaged_sweep_is_one_line(config, tmp_path, content):
    results.write_whole(tmp_path / "sweep.json", content)
    _refused(tmp_path, config, "sweep.json cannot be read or is of another version")


def test_the_best_config_runs_from_any_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.data.dir, config.init.cxr, config.data.statistics = "shards", "runs/cxr", "mimic3.json"
    config.model.modalities = "static, mine/notes.py"
    chosen = {"trial": 1, "values": {"learning_rate": 1e-3}, "val_auroc": 0.7}
    made = runpy.run_path(str(results.write_best_config(tmp_path, chosen, config)))["get_config"]()
    here = str(tmp_path)
    assert (made.data.dir, made.init.cxr, made.init.ehr) == (f"{here}/shards", f"{here}/runs/cxr", "")
    assert made.data.statistics == f"{here}/mimic3.json"
    assert made.model.modalities == f"static,{here}/mine/notes.py"


def test_a_record_is_read_back(tmp_path):
    assert results.record(tmp_path, _TRIAL) is None
    results.write_record(tmp_path, _TRIAL, results.FINISHED, val_auroc=float("nan"), best_epoch=1, epochs=2)
    assert results.record(tmp_path, _TRIAL)["epochs"] == 2 and results.record(tmp_path, _TRIAL)["val_auroc"] is None
    results.write_record(tmp_path, _TRIAL, results.FAILED, "out of memory")
    assert results.record(tmp_path, _TRIAL)["reason"] == "out of memory"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: [], "does not say how the trial ended"),
        (lambda r: {"trial": 1}, "does not say how the trial ended"),
        (lambda r: r | {"values": r["values"] | {"learning_rate": 0.01}}, "values {'learning_rate': 0.01"),
        (lambda r: r | {"trial": 0}, "trial 0, not 1"),
        (lambda r: r | {"val_auroc": "0.9"}, "does not say what the trial reached"),
        (lambda r: {k: v for k, v in r.items() if k != "best_epoch"}, "does not say what the trial reached"),
        (lambda r: {k: v for k, v in r.items() if k != "reason"}, "does not say what the trial reached"),
    ],
)
def test_a_record_of_another_trial_is_named(tmp_path, change, said):
    results.write_record(tmp_path, _TRIAL, results.FINISHED, val_auroc=0.5, best_epoch=1, epochs=2)
    path = results.trial_dir(tmp_path, 1) / "trial.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError) as refused:
        results.record(tmp_path, _TRIAL)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert "trial.json was edited or is another trial's" in str(refused.value)
    assert "delete it, and the trial goes on" in str(refused.value)
