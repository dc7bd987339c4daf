"""The case that reads real shards."""

import dataclasses

from medfuse_jax import records
from medfuse_jax.bench import cases, reading
from medfuse_jax.data import synthetic

_CASE = dataclasses.replace(cases.Case(kind="reading", num_stays=40, batch_size=4, cxr_share=0.5), repeats=1, warm_up=0)


def test_rows_and_images_are_counted(shards, monkeypatch):
    monkeypatch.setattr(synthetic, "build", lambda num_stays, cxr_fraction, tasks: shards)
    (row,) = reading.measure(_CASE)
    index = records.index(shards, "pheno", "train")
    counts = {"rows_per_s": len(index["stay_id"]), "images_read_per_s": index["has_cxr"].sum()}
    assert all(row[name] == round(number / row["seconds"], 1) > 0 for name, number in counts.items())
    assert row["rows_per_cpu_s"] > 0 and row["readers"] >= 1


def test_without_the_packages_it_is_left_out(monkeypatch):
    monkeypatch.setattr(reading, "_NEEDS", ("numpy", "no_such_package", "no_such.package"))
    (row,) = reading.measure(_CASE)
    assert row["outcome"] == "left out" and "no_such_package, no_such.package" in row["reason"]
