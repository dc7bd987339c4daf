"""Runs combined: the same stays, the right scores for each, weights from validation alone, errors in one line."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from example_runs import simulate, write_config, write_evaluation

from medfuse_jax import ensemble, evaluate, experiment, metrics, train
from medfuse_jax.report import pages, read_runs, terminal
from medfuse_jax.runs import checkpoints, sources, workdir
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime.errors import UserError


def _member(folder, method, data, rows=None, split="test"):
    """A finished run that scores the given rows of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    write_evaluation(folder, "mortality", method, data, best_epoch=3)
    write_config(folder, "mortality", method)
    (folder / "data.json").write_text('{"digest": "one build"}')
    with np.load(folder / "predictions_test.npz") as stored:
        whole = rows is None
        part = {name: values if whole or name == "step" else values[rows] for name, values in stored.items()}
    np.savez(folder / f"predictions_{split}.npz", **part)
    if split != "test":
        (folder / f"result_{split}.json").write_text((folder / "result.json").read_text())
    return part


@pytest.fixture(scope="module")
def data():
    return simulate("mortality", 300)


@pytest.fixture
def runs(tmp_path, data):
    """The EHR run scores every stay, the X-ray's those with an X-ray."""
    ehr = _member(tmp_path / "ehr", "uni_ehr", data)
    cxr = _member(tmp_path / "cxr", "uni_cxr", data, rows=np.flatnonzero(data["has_cxr"]))
    return [str(tmp_path / "ehr"), str(tmp_path / "cxr")], ehr, cxr


def _scores(folder):
    with np.load(folder / "predictions_test.npz") as stored:
        return dict(stored)


def test_the_late_average_is_of_those_that_score_a_stay(runs, tmp_path, data):
    names, ehr, cxr = runs
    result = ensemble.ensemble(names, tmp_path / "late")
    scored = _scores(tmp_path / "late")
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
    (to_image,) = [line for line in terminal.table([result]).splitlines() if "average − X-ray only" in line]
    assert "  with X-ray  " in to_image  # its "all" are those


def test_the_ensemble_of_the_paper_takes_a_run_by_whether_there_is_a_image(runs, tmp_path, data):
    names, ehr, cxr = runs
    ensemble.ensemble(names[::-1], tmp_path / "both", "by_image")
    scored, has_cxr = _scores(tmp_path / "both")["scores"], data["has_cxr"]
    np.testing.assert_allclose(scored[has_cxr], cxr["scores"], rtol=1e-6)
    np.testing.assert_allclose(scored[~has_cxr], ehr["scores"][~has_cxr], rtol=1e-6)
    with pytest.raises(UserError, match="stays are not scored by the run that is to score them: mind the order"):
        ensemble.ensemble(names, tmp_path / "wrong", "by_image")


def test_weights_are_those_of_validation_whatever_the_test_split_holds(tmp_path, data):
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


def test_equal_members_get_equal_weights(tmp_path, data):
    for name in ("a", "b"):
        _member(tmp_path / name, "uni_ehr", data, split="val")
    names = [str(tmp_path / name) for name in ("a", "b")]
    result = ensemble.ensemble(names, tmp_path / "weighted", "weighted")
    assert [m["weight"] for m in result["members"]] == [0.5, 0.5]


def test_members_of_one_method_are_told_apart_by_their_folders(tmp_path, data):
    """Such as two trials of a sweep."""
    for name in ("a", "b"):
        _member(tmp_path / name, "uni_ehr", data)
    names = [str(tmp_path / name) for name in ("a", "b")]
    result = ensemble.ensemble(names, tmp_path / "both")
    assert list(dict.fromkeys(c["against"] for c in result["comparisons"])) == names
    assert all(f"average − {name}" in terminal.table([result]) for name in names)


def test_the_report_shows_it_as_a_run(runs, tmp_path):
    result = ensemble.ensemble(runs[0], tmp_path / "late")
    (run,) = read_runs.find_runs([tmp_path / "late"])
    assert run.name == "Late average" and run.task == "mortality" and not run.problems
    assert "Late average" in terminal.table([result]) and "Late average − EHR only (LSTM)" in terminal.table([result])
    pages.write([tmp_path / "late"], tmp_path / "report")
    assert "Late average" in (tmp_path / "report" / "index.html").read_text()


def test_one_classifier_of_a_run_is_a_member(runs, tmp_path, data):
    with np.load(tmp_path / "cxr" / "predictions_test.npz") as stored:
        np.savez(tmp_path / "ehr" / "predictions_test_cxr_only.npz", **stored)
    (tmp_path / "ehr" / "result_test_cxr_only.json").write_text((tmp_path / "cxr" / "result.json").read_text())
    by_head = ensemble.ensemble([f"{tmp_path / 'ehr'}", f"{tmp_path / 'ehr'}:cxr_only"], tmp_path / "heads")
    by_run = ensemble.ensemble(runs[0], tmp_path / "late")
    assert by_head["subsets"]["all"]["auroc_macro"] == by_run["subsets"]["all"]["auroc_macro"]
    assert by_head["num_params"] == by_run["num_params"] / 2  # one model, not two


def _other_labels(tmp_path):
    with np.load(tmp_path / "cxr" / "predictions_test.npz") as stored:
        fields = dict(stored)
    fields["labels"] = 1 - fields["labels"]
    np.savez(tmp_path / "cxr" / "predictions_test.npz", **fields)


def _other_task(tmp_path):
    path = tmp_path / "cxr" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": "pheno"}))


def _left_in(folder, content):
    folder.mkdir()
    (folder / "config.json").write_text(content)


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (_other_labels, {}, "has other labels for stay"),
        (_other_task, {}, "they differ in task (pheno and mortality)"),
        (lambda d: (d / "cxr" / "predictions_test.npz").write_bytes(b"PK"), {}, "cannot be read"),
        (lambda d: None, {"rule": "averge"}, "Did you mean 'average'?"),
        (lambda d: _left_in(d / "out", "{}"), {}, "holds another run"),
        (lambda d: _left_in(d / "out", '{"name": '), {}, "out/config.json cannot be read (Expecting value"),
        (
            lambda d: _left_in(d / "out", "[]"),
            {},
            "out/config.json cannot be read (it holds no fields): choose another",
        ),
        (lambda d: (d / "cxr" / "data.json").unlink(), {}, "cxr/data.json cannot be read"),
    ],
)
def test_what_cannot_be_combined_is_said_in_one_line(runs, tmp_path, change, arguments, said):
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        ensemble.ensemble(runs[0], tmp_path / "out", **arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_is_no_ensemble_with_itself(runs, tmp_path):
    with pytest.raises(UserError, match=r"names .*/ehr twice: give each member once"):
        ensemble.ensemble([runs[0][0], runs[0][0]], tmp_path / "out")


def test_predictions_that_are_not_there_are_made(tiny_config, tmp_path):
    tiny_config.method, tiny_config.num_epochs = "uni_ehr", 1
    run = experiment.open_experiment(tiny_config)
    workdir.claim(tmp_path / "a", run)
    train.train(run, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    evaluate.evaluate(tmp_path / "b")
    result = ensemble.ensemble([str(tmp_path / name) for name in "ab"], tmp_path / "both", "weighted")
    for name in "ab":
        made = {p.name for p in (tmp_path / name).glob("predictions_*")}
        assert made == {"predictions_test.npz", "predictions_val.npz"}
    assert [member["weight"] for member in result["members"]] == [0.5, 0.5]
    np.testing.assert_allclose(_scores(tmp_path / "both")["scores"], _scores(tmp_path / "a")["scores"], rtol=1e-5)


def _save(folder, run, epoch, seed):
    """A checkpoint of made-up weights at an epoch's end, the best so far."""
    state = next(run.fresh_states([seed])).replace(step=jnp.int32(epoch * len(run.train_plan(1))))
    progress = Progress(epoch=epoch, best_epoch=epoch, best_auroc=0.5, learning_rate=1e-4)
    with contextlib.closing(checkpoints.open_manager(folder)) as manager:
        checkpoints.save(manager, state, progress, is_best=True)


def test_predictions_of_older_weights_are_made_again_and_an_unfinished_run_is_refused(tiny_config, tmp_path):
    tiny_config.method, tiny_config.num_epochs = "uni_ehr", 2
    run = experiment.open_experiment(tiny_config)
    for name in "ab":
        workdir.claim(tmp_path / name, run)
        _save(tmp_path / name, run, epoch=1, seed=0)
    names = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError, match=r"a is not finished \(epoch 1 of 2\)") as caught:
        ensemble.ensemble(names, tmp_path / "both")
    assert "\n" not in str(caught.value) and not (tmp_path / "both").exists()
    evaluate.evaluate(tmp_path / "a")
    old = _scores(tmp_path / "a")
    for name in "ab":
        _save(tmp_path / name, run, epoch=2, seed=5)
    made = ensemble.ensemble(names, tmp_path / "both")
    new = _scores(tmp_path / "a")
    assert int(old["step"]) < int(new["step"]) == json.loads((tmp_path / "a" / "result.json").read_text())["step"]
    assert np.abs(new["scores"] - old["scores"]).max() > 1e-3
    np.testing.assert_allclose(_scores(tmp_path / "both")["scores"], new["scores"], rtol=1e-5)
    assert [member["step"] for member in made["members"]] == [int(new["step"])] * 2

    # A kill between the two files: the predictions are new, their result is not.
    np.savez(tmp_path / "b" / "predictions_test.npz", **{**new, "step": old["step"], "scores": old["scores"]})
    ensemble.ensemble(names, tmp_path / "both")
    np.testing.assert_array_equal(_scores(tmp_path / "b")["scores"], new["scores"])

    path = tmp_path / "both" / "result.json"
    made["members"][0]["step"] -= 1
    path.write_text(json.dumps(metrics.to_json(made)))
    with pytest.raises(UserError, match=r"both was made of older weights of .*a: make that ensemble again"):
        ensemble.ensemble([str(tmp_path / "both"), names[0]], tmp_path / "more")


def test_one_run_or_a_folder_without_one_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="names 1 run"):
        ensemble.ensemble(runs[0][:1], tmp_path / "out")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        ensemble.ensemble([runs[0][0], str(tmp_path / "nowhere")], tmp_path / "out")


def test_a_mistyped_run_leaves_no_claim_behind(runs, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        ensemble.ensemble([runs[0][0], str(tmp_path / "nowhere")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ensemble.ensemble(runs[0], tmp_path / "out")
    ensemble.ensemble(runs[0], tmp_path / "out")  # the same command again
    with pytest.raises(UserError, match="holds another run"):
        ensemble.ensemble(runs[0][::-1], tmp_path / "out")


def test_more_weighted_members_than_can_be_searched_are_refused(runs, tmp_path):
    with pytest.raises(
        UserError, match="names 6 runs; --rule=weighted tries every weighting in steps of 1/20, so give"
    ):
        ensemble.ensemble(runs[0] * 3, tmp_path / "out", "weighted")


@pytest.fixture
def splits(runs, tmp_path, monkeypatch):
    """The patients of two builds, by workdir and split."""
    (tmp_path / "cxr" / "data.json").write_text('{"digest": "another build"}')
    same = {"train": [1, 2, 3], "val": [4], "test": [5, 6]}
    patients = {tmp_path / "ehr": dict(same), tmp_path / "cxr": dict(same)}

    def open_run(folder):
        index = {split: {"subject_id": np.array(ids)} for split, ids in patients[folder].items()}
        return SimpleNamespace(dataset=SimpleNamespace(index=index))

    monkeypatch.setattr(sources, "open_run", open_run)
    return patients


def test_an_ensemble_of_predictions_alone_is_a_member_until_they_are_made_anew(runs, tmp_path):
    """No checkpoints are left: the step of the stored result tells whether a member was trained on."""
    ensemble.ensemble(runs[0], tmp_path / "late")
    nested = [str(tmp_path / "late"), runs[0][1]]
    ensemble.ensemble(nested, tmp_path / "nested")
    path = tmp_path / "ehr" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 900}))
    with pytest.raises(UserError, match=r"was made of older weights of .*ehr: make that ensemble again"):
        ensemble.ensemble(nested, tmp_path / "again")


def test_an_ensemble_is_not_written_into_a_sweep(runs, tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="is in the folder of a sweep"):
        ensemble.ensemble(runs[0], tmp_path / "trials" / "010")
    assert not (tmp_path / "trials").exists()


def test_members_of_two_builds_of_one_split_are_combined(runs, tmp_path, splits):
    splits[tmp_path / "cxr"]["test"] = [5, 6, 7]
    ensemble.ensemble(runs[0], tmp_path / "out")
    ensemble.ensemble([str(tmp_path / "out"), runs[0][1]], tmp_path / "with_an_ensemble")


@pytest.mark.parametrize(("split", "ids", "leaked"), [("train", [1, 2, 5], 1), ("val", [4, 5, 6], 2)])
def test_members_of_other_splits_are_not_pooled(runs, tmp_path, splits, split, ids, leaked):
    splits[tmp_path / "cxr"][split] = ids
    splits[tmp_path / "cxr"]["test"] = [7]
    with pytest.raises(UserError, match=rf"cxr and \S+ehr cannot be combined: {leaked} test patients of the second"):
        ensemble.ensemble(runs[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
