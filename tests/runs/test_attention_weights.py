"""The predictions file of a run with attention: a row of weights a stay, whatever the buckets and devices are."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from medfuse_jax import evaluate, experiment, optim, parallel, records
from medfuse_jax.report import pages
from medfuse_jax.runs import attention_weights, checkpoints, workdir


@pytest.fixture
def attention_config(tiny_config):
    tiny_config.method, tiny_config.num_epochs, tiny_config.model.modalities = "medfuse_attention", 1, "static"
    return tiny_config


def test_a_runs_predictions_hold_its_weights_and_its_page_shows_them(attention_config, tmp_path):
    run = experiment.open_experiment(attention_config)
    workdir.claim(tmp_path, run)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        checkpoints.save(manager, _moved(run.fresh_state()), optim.Progress(), is_best=True)
    evaluate.evaluate(tmp_path)
    with np.load(tmp_path / "predictions_test.npz") as stored:
        found = dict(stored)
    index = records.index(attention_config.data.dir, "pheno", "test")
    length_N = index["length"]
    np.testing.assert_array_equal(found["stay_id"], index["stay_id"])
    np.testing.assert_array_equal(found["length"], length_N)
    assert found["modalities"].tolist() == ["static", "ehr", "cxr"]
    inside_NT = np.arange(length_N.max()) < length_N[:, None]
    assert found["time_weights"].dtype == np.float16 and found["time_weights"].shape == inside_NT.shape
    np.testing.assert_array_equal(found["time_weights"] > 0, inside_NT)
    np.testing.assert_allclose(found["time_weights"].astype(np.float32).sum(1), 1, atol=0.01)
    np.testing.assert_allclose(found["modality_weights"].sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(found["modality_weights"][:, 2] > 0, index["has_cxr"])
    assert np.ptp(found["modality_weights"][:, 1]) > 1e-4  # they differ from stay to stay
    pages.write([tmp_path], tmp_path / "report")
    assert "Attention weights" in (tmp_path / "report" / "index.html").read_text()


def _moved(state):
    """Weights start equal: other numbers than the initial ones tell rows apart."""
    rng = np.random.default_rng(0)
    return state.replace(params=jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), state.params))


@pytest.mark.slow
def test_weights_are_the_same_on_one_device_and_on_two(attention_config):
    run = experiment.open_experiment(attention_config)
    state, include_N = run.fresh_state(), run.dataset.usable("test")
    state, made = _moved(state), []
    for devices, mode in ((1, "jit"), (2, "pmap")):
        attention_config.parallel = mode
        other = dataclasses.replace(run, devices=parallel.devices(devices), config=attention_config)
        made.append(attention_weights.collect(other, parallel.replicate(state, other.devices), "test", include_N))
    np.testing.assert_allclose(made[0]["modality_weights"], made[1]["modality_weights"], atol=1e-5)
    np.testing.assert_allclose(made[0]["time_weights"], made[1]["time_weights"], atol=1e-3)
    assert np.abs(made[0]["modality_weights"][1:] - made[1]["modality_weights"][:-1]).max() > 0.01  # another row shows


def test_a_method_without_attention_has_none(tiny_config):
    tiny_config.method = "uni_ehr"
    run = experiment.open_experiment(tiny_config)
    assert attention_weights.collect(run, None, "test", run.dataset.usable("test")) == {}
