"""Workdirs are read as far as they go; damaged files are reported."""

import json

import example_runs
import numpy as np
import pytest

from medfuse_jax.report import pages, read_fields, read_runs
from medfuse_jax.runtime.errors import UserError


def unfinished(folder, num_epochs=3):
    example_runs.write_config(folder, "pheno", "medfuse")
    example_runs.write_training(folder, num_epochs)
    return folder


def test_an_unfinished_run_is_read(tmp_path):
    folder = unfinished(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "epo')
    run = read_runs.read_run(folder)
    assert list(run.train) == list(run.val) == [1, 2, 3] and not run.problems
    assert run.result is None and run.predictions is None and run.finished_at is None
    assert run.best_epoch == 3 and run.task == "pheno" and len(run.label_names) == 25 and not run.is_synthetic


def test_a_run_that_failed_in_its_first_epoch_is_in_the_report(tmp_path):
    example_runs.write_config(tmp_path / "failed", "pheno", "medfuse")
    (tmp_path / "failed" / "data.json").write_text("{}")
    unfinished(tmp_path / "other")
    assert [run.folder.name for run in read_runs.find_runs([tmp_path])] == ["failed", "other"]
    assert "epoch 0 of at most 20" in pages.page(read_runs.find_runs([tmp_path / "failed"]))


def test_damaged_files_are_reported_and_ignored(tmp_path):
    folder = unfinished(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "damaged", *lines[1:], "[1]", "half a li"]))
    (folder / "config.json").write_text("{")
    (folder / "result.json").write_text('{"subsets": {"all": {"auroc": [0.5]}}, "labels": ["a"], "comparisons": []}')
    (folder / "predictions_test.npz").write_bytes(b"PK\x03\x04 damaged")
    run = read_runs.read_run(folder)
    assert list(run.train) == [1, 2, 3] and run.config == {} and run.result is None and run.predictions is None
    assert len(run.problems) == 4
    for problem, name in zip(run.problems, ("config.json", "result.json", "metrics.jsonl", "predictions_test.npz")):
        assert str(folder / name) in problem
    assert "(2, the first is line 2)" in run.problems[2]


@pytest.mark.parametrize(
    "change", [{"labels": "a"}, {"subsets": {"all": []}}, {"subsets": {"all": {}}}, {"num_left_out": None}]
)
def test_a_damaged_result_is_reported_and_ignored(tmp_path, change):
    result = {"labels": [], "subsets": {}, "comparisons": [], "num_left_out": 0}
    for content, is_whole in ((result, True), (result | change, False)):
        (tmp_path / "result.json").write_text(json.dumps(content))
        run = read_runs.read_run(tmp_path)
        assert (run.result == content) == is_whole == (not run.problems)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": np.ones((3, 1))},
        {"scores": np.full((3, 2), np.nan)},
        {"labels": np.full((3, 2), 2)},
        {"labels": None},
        {"age": np.ones(2)},
        {"has_cxr": np.ones((3, 1), bool)},
    ],
)
def test_unusable_predictions_are_reported_and_ignored(tmp_path, changes):
    arrays = {"scores": np.ones((3, 2)), "labels": np.ones((3, 2)), "age": np.ones(3)}
    arrays |= {"has_ehr": np.ones(3, bool), "has_cxr": np.array([True, False, True])}
    path = tmp_path / "predictions_test.npz"
    np.savez(path, **arrays)
    run = read_runs.read_run(tmp_path)
    assert run.predictions["paired"].tolist() == [True, False, True] and not run.problems
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    run = read_runs.read_run(tmp_path)
    assert run.predictions is None and len(run.problems) == 1 and str(path) in run.problems[0]


def test_best_epoch_0_means_none(tmp_path):
    folder = unfinished(tmp_path / "run")
    run = read_runs.read_run(folder)
    assert run.best_epoch == 3
    run.result = {"best_epoch": 0}
    assert run.best_epoch is None


def test_names_are_unique_across_folders(tmp_path):
    for name in ("a/one", "b/two", "c/three"):
        example_runs.write_config(tmp_path / name, "pheno", "medfuse")
        example_runs.write_training(tmp_path / name, 1)
    runs = read_runs.find_runs([tmp_path / "a", tmp_path / "c" / ".." / "b", tmp_path / "a" / "one"])
    assert [run.name for run in runs] == ["MedFuse (a/one)", "MedFuse (b/two)"]


def test_series_drop_nan(tmp_path):
    lines = [{"phase": "val", "epoch": e, "step": e, "val_auroc": v} for e, v in enumerate((0.5, float("nan"), None))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_runs.read_run(tmp_path)
    assert read_fields.series(run.val, "val_auroc") == {0: 0.5} and not run.problems


def test_an_epoch_written_twice_counts_once(tmp_path):
    folder = unfinished(tmp_path / "run", 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "epoch": 2, "step": 9, "train_loss": 0.25}\n')
    assert read_fields.series(read_runs.read_run(folder).train, "train_loss")[2] == 0.25


def test_runs_are_found_at_any_depth_pretraining_first(tmp_path):
    for name in ("b", "a/deep", "a/deep/pretrain_ehr", "b/checkpoints/old", "b/report"):
        unfinished(tmp_path / name, 1)
    (tmp_path / "empty").mkdir()
    runs = read_runs.find_runs([tmp_path])
    assert [run.folder.relative_to(tmp_path).as_posix() for run in runs] == ["a/deep/pretrain_ehr", "a/deep", "b"]
    assert [run.name for run in runs] == ["MedFuse (a/deep/pretrain_ehr)", "MedFuse (a/deep)", "MedFuse (b)"]
    assert [run.color for run in runs] == [2, 0, 1] and [run.is_pretraining for run in runs] == [True, False, False]


def test_no_run_is_an_error(tmp_path):
    for roots in ([], [tmp_path], [tmp_path / "missing"]):
        with pytest.raises(UserError) as caught:
            read_runs.find_runs(roots)
        assert caught.value.field == "--runs" and [caught.value.path] == (roots or [None])


@pytest.mark.parametrize(("manifest", "expected"), [({"synthetic": True}, True), ({"source": "MIMIC-IV 2.2"}, False)])
def test_the_manifest_tells_synthetic_patients(tmp_path, manifest, expected):
    example_runs.write_config(tmp_path, "pheno", "medfuse", data={"dir": str(tmp_path / "shards")})
    (tmp_path / "shards" / "pheno").mkdir(parents=True)
    (tmp_path / "shards" / "pheno" / "manifest.json").write_text(json.dumps(manifest))
    assert read_runs.read_run(tmp_path).is_synthetic is expected
