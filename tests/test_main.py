"""main: trains the stages in order, resumes, and refuses impossible runs before training anything."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import example_runs
import numpy as np
import pytest
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, main, train
from medfuse_jax import run as run_lib
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.runs import sources, workdir

_ONE_PROCESS = {"coordinator": None, "num_processes": None, "process": None, "distributed": False}


@pytest.fixture
def run_main(monkeypatch):
    def run(config, folder):
        given = SimpleNamespace(config=config.copy_and_resolve_references(), workdir=str(folder), **_ONE_PROCESS)
        monkeypatch.setattr(main, "flags", SimpleNamespace(FLAGS=given))
        main.main([])

    return run


def test_a_stopped_command_resumes_and_ends_in_results_and_a_report(
    fusion_config, run_main, tmp_path, monkeypatch, capsys
):
    """The radiology dataset has no test record: that stage is trained, not evaluated."""
    _without_test(monkeypatch, "radiology")
    folder, trained, train_one = tmp_path / "run", [], train.train

    def stop_at_the_second(run, workdir, encoders=None):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(workdir.name)
        train_one(run, workdir, encoders)

    monkeypatch.setattr(train, "train", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_main(fusion_config, folder)
    monkeypatch.setattr(train, "train", train_one)
    assert trained == ["pretrain_cxr"] and not (folder / "result.json").exists()
    before = (folder / "pretrain_cxr" / "metrics.jsonl").read_bytes()
    run_main(fusion_config, folder)
    assert (folder / "pretrain_cxr" / "metrics.jsonl").read_bytes() == before
    methods = {
        name: json.loads((folder / name / "result.json").read_text())["method"] for name in (".", "pretrain_ehr")
    }
    assert methods == {".": "medfuse", "pretrain_ehr": "uni_ehr"}
    printed = capsys.readouterr().out
    assert "pretrain_cxr is not evaluated" in printed and not (folder / "pretrain_cxr" / "result.json").exists()
    assert "MedFuse − EHR only (LSTM)" in printed and (folder / "report" / "index.html").exists()

    # A finished encoder given by config.init replaces its pre-training.
    fusion_config.init.cxr = str(folder / "pretrain_cxr")
    given, stages = sources.find(run_lib.open_run(fusion_config), tmp_path / "given")
    assert set(given) == {"cxr"} and set(stages) == {"ehr"}
    with refused(path=folder):
        run_main(fusion_config, folder)


def _fields(folder) -> dict:
    """Return the names of all fields in a run's files."""
    with np.load(folder / "predictions_test.npz") as stored:
        arrays = {name: stored[name].dtype.kind for name in stored.files}
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "config": {
            f for f in config_lib.flat(config_lib.load(folder / "config.json")) if not f.startswith("pretrain.")
        },
        "predictions": arrays,
        "metrics": {line["phase"]: set(line) for line in lines},
        "result": {k: set(v) if isinstance(v, dict) else type(v) for k, v in result.items() if k != "seal"},
        "subset": set(result["subsets"]["paired"]),
    }


def test_the_commands_train_and_report_as_typed_and_a_run_is_evaluated_again(ehr_config, tmp_path):
    """They run as processes. Their files have the same fields as the simulated runs that other tests read."""
    sizes = ["--config.data.max_buckets=1", "--config.model.ehr_hidden=8", "--config.num_epochs=1"]
    sizes += ["--config.eval.num_bootstrap=20", f"--config.data.dir={ehr_config.data.dir}"]
    config = Path(__file__).parent.parent / "configs" / "pheno.py"

    def run(module, *flags):
        command = [sys.executable, "-m", module, *flags]
        path = os.pathsep.join([str(config.parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("medfuse_jax.main", f"--config={config}", "--config.method=uni_ehr", *sizes)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pheno_") and printed.endswith(f"runs/{folder.name}/report/index.html\n")
    scored = json.loads((folder / "result.json").read_text())
    evaluate.evaluate(folder)
    assert json.loads((folder / "result.json").read_text()) == scored
    assert "EHR only (LSTM)" in run("medfuse_jax.report", "--runs=runs", "--out=report")
    assert (tmp_path / "report" / "index.html").exists()
    example_runs.write_run(tmp_path / "made_up", "pheno", "uni_ehr", example_runs.simulate("pheno", 60))
    assert _fields(tmp_path / "made_up") == _fields(folder)


def test_a_run_that_lost_its_checkpoints_restarts_and_says_so(tiny_config, tmp_path, capsys):
    tiny_config.method, tiny_config.num_epochs = "uni_ehr", 1
    run = run_lib.open_run(tiny_config)
    workdir.claim(tmp_path, run)
    train.train(run, tmp_path)
    assert "restarts" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints")
    train.train(run, tmp_path)
    assert "has no checkpoint: training restarts" in capsys.readouterr().out


def _without_test(monkeypatch, task):
    """Open every dataset of a task as if its test split were empty."""

    def opened(data_dir, name, **options):
        dataset = open_dataset(data_dir, name, **options)
        if name != task:
            return dataset
        part = {field: values[:0] for field, values in dataset.index["test"].items()}
        return dataclasses.replace(dataset, index=dataset.index | {"test": part})

    monkeypatch.setattr(run_lib, "open_dataset", opened)


def test_a_run_without_test_records_is_refused_at_once(fusion_config, run_main, tmp_path, monkeypatch):
    _without_test(monkeypatch, "pheno")
    with refused(path=Path(fusion_config.data.dir) / "pheno"):
        run_main(fusion_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"init.cxr": "nowhere"}, ""),
        ({"method": "uni_cxr", "task": "pheno", "init.ehr": "nowhere"}, ""),
        ({"data.dir": "nowhere"}, ""),
        ({"batch_size": 3}, "batch_size"),
        ({"recurrence": "palas"}, "recurrence"),
        ({"profile_steps": "9000:9001"}, "profile_steps"),
        ({"images_per_batch": 32}, "images_per_batch"),
        ({"learning_rate": 2.0}, "learning_rate"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_written(fusion_config, run_main, tmp_path, changes, field):
    fusion_config.update_from_flattened_dict(changes)
    with refused() as caught:
        run_main(fusion_config, tmp_path / "run")
    assert caught.value.field == f"config.{field}" if field else "nowhere" in str(caught.value.path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["shards", "sweep", "ensemble", "other run"])
def test_a_refused_workdir_is_left_as_it_was(ehr_config, run_main, tmp_path, kind):
    folder = tmp_path / "taken"
    folder.mkdir()
    content = {"sweep": {"sweep.json": {}}, "ensemble": {"config.json": {"rule": "average"}}}
    content |= {"other run": {"config.json": {"name": "other"}, "checkpoints": {}}, "shards": {}}
    for name, part in content[kind].items():
        (folder / name).write_text(json.dumps(part))
    if kind == "shards":
        folder = Path(ehr_config.data.dir) / "pheno"
    before = sorted(folder.rglob("*"))
    with refused():
        run_main(ehr_config, folder)
    assert sorted(folder.rglob("*")) == before
