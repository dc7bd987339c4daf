"""The study of how close runs come to the best reachable AUROC: that it can tell. The study itself takes an hour."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from reliability import optimum, seen

from data_prep.synthetic import cxr, events, signal, tree


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
    assert found["best"]["macro"] - 0.03 < found["seen"]["macro"] < found["best"]["macro"] - 0.003
    assert found["best_ehr"]["macro"] - 0.03 < found["seen_ehr"]["macro"] < found["best_ehr"]["macro"] - 0.003
    assert set(found["found"]) == {"macro", *(rule.group for rule in signal.RULES["pheno"])}


def test_scores_that_know_nothing_are_at_one_half(raw):
    noise = np.random.default_rng(0).random((300, len(signal.RULES["pheno"])))
    found = optimum.expected(raw, "pheno", _predictions(raw, noise))["all"]
    assert found["found"]["macro"] == pytest.approx(0.5, abs=0.02)


def test_records_without_noise_show_the_latents(monkeypatch):
    exact = {name: dataclasses.replace(of, patient_sd=0.0, noise_sd=1e-4) for name, of in events.SIGNALS.items()}
    monkeypatch.setattr(events, "SIGNALS", exact)
    monkeypatch.setattr(cxr, "IMAGE_NOISE", 1e-4)
    latents = signal.draw_latents(np.random.default_rng(0), 50)
    found, true = seen.scores("pheno", *latents, np.full(50, 30)), signal.probabilities("pheno", *latents)
    for name in true:  # seen.py has few nodes for the kink of 'and'
        np.testing.assert_allclose(found[name], true[name], atol=0.02, err_msg=name)


def test_the_information_is_that_of_readings_with_a_common_offset():
    of = events.SIGNALS["awareness"]
    hour = np.arange(0, 30, 0.5)
    gain = of.shifts["coma"] * of.growth(hour)
    covariance = of.patient_sd**2 + (events.READING_SHARE * of.noise_sd) ** 2 * np.eye(len(hour))
    expected = gain @ np.linalg.solve(covariance, gain)
    found = seen._information(np.array([12, 30]))[:, signal.VITAL_LATENTS.index("coma")]
    assert found[1] == pytest.approx(expected, rel=1e-6)
    assert found[0] < expected
