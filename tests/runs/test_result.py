"""result: what the bootstrap draws, by default and by choice; stored, and said in words."""

import json

import damage
import numpy as np
import pytest
from example_runs import save_initial_weights

from medfuse_jax import evaluate, metrics, schema
from medfuse_jax.ensemble import command
from medfuse_jax.report import read_runs, tables, terminal
from medfuse_jax.runs import result
from medfuse_jax.runtime.errors import UserError

_NUM_LABELS = {"acute": 13, "mixed": 5, "chronic": 7}  # Table 4 of Hayat et al. 2022


@pytest.fixture
def scored():
    """60 patients with three stays each, in three blocks; X-rays for the first half of each block."""
    rng = np.random.default_rng(0)
    labels = np.tile(rng.random((60, 2)) < 0.4, (3, 1)).astype(np.int8)
    return {
        "stay_id": np.arange(180),
        "subject_id": np.tile(np.arange(60), 3),
        "labels": labels,
        "scores": np.tile(rng.random((60, 2)), (3, 1)) + 0.3 * labels,
        "has_ehr": np.ones(180, bool),
        "has_cxr": np.tile(np.arange(60) < 30, 3),
    }


def test_subsets_draw_patients_or_stays(scored):
    by_patient = result.subsets(scored, 40, 0, "patient")
    assert {name: (part["num_samples"], part["num_groups"]) for name, part in by_patient.items()} == {
        "all": (180, 60),
        "paired": (90, 30),
        "unpaired": (90, 30),
    }
    by_stay = result.subsets(scored, 40, 0, "stay")
    once = {name: values[:60] for name, values in scored.items()}
    for name, part in by_patient.items():
        assert part["auroc_macro"] == by_stay[name]["auroc_macro"] and "num_groups" not in by_stay[name]
        expected = result.subsets(once, 40, 0, "stay")[name]["auroc_macro_ci"]
        np.testing.assert_allclose(part["auroc_macro_ci"], expected, atol=1e-6)
        assert np.ptp(by_stay[name]["auroc_macro_ci"]) < np.ptp(expected)


def test_the_means_of_label_types_are_over_their_labels_and_the_same_resamples(scored):
    types = {"acute": [0], "mixed": [], "chronic": [1, 2]}
    one_class = np.zeros((180, 1), np.int8)  # left out of the means
    scored |= {name: np.hstack([scored[name], one_class]) for name in ("labels", "scores")}
    alone = result.subsets(scored, 30, 1, "patient")
    for name, of in result.subsets(scored, 30, 1, "patient", types).items():
        assert of.keys() - alone[name].keys() == {"label_types"} and of["label_types"].keys() == types.keys()
        np.testing.assert_array_equal(of["auroc_macro_ci"], alone[name]["auroc_macro_ci"])
        for kind, columns in (("acute", [0]), ("chronic", [1, 2])):
            part = {field: v[:, columns] if field in ("labels", "scores") else v for field, v in scored.items()}
            expected = result.subsets(part, 30, 1, "patient")[name]
            found = of["label_types"][kind]
            assert found["num_labels"] == len(columns)
            for key in ("auroc_macro", "auroc_macro_ci", "auprc_macro", "auprc_macro_ci"):
                np.testing.assert_allclose(found[key], expected[key], rtol=1e-12)
        assert np.isnan(of["label_types"]["mixed"]["auroc_macro"])


def test_runs_and_ensembles_of_phenotypes_have_means_by_type(ehr_config, tmp_path):
    for seed, name in enumerate("ab"):
        ehr_config.seed = seed
        save_initial_weights(ehr_config, tmp_path / name, epoch=9)
        evaluated = evaluate.evaluate(tmp_path / name)
    both = command.ensemble([str(tmp_path / name) for name in "ab"], tmp_path / "both")
    for found in (evaluated, both):
        of = found["subsets"]["all"]
        assert {kind: part["num_labels"] for kind, part in of["label_types"].items()} == _NUM_LABELS
        acute = [k for k, p in enumerate(schema.PHENOTYPES) if p.kind == "acute"]
        assert of["label_types"]["acute"]["auroc_macro"] == pytest.approx(np.nanmean(of["auroc"][acute]))
    assert schema.label_types("mortality", schema.TASKS["mortality"].labels) == {}
    assert schema.label_types("pheno", ["my own", "Shock"]) == {"acute": [1]}


def test_operating_points_of_few_positives_are_withheld(scored):
    of = {name: values[:, :1] if name in ("labels", "scores") else values for name, values in scored.items()}
    shown = evaluate._operating_points(of)
    assert len(shown["operating_points"]) == 3 and len(shown["net_benefit"]) == 19
    assert "operating_points_withheld" not in shown
    few = np.zeros_like(of["labels"])
    few[:9] = 1
    withheld = {"operating_points": [], "net_benefit": [], "operating_points_withheld": True}
    assert evaluate._operating_points(of | {"labels": few}) == withheld


def test_comparisons_draw_patients_or_stays(scored):
    other = {"stay_id": scored["stay_id"], "scores": scored["scores"][::-1]}
    by_patient, by_stay = (result.compare(scored, other, "other", 40, 0, resample) for resample in result.RESAMPLES)
    arguments = (scored["labels"], other["scores"], scored["scores"], 40, 0)
    for found, groups in ((by_patient, scored["subject_id"]), (by_stay, None)):
        expected = metrics.compare(*arguments, groups)
        np.testing.assert_array_equal(found[0]["auroc_macro_ci"], expected["auroc_macro_ci"])
    assert list(by_patient[0]["auroc_macro_ci"]) != list(by_stay[0]["auroc_macro_ci"])


def test_patients_are_drawn_by_default_where_one_has_several_stays(scored):
    once = {name: values[:60] for name, values in scored.items()}
    assert (result.resample_by("", scored), result.resample_by("", once)) == ("patient", "stay")
    assert result.resample_by("stay", scored) == "stay"
    with pytest.raises(UserError) as error:
        result.resample_by("patients", scored)
    assert (error.value.field, error.value.nearest) == ("--resample", "patient")


def test_an_evaluation_stores_and_says_what_it_draws(tiny_config, tmp_path):
    tiny_config.method, tiny_config.task = "uni_cxr", "radiology"
    run = save_initial_weights(tiny_config, tmp_path)
    subject_id_N = run.dataset.index["train"]["subject_id"]
    num_patients = len(np.unique(subject_id_N))
    assert num_patients < len(subject_id_N)  # several X-rays of a patient
    for given, kind in (("stay", "stay"), ("", "patient")):
        evaluate.evaluate(tmp_path, result.Scored("train"), resample=given)
        stored = damage.unsealed(tmp_path / "result_train.json")
        assert stored["resample"] == kind
        assert stored["subsets"]["all"].get("num_groups") == (num_patients if kind == "patient" else None)
        words = {"stay": "train X-rays", "patient": "train patients, each with all of their X-rays"}[kind]
        assert f"resamples of {words}" in terminal.table([stored])
        (tmp_path / "result.json").write_text(json.dumps(stored))
        words = words.replace("train", "test")  # what result.json is about
        assert f"resamples of {words}" in tables.results("radiology", [read_runs.read_run(tmp_path)])
    del stored["resample"]  # a result of an earlier version
    assert "resamples of the train set" in terminal.table([stored])
    with pytest.raises(UserError) as error:
        evaluate.evaluate(tmp_path, resample="day")
    assert error.value.field == "--resample"
