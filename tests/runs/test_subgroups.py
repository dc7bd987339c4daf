"""Metrics by group of patients: the right stays in each, small groups withheld, the largest gap."""

import numpy as np
import pytest

from medfuse_jax import metrics
from medfuse_jax.runs import subgroups


@pytest.fixture(scope="module")
def scored():
    """The scores of women are noise; 5 stays are of a rare unit."""
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 3)) < 0.3).astype(int)
    gender = np.where(np.arange(400) % 2, "F", "M")
    scores = labels * (gender == "M")[:, None] + rng.normal(size=labels.shape)
    unit = np.where(np.arange(400) < 5, "Rare", np.where(np.arange(400) < 50, "", "Medical"))
    age = np.linspace(18, 95, 400)
    return {
        "labels": labels,
        "scores": 1 / (1 + np.exp(-scores)),
        "gender": gender,
        "first_careunit": unit,
        "age": age,
        "subject_id": np.arange(400) // 8,
    }


def _by(scored, title, groups=None):
    return next(e for e in subgroups.describe(scored, 50, 0, groups) if e["by"] == title)


def test_a_group_has_the_metrics_of_its_stays(scored):
    women = next(g for g in _by(scored, "Sex")["groups"] if g["name"] == "F")
    include = scored["gender"] == "F"
    expected = metrics.evaluate(scored["labels"][include], scored["scores"][include], 50, 0)
    assert women["auroc_macro"] == expected["auroc_macro"]
    np.testing.assert_array_equal(women["auprc_macro_ci"], expected["auprc_macro_ci"])
    assert women["num_samples"] == 200 and women["num_positive"] == scored["labels"][include].sum()


def test_the_largest_gap_names_the_worst_group(scored):
    entry = _by(scored, "Sex")
    women, men = entry["groups"]
    gap = entry["gap"]
    assert (gap["worst"], gap["best"]) == ("F", "M")
    assert gap["auroc_macro"] == pytest.approx(men["auroc_macro"] - women["auroc_macro"]) and gap["auroc_macro"] > 0.1
    np.testing.assert_array_equal(gap["worst_ci"], women["auroc_macro_ci"])


def test_small_groups_are_withheld_and_unknown_values_are_in_none(scored):
    entry = _by(scored, "First care unit")
    assert entry["groups"][1] == {"name": "Rare", "withheld": True}
    assert entry["groups"][0]["num_samples"] == 350 and entry["gap"] is None
    alone = scored | {"first_careunit": np.full(400, "")}
    assert not any(e["by"] == "First care unit" for e in subgroups.describe(alone, 5, 0, None))
    few = scored | {"labels": np.zeros_like(scored["labels"])}  # no positive anywhere
    withheld = [{"by": by, "groups": [], "gap": None} for by in ("Age", "Sex", "First care unit")]
    assert subgroups.describe(few, 5, 0, None) == withheld
    no_age = few | {"age": np.full(400, np.nan)}  # unknown, not withheld
    assert [e["by"] for e in subgroups.describe(no_age, 5, 0, None)] == ["Sex", "First care unit"]


def test_the_hours_of_few_stays_are_withheld(scored):
    """400 hours of 50 stays are shown; of 9 stays, or of 50 with a positive hour in 9, they are not."""
    hourly = scored | {"stay_id": scored["subject_id"], "hour": np.arange(400) % 8 + 20}
    assert [g["name"] for g in _by(hourly, "Hour of the stay")["groups"] if "auroc_macro" in g] == [
        "1 to 24",
        "25 to 48",
    ]
    nine_stays = hourly | {"stay_id": scored["subject_id"] % 9}
    assert _by(nine_stays, "Hour of the stay")["groups"] == []
    few = hourly | {"labels": np.where(scored["subject_id"] < 3, 1, 0)[:, None] * scored["labels"]}
    assert _by(few, "Hour of the stay")["groups"] == []


def test_age_groups_are_those_of_the_paper(scored):
    groups = _by(scored, "Age")["groups"]
    assert [g["name"] for g in groups] == ["18 to 39 years", "40 to 59 years", "60 to 79 years", "80 years and over"]
    assert sum(g["num_samples"] for g in groups) == 400
    assert groups[0]["num_samples"] == (scored["age"] < 40).sum()


def test_resamples_draw_patients_where_told(scored):
    stays, patients = (_by(scored, "Sex", groups)["groups"][0] for groups in (None, scored["subject_id"]))
    assert stays["auroc_macro"] == patients["auroc_macro"]
    assert not np.array_equal(stays["auroc_macro_ci"], patients["auroc_macro_ci"])


def test_race_is_a_group_and_a_small_one_is_withheld(scored):
    race = np.where(np.arange(400) < 9, "Asian", np.where(np.arange(400) % 3, "White", "Unknown"))
    entry = _by(scored | {"race": race}, "Race or ethnicity")
    assert [g["name"] for g in entry["groups"] if not g.get("withheld")] == ["Unknown", "White"]
    assert {"name": "Asian", "withheld": True} in entry["groups"]
    nothing = scored | {"race": np.full(400, "")}  # the tables have no such column
    assert not any(e["by"] == "Race or ethnicity" for e in subgroups.describe(nothing, 2, 0, None))
