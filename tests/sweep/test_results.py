"""The files of a sweep: one sweep per folder, one build of the data per sweep, one record per trial."""

import json
import runpy

import damage
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results
from medfuse_jax.sweep.trial import Trial

_SEARCH = {"algorithm": "random", "trials": [{"learning_rate": 1e-3}, {"learning_rate": 1e-4}]}
_OPTUNA = {"algorithm": "optuna", "search": ["lr"], "round": 2, "trials": 3, "seed": 0}
_TRIAL = Trial(1, {"learning_rate": 1e-3, "image.scale": (0.9, 1.1)})


@pytest.fixture
def config():
    return config_lib.default()


def _refusal(workdir, config, digest="digest", search=_SEARCH) -> UserError:
    with pytest.raises(UserError) as error:
        results.claim(workdir, config, digest, search)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return error.value


def test_a_sweep_resumes_only_on_the_build_of_the_data_it_started_with(config, tmp_path):
    results.claim(tmp_path, config, "digest", _SEARCH)
    config.data.dir = "shards"
    assert str(_refusal(tmp_path, config, digest="another").path) == "shards/pheno"


def test_a_sweep_from_before_a_field_existed_resumes(config, tmp_path):
    results.claim(tmp_path, config, "digest", _SEARCH)
    stored = json.loads((tmp_path / "sweep.json").read_text())
    del stored["seal"], stored["config"]["model"]["cxr_encoder"]
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    results.claim(tmp_path, config, "digest", _SEARCH)
    config.model.cxr_encoder = "resnet50"
    assert "config.model.cxr_encoder is resnet34 there" in str(_refusal(tmp_path, config))


def test_a_folder_of_runs_is_refused(config, tmp_path):
    """They could no longer be resumed there."""
    (tmp_path / "pheno").mkdir()
    config_lib.save(config, tmp_path / "pheno" / "config.json")
    assert _refusal(tmp_path, config).path == tmp_path / "pheno" / "config.json"
    assert not (tmp_path / "sweep.json").exists()


def test_only_fields_that_change_numbers_identify_a_sweep(config, tmp_path):
    results.claim(tmp_path, config, "digest", _SEARCH)
    config.data.dir, config.placement = "elsewhere", "device"
    results.claim(tmp_path, config, "digest", _SEARCH)
    config.batch_size = 8
    assert "config.batch_size" in _refusal(tmp_path, config).value


def test_trials_can_be_added_but_not_removed_or_changed(config, tmp_path):
    results.claim(tmp_path, config, "digest", _SEARCH)
    longer = _SEARCH | {"trials": [*_SEARCH["trials"], {"learning_rate": 1e-5}]}
    results.claim(tmp_path, config, "digest", longer, writes=False)
    assert results.read_claim(tmp_path)["search"] == _SEARCH
    results.claim(tmp_path, config, "digest", longer)
    assert results.read_claim(tmp_path)["search"] == longer
    assert _refusal(tmp_path, config).value == "--trials was 3 and is now 2"
    others = _SEARCH | {"trials": [{"learning_rate": i / 1000} for i in range(1, 200)]}
    assert "trial 1 was {'learning_rate': 0.0001}" in _refusal(tmp_path, config, search=others).value
    assert _refusal(tmp_path, config, search=_OPTUNA).value == "--algorithm was random and is now optuna"


def test_rounds_cannot_be_extended(config, tmp_path):
    """The last round of the shorter search may be a partial one."""
    results.claim(tmp_path, config, "digest", _OPTUNA)
    assert _refusal(tmp_path, config, search=_OPTUNA | {"trials": 4}).value == "--trials was 3 and is now 4"


def test_the_chosen_trial_is_known_once_the_sweep_has_ended(tmp_path):
    with pytest.raises(UserError) as error:
        results.chosen_dir(tmp_path)
    assert error.value.path == tmp_path / "sweep.csv" and "has not ended" in str(error.value)
    trials = [
        {"trial": i, "values": {"learning_rate": 10.0**-i}, "status": "finished", "reason": ""}
        | {"val_auroc": auroc, "best_epoch": 1, "epochs": 1}
        for i, auroc in enumerate((0.6, 0.7, None))
    ]
    results.write_table(tmp_path, trials, "pheno")
    assert results.chosen_dir(tmp_path) == tmp_path / "trials" / "001"
    results.write_table(tmp_path, trials[2:], "pheno")
    with pytest.raises(UserError, match="none was chosen"):
        results.chosen_dir(tmp_path)
    (tmp_path / "sweep.csv").write_text("trial,status\n0,finished\n")
    with pytest.raises(UserError, match="cannot be read"):
        results.chosen_dir(tmp_path)


@pytest.mark.parametrize("path", ["trials/000/trial.json", "rounds/000.json"])
def test_trials_without_sweep_json_are_refused(config, tmp_path, path):
    results.write_json(tmp_path / path, [])
    assert _refusal(tmp_path, config).path == tmp_path / path.partition("/")[0]
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"search": []}',
        '{"search": {}, "data": "digest", "config": {"data.dir": ""}}',
        '{"search": {"round": "x"}, "data": "digest", "config": {}}',
    ],
)
def test_a_damaged_sweep_json_is_refused(config, tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    assert _refusal(tmp_path, config).path == tmp_path / "sweep.json"


def test_the_best_config_runs_from_any_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.data.dir, config.init.cxr, config.data.statistics = "shards", "runs/cxr", "mimic3.json"
    config.model.modalities = "static, mine/notes.py"
    chosen = {"trial": 1, "values": {"learning_rate": 1e-3}, "val_auroc": 0.7}
    made = runpy.run_path(str(results.write_best_config(tmp_path, chosen, config)))["get_config"]()
    folder = str(tmp_path)
    assert (made.data.dir, made.init.cxr, made.init.ehr) == (f"{folder}/shards", f"{folder}/runs/cxr", "")
    assert made.data.statistics == f"{folder}/mimic3.json"
    assert made.model.modalities == f"static,{folder}/mine/notes.py"


def test_a_record_is_read_back(tmp_path):
    assert results.record(tmp_path, _TRIAL) is None
    results.write_record(tmp_path, _TRIAL, results.FINISHED, val_auroc=float("nan"), best_epoch=1, epochs=2)
    assert results.record(tmp_path, _TRIAL)["epochs"] == 2 and results.record(tmp_path, _TRIAL)["val_auroc"] is None
    assert list(results.record(tmp_path, _TRIAL)["values"]) == ["learning_rate", "image.scale"], "in the trial's order"
    results.write_record(tmp_path, _TRIAL, results.FAILED, "out of memory")
    assert results.record(tmp_path, _TRIAL)["reason"] == "out of memory"


@pytest.mark.parametrize(
    "change",
    [
        lambda r: [],
        lambda r: {"trial": 1},
        lambda r: r | {"values": r["values"] | {"learning_rate": 0.01}},
        lambda r: r | {"trial": 0},
        lambda r: r | {"status": "running"},
        lambda r: r | {"val_auroc": "0.9"},
        lambda r: {k: v for k, v in r.items() if k != "best_epoch"},
        lambda r: {k: v for k, v in r.items() if k != "reason"},
    ],
)
def test_a_record_that_was_edited_or_belongs_to_another_trial_is_refused(tmp_path, change):
    results.write_record(tmp_path, _TRIAL, results.FINISHED, val_auroc=0.5, best_epoch=1, epochs=2)
    path = results.trial_dir(tmp_path, 1) / "trial.json"
    path.write_text(json.dumps(change(damage.unsealed(path))))
    with pytest.raises(UserError) as error:
        results.record(tmp_path, _TRIAL)
    assert error.value.path == path and "\n" not in str(error.value)


def test_without_a_validation_auroc_the_lowest_loss_is_chosen(tmp_path):
    trials = [
        {"trial": i, "values": {"learning_rate": 10.0**-i}, "status": "finished", "reason": ""}
        | {"val_auroc": None, "val_loss": loss, "best_epoch": 1, "epochs": 1}
        for i, loss in enumerate((0.6, 0.5, 0.5, 0.7))
    ]
    failed = {"trial": 4, "values": {"learning_rate": 1.0}, "status": "failed", "reason": "NaN", "epochs": 1}
    assert results.choose([*trials, failed])["trial"] == 1  # the first in a tie
    assert [r["trial"] for r in results.ranked([failed, *trials])] == [1, 2, 0, 3, 4]
    assert "val_loss" in results.write_table(tmp_path, [*trials, failed], "pheno").splitlines()[0]
    assert results.chosen_dir(tmp_path).name == "001"
