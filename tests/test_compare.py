"""compare: paired differences on the common stays, printed and written; runs that do not match are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from example_runs import save_initial_weights, simulate, write_config, write_evaluation

from medfuse_jax import compare, metrics
from medfuse_jax.report import terminal, wording
from medfuse_jax.runtime.errors import UserError


def _write(folder, task, method, data, rows=slice(None)):
    """Write a finished run that scores the given rows, and return its predictions."""
    write_config(folder, task, method)
    write_evaluation(folder, task, method, data, best_epoch=3)
    (folder / "data.json").write_text('{"digest": "one build"}')
    return _change(folder, lambda name, values: values if name == "step" else values[rows])


def _change(folder, change):
    with np.load(folder / "predictions_test.npz") as stored:
        fields = {name: change(name, values) for name, values in stored.items()}
    np.savez(folder / "predictions_test.npz", **fields)
    return fields


@pytest.fixture
def runs(tmp_path):
    """The second run scores the stays in another order, and not the first 20."""
    data = simulate("pheno", 150)
    a = _write(tmp_path / "a", "pheno", "uni_ehr", data)
    b = _write(tmp_path / "b", "pheno", "medfuse", data, np.random.default_rng(0).permutation(np.arange(20, 150)))
    return str(tmp_path / "a"), str(tmp_path / "b"), a, b


def test_differences_are_paired_on_the_common_stays(runs):
    a, b, of_a, of_b = runs
    found = compare.compare(a, b, num_bootstrap=40, seed=1)
    order = np.argsort(of_b["stay_id"])
    both = (of_a["labels"][20:], of_a["scores"][20:], of_b["scores"][order])
    expected = metrics.compare(*both, 40, 1)
    whole = found["differences"][0]
    assert whole["subset"] == "all" and whole["num_samples"] == 130 and found["resample"] == "stay"
    for name, values in expected.items():
        np.testing.assert_array_equal(whole[name], values, err_msg=name)
    assert whole["auroc_macro"] > 0  # MedFuse sees more
    has_cxr_N = of_a["has_cxr"][20:]
    paired = next(part for part in found["differences"] if part["subset"] == "paired")
    np.testing.assert_array_equal(paired["auroc"], metrics.compare(*(x[has_cxr_N] for x in both), 40, 1)["auroc"])
    back = compare.compare(b, a, num_bootstrap=40, seed=1)["differences"][0]
    np.testing.assert_array_equal(back["auroc"], -whole["auroc"])
    assert back["auprc_macro_p"] == whole["auprc_macro_p"]


def test_patients_are_drawn_where_one_has_several_stays(runs):
    a, b, *_ = runs
    for run in (a, b):
        _change(Path(run), lambda name, values: values // 2 if name == "subject_id" else values)
    found = compare.compare(a, b, num_bootstrap=40)
    assert found["resample"] == "patient" and found["differences"][0]["num_groups"] == 65
    assert "test patients, each with all of" in terminal.differences(metrics.to_json(found))
    by_stay = compare.compare(a, b, num_bootstrap=40, resample="stay")
    assert "num_groups" not in by_stay["differences"][0]
    assert by_stay["differences"][0]["auroc_macro"] == found["differences"][0]["auroc_macro"]


def _write_hourly(folder, method, data, predicted_h):
    """Write a finished run of length of stay with 5 hours a stay, and return its predictions."""
    of = _write(folder, "length_of_stay", method, data)
    place = np.arange(len(predicted_h))
    of |= {"stay_id": place // 5, "subject_id": place // 10, "hour": 5.0 + place % 5}
    of |= {"remaining_h": place * 2.0, "predicted_h": predicted_h}
    np.savez(folder / "predictions_test.npz", **of)
    return of


def test_ordered_bins_have_differences_of_kappa_and_deviation(tmp_path):
    data = simulate("length_of_stay", 150)
    data["labels"] = np.eye(10, dtype=bool)[np.random.default_rng(0).integers(0, 10, 150)]
    rng = np.random.default_rng(1)
    a = _write_hourly(tmp_path / "a", "uni_ehr", data, rng.uniform(0, 300, 150))
    b = _write_hourly(tmp_path / "b", "medfuse", data, rng.uniform(0, 300, 150))
    found = compare.compare(str(tmp_path / "a"), str(tmp_path / "b"), num_bootstrap=40, seed=1)
    assert found["resample"] == "patient"
    scored = [(of["scores"], np.abs(of["remaining_h"] - of["predicted_h"])) for of in (a, b)]
    expected = metrics.compare_ordinal(b["labels"], *scored, 40, 1, b["subject_id"])
    whole = found["differences"][0]
    for name, values in expected.items():
        np.testing.assert_array_equal(whole[name], values, err_msg=name)
    assert whole["mad_h"] == pytest.approx(scored[1][1].mean() - scored[0][1].mean()) and whole["mad_h"] != 0
    text = terminal.differences(metrics.to_json(found))
    assert f"all: linear kappa {wording.number(whole['kappa'], 3, True)} (" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_table_shows_each_label_and_fits(runs):
    a, b, *_ = runs
    found = metrics.to_json(compare.compare(a, b, num_bootstrap=40))
    found["differences"][0]["auroc"][3] = None  # a label with one class
    text = terminal.differences(found)
    assert max(map(len, text.splitlines())) <= 100
    assert all(label in text for label in found["labels"])
    whole = found["differences"][0]
    low, high = whole["auroc_macro_ci"]
    mean = f"{whole['auroc_macro']:+.3f} [{low:+.3f}, {high:+.3f}] {whole['auroc_macro_p']:.3f}".replace("-", "−")
    (line,) = [line for line in text.splitlines() if line.startswith("mean") and " all " in line]
    assert mean in line and " 130 " in line
    assert a in text and b in text


def _other_task(root, a, b):
    _write(root / "b", "mortality", "medfuse", simulate("mortality", 150))


def _other_labels(root, a, b):
    path = root / "b" / "result.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"labels": content["labels"][::-1]}))


def _other_values(root, a, b):
    def change(name, values):
        return np.where(b["stay_id"][:, None] == 20, 1 - values, values) if name == "labels" else values

    _change(root / "b", change)


def _nothing_common(root, a, b):
    _change(root / "b", lambda name, values: values + 1000 if name == "stay_id" else values)


def _x_rays(root, a, b):
    for name in "ab":
        _write(root / name, "radiology", "uni_cxr", simulate("radiology", 150))


def _missing(root, a, b):
    (root / "b" / "predictions_test.npz").unlink()
    (root / "b" / "config.json").unlink()


def _unended_sweep(root, a, b):
    (root / "b" / "sweep.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        (_other_task, "b", "task"),
        (_other_labels, "b", "labels"),
        (_other_values, "b", 20),
        (_nothing_common, "b", 0),
        (_x_rays, "a", "radiology"),
        (_missing, "b/config.json", None),
        (_unended_sweep, "b/sweep.csv", None),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, change, path, value):
    change(tmp_path, *runs[2:])
    with pytest.raises(UserError) as error:
        compare.compare(*runs[:2], num_bootstrap=40)
    assert (error.value.path, error.value.value) == (tmp_path / path, value) and "\n" not in str(error.value)
    if value is not None:
        assert error.value.field == ("--a" if change is _x_rays else "--b")


@pytest.mark.parametrize(("field", "choice"), [("split", "tests"), ("resample", "patients")])
def test_wrong_choices_are_refused(runs, field, choice):
    with pytest.raises(UserError) as error:
        compare.compare(*runs[:2], **{field: choice})
    assert (error.value.field, error.value.nearest) == (f"--{field}", choice[:-1])


def test_a_sweep_stands_for_its_chosen_trial(runs, tmp_path):
    a, *_ = runs
    (tmp_path / "sweep" / "trials").mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "sweep" / "sweep.csv").write_text("trial,chosen\n4,yes\n0,\n")
    (tmp_path / "b").rename(tmp_path / "sweep" / "trials" / "004")
    found = compare.compare(a, str(tmp_path / "sweep"), num_bootstrap=40)
    assert found["b"]["run"] == str(tmp_path / "sweep" / "trials" / "004") and found["b"]["method"] == "medfuse"


def test_missing_predictions_are_made_first(ehr_config, tmp_path):
    ehr_config.num_epochs = 1
    for seed, name in enumerate("ab"):
        ehr_config.seed = seed
        run = save_initial_weights(ehr_config, tmp_path / name)
    found = compare.compare(str(tmp_path / "a"), str(tmp_path / "b"), split="val", num_bootstrap=20)
    assert found["differences"][0]["num_samples"] == len(run.dataset.index["val"]["stay_id"])
    results = [json.loads((tmp_path / name / "result_val.json").read_text())["subsets"]["all"] for name in "ab"]
    difference = results[1]["auroc_macro"] - results[0]["auroc_macro"]
    assert found["differences"][0]["auroc_macro"] == pytest.approx(difference, abs=1e-12) and difference
