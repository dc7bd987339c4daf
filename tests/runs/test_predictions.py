"""predictions: attention weights, one row a stay, whatever the buckets and devices."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from medfuse_jax import evaluate, parallel, records
from medfuse_jax import run as run_lib
from medfuse_jax import step as step_lib
from medfuse_jax.report import pages
from medfuse_jax.runs import checkpoints, predictions, workdir
from medfuse_jax.runs.progress import Progress


@pytest.fixture
def attention_config(tiny_config):
    tiny_config.method, tiny_config.num_epochs, tiny_config.model.modalities = "medfuse_attention", 1, "static"
    return tiny_config


def test_predictions_hold_attention_weights_and_the_report_shows_them(attention_config, tmp_path):
    run = run_lib.open_run(attention_config)
    workdir.claim(tmp_path, run)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        checkpoints.save(manager, _perturbed(run.fresh_state()), Progress(), is_best=True)
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
    assert np.ptp(found["modality_weights"][:, 1]) > 1e-4  # they differ between stays
    pages.write([tmp_path], tmp_path / "report")
    assert "Attention weights" in (tmp_path / "report" / "index.html").read_text()


def _perturbed(state):
    """Initial weights are equal for all rows: perturb them to tell rows apart."""
    rng = np.random.default_rng(0)
    return state.replace(params=jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), state.params))


@pytest.mark.nightly
def test_attention_weights_are_the_same_on_one_device_and_on_two(attention_config):
    run = run_lib.open_run(attention_config)
    state, include_N = _perturbed(run.fresh_state()), run.dataset.usable("test")
    results = []
    for num_devices, mode in ((1, "shard_map"), (2, "pmap")):
        devices = parallel.devices(num_devices)
        weights_fn = parallel.compile_eval(run.options, mode, devices, step_lib.weights_step)
        placed = parallel.replicate(state, devices)
        one = dataclasses.replace(run, devices=devices)
        results.append(predictions.attention_weights(one, weights_fn, placed, "test", include_N))
    a, b = results
    np.testing.assert_allclose(a["modality_weights"], b["modality_weights"], atol=1e-5)
    np.testing.assert_allclose(a["time_weights"], b["time_weights"], atol=1e-3)
    assert np.abs(a["modality_weights"][1:] - b["modality_weights"][:-1]).max() > 0.01  # a shifted row would show


def test_method_without_attention_has_no_weights(ehr_config):
    run = run_lib.open_run(ehr_config)
    assert predictions.attention_weights(run, None, None, "test", run.dataset.usable("test")) == {}
