"""Assembling a task's dataset: whose labels it has, and which patients are in which split."""

import numpy as np
import pytest
from build_cases import write_one_stay

from data_prep import build
from data_prep.write import datasets
from medfuse_jax import schema


def test_a_task_without_labels_of_its_own_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setitem(schema.TASKS, "toy", schema.Task("toy", "A toy", ("toy",)))
    with pytest.raises(AssertionError, match="no labels for the task 'toy'"):
        build.build(*write_one_stay(tmp_path), tmp_path / "out", tasks=["toy"])
    assert not (tmp_path / "out" / "toy").exists()


def test_a_patient_in_two_splits_is_refused():
    index = {"train": {"subject_id": np.array([1, 1, 2])}, "val": {"subject_id": np.array([3])}}
    datasets.check_splits_disjoint(index)
    with pytest.raises(AssertionError, match="train and test"):
        datasets.check_splits_disjoint({**index, "test": {"subject_id": np.array([4, 2])}})
