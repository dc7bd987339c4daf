"""The benchmark of data preparation: its input holds what it says, and its command measures it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from raw_tables import chart, image, lab, stay, write_mimic_cxr, write_mimic_iv

from data_prep import bench
from data_prep.ehr import cohort
from data_prep.raw import tables
from data_prep.synthetic import tree as synthetic_tree
from medfuse_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
HEART_RATE, GLUCOSE = 220045, 50931
STAYS, CHARTS, LABS = 3, 30, 6  # what the tree below holds


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
def test_a_copy_differs_by_its_ids_alone(tree, tmp_path, monkeypatch, member_bytes):
    monkeypatch.setattr(bench, "MEMBER_BYTES", member_bytes)  # a gzip member a copy, or one for all
    source = tables.mimic_iv(tree)
    bench.repeat(source, tmp_path, 5)
    for name, table in tables.mimic_iv(tmp_path).items():
        one, five = source[name].read(*table.columns), table.read(*table.columns)
        assert len(five) == 5 * len(one)
        other = [column for column in table.columns if column not in bench.IDS]
        assert five.select(other).equals(pl.concat([one] * 5).select(other))
        for column in set(bench.IDS) & set(table.columns):
            assert five[column].n_unique() == 5 * one[column].n_unique()
    found, _ = cohort.read_stays(tables.mimic_iv(tmp_path))
    assert len(found) == 5 * STAYS


def test_the_stays_of_a_copy_are_spread_over_those_of_the_others(tree, tmp_path):
    bench.repeat(tables.mimic_iv(tree), tmp_path, 3)
    in_order = _ids(tmp_path, "icustays", "stay_id").cast(pl.Int64)
    assert not in_order.is_sorted() and _ids(tmp_path, "icustays", "hadm_id").cast(pl.Int64).is_sorted()


def test_events_to_arrays_counts_rows_and_stays_and_clears_up(tree, tmp_path):
    result = bench.events_to_arrays(tree, tmp_path / "work")
    assert (result["raw_rows"], result["stays"]) == (CHARTS + LABS, STAYS)
    assert 0 < result["seconds_extraction"] <= result["seconds"] and result["cpu_seconds"] > 0
    assert result["rows_per_s"] == pytest.approx(result["raw_rows"] / result["seconds"], rel=0.2)
    assert 0.01 < result["peak_memory_gb"] < 64 and not (tmp_path / "work").exists()


def test_the_whole_build_is_measured_as_such(tree, tmp_path):
    result = bench.whole_build(tree, tmp_path / "work")
    assert (result["what"], result["raw_rows"], result["stays"]) == (
        "whole build, without X-rays",
        CHARTS + LABS,
        STAYS,
    )
    assert result["seconds"] > 0 and result["peak_memory_gb"] > 0.1 and not (tmp_path / "work").exists()


def test_images_are_measured_as_they_are_and_enlarged(images, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "IMAGE_PX", (700, 800))
    found = bench.images(images, tmp_path / "images", most=3)
    assert [(row["what"], row["images"]) for row in found] == [
        ("X-rays, as they are, data_prep", 3),
        ("X-rays, as they are, PIL, whole X-ray", 3),
        ("X-rays, 700x800 px, data_prep", 3),
        ("X-rays, 700x800 px, PIL, whole X-ray", 3),
    ]
    assert all(row["images_per_s_core"] > 0 for row in found) and not (tmp_path / "images").exists()
    with pytest.raises(UserError, match="holds no X-ray under files/"):
        shutil.rmtree(shutil.copytree(images, tmp_path / "none") / "files")
        bench.images(tmp_path / "none", tmp_path / "images")


def test_without_a_tree_the_synthetic_cohort_is_repeated(tmp_path, monkeypatch):
    original, asked = synthetic_tree.write, []

    def smaller(out, num_stays, seed):
        asked.append(num_stays)
        original(out, num_stays=20, seed=seed)

    monkeypatch.setattr(synthetic_tree, "write", smaller)
    source = bench._source(None, tmp_path)
    assert asked == [200] and set(source) == set(tables.MIMIC_IV)
    assert bench._source(None, tmp_path)["icustays"].path == source["icustays"].path and len(asked) == 1
    bench.repeat(source, tmp_path / "raw", 2)
    result = bench.events_to_arrays(tmp_path / "raw", tmp_path / "work")
    assert result["stays"] >= 2 * 20  # of 20 that count; others are there to be left out


def test_the_command_prints_a_line_a_measurement(tree, images, tmp_path):
    options = [
        f"--mimic_iv={tree}",
        f"--mimic_cxr={images}",
        "--copies=16",
        "--repeats=2",
        "--whole_build",
        f"--json={tmp_path / 'a'}",
    ]
    command = [sys.executable, "-m", "data_prep.bench", f"--out={tmp_path / 'out'}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    both = ["events to arrays", "zcat FILE | wc -l"]
    assert [(row["what"], row["copies"]) for row in rows[:8]] == [
        (w, c) for c in (2, 16) for _ in range(2) for w in both
    ]
    assert [row["raw_rows"] for row in rows[:8:2]] == [copies * (CHARTS + LABS) for copies in (2, 2, 16, 16)]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "out").rglob("*"))
    assert (rows[8]["what"], rows[8]["copies"], rows[8]["stays"]) == ("whole build, without X-rays", 16, 16 * STAYS)
    assert len(rows) == 13 and (tmp_path / "a").read_text() == done.stdout


def test_the_command_names_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "data_prep.bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: --out=DIR is missing"
