"""Records as we decode them are those that TFDS reads."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from build_cases import assert_same_as_tfds
from refusals import refused

from medfuse_jax import records, schema
from medfuse_jax.runtime import files


@pytest.mark.parametrize("task", ["pheno", "radiology"])
def test_records_are_equal_to_those_that_tfds_reads(shards, task):
    assert_same_as_tfds(shards, task)


def test_only_the_fields_asked_for_are_decoded(shards):
    whole = records.open_split(shards, "pheno", "train")[3]
    part = records.open_split(shards, "pheno", "train", only=("stay_id", "ehr", "image"))[3]
    assert part.keys() == {"stay_id", "ehr", "image"} and part["stay_id"] == whole["stay_id"]
    np.testing.assert_array_equal(part["ehr"], whole["ehr"])


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 20])
def test_a_damaged_record_is_refused_by_its_number(shards, spoil):
    split = records.open_split(shards, "pheno", "train")
    source = [split._source[i] for i in range(3)]
    source[1] = spoil(source[1])
    damaged = records.Split(source, split._fields, "pheno train")
    assert damaged[0]["stay_id"] == split[0]["stay_id"]
    with refused(value=1):
        damaged[1]


def test_threads_read_at_once_in_a_process_that_has_read_nothing(shards):
    """Importing TFDS in two threads at once used to stop both for ever."""
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from medfuse_jax import records; "
        "split = records.open_split(sys.argv[1], 'pheno', 'train'); "
        "assert 'tensorflow_datasets.proto.tf_example_generated_pb2' in sys.modules; "
        "print(len(list(ThreadPoolExecutor(8).map(split.__getitem__, range(40)))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(shards)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "40\n", done.stderr


def test_statistics_are_over_all_time_steps():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(1e4, 3, (n, 76)).astype(np.float32) for n in (5, 0, 1, 200)]
    constant = schema.CHANNELS.index("Height")
    for array in arrays:
        array[:, constant] = 170
    mean, std = map(np.array, records.train_statistics(iter(arrays)))
    steps = np.concatenate(arrays).astype(np.float64)
    moving = [c for c in schema.CONTINUOUS_CHANNELS if c != constant]
    np.testing.assert_allclose(mean[moving], steps.mean(0)[moving], rtol=1e-12)
    np.testing.assert_allclose(std[moving], steps.std(0)[moving], rtol=1e-9)
    # A likely mistake, the mean of the arrays' deviations, is outside the tolerance.
    assert abs(np.mean([a.std(0)[moving] for a in arrays if len(a)]) / steps.std(0)[moving].mean() - 1) > 1e-2
    assert (mean[constant], std[constant]) == (170, 1)
    other = [c for c in range(76) if c not in schema.CONTINUOUS_CHANNELS]
    assert not mean[other].any() and (std[other] == 1).all()
    assert records.train_statistics(iter(())) == ([0.0] * 76, [1.0] * 76)


def test_race_is_in_the_index_and_in_no_record(shards):
    """So no model can read it."""
    groups = set()
    for task in ("pheno", "radiology"):
        for split in schema.SPLITS:
            race = records.index(shards, task, split)["race"]
            groups |= set(race.tolist())
            assert len(race) == len(records.open_split(shards, task, split))
        assert schema.RACE not in records.open_split(shards, task, "train")[0]
    assert {"White", "Black", ""} <= groups <= {*schema.RACES, ""}  # '': X-rays without a stay
    assert schema.RACE not in (*schema.STATIC_TEXTS, *records.layout(1))


@pytest.mark.parametrize(("folder", "task"), [("shards", "pheno"), ("shards", "radiology"), ("hourly_shards", "pheno")])
def test_the_names_of_all_x_rays_are_in_the_index(request, folder, task):
    data_dir = request.getfixturevalue(folder)
    for split in schema.SPLITS:
        listed = records.dicom_ids(data_dir, task, split)
        names = [record["dicom_id"].split() for record in records.open_split(data_dir, task, split, ("dicom_id",))]
        assert listed["num_images"].tolist() == [len(of_record) for of_record in names]
        assert listed["dicom_id"].tolist() == [name for of_record in names for name in of_record]


def test_shards_without_race_are_read(shards, tmp_path):
    """They were built before."""
    folder = tmp_path / "pheno"
    shutil.copytree(shards / "pheno", folder)
    path = folder / "index_val.npz"
    with np.load(path) as stored:
        old = {name: stored[name] for name in records.INDEX_FIELDS}
    np.savez(path, **old)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["index_val.npz"] = files.sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": records.seal(manifest)}))
    assert set(records.index(tmp_path, "pheno", "val")["race"].tolist()) == {""}
    with refused(path=path):  # nor names of X-rays
        records.dicom_ids(tmp_path, "pheno", "val")
