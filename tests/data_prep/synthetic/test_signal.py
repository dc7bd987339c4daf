"""The signal planted in the synthetic cohort: labels of known difficulty."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from data_prep.synthetic import cohort, signal


@pytest.fixture(scope="module")
def many():
    """Probabilities and labels of 4,000 stays, by task."""
    stays, planted = cohort.draw_stays(np.random.default_rng(0), 4000)
    kept = (stays["kind"] == "kept").to_numpy()
    return {
        task: ({name: p[kept] for name, p in planted[task].items()}, planted[f"{task}_label"][kept])
        for task in signal.RULES
    }


@pytest.mark.parametrize("task", signal.RULES)
def test_best_auroc_is_that_of_the_drawn_labels(many, task):
    given, label = many[task]
    has_cxr = np.random.default_rng(1).random(len(label)) < 0.5
    report = signal.best_auroc(task, given, has_cxr)

    def difference(score, drawn, expected):
        aurocs = [roc_auc_score(drawn[:, k], score[:, k]) for k in range(drawn.shape[1])]
        return np.abs(np.array(aurocs) - expected["per_label"]).max()

    for subset, rows in (("all", slice(None)), ("paired", has_cxr)):
        score = given["ehr_only"][rows]
        assert difference(score, label[rows], report[subset]["ehr_only"]) < 0.04
    both = report["paired"]["both"]
    assert difference(given["both"][has_cxr], label[has_cxr], both) < 0.04
    assert difference(given["ehr_only"][has_cxr], label[has_cxr], both) > 0.06  # planted error: another score


def test_each_group_of_labels_needs_its_modalities(many):
    given, label = many["pheno"]
    report = signal.best_auroc("pheno", given, np.arange(len(label)) % 5 == 0)
    groups = np.array(report["groups"])
    ehr, image, both = (np.array(report["paired"][m]["per_label"]) for m in ("ehr_only", "cxr_only", "both"))
    assert {g: int((groups == g).sum()) for g in set(groups)} == {"vitals": 9, "cxr": 8, "sum": 6, "and": 2}
    np.testing.assert_allclose(ehr[groups == "cxr"], 0.5)
    np.testing.assert_allclose(image[groups == "vitals"], 0.5)
    np.testing.assert_allclose(ehr[groups == "vitals"], both[groups == "vitals"])
    needs_both = np.isin(groups, ("sum", "and"))
    assert (both - np.maximum(ehr, image))[needs_both].min() > 0.04
    macro = {m: report["paired"][m]["macro"] for m in ("ehr_only", "both")}
    assert 0.70 < macro["ehr_only"] < 0.76 and 0.88 < macro["both"] < 0.93
    assert report["all"]["ehr_only"]["macro"] < report["all"]["both"]["macro"] < macro["both"]


def test_prevalences_are_those_of_the_rules(many):
    for task, rules in signal.RULES.items():
        wanted = np.array([rule.prevalence for rule in rules])
        np.testing.assert_allclose(many[task][0]["both"].mean(axis=0), wanted, atol=0.02)
        np.testing.assert_allclose(many[task][1].mean(axis=0), wanted, atol=0.03)


def test_ehr_only_score_is_the_mean_over_images():
    rng = np.random.default_rng(0)
    vitals, _ = signal.draw_latents(rng, 3)
    images = rng.standard_normal((5_000, len(signal.IMAGE_LATENTS)))
    for i in range(3):
        alone = signal.probabilities("pheno", vitals[i : i + 1], images[:1])["ehr_only"][0]
        drawn = signal.probabilities("pheno", np.repeat(vitals[i : i + 1], len(images), 0), images)["both"]
        np.testing.assert_allclose(alone, drawn.mean(axis=0), atol=0.025)
