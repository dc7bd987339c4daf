"""Every command of the pages and configs runs and writes what its page says.

Each runs as a process in a copy of the repository, on a synthetic cohort, with flags for size.
"""

import csv
import json
import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from documented import ROOT, Command, commands, made_table
from documented_runs import (
    COUNTED,
    SMALLEST,
    Outcome,
    Workspace,
    all_commands,
    first_of_each_kind,
    missing,
    needs,
    reads,
    writes,
)

from data_prep import cache
from medfuse_jax import config as config_lib
from medfuse_jax import records, torch_import
from medfuse_jax.bench import cases
from medfuse_jax.models import registry
from medfuse_jax.runs import warm_start

_COMMANDS = all_commands()
_SLOW = first_of_each_kind(_COMMANDS)
_MARKED = [
    pytest.param(c, id=str(c)[:100], marks=pytest.mark.slow if c in _SLOW else pytest.mark.nightly) for c in _COMMANDS
]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """One workspace for all test processes."""
    base = tmp_path_factory.getbasetemp()
    return Workspace((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "documented")


@pytest.mark.parametrize("command", _MARKED)
def test_a_documented_command_runs(command, workspace, monkeypatch):
    monkeypatch.chdir(workspace.root)  # outputs contain paths relative to it
    for package in _packages(command):
        if not os.environ.get("MEDFUSE_TEST_ALL"):  # .ci/run sets it, so that no command is skipped there
            pytest.importorskip(package)
    outcome = workspace.done(command)
    assert outcome.returncode == 0, outcome.output[-5000:]
    assert "Traceback" not in outcome.output
    _CHECKS[command.module](command, outcome, workspace.root)


def test_commands_train_every_method_and_read_only_what_others_write():
    assert {command.module for command in _COMMANDS} == set(_CHECKS)
    assert {command.module for command in _SLOW} == set(_CHECKS)
    trained = {c.value("config.method") for c in _COMMANDS if c.module == "medfuse_jax.main"}
    assert trained >= set(registry.METHODS)
    assert {str(command): paths for command in _COMMANDS if (paths := missing(command, _COMMANDS))} == {}
    lost = Command("README.md", "medfuse_jax.evaluate", ("--workdir=runs/lost",))
    assert missing(lost, [*_COMMANDS, lost]) == ["runs/lost"]


def test_commands_run_after_those_they_need():
    evaluate = next(c for c in _COMMANDS if c.module == "medfuse_jax.evaluate" and "003" in c.value("workdir"))
    assert [need.value("export") for need in needs(evaluate, _COMMANDS)] == ["", "0,3"]
    train = next(c for c in _COMMANDS if c.value("workdir") == "runs/pheno" and c.module == "medfuse_jax.main")
    assert [need.module for need in needs(train, _COMMANDS)] == ["data_prep.build"]
    assert reads(train) == ["shards"] and writes(train) == ["runs/pheno"]


def test_documented_benchmark_cases_exist():
    shown = [command for command in commands() if command.value("preset") and "bench" in command.module]
    assert {command.value("preset") for command in shown if command.where.endswith(".md")} == set(SMALLEST)
    for command in shown:
        names = [case.name for case in cases.preset(command.value("preset"))[0]]
        for pattern in (command.value("only"), SMALLEST[command.value("preset")]):
            assert any(re.search(pattern, name) for name in names), (command, pattern)


@pytest.mark.slow
def test_the_code_of_the_data_page_runs(workspace):
    for command in _COMMANDS:
        if command.module == "data_prep.build" and command.value("out") == "shards":
            workspace.done(command)
    block = workspace.python_block("docs/data.md", "from medfuse_jax import records")
    printed = workspace.run_block(block + "\nprint(len(manifest['channels']), len(index['stay_id']), sorted(record))")
    assert printed.startswith("76 ") and "'ehr'" in printed and "'image'" in printed


def _packages(command: Command) -> list[str]:
    """Return the optional packages that a command needs."""
    files = [*reads(command), *writes(command)]
    found = ["torch"] if any(path.endswith((".pth.tar", ".pth")) for path in files) else []
    # These runs start from an imported torch file.
    found += ["torch"] if any(path in ("runs/released", "runs/imagenet") for path in files) else []
    found += ["safetensors"] if any("safetensors" in path or "runs/released_" in path for path in files) else []
    found += ["apache_beam"] if command.module == "data_prep.images.beam" else []
    return found + (["optuna"] if command.value("algorithm") == "optuna" else [])


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _check_scored(folder: Path, predictions: str = "predictions_test.npz", result: str = "result.json") -> dict:
    """Check a workdir's predictions and return its result."""
    with np.load(folder / predictions) as scored:
        assert len(scored["scores"]) == len(scored["labels"]) == len(scored["stay_id"]) > 0
        assert np.isfinite(scored["scores"]).all() and np.ptp(scored["scores"]) > 0
    found = _json(folder / result)
    assert np.isfinite(found["loss"]) and 0 <= found["subsets"]["all"]["auroc_macro"] <= 1
    return found


def _check_build(command: Command, outcome: Outcome, root: Path) -> None:
    if "--explain" in command.flags:
        assert command.value("profile") in outcome.output and len(outcome.output.splitlines()) > 10
        return
    out = str(root / command.value("out"))
    asked = command.value("tasks", "pheno,mortality" + (",radiology" if command.value("mimic_cxr") else "")).split(",")
    assert sorted(path.parent.name for path in Path(out).glob("*/manifest.json")) == sorted(asked)
    for task in asked:
        splits = [records.open_split(out, task, split) for split in ("train", "val", "test")]
        assert all(len(split) > 0 and len(split[0]["label"]) > 0 for split in splits)
        assert records.manifest(out, task)["profile"] == command.value("profile", "paper")
    if "radiology" in asked:
        assert records.open_split(out, "radiology", "train")[0]["image"].shape == (256, 256)
    assert (root / command.value("out") / "audit.html").stat().st_size > 10_000


def _check_synthetic(command: Command, outcome: Outcome, root: Path) -> None:
    assert {path.name for path in (root / command.value("out")).iterdir()} >= {"mimic-iv", "mimic-cxr"}


def _check_images(command: Command, outcome: Outcome, root: Path) -> None:
    printed = re.search(r"([\d,]+) X-rays in ([\d,]+) chunks", outcome.output)
    images, chunks = (int(number.replace(",", "")) for number in printed.groups())
    # At least those with radiology labels.
    assert images >= records.manifest("shards", "radiology")["counts"]["splits"]["train"]["records"]
    assert len(list((root / command.value("out") / cache.FOLDER / "images").iterdir())) >= chunks


def _check_run(command: Command, outcome: Outcome, root: Path) -> None:
    """Check a run of `main`, found by the report's path in its last line that is not of a library."""
    lines = [line for line in outcome.output.strip().splitlines() if not line.startswith("[Gloo]")]
    if command.value("process") not in ("", "0"):
        assert lines == []  # the first process alone reports
        return
    last = lines[-1]
    page = root / last.removeprefix("report: ")
    assert last.startswith("report: ") and page.stat().st_size > 10_000, last
    folder = page.parents[1]
    if command.value("workdir"):
        assert folder == root / command.value("workdir")
    config = config_lib.load(folder / "config.json")
    assert config.method == command.value("config.method", config.method)
    result = _check_scored(folder)
    assert (result["method"], result["task"]) == (config.method, config.task)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in logged] == ["train", "val"] * config.num_epochs
    assert any((folder / "checkpoints").iterdir())
    for name in warm_start.staged(config):
        assert _check_scored(folder / f"pretrain_{name}")["method"] == f"uni_{name}"
    if "pretrain_ehr" in {path.name for path in folder.iterdir()}:
        assert "uni_ehr" in {difference["against"] for difference in result["comparisons"]}
    if config.profile_steps:
        assert any((folder / "profile").rglob("*.json.gz"))


def _check_evaluation(command: Command, outcome: Outcome, root: Path) -> None:
    if "--robustness" in command.flags:
        stored = json.loads((root / command.value("workdir") / "robustness.json").read_text())
        assert [curve["name"] for curve in stored["curves"]] == ["cxr_dropped", "ehr_only", "ehr_hours"]
        return
    written = outcome.output.strip().splitlines()[-1].removeprefix("written: ").split(", ")
    result, predictions = (root / path for path in written)
    assert result.parent == predictions.parent == root / command.value("workdir")
    found = _check_scored(result.parent, predictions.name, result.name)
    dropped = [name for name in ("drop_ehr", "drop_cxr") if command.value(name)]
    for asked in (command.value("head"), command.value("split"), *dropped):
        assert asked in result.name
    if command.value("data_dir"):
        assert found["data"]["dir"] == command.value("data_dir")


def _check_sweep(command: Command, outcome: Outcome, root: Path) -> None:
    folder = root / command.value("workdir")
    if command.value("folds"):
        with (folder / "repeats.csv").open() as file:
            assert {row["fold"] for row in csv.DictReader(file)} == {"0", "1"}
        assert "±" in (folder / "repeats.html").read_text()
        return
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * int(command.value("trials"))
    assert [row["chosen"] for row in rows].count("yes") == 1 and len({row["lr"] for row in rows}) == len(rows)
    (chosen,) = (row for row in rows if row["chosen"])
    trial = folder / "trials" / f"{int(chosen['trial']):03d}"
    assert _check_scored(trial)["best_epoch"] == 1
    best = runpy.run_path(str(folder / "best_config.py"))["get_config"]()
    assert config_lib.difference(best, config_lib.load(trial / "config.json"), ("init.ehr", "init.cxr")) == ""
    assert "<svg" in (folder / "sweep.html").read_text()
    given = [name for name in ("ehr", "cxr") if command.value(f"config.init.{name}")]
    for name in ("ehr", "cxr"):
        source = command.value(f"config.init.{name}") if name in given else str(folder / f"pretrain_{name}")
        assert best.init[name] == str(root / source)
        assert (folder / f"pretrain_{name}" / "trained.json").exists() == (name not in given)
    for number in command.value("export").split(",") if command.value("export") else ():
        assert any((folder / "trials" / f"{int(number):03d}" / "checkpoints").iterdir())
    if command.value("process") == "1":
        assert "once for 1 trials" in outcome.output


def _check_ensemble(command: Command, outcome: Outcome, root: Path) -> None:
    result = _check_scored(root / command.value("workdir"))
    assert [member["run"] for member in result["members"]] and len(result["members"]) == 2


def _check_compare(command: Command, outcome: Outcome, root: Path) -> None:
    found = _json(root / command.value("json"))
    assert [found[name]["run"] for name in ("a", "b")] == [command.value(name) for name in ("a", "b")]
    assert found["differences"][0]["subset"] == "all" and 0 < found["differences"][0]["auroc_macro_p"] <= 1
    assert "b − a" in outcome.output


def _check_predict(command: Command, outcome: Outcome, root: Path) -> None:
    with (root / command.value("out")).open() as file:
        rows = list(csv.DictReader(file))
    index = records.index(root / command.value("data"), "pheno", "test")
    assert [int(row["stay_id"]) for row in rows] == index["stay_id"].tolist()
    assert all(0 <= float(row["Shock"]) <= 1 for row in rows)


def _check_report(command: Command, outcome: Outcome, root: Path) -> None:
    text = (root / command.value("out") / "index.html").read_text()
    assert "<table" in text and "MedFuse" in text


def _check_weights(command: Command, outcome: Outcome, root: Path) -> None:
    if export := command.value("export"):
        state_dict = torch_import.read(root / export)
        assert len(state_dict) >= 10 and all(np.isfinite(value).all() for value in state_dict.values())
        return
    folder = root / command.value("workdir")
    assert _json(folder / "import.json")["file"] == command.value("checkpoint")
    assert any((folder / "checkpoints").iterdir())


def _check_bench(command: Command, outcome: Outcome, root: Path) -> None:
    rows = [json.loads(line) for line in (root / command.value("json")).read_text().splitlines()]
    assert "left out" not in outcome.output and any(row["contender"] == "ours" for row in rows)


def _check_compiled(command: Command, outcome: Outcome, root: Path) -> None:
    rows = [json.loads(line) for line in (root / command.value("json")).read_text().splitlines()]
    assert all(row["fits"] and row["kernels"] > 0 for row in rows) and "fits" in outcome.output


def _check_page(name: str):
    """Check that the page generated from the committed records equals the committed page."""

    def check(command: Command, outcome: Outcome, root: Path) -> None:
        assert (root / name).read_text() == (ROOT / name).read_text()

    return check


def _check_costs(command: Command, outcome: Outcome, root: Path) -> None:
    """Check that the table of docs/methods.md is current; operation counts differ a little between versions of XLA."""
    shown, now = (made_table((folder / "docs/methods.md").read_text()) for folder in (ROOT, root))
    assert list(shown) == list(now) == list(registry.METHODS)
    for method in COUNTED:
        cells = now[method]
        assert shown[method][:3] == cells[:3]
        assert [float(x) for x in shown[method][3:]] == pytest.approx(
            [float(x) for x in cells[3:]], rel=0.05, abs=0.011
        )


def _check_measured(command: Command, outcome: Outcome, root: Path) -> None:
    rows = [json.loads(line) for line in outcome.output.splitlines() if line.startswith("{")]
    assert {row["copies"] for row in rows if row.get("rows_per_s", 0) > 0} == {1, 8}, outcome.output
    assert sum(row.get("images_per_s_core", 0) > 0 for row in rows) == 4, outcome.output


def _check_attribution(command: Command, outcome: Outcome, root: Path) -> None:
    written = list((root / command.value("workdir") / "attributions").iterdir())
    assert {path.suffix for path in written} == {".html", ".npz"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in written)


def _check_paper(command, outcome, root):
    content = json.loads((root / command.value("out") / "paper.json").read_text())
    assert content["self_checks"]["failed"] == [] and content["tables"]
    assert (root / command.value("out") / "index.html").exists()


_CHECKS = {
    "data_prep.synthetic": _check_synthetic,
    "data_prep.build": _check_build,
    "data_prep.images.beam": _check_images,
    "data_prep.bench": _check_measured,
    "medfuse_jax.config": _check_page("docs/config.md"),
    "medfuse_jax.main": _check_run,
    "medfuse_jax.evaluate": _check_evaluation,
    "medfuse_jax.sweep": _check_sweep,
    "medfuse_jax.ensemble": _check_ensemble,
    "medfuse_jax.attribution": _check_attribution,
    "medfuse_jax.compare": _check_compare,
    "medfuse_jax.predict": _check_predict,
    "medfuse_jax.paper": _check_paper,
    "medfuse_jax.report": _check_report,
    "medfuse_jax.torch_import": _check_weights,
    "medfuse_jax.bench": _check_bench,
    "medfuse_jax.bench.compiled": _check_compiled,
    "medfuse_jax.bench.page": _check_page("BENCHMARKS.md"),
    "medfuse_jax.bench.growth": _check_page("docs/performance.md"),
    "medfuse_jax.bench.flops": _check_costs,
}
