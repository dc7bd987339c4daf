"""Ensembles: stays are matched, weights come from validation alone, and incompatible runs are refused."""

import contextlib
import json
from types import SimpleNamespace

import damage
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from example_runs import simulate, write_config, write_evaluation

from medfuse_jax import evaluate, metrics
from medfuse_jax import run as run_lib
from medfuse_jax.ensemble import command as ensemble
from medfuse_jax.report import pages, read_runs, terminal
from medfuse_jax.runs import checkpoints, sources, workdir
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime.errors import UserError


def _member(folder, method, data, rows=None, split="test"):
    """Write a finished run that scores the given rows of a split; return its predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    write_evaluation(folder, "mortality", method, data, best_epoch=3)
    write_config(folder, "mortality", method)
    (folder / "data.json").write_text('{"digest": "one build"}')
    part = _predictions(folder)
    if rows is not None:
        part = {name: values if name == "step" else values[rows] for name, values in part.items()}
    np.savez(folder / f"predictions_{split}.npz", **part)
    if split != "test":
        (folder / f"result_{split}.json").write_text((folder / "result.json").read_text())
    return part


def _predictions(folder):
    with np.load(folder / "predictions_test.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def data():
    return simulate("mortality", 300)


@pytest.fixture
def runs(tmp_path, data):
    """The EHR run scores every stay, the X-ray run those with an X-ray."""
    ehr = _member(tmp_path / "ehr", "uni_ehr", data)
    cxr = _member(tmp_path / "cxr", "uni_cxr", data, rows=np.flatnonzero(data["has_cxr"]))
    return [str(tmp_path / "ehr"), str(tmp_path / "cxr")], ehr, cxr


def test_the_late_average_is_over_the_members_that_score_a_stay(runs, tmp_path, data):
    names, ehr, cxr = runs
    result = ensemble.ensemble(names, tmp_path / "late")
    scored = _predictions(tmp_path / "late")
    np.testing.assert_array_equal(scored["stay_id"], ehr["stay_id"])
    has_cxr = data["has_cxr"]
    np.testing.assert_allclose(scored["scores"][~has_cxr], ehr["scores"][~has_cxr], rtol=1e-6)
    np.testing.assert_allclose(scored["scores"][has_cxr], (ehr["scores"][has_cxr] + cxr["scores"]) / 2, rtol=1e-6)
    expected = sklearn.metrics.roc_auc_score(data["labels"][:, 0], scored["scores"][:, 0])
    assert result["subsets"]["all"]["auroc_macro"] == pytest.approx(expected)
    assert set(result["subsets"]) == {"all", "paired", "unpaired"}
    low, high = result["subsets"]["all"]["auroc_macro_ci"]
    assert low < expected < high
    compared = {(c["against"], c["subset"]): c["num_samples"] for c in result["comparisons"]}
    assert compared[("uni_ehr", "all")] == 300 and compared[("uni_cxr", "all")] == has_cxr.sum()
    assert compared[("uni_cxr", "paired")] == has_cxr.sum() and result["num_left_out"] == 0
    lines = terminal.table([result]).splitlines()
    (at,) = [i for i, line in enumerate(lines) if "average − X-ray only" in line]
    assert lines[at + 1].split()[:2] == ["with", "X-ray"]  # 'all' is not shown: uni_cxr scores only those


def test_an_ensemble_resamples_as_its_first_run_did(runs, tmp_path):
    names, *_ = runs
    for name in ("ehr", "cxr"):  # two stays a patient
        fields = _predictions(tmp_path / name)
        fields["subject_id"] = fields["subject_id"] // 2
        np.savez(tmp_path / name / "predictions_test.npz", **fields)
    _change_result(tmp_path, "ehr", resample="patient")
    assert ensemble.ensemble(names, tmp_path / "by_patient")["resample"] == "patient"
    _change_result(tmp_path, "ehr", resample="stay")
    by_stay = ensemble.ensemble(names, tmp_path / "by_stay")
    assert by_stay["resample"] == "stay" and "num_groups" not in by_stay["subsets"]["all"]
    assert all("num_groups" not in difference for difference in by_stay["comparisons"])


def test_by_cxr_takes_the_first_run_for_stays_with_an_x_ray(runs, tmp_path, data):
    names, ehr, cxr = runs
    ensemble.ensemble(names[::-1], tmp_path / "both", "by_cxr")
    scored, has_cxr = _predictions(tmp_path / "both")["scores"], data["has_cxr"]
    np.testing.assert_allclose(scored[has_cxr], cxr["scores"], rtol=1e-6)
    np.testing.assert_allclose(scored[~has_cxr], ehr["scores"][~has_cxr], rtol=1e-6)
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(names, tmp_path / "wrong", "by_cxr")
    assert caught.value.value == (~has_cxr).sum()


def test_weights_come_from_validation_alone(tmp_path, data):
    validation = simulate("mortality", 400, seed=5)
    noise = np.random.default_rng(0).normal(size=validation["cxr"].shape)
    good, bad = {**validation, "ehr": validation["labels"] * 3.0 + noise}, {**validation, "ehr": noise}
    for name, on_val in (("a", good), ("b", bad)):
        _member(tmp_path / name, "uni_ehr", on_val, split="val")
        _member(tmp_path / name, "uni_ehr", data)
    names = [str(tmp_path / name) for name in ("a", "b")]
    result = ensemble.ensemble(names, tmp_path / "weighted", "weighted")
    first, second = (m["weight"] for m in result["members"])
    assert first + second == pytest.approx(1) and first > 0.6
    _member(tmp_path / "a", "uni_ehr", {**data, "ehr": -data["ehr"]})  # now harmful on the test split
    again = ensemble.ensemble(names, tmp_path / "again", "weighted")
    assert [m["weight"] for m in again["members"]] == [first, second]
    assert "400 validation stays" in result["selected_by"]


def test_members_of_one_method_are_told_apart_by_their_folders(tmp_path, data):
    """For example, two trials of a sweep."""
    for name in ("a", "b"):
        _member(tmp_path / name, "uni_ehr", data)
    names = [str(tmp_path / name) for name in ("a", "b")]
    result = ensemble.ensemble(names, tmp_path / "both")
    assert list(dict.fromkeys(c["against"] for c in result["comparisons"])) == names
    assert all(f"average − {name}" in terminal.table([result]) for name in names)


def test_the_report_shows_an_ensemble_as_a_run(runs, tmp_path):
    result = ensemble.ensemble(runs[0], tmp_path / "late")
    (run,) = read_runs.find_runs([tmp_path / "late"])
    assert run.name == "Late average" and run.task == "mortality" and not run.problems
    assert "Late average − EHR only (LSTM)" in terminal.table([result])
    assert "Late average" in pages.page([run])


def test_another_head_of_a_run_is_a_member(runs, tmp_path, data):
    (tmp_path / "ehr" / "predictions_test_cxr_only.npz").write_bytes(
        (tmp_path / "cxr" / "predictions_test.npz").read_bytes()
    )
    (tmp_path / "ehr" / "result_test_cxr_only.json").write_text((tmp_path / "cxr" / "result.json").read_text())
    by_head = ensemble.ensemble([f"{tmp_path / 'ehr'}", f"{tmp_path / 'ehr'}:cxr_only"], tmp_path / "heads")
    by_run = ensemble.ensemble(runs[0], tmp_path / "late")
    assert by_head["subsets"]["all"]["auroc_macro"] == by_run["subsets"]["all"]["auroc_macro"]
    assert by_head["num_params"] == by_run["num_params"] / 2  # one model, not two


def _change_labels(root):
    fields = _predictions(root / "cxr")
    np.savez(root / "cxr" / "predictions_test.npz", **{**fields, "labels": 1 - fields["labels"]})


def _change_result(root, run="cxr", **changes):
    path = root / run / "result.json"
    path.write_text(json.dumps(damage.unsealed(path) | changes))


def _write_out(root, content):
    (root / "out").mkdir()
    (root / "out" / "config.json").write_text(content)


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        (_change_labels, "cxr", 0),  # the first stay whose labels differ, of those with an X-ray
        (lambda d: _change_result(d, task="pheno"), "cxr", "task"),
        (lambda d: _change_result(d, labels=["other"]), "cxr", "labels"),
        (lambda d: (d / "cxr" / "predictions_test.npz").write_bytes(b"PK"), "cxr/predictions_test.npz", None),
        (lambda d: (d / "cxr" / "data.json").unlink(), "cxr/data.json", None),
        (lambda d: _write_out(d, "{}"), "out", None),
        (lambda d: _write_out(d, '{"name": '), "out/config.json", None),
        (lambda d: _write_out(d, "[]"), "out/config.json", None),
    ],
)
def test_incompatible_runs_are_refused(runs, tmp_path, data, change, path, value):
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(runs[0], tmp_path / "out")
    assert caught.value.path == tmp_path / path
    expected = int(np.flatnonzero(data["has_cxr"])[0]) if change is _change_labels else value
    assert caught.value.value == expected and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "rule", "field", "value"),
    [
        (["ehr"], "average", "--runs", 1),
        (["ehr", "cxr", "ehr"], "by_cxr", "--runs", 3),
        (["ehr", "cxr"] * 3, "weighted", "--runs", 6),
        (["ehr", "ehr"], "average", "--runs", "ehr"),
        (["ehr", "cxr"], "averge", "--rule", "averge"),
    ],
)
def test_a_wrong_command_is_refused(tmp_path, members, rule, field, value):
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(members, tmp_path / "out", rule)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert caught.value.nearest == ("average" if field == "--rule" else "")


def test_an_ensemble_of_x_rays_is_refused(runs, tmp_path):
    for run in ("ehr", "cxr"):
        _change_result(tmp_path, run, task="radiology")
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(runs[0], tmp_path / "out")
    assert caught.value.path == tmp_path / "ehr"


def _save(folder, run, epoch, seed):
    """Save a checkpoint of untrained weights at an epoch's end, the best so far."""
    state = next(run.fresh_states([seed])).replace(step=jnp.int32(epoch * len(run.train_plan(1))))
    progress = Progress(epoch=epoch, best_epoch=epoch, best_auroc=0.5, learning_rate=1e-4)
    with contextlib.closing(checkpoints.open_manager(folder)) as manager:
        checkpoints.save(manager, state, progress, is_best=True)


def test_missing_and_outdated_predictions_are_made_and_an_unfinished_run_is_refused(ehr_config, tmp_path):
    run = run_lib.open_run(ehr_config)
    names = [str(tmp_path / name) for name in "ab"]
    for name in "ab":
        workdir.claim(tmp_path / name, run)
        _save(tmp_path / name, run, epoch=1, seed=0)
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(names, tmp_path / "both")
    assert (caught.value.path, caught.value.value) == (tmp_path / "a", 1) and not (tmp_path / "both").exists()
    evaluate.evaluate(tmp_path / "a")
    old = _predictions(tmp_path / "a")
    for name in "ab":
        _save(tmp_path / name, run, epoch=2, seed=5)
    made = ensemble.ensemble(names, tmp_path / "both", "weighted")
    for name in "ab":
        assert {p.name for p in (tmp_path / name).glob("pred*")} == {"predictions_test.npz", "predictions_val.npz"}
    new = _predictions(tmp_path / "a")
    assert int(old["step"]) < int(new["step"]) == json.loads((tmp_path / "a" / "result.json").read_text())["step"]
    assert np.abs(new["scores"] - old["scores"]).max() > 1e-3
    np.testing.assert_allclose(_predictions(tmp_path / "both")["scores"], new["scores"], rtol=1e-5)
    assert [(member["step"], member["weight"]) for member in made["members"]] == [(int(new["step"]), 0.5)] * 2

    # A kill between the two files: the result is new, its predictions are not.
    np.savez(tmp_path / "b" / "predictions_test.npz", **{**new, "step": old["step"], "scores": old["scores"]})
    ensemble.ensemble(names, tmp_path / "both", "weighted")
    np.testing.assert_array_equal(_predictions(tmp_path / "b")["scores"], new["scores"])

    made["members"][0]["step"] -= 1
    (tmp_path / "both" / "result.json").write_text(json.dumps(metrics.to_json(made)))
    with pytest.raises(UserError) as caught:
        ensemble.ensemble([str(tmp_path / "both"), names[0]], tmp_path / "more")
    assert caught.value.path == tmp_path / "both"


def test_a_mistyped_run_leaves_the_workdir_free(runs, tmp_path):
    with pytest.raises(UserError) as caught:
        ensemble.ensemble([runs[0][0], str(tmp_path / "missing")], tmp_path / "out")
    assert "missing" in str(caught.value) and not (tmp_path / "out").exists()
    ensemble.ensemble(runs[0], tmp_path / "out")
    ensemble.ensemble(runs[0], tmp_path / "out")  # the same command again
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(runs[0][::-1], tmp_path / "out")
    assert caught.value.field == "--workdir"


def test_an_ensemble_is_a_member_until_its_own_members_change(runs, tmp_path):
    """Without checkpoints, the step of the stored result tells whether a member was trained on."""
    ensemble.ensemble(runs[0], tmp_path / "late")
    nested = [str(tmp_path / "late"), runs[0][1]]
    ensemble.ensemble(nested, tmp_path / "nested")
    path = tmp_path / "ehr" / "result.json"
    path.write_text(json.dumps(damage.unsealed(path) | {"step": 900}))
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(nested, tmp_path / "again")
    assert (caught.value.path, caught.value.value) == (tmp_path / "late", 900)


def test_an_ensemble_is_not_written_into_a_sweep(runs, tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(runs[0], tmp_path / "trials" / "010")
    assert caught.value.path == tmp_path and not (tmp_path / "trials").exists()


@pytest.fixture
def splits(runs, tmp_path, monkeypatch):
    """The patients of two builds, by workdir and split."""
    (tmp_path / "cxr" / "data.json").write_text('{"digest": "another build"}')
    same = {"train": [1, 2, 3], "val": [4], "test": [5, 6]}
    patients = {tmp_path / "ehr": dict(same), tmp_path / "cxr": dict(same)}

    def reopen(folder):
        index = {split: {"subject_id": np.array(ids)} for split, ids in patients[folder].items()}
        return SimpleNamespace(dataset=SimpleNamespace(index=index))

    monkeypatch.setattr(sources, "reopen", reopen)
    return patients


def test_two_builds_of_one_split_can_be_combined(runs, tmp_path, splits):
    splits[tmp_path / "cxr"]["test"] = [5, 6, 7]
    ensemble.ensemble(runs[0], tmp_path / "out")
    ensemble.ensemble([str(tmp_path / "out"), runs[0][1]], tmp_path / "with_an_ensemble")


@pytest.mark.parametrize(("split", "ids", "num_leaked"), [("train", [1, 2, 5], 1), ("val", [4, 5, 6], 2)])
def test_a_member_trained_on_test_patients_of_another_is_refused(runs, tmp_path, splits, split, ids, num_leaked):
    splits[tmp_path / "cxr"][split] = ids
    splits[tmp_path / "cxr"]["test"] = [7]
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(runs[0], tmp_path / "out")
    assert (caught.value.path, caught.value.value) == (tmp_path / "cxr", num_leaked)
    assert not (tmp_path / "out").exists()
