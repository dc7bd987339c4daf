"""The benchmark of data preparation: its input and its measurements."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import polars as pl
import pytest
from absl import flags
from build_cases import ROOT
from raw_tables import chart, image, lab, stay, write_mimic_cxr, write_mimic_iv

from data_prep import bench
from data_prep.ehr import cohort
from data_prep.raw import tables
from data_prep.synthetic import tree as synthetic_tree
from medfuse_jax.runtime.errors import UserError

HEART_RATE, GLUCOSE = 220045, 50931
STAYS, CHARTS, LABS = 3, 30, 6  # in the tree below


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw")
    charts = [chart(n, h, HEART_RATE, str(60 + n + h)) for n in range(STAYS) for h in range(1, 11)]
    labs = [lab(n, h, GLUCOSE, "110") for n in range(STAYS) for h in (2, 3)]
    return write_mimic_iv(root / "iv", [stay(n) for n in range(STAYS)], charts, labs, [(0, "4019", 9)])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_mimic_cxr(tmp_path_factory.mktemp("cxr"), [image(n, 1) for n in range(4)], size=(640, 520))


def _ids(root, table, column):
    return tables.mimic_iv(root)[table].read(column)[column]


@pytest.mark.parametrize("member_bytes", [1, 1 << 20])
def test_copies_differ_only_in_their_ids(tree, tmp_path, monkeypatch, member_bytes):
    monkeypatch.setattr(bench, "MEMBER_BYTES", member_bytes)  # one gzip member per copy, or one in all
    source = tables.mimic_iv(tree)
    bench.repeat(source, tmp_path, 5)
    for name, table in tables.mimic_iv(tmp_path).items():
        one, five = source[name].read(*table.columns), table.read(*table.columns)
        assert len(five) == 5 * len(one)
        other = [column for column in table.columns if column not in bench.IDS]
        assert five.select(other).equals(pl.concat([one] * 5).select(other))
        for column in set(bench.IDS) & set(table.columns):
            assert five[column].n_unique() == 5 * one[column].n_unique()
    stays, _ = cohort.read_stays(tables.mimic_iv(tmp_path))
    assert len(stays) == 5 * STAYS


def test_the_stay_ids_of_a_copy_are_spread_over_all(tree, tmp_path):
    bench.repeat(tables.mimic_iv(tree), tmp_path, 3)
    in_order = _ids(tmp_path, "icustays", "stay_id").cast(pl.Int64)
    assert not in_order.is_sorted() and _ids(tmp_path, "icustays", "hadm_id").cast(pl.Int64).is_sorted()


def test_events_to_arrays_counts_rows_and_stays_and_cleans_up(tree, tmp_path):
    result = bench.events_to_arrays(tree, tmp_path / "work")
    assert (result["raw_rows"], result["stays"]) == (CHARTS + LABS, STAYS)
    assert 0 < result["seconds_extraction"] <= result["seconds"] and result["cpu_seconds"] > 0
    assert result["rows_per_s"] == pytest.approx(result["raw_rows"] / result["seconds"], rel=0.2)
    assert 0.01 < result["peak_memory_gb"] < 64 and not (tmp_path / "work").exists()


def test_decoding_is_measured_on_images_as_they_are_and_enlarged(images, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "IMAGE_PX", (700, 800))
    rows = bench.images(images, tmp_path / "images", limit=3)
    assert [(row["what"], row["images"]) for row in rows] == [
        ("X-rays, as they are, data_prep", 3),
        ("X-rays, as they are, PIL, full decode", 3),
        ("X-rays, 700x800 px, data_prep", 3),
        ("X-rays, 700x800 px, PIL, full decode", 3),
    ]
    assert all(row["images_per_s_core"] > 0 for row in rows) and not (tmp_path / "images").exists()
    shutil.rmtree(shutil.copytree(images, tmp_path / "none") / "files")
    with pytest.raises(UserError) as raised:
        bench.images(tmp_path / "none", tmp_path / "images")
    assert (raised.value.field, raised.value.path) == ("--mimic_cxr", tmp_path / "none")


def test_the_synthetic_cohort_is_the_default_input(tmp_path, monkeypatch):
    original, sizes = synthetic_tree.write, []

    def smaller(out, num_stays, seed):
        sizes.append(num_stays)
        original(out, num_stays=10, seed=seed, images_per_stay=0)

    monkeypatch.setattr(synthetic_tree, "write", smaller)
    source = bench._source(None, tmp_path)
    assert sizes == [200] and set(source) == set(tables.MIMIC_IV)
    assert bench._source(None, tmp_path)["icustays"].path == source["icustays"].path and len(sizes) == 1


def _main(*arguments):
    """Run the command in this process and return what it prints."""
    values = flags.FlagValues()
    bench.define_flags(values)
    values(["bench", *arguments])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(bench.flags, "FLAGS", values)
        bench.main([])
    return stdout.getvalue()


def test_the_command_prints_one_line_per_measurement(tree, images, tmp_path, monkeypatch):
    run, umask = subprocess.run, os.umask(0o022)

    def run_here(command, **options):
        """Run the command's own children in this process: each would import for seconds."""
        if isinstance(command, str):
            return run(command, **options)
        assert command[:3] == [sys.executable, "-m", "data_prep.bench"]
        return subprocess.CompletedProcess(command, 0, stdout=_main(*command[3:]))

    monkeypatch.setattr(bench.subprocess, "run", run_here)
    options = [f"--mimic_iv={tree}", f"--mimic_cxr={images}", "--copies=16", "--repeats=2", "--whole_build"]
    try:
        printed = _main(f"--out={tmp_path / 'out'}", *options, f"--json={tmp_path / 'a'}")
    finally:
        os.umask(umask)
    rows = [json.loads(line) for line in printed.splitlines()]
    both = ["events to arrays", "zcat FILE | wc -l"]
    assert [(row["what"], row["copies"]) for row in rows[:8]] == [
        (what, copies) for copies in (2, 16) for _ in range(2) for what in both
    ]
    assert [row["raw_rows"] for row in rows[:8:2]] == [copies * (CHARTS + LABS) for copies in (2, 2, 16, 16)]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "out").rglob("*"))
    assert (rows[8]["what"], rows[8]["copies"], rows[8]["stays"]) == ("whole build, without X-rays", 16, 16 * STAYS)
    assert rows[8]["seconds"] > 0 and rows[8]["peak_memory_gb"] > 0.1 and not (tmp_path / "out/work").exists()
    assert len(rows) == 13 and (tmp_path / "a").read_text() == printed


def test_the_command_reports_a_missing_flag_in_one_line():
    command = [sys.executable, "-m", "data_prep.bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: --out=DIR is missing"
