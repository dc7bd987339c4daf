"""The estimate of a plan's time: what it adds up. The seconds of a step are stand-ins."""

import math

import pytest

from medfuse_jax import records
from medfuse_jax.paper import estimate, trainings
from medfuse_jax.paper.trainings import Training

_TRIALS = 3


@pytest.mark.parametrize(
    ("fields", "rate", "share"),
    [
        ({"method": "uni_ehr"}, 1e-4, 1.0),
        ({"method": "uni_ehr"}, None, 1.0),  # searched
        ({"method": "uni_ehr", "data.train_stays": "paired"}, 1e-4, 1.0),
        ({"method": "early"}, 1e-4, 1 / 3),  # frozen encoders compute no gradient
    ],
)
def test_steps_are_those_of_all_epochs_and_runs(shards, monkeypatch, fields, rate, share):
    monkeypatch.setattr(estimate, "_measure", lambda config_of, task: (2.0, 0.0, 5.0))
    settings = trainings.Settings(fields={"num_epochs": 7, "data.dir": str(shards)})
    training = Training("X", "pheno", "", fields, rate=rate)
    found = estimate.estimate([training] * 2, lambda t: trainings.config_of(t, settings, {}, t.rate), _TRIALS)
    has_cxr_N = records.index(shards, "pheno", "train")["has_cxr"]
    num_records = has_cxr_N.sum() if "data.train_stays" in fields else len(has_cxr_N)
    runs = _TRIALS if rate is None else 1
    assert found.steps_s == pytest.approx(2 * 7 * runs * math.ceil(num_records / 16) * 2.0 * share)
    assert found.start_s == 2 * 2 * 5.0, "twice the time to a first step, for each of two commands"
