"""An experiment: which records it draws, and what it says where there is none."""

import dataclasses

import jax
import numpy as np
import pytest

from medfuse_jax import experiment
from medfuse_jax.errors import UserError


@pytest.fixture
def ehr_run(tiny_config):
    tiny_config.method = "uni_ehr"
    return experiment.open_experiment(tiny_config)


@pytest.mark.parametrize(("backend", "form"), [("cpu", "chunks"), ("tpu", "chunks"), ("gpu", "pallas")])
def test_a_gpus_form_of_the_recurrence_is_a_gpus_alone(ehr_config, monkeypatch, backend, form):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    ehr_config.recurrence = "pallas"
    assert experiment.open_experiment(ehr_config).options.model.recurrence == form


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
    """Stays without films alone, of which none is to be drawn."""
    index = {split: part | {"has_cxr": np.zeros_like(part["has_cxr"])} for split, part in ehr_run.dataset.index.items()}
    ehr_run.config.data.ehr_only_ratio = 0.0
    without = dataclasses.replace(ehr_run, dataset=dataclasses.replace(ehr_run.dataset, index=index))
    with pytest.raises(UserError, match=r"config.data.ehr_only_ratio is 0.0, which leaves no record"):
        experiment._check_batches(without)
