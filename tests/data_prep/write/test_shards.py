"""Datasets read back as written: order, index, statistics."""

import subprocess
import sys

import numpy as np
import pytest

from data_prep.write import shards
from medfuse_jax import records, schema

TASK = schema.TASKS["mortality"]


def _record(i, rng):
    has_cxr = i % 3 == 0
    return {
        "stay_id": 1000 - i,  # not sorted: the order must be kept
        "subject_id": 7 * i,
        "ehr": rng.normal(size=(i % 5 + 1, 76)).astype(np.float32),
        "label": np.array([i % 2], np.int8),
        "has_cxr": has_cxr,
        "dicom_id": f"X-ray-{i}" if has_cxr else "",
        "image": rng.integers(0, 256, (int(has_cxr), 256, 256), np.uint8),
        "age": np.float32(50 + i),
        "gender": "F",
        "admission_type": "URGENT",
        "first_careunit": "MICU",
    }


def _dataset(sizes):
    rng = np.random.default_rng(0)
    rows_of = {split: [_record(i, rng) for i in range(n)] for split, n in sizes.items()}
    index = {
        split: {
            "stay_id": np.array([r["stay_id"] for r in rows], np.int64),
            "subject_id": np.array([r["subject_id"] for r in rows], np.int64),
            "length": np.array([len(r["ehr"]) for r in rows], np.int32),
            "has_cxr": np.array([r["has_cxr"] for r in rows], bool),
            "age": np.array([r["age"] for r in rows], np.float32),
            **{field: np.array([r[field] for r in rows], str) for field in schema.STATIC_TEXTS},
            "label": np.array([r["label"] for r in rows], np.int8).reshape(len(rows), 1),
        }
        for split, rows in rows_of.items()
    }
    return rows_of, index


MANIFEST = {"format_version": records.FORMAT_VERSION, "task": "mortality"}
MANIFEST |= dict.fromkeys(("channels", "train_mean", "train_std"), ())  # unused here
MANIFEST["labels"] = TASK.labels


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A dataset of 40 training, 3 test and no validation records."""
    rows_of, index = _dataset({"train": 40, "val": 0, "test": 3})
    folder = tmp_path_factory.mktemp("out") / "mortality"
    folder.mkdir()
    shards.write(
        folder, TASK, index, {split: (lambda rows=rows: iter(rows)) for split, rows in rows_of.items()}, MANIFEST
    )
    return folder.parent, rows_of, index


def test_records_come_back_in_order(written):
    out, rows_of, index = written
    for split, rows in rows_of.items():
        read = records.open_split(out, "mortality", split)
        assert len(read) == len(rows)
        stored = records.index(out, "mortality", split)
        for name in records.INDEX_FIELDS:
            np.testing.assert_array_equal(stored[name], index[split][name])
            assert stored[name].dtype == index[split][name].dtype
        for record, expected in zip(read, rows, strict=True):
            for name in ("stay_id", "subject_id", "has_cxr", "dicom_id", "age", "gender"):
                assert record[name] == expected[name]
            np.testing.assert_array_equal(record["ehr"], expected["ehr"])
            np.testing.assert_array_equal(record["label"], expected["label"])
            if expected["has_cxr"]:
                np.testing.assert_array_equal(record["image"], expected["image"][0])
            else:
                assert record["image"] is None


def test_files_are_the_same_bytes_each_time_and_nothing_is_printed(written, tmp_path, capfd):
    out, rows_of, index = written
    shards.write(
        tmp_path, TASK, index, {split: (lambda rows=rows: iter(rows)) for split, rows in rows_of.items()}, MANIFEST
    )
    assert capfd.readouterr() == ("", "")

    def content(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    assert content(tmp_path) == content(out / "mortality")
    assert sorted(content(tmp_path)) == [
        "dataset_info.json",
        "features.json",
        "index_test.npz",
        "index_train.npz",
        "index_val.npz",
        "manifest.json",
        "mortality-test.array_record-00000-of-00001",
        "mortality-train.array_record-00000-of-00001",
    ]


def test_several_shards_keep_the_order(tmp_path, monkeypatch):
    """Each shard is on disk before the next one's records are generated, so a split need not fit in memory."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    rows_of, index = _dataset({"train": 40, "val": 0, "test": 3})
    (tmp_path / "mortality").mkdir()
    shards_before = []

    def train():
        for record in rows_of["train"]:
            shards_before.append(len(list((tmp_path / "mortality").glob("train.*"))))
            yield record

    records_of = {"train": train, "val": lambda: iter(()), "test": lambda: iter(rows_of["test"])}
    shards.write(tmp_path / "mortality", TASK, index, records_of, MANIFEST)
    names = sorted(p.name for p in (tmp_path / "mortality").glob("mortality-train*"))
    assert len(names) > 3 and names[-1].endswith(f"-{len(names) - 1:05d}-of-{len(names):05d}")
    assert shards_before == sorted(shards_before) and shards_before[-1] == len(names)
    assert not list((tmp_path / "mortality").glob("*.partial"))
    read = records.open_split(tmp_path, "mortality", "train")
    assert [record["stay_id"] for record in read] == [record["stay_id"] for record in rows_of["train"]]
    np.testing.assert_array_equal(read[39]["image"], rows_of["train"][39]["image"][0])


_LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
from data_prep.write import shards
from medfuse_jax import records, schema
n, image = 17_000, np.random.default_rng(0).integers(0, 256, (1, 256, 256), np.uint8)
row = {"stay_id": -1, "subject_id": 1, "ehr": np.zeros((0, 76), np.float32), "label": np.zeros(14, np.int8)}
row |= {"has_cxr": True, "dicom_id": "x", "image": image, "age": np.float32(1)}
row |= dict.fromkeys(schema.STATIC_TEXTS, "")
index = {name: np.zeros(n) for name in records.INDEX_FIELDS}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
records_of = {"train": lambda: (row for _ in range(n))}
shards.write(Path(sys.argv[1]), schema.TASKS["radiology"], {"train": index}, records_of, {})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.nightly
def test_a_split_over_a_gigabyte_needs_little_memory_and_no_tensorflow(tmp_path):
    done = subprocess.run([sys.executable, "-c", _LARGE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(p.stat().st_size for p in tmp_path.glob("*array_record*")) > 1.1e9
    assert int(done.stdout) < 400, "MiB"
