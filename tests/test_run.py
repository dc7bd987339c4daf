"""A run: which records it uses, and what it refuses."""

import dataclasses
import math
import types
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from medfuse_jax import evaluate
from medfuse_jax import run as run_lib
from medfuse_jax.runs import preflight
from medfuse_jax.runs.progress import Progress


@pytest.fixture
def ehr_run(tiny_config):
    tiny_config.method = "uni_ehr"
    return run_lib.open_run(tiny_config)


def _gpus(compute_capability: str, number: int = 1) -> list:
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=compute_capability, memory_stats=lambda: None)
    return [gpu] * number


@pytest.mark.parametrize("kernel", ["chunks", "pallas", "cudnn"])
def test_a_cpu_falls_back_to_chunks_and_a_gpu_runs_the_configured_kernel(ehr_config, kernel):
    ehr_config.recurrence = kernel
    on_cpus, on_gpu = (run_lib.open_run(ehr_config, on) for on in (None, _gpus("9.0")))
    assert on_cpus.options.model.recurrence == "chunks" and on_gpu.options.model.recurrence == kernel
    assert on_cpus.options.model.ops == "cpu" and on_gpu.options.model.ops == "gpu"
    for run in (on_cpus, on_gpu):
        preflight.check(run, {})


def test_a_gpu_that_cannot_run_the_lstm_kernel_is_rejected_for_training_only(ehr_config):
    ehr_config.recurrence = "pallas"
    run = run_lib.open_run(ehr_config, _gpus("7.5"))
    assert run.options.model.recurrence == "chunks" and run.options.model.ops == "gpu"
    with refused(field="config.recurrence", value="pallas", nearest="chunks"):
        preflight.check(run, {})
    ehr_config.method = "uni_cxr"
    preflight.check(run_lib.open_run(ehr_config, _gpus("7.5")), {})


def test_every_included_record_is_planned_once(ehr_run):
    plans = ehr_run.eval_plans("test", ehr_run.dataset.usable("test"))
    rows = np.concatenate([np.concatenate([p.paired_SP, p.unpaired_SU], 1).reshape(-1) for p in plans])
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.flatnonzero(ehr_run.dataset.usable("test")))


@pytest.mark.parametrize(("split", "field"), [("val", "config.data.val_stays"), ("test", "")])
def test_a_split_without_a_record_is_refused(ehr_run, split, field):
    with refused(field=field, path=Path(ehr_run.config.data.dir) / "pheno"):
        ehr_run.eval_plans(split, np.zeros(len(ehr_run.dataset.usable(split)), bool))


def test_an_ehr_only_ratio_that_leaves_no_record_is_refused(ehr_run):
    """Every stay is EHR-only, and the ratio draws none of them."""
    index = {split: part | {"has_cxr": np.zeros_like(part["has_cxr"])} for split, part in ehr_run.dataset.index.items()}
    ehr_run.config.data.ehr_only_ratio = 0.0
    without = dataclasses.replace(ehr_run, dataset=dataclasses.replace(ehr_run.dataset, index=index))
    with refused(field="config.data.ehr_only_ratio", value=0.0):
        run_lib._check_batches(without)


def test_without_a_validation_auroc_the_loss_selects(ehr_run, capsys):
    val = ehr_run.dataset.index["val"]
    index = ehr_run.dataset.index | {"val": val | {"label": np.zeros_like(val["label"])}}
    run = dataclasses.replace(ehr_run, dataset=dataclasses.replace(ehr_run.dataset, index=index))
    assert not ehr_run.selected_by_loss and run.selected_by_loss
    preflight.check(ehr_run, {})
    assert capsys.readouterr().out == ""
    preflight.check(run, {})
    assert "no label has both classes in the validation stays" in capsys.readouterr().out
    progress = Progress()
    progress.update(1, val_loss=0.5, val_auroc=math.nan, plateau_epochs=10)
    by = evaluate._selected_by(run.config, {}, progress)
    assert by == "loss (no label has both classes) on all validation stays"
