"""workdirs: what is there is read, what is half there is read as far as it goes."""

import json
import re

import example_runs
import numpy as np
import pytest

from medfuse_jax.report import read_runs
from medfuse_jax.runtime.errors import UserError


def unfinished(folder, num_epochs=3):
    example_runs.write_config(folder, "pheno", "medfuse")
    example_runs.write_training(folder, num_epochs)
    return folder


def test_a_run_that_trains_is_read_as_far_as_it_goes(tmp_path):
    folder = unfinished(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "epo')
    run = read_runs.read_run(folder)
    assert list(run.train) == list(run.val) == [1, 2, 3] and not run.problems
    assert run.result is None and run.predictions is None and run.finished is None
    assert run.chosen_epoch == 3 and run.task == "pheno" and len(run.label_names) == 25 and not run.is_synthetic


def test_what_is_damaged_is_said_and_left_out(tmp_path):
    folder = unfinished(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "damaged", *lines[1:], "[1]"]))
    (folder / "config.json").write_text("{")
    (folder / "result.json").write_text('{"subsets": {"all": {"auroc": [0.5]}}, "labels": ["a"], "comparisons": []}')
    (folder / "predictions_test.npz").write_bytes(b"PK\x03\x04 damaged")
    run = read_runs.read_run(folder)
    assert list(run.train) == [1, 2, 3] and run.config == {} and run.result is None and run.predictions is None
    said = "\n".join(run.problems)
    for part in (
        "config.json cannot be read",
        "result.json is not",
        "line 2 is damaged",
        "predictions_test.npz cannot",
    ):
        assert part in said
    assert len(run.problems) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"scores": np.ones((3, 2)), "labels": np.ones((3, 1))}, r"scores \(3, 2\)"),
        ({"scores": np.full((3, 2), np.nan), "labels": np.ones((3, 2))}, "row 0, label 0 is nan"),
        ({"scores": np.ones((3, 2)), "labels": np.full((3, 2), 2)}, "row 0, label 0 is 2"),
        ({"scores": np.ones((3, 2))}, "labels is not a file"),
    ],
)
def test_predictions_that_make_no_curve_are_left_out(tmp_path, arrays, message):
    np.savez(tmp_path / "predictions_test.npz", **arrays)
    run = read_runs.read_run(tmp_path)
    assert run.predictions is None
    assert re.search(message, run.problems[0]) and len(run.problems) == 1


def test_pairing_that_is_not_a_bool_a_stay_is_said(tmp_path):
    arrays = {"scores": np.array([[0.1], [0.2]]), "labels": np.array([[0], [1]]), "has_ehr": np.ones(2, bool)}
    for has_cxr in (np.ones(3, bool), np.ones(2)):
        np.savez(tmp_path / "predictions_test.npz", **arrays, has_cxr=has_cxr)
        run = read_runs.read_run(tmp_path)
        assert len(run.problems) == 1 and "run medfuse_jax.evaluate again" in run.problems[0]


def test_a_result_that_nothing_was_chosen_for_has_no_chosen_epoch(tmp_path):
    folder = unfinished(tmp_path / "run")
    run = read_runs.read_run(folder)
    assert run.chosen_epoch == 3
    run.result = {"best_epoch": 0}
    assert run.chosen_epoch is None


def test_runs_of_several_folders_have_names_of_their_own(tmp_path):
    for name in ("a/one", "b/two", "c/three"):
        example_runs.write_config(tmp_path / name, "pheno", "medfuse")
        example_runs.write_training(tmp_path / name, 1)
    runs = read_runs.find_runs([tmp_path / "a", tmp_path / "c" / ".." / "b", tmp_path / "a" / "one"])
    assert [run.name for run in runs] == ["MedFuse (a/one)", "MedFuse (b/two)"]


def test_no_folder_at_all_is_said():
    with pytest.raises(UserError, match="--runs names no folder"):
        read_runs.find_runs([])


def test_further_modalities_are_part_of_a_methods_name():
    assert (
        read_runs.title({"method": "medfuse", "modalities": ["static", "mine/notes.py"]}) == "MedFuse + static + notes"
    )


def test_nan_in_a_log_is_no_point(tmp_path):
    lines = [{"phase": "val", "epoch": e, "step": e, "val_auroc": v} for e, v in enumerate((0.5, float("nan"), None))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_runs.read_run(tmp_path)
    assert read_runs.series(run.val, "val_auroc") == {0: 0.5} and not run.problems


def test_an_epoch_written_twice_counts_once(tmp_path):
    folder = unfinished(tmp_path / "run", 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "epoch": 2, "step": 9, "train_loss": 0.25}\n')
    assert read_runs.series(read_runs.read_run(folder).train, "train_loss")[2] == 0.25


def test_runs_are_found_at_any_depth_prepared_first_and_named_apart(tmp_path):
    for name in ("b", "a/deep", "a/deep/pretrain_ehr", "b/checkpoints/old", "b/report"):
        unfinished(tmp_path / name, 1)
    (tmp_path / "empty").mkdir()
    runs = read_runs.find_runs([tmp_path])
    assert [run.folder.relative_to(tmp_path).as_posix() for run in runs] == ["a/deep/pretrain_ehr", "a/deep", "b"]
    assert [run.name for run in runs] == ["MedFuse (a/deep/pretrain_ehr)", "MedFuse (a/deep)", "MedFuse (b)"]
    assert [run.color for run in runs] == [2, 0, 1] and [run.is_pretraining for run in runs] == [True, False, False]


def test_a_folder_without_runs_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*result\.json or a metrics\.jsonl"):
        read_runs.find_runs([tmp_path])
    with pytest.raises(UserError, match="is not a folder"):
        read_runs.find_runs([tmp_path / "missing"])


@pytest.mark.parametrize(("manifest", "expected"), [({"synthetic": True}, True), ({"source": "MIMIC-IV 2.2"}, False)])
def test_the_manifest_says_whether_patients_are_synthetic(tmp_path, manifest, expected):
    example_runs.write_config(tmp_path, "pheno", "medfuse", data={"dir": str(tmp_path / "shards")})
    (tmp_path / "shards" / "pheno").mkdir(parents=True)
    (tmp_path / "shards" / "pheno" / "manifest.json").write_text(json.dumps(manifest))
    assert read_runs.read_run(tmp_path).is_synthetic is expected


def test_numbers_as_tables_show_them():
    assert read_runs.number(0.12345) == "0.123" and read_runs.number(np.float32(0.5), 1) == "0.5"
    assert read_runs.number(-0.01, sign=True) == "−0.010" and read_runs.number(0.01, sign=True) == "+0.010"
    assert read_runs.number(11914, 0) == "11,914"
    assert [read_runs.number(x) for x in (None, float("nan"), "x")] == ["–"] * 3
    assert read_runs.pair(None) == (None, None) and read_runs.pair(np.array([0.1, 0.2])) == (0.1, 0.2)
