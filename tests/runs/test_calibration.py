"""Calibration, operating points and net benefit, against plain implementations and known cases."""

import numpy as np
import pytest
import sklearn.metrics

from medfuse_jax.runs import calibration


@pytest.fixture(scope="module")
def calibrated():
    """Labels drawn with the scores as their probabilities."""
    rng = np.random.default_rng(0)
    scores = 0.001 + 0.998 * rng.random((20_000, 2)) ** 2
    return (rng.random(scores.shape) < scores).astype(int), scores


def test_calibrated_scores_have_a_small_error_and_shifted_ones_a_large_one(calibrated):
    labels, scores = calibrated
    found = calibration.describe(labels, scores)
    assert found["ece_macro"] < 0.02
    for bin in found["curve"]:
        assert bin["positive"] == pytest.approx(bin["score"], abs=0.03)
    assert calibration.describe(labels, scores**0.5)["ece_macro"] > 0.1
    expected = [sklearn.metrics.brier_score_loss(labels[:, k], scores[:, k]) for k in range(2)]
    np.testing.assert_allclose(found["brier"], expected)


def test_the_expected_calibration_error_is_that_of_its_definition():
    labels, scores = np.array([[0], [1], [1], [0]]), np.array([[0.05], [0.15], [0.15], [1.0]])
    found = calibration.describe(labels, scores)
    assert found["ece_macro"] == pytest.approx((0.05 + 2 * 0.85 + 1.0) / 4)
    assert [b["num_samples"] for b in found["curve"]] == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found["curve"][2] == {"num_samples": 0, "score": None, "positive": None}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_fitted_temperature_undoes_one(calibrated, temperature):
    labels, scores = calibrated
    distorted = calibration.scale(scores, 1 / temperature)
    assert calibration.fit_temperature(labels, distorted) == pytest.approx(temperature, rel=0.05)
    np.testing.assert_array_equal(np.argsort(calibration.scale(scores, temperature)[:, 0]), np.argsort(scores[:, 0]))


def test_no_temperature_is_fitted_without_both_classes(calibrated):
    labels, scores = calibrated
    assert calibration.fit_temperature(np.zeros_like(labels), scores) is None
    assert calibration.fit_temperature(np.ones_like(labels), scores) is None
    one = np.column_stack([labels[:, 0], np.zeros(len(labels))])
    assert calibration.fit_temperature(one[:, :1], scores[:, :1]) == pytest.approx(1, rel=0.05)
    assert calibration.fit_temperature(one, scores) > 0


def test_operating_points_reach_their_sensitivity_with_the_highest_threshold(calibrated):
    label, score = (x[:, 0] for x in calibrated)
    for point, wanted in zip(calibration.operating_points(label, score), (0.8, 0.9, 0.95)):
        predicted = score >= point["threshold"]
        matrix = sklearn.metrics.confusion_matrix(label, predicted)
        assert point["sensitivity"] == matrix[1, 1] / matrix[1].sum() >= wanted
        assert point["specificity"] == pytest.approx(matrix[0, 0] / matrix[0].sum())
        assert point["ppv"] == pytest.approx(matrix[1, 1] / matrix[:, 1].sum())
        higher = score[(label == 1) & (score > point["threshold"])].min()
        assert (score[label == 1] >= higher).mean() < wanted
    assert calibration.operating_points(np.ones(3), np.ones(3)) == []


def test_the_net_benefit_of_a_perfect_model_is_the_prevalence():
    label = np.array([1, 0, 0, 1, 0])
    rows = calibration.net_benefit(label, label.astype(float))
    assert all(row["model"] == pytest.approx(0.4) for row in rows)
    half = next(row for row in rows if row["threshold"] == 0.5)
    assert half["everyone"] == pytest.approx(0.4 - 0.6)
    everyone = calibration.net_benefit(label, np.ones(5))
    assert [row["model"] for row in everyone] == pytest.approx([row["everyone"] for row in everyone])
