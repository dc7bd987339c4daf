"""An experiment: which records it draws, and what it says where there is none."""

import dataclasses
import types

import numpy as np
import pytest

from medfuse_jax import experiment
from medfuse_jax.runtime.errors import UserError


@pytest.fixture
def ehr_run(tiny_config):
    tiny_config.method = "uni_ehr"
    return experiment.open_experiment(tiny_config)


def _gpus(compute_capability: str, number: int = 1) -> list:
    return [types.SimpleNamespace(platform="gpu", compute_capability=compute_capability)] * number


@pytest.mark.parametrize("form", ["chunks", "pallas", "cudnn"])
def test_a_form_of_the_recurrence_runs_where_it_can(ehr_config, form):
    ehr_config.recurrence = form
    on_cpus, on_gpu = (experiment.open_experiment(ehr_config, on) for on in (None, _gpus("9.0")))
    assert on_cpus.options.model.recurrence == "chunks" and on_gpu.options.model.recurrence == form
    for run in (on_cpus, on_gpu):
        experiment.check_recurrence(run)


@pytest.mark.parametrize(
    ("compute_capability", "number", "changes", "said"),
    [
        ("9.0", 2, {"parallel": "jit"}, "config.parallel=jit cannot divide it over 2 devices"),
        ("9.0", 1, {"model.ehr_hidden": 1024}, "9.0 has room for 512 units, not for the 1024 of config.model.ehr_hid"),
        ("8.9", 1, {"model.ehr_hidden": 512}, "8.9 has room for 256 units"),
        ("7.5", 1, {}, "7.5 does not run it"),
        ("gfx942", 1, {"recurrence": "cudnn"}, "gfx942 does not run it"),
    ],
)
def test_a_gpu_that_cannot_run_the_form_is_refused_for_training_alone(
    ehr_config, compute_capability, number, changes, said
):
    ehr_config.recurrence = "pallas"
    ehr_config.update_from_flattened_dict(changes)
    run = experiment.open_experiment(ehr_config, _gpus(compute_capability, number))
    assert run.options.model.recurrence == "chunks"
    with pytest.raises(UserError, match=said):
        experiment.check_recurrence(run)
    without_ehr = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, use_ehr=False))
    experiment.check_recurrence(without_ehr)


def test_every_included_record_is_planned_once(ehr_run):
    plans = ehr_run.eval_plans("test", ehr_run.dataset.usable("test"))
    rows = np.concatenate([np.concatenate([p.paired_SP, p.unpaired_SU], 1).reshape(-1) for p in plans])
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.flatnonzero(ehr_run.dataset.usable("test")))


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("val", r"the val split of .*/pheno has no record .*val_stays=partial, method uni_ehr"),
        ("test", r"the test split"),
    ],
)
def test_a_split_without_a_record_is_named(ehr_run, split, said):
    with pytest.raises(UserError, match=said):
        ehr_run.eval_plans(split, np.zeros(len(ehr_run.dataset.usable(split)), bool))


def test_a_part_of_nothing_is_refused(ehr_run):
    """Stays without X-rays alone, of which none is to be drawn."""
    index = {split: part | {"has_cxr": np.zeros_like(part["has_cxr"])} for split, part in ehr_run.dataset.index.items()}
    ehr_run.config.data.ehr_only_ratio = 0.0
    without = dataclasses.replace(ehr_run, dataset=dataclasses.replace(ehr_run.dataset, index=index))
    with pytest.raises(UserError, match=r"config.data.ehr_only_ratio is 0.0, which leaves no record"):
        experiment._check_batches(without)
