"""The study of how close runs come to the best reachable AUROC: that it can tell. The study itself takes an hour."""

import numpy as np
import polars as pl
import pytest
from reliability import optimum

from data_prep.synthetic import signal, tree


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimum") / "raw"
    tree.write(folder, num_stays=300, seed=1, cxr_fraction=0.02, images_per_stay=0.02)
    return folder


def _predictions(raw, scores=None):
    """Return predictions of all stays, by default with the true probabilities as scores, for one order of the stays."""
    truth = pl.read_csv(raw / "truth.csv.gz").sample(fraction=1, shuffle=True, seed=0)
    names = [name for name in truth.columns if name.startswith("p_") and name != "p_mortality"]
    scores = truth.select(names).to_numpy() if scores is None else scores
    return {"stay_id": truth["stay_id"].to_numpy(), "scores": scores, "has_cxr": np.full(len(truth), True)}


def test_the_true_probabilities_are_the_best_scores(raw):
    found = optimum.expected(raw, "pheno", _predictions(raw))["paired"]
    assert found["found"] == pytest.approx(found["best"], abs=1e-4)
    assert found["found"]["macro"] > found["best_ehr"]["macro"] + 0.1
    assert found["found"]["macro"] > found["best_cxr"]["macro"] + 0.1
    assert set(found["found"]) == {"macro", *(rule.group for rule in signal.RULES["pheno"])}


def test_scores_that_know_nothing_are_at_one_half(raw):
    noise = np.random.default_rng(0).random((300, len(signal.RULES["pheno"])))
    found = optimum.expected(raw, "pheno", _predictions(raw, noise))["all"]
    assert found["found"]["macro"] == pytest.approx(0.5, abs=0.02)
