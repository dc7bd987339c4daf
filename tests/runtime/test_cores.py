"""Cores where the system has no affinity, as on macOS."""

import os

from data_prep import build
from medfuse_jax import records
from medfuse_jax.runtime import cores


def test_a_build_needs_no_affinity(raw_tree, tmp_path, monkeypatch):
    assert cores.usable() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.usable() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.usable() == 1
    build.build(*raw_tree, tmp_path, tasks=["mortality"])
    assert records.manifest(tmp_path, "mortality")
