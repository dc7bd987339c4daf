"""builds: results of unusual data say so wherever they are shown; runs of different data are named."""

import contextlib
import json
import shutil
from pathlib import Path

import damage
import example_runs
import pytest

from medfuse_jax import compare, evaluate, metrics, predict, records
from medfuse_jax import run as run_lib
from medfuse_jax.ensemble import command
from medfuse_jax.report import pages, read_runs, terminal
from medfuse_jax.runs import builds, checkpoints, workdir
from medfuse_jax.runs.progress import Progress
from medfuse_jax.sweep import page as sweep_page

_NOTE = builds.UNTIL_OUTTIME_NOTE


def _rebuilt(shards: Path, out: Path, **changes) -> Path:
    """Copy the phenotyping shards with another manifest."""
    shutil.copytree(shards / "pheno", out / "pheno")
    path = out / "pheno" / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest | {"sha256": records.seal(manifest)}))
    return out


def _save(config, folder: Path) -> Path:
    """Write a finished run with random weights."""
    run = run_lib.open_run(config)
    workdir.claim(folder, run)
    with contextlib.closing(checkpoints.open_manager(folder)) as manager:
        checkpoints.save(manager, run.fresh_state(), Progress(epoch=1, best_epoch=1), is_best=True)
    return folder


def _write(folder: Path, method: str, **data) -> Path:
    """Write a finished run of mortality with simulated values. data: changes of its result's 'data'."""
    example_runs.write_config(folder, "mortality", method)
    example_runs.write_evaluation(folder, "mortality", method, example_runs.simulate("mortality", 200), best_epoch=3)
    path = folder / "result.json"
    result = json.loads(path.read_text())
    result["data"] |= data
    path.write_text(json.dumps(result))
    return folder


def _said(text: str) -> bool:
    return _NOTE in " ".join(text.split())


@pytest.mark.parametrize("pairing", ["in_window", "until_outtime"])
def test_results_of_unusually_paired_data_say_so(ehr_config, shards, tmp_path, capsys, pairing):
    is_unusual = pairing == "until_outtime"
    data_dir = _rebuilt(shards, tmp_path / "shards", pairing=pairing)
    ehr_config.data.dir = str(data_dir)
    folder = _save(ehr_config, tmp_path / "run")
    result = evaluate.evaluate(folder)
    expected = {"pairing": pairing} if is_unusual else {}
    for described in (result["data"], damage.unsealed(folder / "data.json")):
        assert {name: value for name, value in described.items() if name == "pairing"} == expected
    assert _said(terminal.table([metrics.to_json(result)])) == is_unusual
    evaluate.write_robustness(folder)
    assert _said(capsys.readouterr().out) == is_unusual
    predict.predict(folder, shards, "val")  # whose pairing is the usual one
    assert (f"{folder}: {_NOTE}" in capsys.readouterr().out) == is_unusual
    trained_as_usual = _save(ehr_config, tmp_path / "usual") if not is_unusual else None
    if trained_as_usual:
        other = _rebuilt(shards, tmp_path / "others", pairing="until_outtime")
        predict.predict(trained_as_usual, other, "val")
        assert f"{other}: {_NOTE}" in capsys.readouterr().out


def test_pages_and_comparisons_say_which_results_are_of_such_data(tmp_path):
    usual = _write(tmp_path / "a", "uni_ehr")
    marked = _write(tmp_path / "b", "medfuse", pairing="until_outtime")
    runs = [read_runs.read_run(folder) for folder in (usual, marked)]
    assert _NOTE not in pages.page(runs[:1])
    assert "For comparison alone" in (alone := pages.page(runs[1:])) and _NOTE in alone
    both = pages.page(read_runs.find_runs([tmp_path]))
    assert f"{_NOTE} Some of these results come from such data." in both
    assert _said(terminal.table([run.result for run in runs], ["usual", "marked"]).replace("marked: ", ""))
    assert "marked: X-rays up to the end" in terminal.table([run.result for run in runs], ["usual", "marked"])
    found = compare.compare(str(usual), str(marked), num_bootstrap=5)
    assert found["b"]["pairing"] == "until_outtime" and "pairing" not in found["a"]
    assert "b: X-rays up to the end" in terminal.differences(metrics.to_json(found))
    same = compare.compare(str(usual), str(usual), num_bootstrap=5)
    assert not _said(terminal.differences(metrics.to_json(same)))


def test_an_unfinished_run_and_a_sweep_of_such_data_are_marked(tmp_path):
    folder = tmp_path / "trials" / "000"
    example_runs.write_config(folder, "mortality", "uni_ehr")
    example_runs.write_training(folder, 2)
    trial = {"trial": 0, "status": "finished", "values": {"learning_rate": 1e-3}, "best_epoch": 1, "val_auroc": 0.7}
    config = json.loads((folder / "config.json").read_text())
    for described in ({}, {"pairing": "until_outtime"}):
        (folder / "data.json").write_text(json.dumps(described))
        assert (_NOTE in pages.page([read_runs.read_run(folder)])) == bool(described)
        page = sweep_page.write(tmp_path, config, [trial | {"epochs": 2, "reason": ""}]).read_text()
        assert (_NOTE in page) == bool(described)


def _trained(folder: Path, **described) -> Path:
    (folder / "data.json").write_text(
        json.dumps({"profile": "paper", "timestep_h": 2.0, "shards": "a" * 64} | described)
    )
    return folder


@pytest.mark.parametrize(
    ("scored", "trained", "words"),
    [
        ({}, {}, ""),
        ({"dir": "moved"}, {"digest": "of other modalities"}, ""),
        ({"profile": "strict"}, {"profile": "strict", "shards": "b" * 64}, "profile strict instead of paper"),
        ({"timestep_h": 0.5}, {"timestep_h": 0.5}, "time steps of 0.5 h instead of 2 h"),
        ({"pairing": "until_outtime"}, {}, "pairing until_outtime instead of in_window"),
        ({}, {"shards": "b" * 64}, "build bbbbbbbb instead of aaaaaaaa"),
        ({"shards": "b" * 64}, {}, "build bbbbbbbb instead of aaaaaaaa"),
    ],
)
def test_runs_of_different_data_are_named(tmp_path, capsys, scored, trained, words):
    for name, method in (("a", "uni_ehr"), ("b", "early"), ("c", "medfuse")):
        is_other = name == "c"
        data = {"shards": "a" * 64} | scored if is_other else {"shards": "a" * 64}
        _trained(_write(tmp_path / name, method, **data), **(trained if is_other else {}))
    printed = pages.write([tmp_path], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    sentence = "MedFuse was trained or scored on other data than EHR only (LSTM): "
    for text in (printed, page):
        assert (sentence in text and words in text) if words else "other data" not in text
    assert page.count("was trained or scored on other data") == bool(words)
    capsys.readouterr()
    a, b, c = (str(tmp_path / name) for name in "abc")
    for found in (compare.compare(a, c, num_bootstrap=5), compare.compare(a, b, num_bootstrap=5)):
        lines = capsys.readouterr().out.splitlines()
        is_other = bool(words) and found["b"]["run"] == c
        assert len(lines) == len(found["other_data"]) == is_other
        if is_other:
            assert (
                lines[0].startswith(f"warning: {c} was trained or scored on other data than {a}: ")
                and words in lines[0]
            )


def test_an_ensemble_of_different_data_warns_once_and_its_result_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_check_splits", lambda members: None)  # reads the shards, which are gone
    a, b = (_trained(_write(tmp_path / name, method)) for name, method in (("a", "uni_ehr"), ("b", "medfuse")))
    assert "other_data" not in command.ensemble([str(a), str(b)], tmp_path / "same")["data"]
    assert capsys.readouterr().out == ""
    c = _trained(_write(tmp_path / "c", "early", profile="strict", pairing="until_outtime"), profile="strict")
    result = command.ensemble([str(a), str(c)], tmp_path / "other")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"warning: {c} was trained or scored on other data than {a}: profile strict instead of paper"
    )
    assert result["data"]["pairing"] == "until_outtime" and result["data"]["profile"] == "paper"
    assert line in pages.write([tmp_path / "other"], tmp_path / "out").replace("Late average: ", "")


def test_the_head_of_a_page_names_the_data_of_all_its_runs(tmp_path):
    _write(tmp_path / "a", "uni_ehr")
    _write(tmp_path / "b", "medfuse", profile="strict", dir="others")
    page = pages.page(read_runs.find_runs([tmp_path]))
    assert "simulated_shards · profile paper · time steps of 2 h; others · profile strict · time steps of 2 h" in page
