"""All X-rays of a stay: each once, in order of time, with its time, wherever its batch comes from."""

import numpy as np
import pytest
from refusals import refused

from medfuse_jax import records
from medfuse_jax import run as run_lib
from medfuse_jax.data import batches, images, missing, plan
from medfuse_jax.data.dataset import open_dataset


@pytest.fixture(scope="module", params=["pheno", "mortality"])
def task(request):
    return request.param


@pytest.fixture(scope="module")
def dataset(hourly_shards, task):
    return open_dataset(hourly_shards, task, images="all")


def _plan(dataset):
    arguments = (dataset.lengths("train"), dataset.paired("train"), dataset.usable("train"))
    options = {"batch_size": 32, "seed": 0, "epoch": 1, "buckets": dataset.buckets}
    return plan.train_plan(*arguments, packing=dataset.packing("train"), **options)


def test_images_of_a_split_by_record():
    of = images.of({"num_images": np.array([2, 0, 1]), "cxr_time_h": np.array([1, 5, 2.5], np.float32)})
    assert of.image_first_N.tolist() == [0, 2, 2] and of.image_of_J.tolist() == [0, 1, 0]
    assert of.of_record(0, np.array([7, 8])) == [7, 8] and of.of_record(1, np.array([])) == []


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_batch_holds_all_images_of_its_stays_in_order_of_time(dataset, hourly_shards, task, num_devices):
    stored, seen, most = records.open_split(hourly_shards, task, "train"), 0, 0
    for batch in batches.batches(dataset, "train", _plan(dataset), num_devices=num_devices):
        for device, row in np.argwhere(batch["valid"]).tolist():
            record = stored[int(batch["record"][device, row])]
            slots = batch["image_slot"][device, row] if "image_slot" in batch else np.zeros(0, int)
            slots = slots[slots >= 0]
            assert (np.diff(record["cxr_time_h"]) >= 0).all()
            if len(slots):
                np.testing.assert_array_equal(batch["image"][device, slots], record["images"])
                np.testing.assert_array_equal(batch["image_time_h"][device, slots], record["cxr_time_h"])
                assert batch["image_mask"][device, slots].all()
            assert len(slots) == len(record["images"])
            seen, most = seen + len(slots), max(most, len(slots))
        if "image" in batch:
            empty = ~batch["image_mask"]
            assert not batch["image"][empty].any() and not batch["image_time_h"][empty].any()
    assert seen == dataset.num_images("train").sum() > dataset.paired("train").sum() and most > 1


def test_the_last_x_ray_is_read_from_a_dataset_of_all_as_from_one_of_the_last(shards, hourly_shards, task):
    last, of_all = (open_dataset(folder, task) for folder in (shards, hourly_shards))
    assert of_all.packing("train") is None and not of_all.several
    pairs = zip(*(batches.batches(of, "train", _plan(of)) for of in (last, of_all)), strict=True)
    for expected, found in pairs:
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
    stays = [records.open_split(folder, task, "train") for folder in (shards, hourly_shards)]
    for a, b in zip(*stays, strict=True):
        assert (a["image"] is None) == (b["image"] is None) == (not len(b["images"]))
        np.testing.assert_array_equal(a["image"], b["image"])


def test_a_dataset_of_last_x_rays_is_refused_with_the_command_to_build(images_config, shards):
    images_config.data.dir = str(shards)
    with refused(field="config.data.images", value="all", path=shards / "pheno") as caught:
        run_lib.open_run(images_config)
    assert "data_prep.build --images=all" in str(caught.value)


def test_all_x_rays_of_a_stay_are_dropped_together(dataset):
    dropped = missing.drop_modalities(dataset, 0.0, 1.0)
    assert dropped.num_images("train").sum() == 0 and not dropped.paired("train").any()
    kept = missing.drop_modalities(dataset, 1.0, 0.0)  # of a stay of no length, which has all of its images
    np.testing.assert_array_equal(kept.num_images("train"), dataset.num_images("train"))
    for batch in batches.batches(kept, "train", _plan(kept)):
        assert (batch["image_slot"] >= 0).sum() == batch["image_mask"].sum()
