"""Sweeps as a whole: their table and choice, what they go on with, and what is refused before anything is trained."""

import functools
import json
import re
import runpy
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from sweep_cases import PRETRAIN, RATES, best_state, stop_at_save, sweep

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, experiment, records
from medfuse_jax.runs import sources
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import command, processes, results
from medfuse_jax.sweep import groups as run_lib


def test_the_sweep_chooses_by_validation_and_tests_once(ehr_config, tmp_path):
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=4)
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
    assert sweep(ehr_config, tmp_path, RATES, num_trials=4) == rows
    assert {path: path.stat().st_mtime_ns for path in written} == written, "a finished sweep trains and tests nothing"


def test_a_sweep_pretrains_its_encoders_in_its_own_folder(tiny_config, tmp_path):
    """Nothing is replaced here. Rerunning trains nothing, and no other command can write to a trial or a stage."""
    tiny_config.num_epochs = 1
    for name, changes in PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    rates = ["lr:loguniform(1e-9,1e-8)"]  # so low that a trial ends with the weights it started from
    rows = sweep(tiny_config, tmp_path, rates, num_trials=2, lanes=1)
    assert [row["status"] for row in rows] == ["finished"] * 2
    stages = {name: tmp_path / f"pretrain_{name}" for name in PRETRAIN}
    trained = best_state(results.trial_dir(tmp_path, int(rows[0]["trial"]))).params
    for name, folder in stages.items():
        encoder = best_state(folder).params[f"{name}_encoder"]
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), trained[f"{name}_encoder"], encoder)
        assert max(np.ptp(leaf) for leaf in jax.tree.leaves(encoder)) > 0.1, "the tolerance is below a weight's size"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/metrics.jsonl")}
    assert len(written) == 4
    assert sweep(tiny_config, tmp_path, rates, num_trials=2, lanes=1) == rows
    assert {path: path.stat().st_mtime_ns for path in written} == written
    run = experiment.open_experiment(config_lib.load(stages["ehr"] / "config.json"))
    for folder in (stages["ehr"], results.trial_dir(tmp_path, 0)):
        with pytest.raises(UserError, match="is in the folder of a sweep"):
            workdir_lib.claim(folder, run)


def test_a_sweep_goes_on_with_more_trials(ehr_config, tmp_path):
    ehr_config.num_epochs = 1
    (first,) = sweep(ehr_config, tmp_path, RATES, num_trials=1, lanes=1)
    folder = results.trial_dir(tmp_path, 0)
    trained = (folder / "metrics.jsonl").stat().st_mtime_ns
    record = json.loads((folder / "trial.json").read_text())
    (folder / "trial.json").write_text(json.dumps(record | {"val_auroc": 0.01}))  # so that another is chosen
    other, again = sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)
    assert (other["trial"], other["chosen"]) == ("1", "yes") and (again["trial"], again["lr"]) == ("0", first["lr"])
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == trained
    assert "scored for this trial and, at another time, for trial 0, is" in (tmp_path / "sweep.html").read_text()
    with pytest.raises(UserError, match=r"holds another sweep \(--trials is 2 there and 1 here\)"):
        sweep(ehr_config, tmp_path, RATES, num_trials=1, lanes=1)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_where_its_folder_was_moved(tiny_config, tmp_path, monkeypatch):
    for name, changes in PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    whole = sweep(tiny_config, tmp_path / "whole", RATES, num_trials=2, lanes=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_save(patched, 2)
        sweep(tiny_config, tmp_path / "stopped", RATES, num_trials=2, lanes=1)
    (tmp_path / "stopped").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert sweep(tiny_config, Path("moved"), RATES, num_trials=2, lanes=1) == whole
    config = config_lib.load(results.trial_dir(tmp_path / "moved", 0) / "config.json")
    assert config.init.cxr == str(tmp_path / "moved" / "pretrain_cxr"), "an absolute path, whatever was typed"


@pytest.mark.slow
def test_trials_are_exported_and_chosen_where_the_shards_were_moved(tiny_config, shards, tmp_path):
    """Heads are kept in a file, and encoded again: the shards are read where they are now."""
    tiny_config.method, tiny_config.num_epochs = "early", 1
    for name, changes in PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    shutil.copytree(shards, tmp_path / "before")
    tiny_config.data.dir = str(tmp_path / "before")
    rows = sweep(tiny_config, tmp_path / "sweep", RATES, num_trials=2, lanes=1)
    (tmp_path / "before").rename(tmp_path / "after")
    tiny_config.data.dir = str(tmp_path / "after")
    assert sweep(tiny_config, tmp_path / "sweep", RATES, num_trials=2, lanes=1, export=[0, 1]) == rows
    with pytest.raises(UserError, match=r"holds a sweep: give one of its trials, such as .*trials/000"):
        evaluate.evaluate(tmp_path / "sweep")
    for number in range(2):
        found = evaluate.evaluate(results.trial_dir(tmp_path / "sweep", number))
        assert found["data"]["dir"] == str(tmp_path / "after")
    best = runpy.run_path(str(tmp_path / "sweep" / "best_config.py"))["get_config"]()
    assert best.data.dir == str(tmp_path / "after")
    assert sources.find(experiment.open_experiment(best), tmp_path / "run")[0].keys() == {"ehr", "cxr"}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("profile_steps", "1:2", r"config\.profile_steps is of a run alone"),
        ("recurrence", "cudnn", r"config\.recurrence is 'cudnn', which runs no trials side by side"),
    ],
)
def test_what_trials_cannot_do_is_refused(ehr_config, tmp_path, field, value, said):
    ehr_config[field] = value
    with pytest.raises(UserError, match=said):
        sweep(ehr_config, tmp_path / "sweep", RATES)
    assert not (tmp_path / "sweep").exists()


def test_two_sweeps_do_not_share_a_folder(ehr_config, tmp_path):
    with workdir_lib.locked(tmp_path), pytest.raises(UserError, match="another process is using"):
        sweep(ehr_config, tmp_path, RATES)


@pytest.mark.slow
def test_rounds_of_optuna_are_trials_like_any(ehr_config, tmp_path):
    pytest.importorskip("optuna")
    ehr_config.num_epochs = 1
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=5, algorithm="optuna", per_round=2)
    assert [row["status"] for row in rows] == ["finished"] * 5 and [row["chosen"] for row in rows].count("yes") == 1
    assert len(list((tmp_path / "rounds").iterdir())) == 3
    assert sweep(ehr_config, tmp_path, RATES, num_trials=5, algorithm="optuna", per_round=2) == rows
    with pytest.raises(UserError, match="holds another sweep"):
        sweep(ehr_config, tmp_path, RATES, num_trials=5)


def test_a_folder_of_something_else_is_refused(ehr_config, tmp_path, monkeypatch):
    ehr_config.num_epochs = 1
    sweep(ehr_config, tmp_path / "sweep", RATES, num_trials=1, lanes=1)
    with pytest.raises(UserError, match=r"holds another sweep \(by --search or --seed, trial 0 is .* there and"):
        sweep(ehr_config, tmp_path / "sweep", ["lr:loguniform(1e-3,1e-1)"], num_trials=1)
    with monkeypatch.context() as rebuilt, pytest.raises(UserError, match="is no longer the build that the sweep in"):
        rebuilt.setattr(records, "digest", lambda *args: "of other shards")
        sweep(ehr_config, tmp_path / "sweep", RATES, num_trials=1)
    ehr_config.batch_size = 16
    with pytest.raises(UserError, match=r"holds another sweep \(config\.batch_size is 32 there and 16 here\)"):
        sweep(ehr_config, tmp_path / "sweep", RATES, num_trials=1)
    with pytest.raises(UserError, match="is in the folder of a sweep"):
        sweep(ehr_config, results.trial_dir(tmp_path / "sweep", 0), RATES, num_trials=1)
    shutil.copytree(results.trial_dir(tmp_path / "sweep", 0), tmp_path / "run")
    with pytest.raises(UserError, match="holds a run, not a sweep"):
        sweep(ehr_config, tmp_path / "run", RATES, num_trials=1)


def test_the_shards_are_no_folder_of_a_sweep(ehr_config, shards):
    before = sorted(shards.rglob("*"))
    with pytest.raises(UserError, match="holds the shards"):
        sweep(ehr_config, shards, RATES, num_trials=1)
    assert sorted(shards.rglob("*")) == before


def test_a_trial_that_cannot_run_is_refused_before_any_is_trained(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"trial \d \(method uni_crx\): config\.method is 'uni_crx'.*Did you mean"):
        sweep(tiny_config, tmp_path, ["method:choice(medfuse,uni_crx)"], num_trials=2)
    assert not any(tmp_path.iterdir())


def _stages_and_trials(config, workdir, specs, monkeypatch, **more) -> tuple[dict, dict]:
    """The pre-training of a sweep of two trials, and the encoders that each starts from, by method; trains nothing."""
    stages, started = {}, {}

    def note(sweep, trials, costs):
        for of_trial in map(sweep.config_of, trials):
            started[of_trial.method] = {name: Path(path).name for name, path in of_trial.init.items() if path}

    monkeypatch.setattr(command.train, "pretrain", lambda found, by_sweep: stages.update(found))
    monkeypatch.setattr(run_lib, "train_group", note)
    monkeypatch.setattr(command, "_are_recorded", lambda workdir, trials: [True])
    monkeypatch.setattr(command, "_conclude", lambda sweep, trials, wanted: (workdir / "sweep.csv").touch())
    sweep(config, workdir, specs, num_trials=2, **more)
    return stages, started


@pytest.mark.parametrize("method", ["uni_ehr", "medfuse"])
def test_each_trial_starts_from_the_encoders_that_it_alone_would_have_trained(
    tiny_config, tmp_path, monkeypatch, method
):
    """Whatever the config's own method. That of uni_ehr would be trained as the run itself is."""
    tiny_config.method = method
    for name, changes in PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    stages, started = _stages_and_trials(tiny_config, tmp_path, ["method:choice(uni_ehr,medfuse)"], monkeypatch)
    assert sorted(stages) == ["cxr", "ehr"] and stages["cxr"][1].config.method == "uni_cxr"
    assert started == {"uni_ehr": {}, "medfuse": {"ehr": "pretrain_ehr", "cxr": "pretrain_cxr"}}


def test_processes_wait_for_an_encoder_that_only_trials_added_later_start_from(tiny_config, tmp_path, monkeypatch):
    for name, changes in PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    _stages_and_trials(tiny_config, tmp_path, ["method:choice(uni_ehr,medfuse)"], monkeypatch)
    waited = []
    monkeypatch.setattr(command.pods, "wait_for", lambda are_there, what: waited.append(list(are_there())))
    (tmp_path / "pretrain_cxr" / "trained.json").unlink()
    _stages_and_trials(
        tiny_config, tmp_path, ["method:choice(uni_ehr,medfuse)"], monkeypatch, process=processes.Process(1, 2)
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
    for name, changes in PRETRAIN.items():
        tiny_config.pretrain[name] = changes
    with pytest.raises(UserError, match=rf"trial \d \({said}\): the ehr encoder is frozen .* would stay random"):
        sweep(tiny_config, tmp_path, [spec], num_trials=2)
    assert not any(tmp_path.iterdir())


def test_groups_of_one_are_dealt_to_all_processes(ehr_config, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(run_lib, "train_group", lambda sweep, trials, costs: trained.extend(t.number for t in trials))
    monkeypatch.setattr(command, "_are_recorded", lambda workdir, trials: [True])
    monkeypatch.setattr(command, "_conclude", lambda sweep, trials, wanted: (tmp_path / "sweep.csv").touch())
    shares = []
    for process in range(4):
        sweep(ehr_config, tmp_path, ["ehr_only_ratio:uniform(0,1)"], 8, process=processes.Process(process, 4))
        shares.append(trained[:])
        trained.clear()
    assert [len(share) for share in shares] == [2] * 4 and sorted(
        number for share in shares for number in share
    ) == list(range(8))


@pytest.mark.slow
def test_what_is_said_of_the_costs_is_of_this_start(ehr_config, tmp_path, capsys, monkeypatch):
    """Pre-training beside start-up, and no trial that an earlier start had trained."""
    ahead_s, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead_s[0])

    def pretrain(stages, by_sweep):
        ahead_s[0] += 1000.0

    monkeypatch.setattr(command, "_conclude", lambda sweep, trials, wanted: (tmp_path / "sweep.csv").touch())
    monkeypatch.setattr(command.train, "pretrain", pretrain)
    ehr_config.num_epochs = 1
    for trained in (2, 0):
        sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("once for "))
        trials, pretrain_s, startup_s, *_ = (float(number) for number in re.findall(r"[\d.]+(?= s|\b trials)", line))
        assert trials == trained and 1000 <= pretrain_s < 1100
        assert 0 <= startup_s < 900, "pre-training is no part of it"
