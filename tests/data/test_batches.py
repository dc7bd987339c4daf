"""Batches hold the planned records unchanged, from any step and for any number of devices."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import damage
import numpy as np
import pytest
from refusals import refused

from medfuse_jax import records
from medfuse_jax.data import batches, plan
from medfuse_jax.data.dataset import open_dataset, with_cxr_dataset
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def dataset(shards):
    return open_dataset(shards, "pheno")


def _plan(dataset, **changes):
    arguments = {"batch_size": 16, "seed": 0, "epoch": 1, "buckets": dataset.buckets} | changes
    return plan.train_plan(dataset.lengths("train"), dataset.paired("train"), dataset.usable("train"), **arguments)


def test_a_batch_holds_the_records_of_its_plan(dataset, shards):
    the_plan, stored = _plan(dataset), records.open_split(shards, "pheno", "train")
    for step, batch in zip(range(3), batches.batches(dataset, "train", the_plan)):
        assert batch["ehr"].shape == (1, 16, the_plan.padded_length_S[step], 76)
        filled_P = batch["image_mask"][0]
        images = dict(zip(batch["image_row"][0][filled_P], batch["image"][0][filled_P]))
        for row in range(16):
            number = batch["record"][0, row]
            if number == plan.PADDING:
                assert not batch["valid"][0, row] and batch["length"][0, row] == 0
                continue
            record, length = stored[int(number)], batch["length"][0, row]
            np.testing.assert_array_equal(batch["ehr"][0, row, :length], record["ehr"])
            assert not batch["ehr"][0, row, length:].any()
            np.testing.assert_array_equal(batch["label"][0, row], record["label"])
            assert (row in images) == record["has_cxr"]
            if record["has_cxr"]:
                np.testing.assert_array_equal(images[row], record["image"])


def test_batches_resume_from_any_step(dataset):
    the_plan = _plan(dataset)
    all_records = [b["record"] for b in batches.batches(dataset, "train", the_plan)]
    from_third = [b["record"] for b in batches.batches(dataset, "train", the_plan, start=3)]
    assert len(all_records) == len(the_plan) > 3
    np.testing.assert_array_equal(all_records[3:], from_third)
    assert list(batches.batches(dataset, "train", the_plan, start=len(the_plan))) == []


def test_two_devices_get_the_same_stays_and_images_as_one(dataset):
    the_plan = _plan(dataset)
    one, two = (next(batches.batches(dataset, "train", the_plan, num_devices=d)) for d in (1, 2))
    assert sorted(one["record"].reshape(-1)) == sorted(two["record"].reshape(-1))

    def images(batch):
        return {
            int(batch["record"][d, batch["image_row"][d, slot]]): batch["image"][d, slot].sum()
            for d, slot in np.argwhere(batch["image_mask"])
        }

    assert images(one) == images(two) and images(one)


def test_batches_omit_what_the_method_does_not_read(shards):
    ehr_only = open_dataset(shards, "pheno", use_cxr=False)
    assert not {"image", "image_row"} & next(batches.batches(ehr_only, "train", _plan(ehr_only))).keys()
    images = open_dataset(shards, "radiology")
    batch = next(batches.batches(images, "train", _plan(images)))
    assert not {"ehr", "length"} & batch.keys() and batch["image"].shape == (1, 16, 256, 256)


def test_x_ray_batches_alternate_with_stay_batches(dataset, shards):
    both_datasets = with_cxr_dataset(dataset, shards, "radiology")
    images = both_datasets.cxr_dataset
    of_images = (images.lengths("train"), images.paired("train"), images.usable("train"))
    image_plan = plan.train_plan(*of_images, batch_size=16, seed=0, epoch=1, buckets=images.buckets)
    alternating = plan.alternate(_plan(dataset), image_plan)
    both = list(batches.batches(both_datasets, "train", alternating))
    assert len(both) == len(alternating)
    assert [("label" in b, "cxr_label" in b) for b in both[:2]] in (
        [(True, False), (False, True)],
        [(True, False), (True, False)],
    )
    of_images = next(b for b in both if "cxr_label" in b)
    assert not {"ehr", "length"} & of_images.keys() and of_images["cxr_label"].shape == (1, 16, 14)
    label_K = images.index["train"]["label"][of_images["record"][0, 0]]
    np.testing.assert_array_equal(of_images["cxr_label"][0, 0], label_K)
    again = list(batches.batches(both_datasets, "train", alternating, start=3))
    for a, b in zip(both[3:], again, strict=True):
        np.testing.assert_array_equal(a["record"], b["record"])


def test_the_index_matches_the_records(shards):
    for task in ("pheno", "mortality", "radiology"):
        for split in ("train", "val", "test"):
            index, stored = records.index(shards, task, split), records.open_split(shards, task, split)
            assert len(stored) == len(index["stay_id"])
            for i, record in enumerate(stored):
                assert record["stay_id"] == index["stay_id"][i] and len(record["ehr"]) == index["length"][i]
                assert (
                    record["has_cxr"]
                    == index["has_cxr"][i]
                    == (record["image"] is not None)
                    == bool(record["dicom_id"])
                )
                np.testing.assert_array_equal(record["label"], index["label"][i])


def test_train_statistics_are_over_the_train_steps(shards):
    manifest, stays = records.manifest(shards, "pheno"), records.open_split(shards, "pheno", "train")
    steps = np.concatenate([record["ehr"] for record in stays]).astype(np.float64)
    continuous = [i for i, name in enumerate(manifest["channels"]) if "->" not in name]
    assert len(continuous) == 12
    np.testing.assert_allclose(np.array(manifest["train_mean"])[continuous], steps[:, continuous].mean(0), rtol=1e-4)
    np.testing.assert_allclose(np.array(manifest["train_std"])[continuous], steps[:, continuous].std(0), rtol=1e-3)


def _copy(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "pheno" / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda d: (d / "pheno" / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (
            lambda d: _edit_manifest(d, format_version="0.1.0"),
            "has format 0.1.0",
        ),
        (lambda d: _edit_manifest(d, task="mortality"), "describes the task 'mortality', not 'pheno'"),
        (lambda d: (d / "pheno" / "manifest.json").write_text("[]"), "manifest.json holds no JSON object"),
        (lambda d: _edit_manifest(d, train_mean=None), "manifest.json lacks train_mean"),
        (
            lambda d: damage.cut(d / "pheno" / "index_val.npz"),
            "bytes, not ",
        ),
        (
            lambda d: damage.flip(d / "pheno" / "index_val.npz"),
            "index_val.npz does not match its manifest",
        ),
        (lambda d: (d / "pheno" / "index_val.npz").unlink(), "index_val.npz is missing: run data_prep.build again"),
        (lambda d: damage.flip(d / "pheno" / "dataset_info.json"), "dataset_info.json does not match its manifest"),
        (lambda d: damage.cut(d / "pheno" / "features.json"), "features.json has "),
        (lambda d: damage.cut(next((d / "pheno").glob("*test.array_record*"))), "bytes, not "),
        (lambda d: next((d / "pheno").glob("*val.array_record*")).unlink(), "-00001 is missing: run"),
        (lambda d: _add_to_mean(d), "manifest.json was changed after the build"),
        (lambda d: _rewrite_index(d, "train", lambda f: {k: v[:-5] for k, v in f.items()}), "mixes two builds"),
        (
            lambda d: shutil.rmtree(d / "pheno"),
            "holds no dataset for the task 'pheno' (it holds: mortality, radiology)",
        ),
        (lambda d: (d / "pheno" / "dataset_info.json").unlink(), "dataset_info.json is missing"),
        (lambda d: shutil.rmtree(d), "no data folder"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(shards, tmp_path, spoil, said):
    folder = _copy(shards, tmp_path)
    spoil(folder)
    with pytest.raises(UserError) as caught:
        open_dataset(folder, "pheno")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def _edit_manifest(folder, **changes):
    """Change a manifest as if the build had written it so."""
    path = folder / "pheno" / "manifest.json"
    content = json.loads(path.read_text()) | changes
    content = {field: value for field, value in content.items() if value is not None}
    path.write_text(json.dumps(content | {"sha256": records.seal(content)}))


def _add_to_mean(folder):
    path = folder / "pheno" / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"train_mean": [mean + 5 for mean in content["train_mean"]]}))


def _rewrite_index(folder, split, change):
    """Change an index and its hash in the manifest."""
    path = folder / "pheno" / f"index_{split}.npz"
    with np.load(path) as stored:
        fields = dict(stored)
    np.savez(path, **change(fields))
    manifest = json.loads((folder / "pheno" / "manifest.json").read_text())
    hashes, sizes = manifest["files"], manifest["file_bytes"]
    _edit_manifest(
        folder,
        files=hashes | {path.name: files.sha256(path)},
        file_bytes=sizes | {path.name: path.stat().st_size},
    )


def test_a_truncated_shard_is_named(shards, tmp_path):
    folder = _copy(shards, tmp_path)
    shard = next((folder / "pheno").glob("*train*array_record*"))
    damage.cut(shard)
    with pytest.raises(UserError, match=r"pheno"):
        opened = open_dataset(folder, "pheno")
        for record in opened.splits["train"]:
            assert record["ehr"].shape[1] == 76


def test_a_value_that_is_not_finite_is_named_by_record_and_channel(shards):
    dataset = open_dataset(shards, "pheno")
    record, part = dataset.splits["val"][3], dataset.index["val"]
    batches.check(record, part, 3, "val")
    ehr_TF = record["ehr"].copy()
    ehr_TF[2, 5] = np.nan
    with refused(field=dataset.manifest["channels"][5], row=4):
        batches.check(record | {"ehr": ehr_TF}, part, 3, "val")


def test_a_changed_shard_of_any_split_is_noticed_when_the_dataset_is_opened(shards, tmp_path):
    folder = _copy(shards, tmp_path)
    for split in ("train", "val", "test"):
        path = next((folder / "pheno").glob(f"*-{split}.array_record*"))
        whole = path.read_bytes()
        damage.flip(path)
        with refused(path=path):
            open_dataset(folder, "pheno")
        path.write_bytes(whole)
    open_dataset(folder, "pheno")


def test_a_manifest_cannot_lose_its_seal(shards, tmp_path):
    folder = _copy(shards, tmp_path)
    path = folder / "pheno" / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    with refused(path=path):
        open_dataset(folder, "pheno")


def test_mixed_shards_of_two_builds_are_detected(shards, tmp_path):
    folder = _copy(shards, tmp_path)
    _rewrite_index(folder, "train", lambda fields: fields | {"stay_id": np.roll(fields["stay_id"], 1)})
    mixed = open_dataset(folder, "pheno")
    with pytest.raises(UserError, match="mixes two builds"):
        next(batches.batches(mixed, "train", _plan(mixed)))


def test_statistics_can_come_from_a_file(shards, tmp_path):
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"mean": [1.0] * 76, "std": [2.0] * 76}))
    assert open_dataset(shards, "pheno", statistics=str(path)).mean_F.tolist() == [1.0] * 76
    nan, inf = float("nan"), float("inf")
    for mean, std in ((1.0, 0.0), (nan, 1.0), (0.0, inf), ("a", 1.0), ([1.0], 1.0), (None, {})):
        path.write_text(json.dumps({"mean": [mean] * 76, "std": [std] * 76}))
        with refused(field="config.data.statistics"):
            open_dataset(shards, "pheno", statistics=str(path))
    with refused(path=Path("trian")):
        open_dataset(shards, "pheno", statistics="trian")


def test_other_statistics_change_the_digest(shards, tmp_path):
    train = open_dataset(shards, "pheno")
    path, digests = tmp_path / "statistics.json", []
    for mean_F in (train.mean_F, train.mean_F + 1, train.mean_F + 2):
        path.write_text(json.dumps({"mean": mean_F.tolist(), "std": train.std_F.tolist()}))
        digests.append(open_dataset(shards, "pheno", statistics=str(path)).digest)
    assert digests[0] == train.digest == records.digest(shards, "pheno") and len(set(digests)) == 3


def test_an_image_only_method_needs_a_dataset_with_images(shards, tmp_path):
    folder = _copy(shards, tmp_path)
    for split in ("train", "val", "test"):
        _rewrite_index(folder, split, lambda fields: fields | {"has_cxr": np.zeros_like(fields["has_cxr"])})
    with refused(path=folder / "pheno"):
        open_dataset(folder, "pheno", use_ehr=False)


_STALLING = """
import sys, time
from medfuse_jax.data import batches, device_store, plan
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.runtime import command_line

batches.READ_LIMIT_S = 2.0

class Stalls:
    def __getitem__(self, i):
        time.sleep(600)

def main(argv):
    dataset = open_dataset(sys.argv[1], "pheno")
    dataset.splits["train"] = Stalls()
    included_N = dataset.usable("train")
    if sys.argv[2] == "device":
        device_store.load(dataset, "train", included_N)
    else:
        drawn, *_ = plan.eval_plans(
            dataset.lengths("train"), dataset.paired("train"), included_N, batch_size=16, buckets=dataset.buckets
        )
        next(batches.batches(dataset, "train", drawn))

command_line.run(main, pass_on_unknown=True)
"""


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_a_reader_that_stalls_ends_the_command_and_is_named(shards, placement):
    command = [sys.executable, "-c", _STALLING, str(shards), placement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "the train split of pheno" in done.stderr and "2 s" in done.stderr
