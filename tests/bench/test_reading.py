"""The case that reads real shards, which it writes itself."""

import dataclasses

import numpy as np

from medfuse_jax.bench import cases, cohort, reading
from medfuse_jax.data import dataset

_CASE = dataclasses.replace(cases.Case(kind="reading", num_stays=40, batch_size=4, cxr_share=0.5), repeats=1, warm_up=0)


def test_shards_hold_the_made_up_stays(tmp_path):
    reading.write(tmp_path, _CASE)
    read, made = dataset.open_dataset(tmp_path, "pheno").splits["train"], cohort.dataset(_CASE).splits["train"]
    assert len(read) == len(made) == 40
    for i in (0, 7, 39):
        np.testing.assert_array_equal(read[i]["ehr"], made[i]["ehr"])
        assert (read[i]["image"] is None) == (made[i]["image"] is None)
    assert sum(read[i]["image"] is not None for i in range(40)) == 20


def test_rows_and_images_are_counted():
    (row,) = reading.measure(_CASE)
    assert row["rows_per_s"] == round(40 / row["seconds"], 1) and row["images_read_per_s"] == round(
        20 / row["seconds"], 1
    )


def test_without_the_packages_it_is_left_out(monkeypatch):
    monkeypatch.setattr(reading, "_NEEDS", ("numpy", "no_such_package", "no_such.package"))
    (row,) = reading.measure(_CASE)
    assert row["outcome"] == "left out" and "no_such_package, no_such.package" in row["reason"]
