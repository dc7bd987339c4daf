"""Sweeps as a whole: table and choice, resuming, and what is refused before anything is trained."""

import dataclasses
import functools
import json
import runpy
import shutil
import time
from pathlib import Path

import damage
import jax
import numpy as np
import pytest
from refusals import refused
from sweep_cases import PRETRAIN, RATES, assert_as_alone, best_state, read_lines, stop_at_save, sweep

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, records, train
from medfuse_jax import run as run_lib
from medfuse_jax.data import device_store
from medfuse_jax.runs import checkpoints, sources
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import command, groups, leases, results
from medfuse_jax.sweep.sweep import Sweep
from medfuse_jax.sweep.trial import Trial


@pytest.fixture(scope="module")
def finished_sweep(shared_tiny_config, tmp_path_factory):
    """(folder, config, rows) of a sweep of three trials."""
    config, folder = shared_tiny_config.copy_and_resolve_references(), tmp_path_factory.mktemp("sweep") / "sweep"
    config.method, config.num_epochs = "uni_ehr", 1
    return folder, config, sweep(config, folder, RATES)


@pytest.fixture
def finished(finished_sweep, tmp_path):
    folder, config, rows = finished_sweep
    shutil.copytree(folder, tmp_path / "sweep")
    return tmp_path / "sweep", config.copy_and_resolve_references(), rows


def _written_at(folder, pattern) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def test_the_best_trial_is_chosen_on_validation_and_tested_once(finished):
    folder, config, rows = finished
    aurocs = [float(row["val_auroc"]) for row in rows]
    assert aurocs == sorted(aurocs, reverse=True) and len(set(aurocs)) > 1
    assert [row["chosen"] for row in rows] == ["yes", "", ""]
    chosen = results.trial_dir(folder, int(rows[0]["trial"]))
    assert [path.parent for path in (folder / "trials").glob("*/result*.json")] == [chosen]
    assert [path.parent for path in (folder / "trials").glob("*/predictions*.npz")] == [chosen]
    best = runpy.run_path(str(folder / "best_config.py"))["get_config"]()
    config_lib.validate(best)
    assert config_lib.difference(best, config_lib.load(chosen / "config.json")) == ""
    page = (folder / "sweep.html").read_text()
    assert f"trial {rows[0]['trial']}: {aurocs[0]:.3f}" in page
    reached = [checkpoints.reached(results.trial_dir(folder, n))[1] for n in range(3)]
    scaled = json.loads((chosen / "result.json").read_text())["calibration"]["scaled"]
    assert scaled["temperature"] == reached[int(chosen.name)].temperature
    assert all(progress.temperature > 0 for progress in reached)
    costs = json.loads((folder / "costs.json").read_text())
    assert (costs["trials"], costs["steps"]) == (3, len(run_lib.open_run(config).train_plan(epoch=1)))
    assert costs["compile_s"] > 0 and costs["train_s"] > 0


def test_rerunning_a_finished_sweep_trains_and_tests_nothing(finished):
    folder, config, rows = finished
    before = _written_at(folder, "trials/**/*.json*")
    assert sweep(config, folder, RATES) == rows
    assert _written_at(folder, "trials/**/*.json*") == before


def test_trials_can_be_added_and_another_may_be_chosen(finished):
    folder, config, rows = finished
    first = results.trial_dir(folder, int(rows[0]["trial"]))
    before = _written_at(folder, "trials/*/metrics.jsonl")
    record = damage.unsealed(first / "trial.json")
    (first / "trial.json").write_text(json.dumps(record | {"val_auroc": 0.01}))
    more = sweep(config, folder, RATES, num_trials=4)
    assert more[0]["chosen"] == "yes" and more[-1]["trial"] == rows[0]["trial"] and len(more) == 4
    assert {row["trial"]: row["lr"] for row in rows}.items() <= {row["trial"]: row["lr"] for row in more}.items()
    assert before.items() <= _written_at(folder, "trials/*/metrics.jsonl").items()
    assert f"also scored for trial {rows[0]['trial']}, at another time" in (folder / "sweep.html").read_text()
    with pytest.raises(UserError) as error:
        sweep(config, folder, RATES)
    assert error.value.value == "--trials was 4 and is now 3"


@pytest.mark.slow
def test_a_sweep_pretrains_its_encoders_in_its_own_folder(tiny_config, tmp_path):
    """Rerunning trains nothing, and no other command can write to a trial or a stage."""
    tiny_config.num_epochs = 1
    tiny_config.pretrain.ehr = PRETRAIN["ehr"]
    rates = ["lr:loguniform(1e-9,1e-8)"]  # so low that a trial keeps its initial weights
    rows = sweep(tiny_config, tmp_path, rates, num_trials=2, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 2
    stage = tmp_path / "pretrain_ehr"
    encoder = best_state(stage).params["ehr_encoder"]
    trained = best_state(results.trial_dir(tmp_path, int(rows[0]["trial"]))).params["ehr_encoder"]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), trained, encoder)
    assert max(np.ptp(leaf) for leaf in jax.tree.leaves(encoder)) > 0.1, "weights are larger than the tolerance"
    before = _written_at(tmp_path, "*/**/metrics.jsonl")
    assert len(before) == 3
    assert sweep(tiny_config, tmp_path, rates, num_trials=2, lanes=1) == rows
    assert _written_at(tmp_path, "*/**/metrics.jsonl") == before
    for folder in (stage, results.trial_dir(tmp_path, 0)):
        with pytest.raises(UserError) as error:
            workdir_lib.check_outside_sweeps(folder)
        assert error.value.path == tmp_path


@pytest.mark.nightly
def test_a_stopped_sweep_resumes_after_its_folder_was_moved(tiny_config, tmp_path, monkeypatch):
    tiny_config.pretrain.update(PRETRAIN)
    whole = sweep(tiny_config, tmp_path / "whole", RATES, num_trials=2, lanes=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_save(patched, 2)
        sweep(tiny_config, tmp_path / "stopped", RATES, num_trials=2, lanes=1)
    (tmp_path / "stopped").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert sweep(tiny_config, Path("moved"), RATES, num_trials=2, lanes=1) == whole
    config = config_lib.load(results.trial_dir(tmp_path / "moved", 0) / "config.json")
    assert config.init.cxr == str(tmp_path / "moved" / "pretrain_cxr"), "an absolute path, from a relative --workdir"


@pytest.mark.nightly
def test_trials_are_exported_and_chosen_after_the_shards_were_moved(tiny_config, shards, tmp_path):
    """Trials on frozen encoders are stored in files and encode the data again."""
    tiny_config.method, tiny_config.num_epochs = "early", 1
    tiny_config.pretrain.update(PRETRAIN)
    shutil.copytree(shards, tmp_path / "before")
    tiny_config.data.dir = str(tmp_path / "before")
    rows = sweep(tiny_config, tmp_path / "sweep", RATES, num_trials=2, lanes=1)
    (tmp_path / "before").rename(tmp_path / "after")
    tiny_config.data.dir = str(tmp_path / "after")
    assert sweep(tiny_config, tmp_path / "sweep", RATES, num_trials=2, lanes=1, export=[0, 1]) == rows
    with pytest.raises(UserError, match=r"such as .*trials/000") as error:
        evaluate.evaluate(tmp_path / "sweep")
    assert error.value.path == tmp_path / "sweep"
    for number in range(2):
        result = evaluate.evaluate(results.trial_dir(tmp_path / "sweep", number))
        assert result["data"]["dir"] == str(tmp_path / "after")
    best = runpy.run_path(str(tmp_path / "sweep" / "best_config.py"))["get_config"]()
    assert best.data.dir == str(tmp_path / "after")
    assert sources.find(run_lib.open_run(best), tmp_path / "run")[0].keys() == {"ehr", "cxr"}


def test_a_trials_config_follows_files_that_were_moved(tiny_config, tmp_path):
    tiny_config.data.cxr_features, tiny_config.model.cxr_encoder = "before.npz", "features"
    trial = Trial(0, {})
    path = results.trial_dir(tmp_path, 0) / "config.json"
    path.parent.mkdir(parents=True)
    config_lib.save(Sweep(tiny_config, tmp_path, {}).config_of(trial), path)
    tiny_config.data.cxr_features = "after.npz"
    command._update_paths(Sweep(tiny_config, tmp_path, {}), trial)
    assert config_lib.load(path).data.cxr_features == str(Path("after.npz").absolute())


@pytest.mark.parametrize(("field", "value"), [("profile_steps", "1:2"), ("recurrence", "cudnn")])
def test_fields_of_single_runs_are_refused(ehr_config, tmp_path, field, value):
    ehr_config[field] = value
    with pytest.raises(UserError) as error:
        sweep(ehr_config, tmp_path / "sweep", RATES)
    assert (error.value.field, error.value.value) == (f"config.{field}", value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_rounds_of_optuna_are_trained_and_resumed(ehr_config, tmp_path):
    pytest.importorskip("optuna")
    ehr_config.num_epochs = 1
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, algorithm="optuna", per_round=2)
    assert [row["status"] for row in rows] == ["finished"] * 5 and [row["chosen"] for row in rows].count("yes") == 1
    assert len(list((tmp_path / "rounds").iterdir())) == 3
    assert sweep(ehr_config, tmp_path, RATES, num_trials=5, algorithm="optuna", per_round=2) == rows
    with pytest.raises(UserError) as error:
        sweep(ehr_config, tmp_path, RATES, num_trials=5)
    assert error.value.path == tmp_path


def test_folders_of_other_sweeps_and_runs_are_refused(finished, tmp_path, monkeypatch):
    folder, config, _ = finished
    with pytest.raises(UserError) as error:
        sweep(config, folder, ["lr:loguniform(1e-3,1e-1)"])
    assert error.value.path == folder and "--search or --seed: trial 0 was" in error.value.value
    with monkeypatch.context() as rebuilt, pytest.raises(UserError) as error:
        rebuilt.setattr(records, "digest", lambda *args: "of other shards")
        sweep(config, folder, RATES)
    assert error.value.path == Path(config.data.dir) / config.task
    config.batch_size = 16
    with pytest.raises(UserError) as error:
        sweep(config, folder, RATES)
    assert error.value.path == folder and "config.batch_size" in error.value.value
    with pytest.raises(UserError) as error:
        sweep(config, results.trial_dir(folder, 0), RATES)
    assert error.value.path == folder
    shutil.copytree(results.trial_dir(folder, 0), tmp_path / "run")
    with pytest.raises(UserError) as error:
        sweep(config, tmp_path / "run", RATES)
    assert error.value.path == tmp_path / "run" / "config.json"


def test_the_folder_of_the_shards_is_refused(ehr_config, shards):
    before = sorted(shards.rglob("*"))
    with pytest.raises(UserError) as error:
        sweep(ehr_config, shards, RATES, num_trials=1)
    assert error.value.path == shards.resolve() and sorted(shards.rglob("*")) == before


def test_an_invalid_trial_is_refused_before_any_is_trained(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"^trial \d \(method uni_crx\): ") as error:
        sweep(tiny_config, tmp_path, ["method:choice(medfuse,uni_crx)"], num_trials=2)
    assert (error.value.field, error.value.nearest) == ("config.method", "uni_cxr")
    assert not any(tmp_path.iterdir())


def test_a_stage_that_the_devices_cannot_hold_is_refused_before_any_is_trained(tiny_config, tmp_path, monkeypatch):
    tiny_config.pretrain.update(PRETRAIN | {"ehr": PRETRAIN["ehr"] | {"placement": "device"}})
    monkeypatch.setattr(device_store, "MAX_FRACTION", {"auto": 1, "device": 0})
    monkeypatch.setattr(device_store, "memory", lambda on, placement: 1e9)
    with refused(field="config.placement", value="device"):
        sweep(tiny_config, tmp_path / "sweep", RATES)
    assert not (tmp_path / "sweep").exists()


def test_a_list_in_the_config_gives_the_trials_unless_there_is_a_search(tmp_path, capsys):
    path = tmp_path / "listed.py"
    path.write_text("def sweep(add):\n    add(lr=1e-3)\n    add(lr=1e-2)\n")
    request = command.Request(config_lib.default(), path, tmp_path / "sweep", [])
    trials = command._plan_trials(request).initial
    assert [trial.values for trial in trials] == [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]
    with pytest.raises(UserError) as error:
        command._plan_trials(dataclasses.replace(request, algorithm="optuna"))
    assert error.value.field == "--search"
    searched = dataclasses.replace(request, specs=["seed:int(0,9)"], num_trials=1)
    assert [list(trial.values) for trial in command._plan_trials(searched).initial] == [["seed"]]
    assert f"--search replaces the trials listed in {path}" in capsys.readouterr().out


def _skip_training(monkeypatch, pretrained, configs=None):
    """Leave out all training and the results; collect the stages and the trials' configs."""

    def train_group(sweep, trials, costs):
        for trial in trials:
            results.write_record(sweep.workdir, trial, results.FAILED, "not trained")
            if configs is not None:
                configs.append(sweep.config_of(trial))

    monkeypatch.setattr(command.train, "pretrain", lambda stages, **options: pretrained.extend(stages))
    monkeypatch.setattr(groups, "train_group", train_group)
    monkeypatch.setattr(command, "_conclude", lambda sweep, trials, exported: (sweep.workdir / "sweep.csv").touch())


@pytest.mark.parametrize("method", ["uni_ehr", "medfuse"])
def test_trials_start_from_the_encoders_that_their_single_runs_would_train(tiny_config, tmp_path, monkeypatch, method):
    """Whatever the config's own method: for uni_ehr, the stage would be the run itself."""
    tiny_config.method = method
    tiny_config.pretrain.update(PRETRAIN)
    stages, configs = [], []
    _skip_training(monkeypatch, stages, configs)
    sweep(tiny_config, tmp_path, ["method:choice(uni_ehr,medfuse)"], num_trials=2)
    assert sorted(stages) == ["cxr", "ehr"]
    encoders = {c.method: {name: Path(path).name for name, path in c.init.items() if path} for c in configs}
    assert encoders == {"uni_ehr": {}, "medfuse": {"ehr": "pretrain_ehr", "cxr": "pretrain_cxr"}}


def test_encoders_that_added_trials_need_are_trained(tiny_config, tmp_path, monkeypatch):
    tiny_config.pretrain.update(PRETRAIN)
    trained = []
    _skip_training(monkeypatch, trained)
    specs = ["method:choice(uni_ehr,medfuse)"]
    sweep(tiny_config, tmp_path, specs, num_trials=2)
    assert sorted(trained) == ["cxr", "ehr"]
    (tmp_path / "pretrain_cxr" / "trained.json").unlink()
    sweep(tiny_config, tmp_path, specs, num_trials=2)
    assert sorted(trained) == ["cxr", "cxr", "ehr"]


def test_encoders_that_another_process_has_taken_over_are_left_to_it(tiny_config, tmp_path, monkeypatch):
    """As after a suspension: the lease has another owner, which finishes the encoder."""
    tiny_config.pretrain.update(PRETRAIN)
    _skip_training(monkeypatch, [])

    def pretrain(stages, by_sweep, is_ours):
        ((name, (folder, _)),) = stages.items()
        assert is_ours()
        (tmp_path / "leases" / f"pretrain_{name}.1").write_text("of the other process")
        assert not is_ours()
        (folder / "trained.json").write_text("{}")
        raise train.TakenOver

    monkeypatch.setattr(command.train, "pretrain", pretrain)
    sweep(tiny_config, tmp_path, RATES, num_trials=2)
    assert (tmp_path / "sweep.csv").exists()


@pytest.mark.parametrize(
    ("method", "spec", "values"),
    [
        ("medfuse", "method:choice(early,medfuse)", "method early"),
        ("early", "method:choice(early,medfuse)", "method early"),
        ("medfuse", "model.freeze_encoders:choice(true,false)", "model.freeze_encoders True"),
    ],
)
def test_a_trial_that_freezes_random_encoders_is_refused(tiny_config, tmp_path, method, spec, values):
    tiny_config.method, tiny_config.encoders = method, "random"
    tiny_config.pretrain.update(PRETRAIN)
    with pytest.raises(UserError, match=rf"^trial \d \({values}\): ") as error:
        sweep(tiny_config, tmp_path, [spec], num_trials=2)
    assert error.value.field == "config.pretrain.ehr"
    assert not any(tmp_path.iterdir())


@pytest.mark.nightly
def test_costs_are_those_of_the_current_start(ehr_config, tmp_path, monkeypatch):
    """Pre-training is not part of start-up, and trials trained by an earlier start are not counted."""
    ahead_s, clock, claimed = [0.0], time.perf_counter, leases.Leases.claimed
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead_s[0])

    def pretrained_first(self, claim, missing, what):
        ahead_s[0] += 1000.0 * (what == "encoders")
        return claimed(self, claim, missing, what)

    monkeypatch.setattr(leases.Leases, "claimed", pretrained_first)
    ehr_config.num_epochs = 1
    for trained in (2, 0):
        sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)
        costs = json.loads((tmp_path / "costs.json").read_text())
        assert costs["trials"] == trained and 1000 <= costs["pretrain_s"] < 1100
        assert 0 <= costs["startup_s"] < 900


@pytest.mark.slow
def test_a_sweep_of_an_hourly_task_chooses_by_kappa_over_its_hours(hourly_config, tmp_path):
    hourly_config.task, hourly_config.method, hourly_config.num_epochs = "length_of_stay", "uni_ehr", 1
    rows = sweep(hourly_config, tmp_path / "sweep", RATES, 2)
    for row in rows:
        lines = read_lines(results.trial_dir(tmp_path / "sweep", int(row["trial"])))
        assert float(row["val_kappa"]) == pytest.approx(lines[-1]["val_kappa"], abs=1e-5)
    result = json.loads((results.trial_dir(tmp_path / "sweep", int(rows[0]["trial"])) / "result.json").read_text())
    hours = records.hours(hourly_config.data.dir, "length_of_stay", "test")
    assert result["subsets"]["all"]["num_samples"] == hours["num_hours"].sum()


@pytest.mark.nightly
def test_trials_on_all_x_rays_of_a_stay_have_the_results_of_single_runs(images_config, tmp_path, monkeypatch):
    images_config.num_epochs = 1
    rows = sweep(images_config, tmp_path / "sweep", RATES, 2, lanes=2)
    assert [row["status"] for row in rows] == ["finished"] * 2
    chosen = results.trial_dir(tmp_path / "sweep", int(rows[0]["trial"]))
    assert_as_alone(chosen, tmp_path / "alone", monkeypatch, tolerance=2e-5)


def test_without_a_validation_auroc_the_loss_chooses_and_is_named(ehr_config, tmp_path, monkeypatch, capsys):
    """No label of a validation stay is true."""
    read = records.index
    without = {"label": np.zeros_like(read(ehr_config.data.dir, "pheno", "val")["label"])}
    monkeypatch.setattr(records, "index", lambda *of: read(*of) | (without if of[-1] == "val" else {}))
    for flag, value in (("algorithm", "optuna"), ("pruning", "median")):
        with refused(field=f"--{flag}", value=value):
            sweep(ehr_config, tmp_path / flag, RATES, 2, **{flag: value})
    assert capsys.readouterr().out.count("their loss selects it") == 0
    rows = sweep(ehr_config, tmp_path / "sweep", RATES, 2)
    assert capsys.readouterr().out.count("their loss selects it") == 1
    losses = [float(row["val_loss"]) for row in rows]
    assert losses == sorted(losses) and rows[0]["chosen"] == "yes" and "val_auroc" not in rows[0]
    folder = results.chosen_dir(tmp_path / "sweep")
    lines = [line["val_loss"] for line in read_lines(folder) if line["phase"] == "val"]
    assert losses[0] == pytest.approx(min(lines), abs=1e-6)
    result = json.loads((folder / "result.json").read_text())
    assert result["selected_by"].startswith("loss") and "scaled" not in result["calibration"]
    assert "validation loss 0." in (tmp_path / "sweep" / "best_config.py").read_text()
    assert "validation loss by epoch" in (tmp_path / "sweep" / "sweep.html").read_text().lower()
