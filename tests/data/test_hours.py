"""Hourly tasks: each hour's label, time steps and X-ray are those of the record, wherever its batch comes from."""

import dataclasses

import jax
import numpy as np
import pytest
from refusals import refused

from medfuse_jax import augment, parallel, records
from medfuse_jax import run as run_lib
from medfuse_jax.data import batches, hours, missing, plan
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.runs import predictions


@pytest.fixture(scope="module")
def dataset(hourly_shards):
    return open_dataset(hourly_shards, "decompensation")


def test_all_images_are_seen_from_the_hour_after_each(dataset, hourly_shards):
    of_all = open_dataset(hourly_shards, "decompensation", images="all")
    of, stored = of_all.hours["train"], records.open_split(hourly_shards, "decompensation", "train")
    for i, record in enumerate(stored):
        first, count = of.image_first_N[i], of.image_count_N[i]
        time_h_P = record["cxr_time_h"][record["cxr_time_h"] <= record["label_time_h"][-1]]
        assert of.image_of_J[first : first + count].tolist() == list(range(len(time_h_P)))
        hour_P = np.searchsorted(record["label_time_h"], time_h_P)
        assert of.image_hour_J[first : first + count].tolist() == hour_P.tolist()
        np.testing.assert_array_equal(of.image_time_h_J[first : first + count], time_h_P)
    latest = dataset.hours["train"]
    np.testing.assert_array_equal(of.has_cxr_S, latest.has_cxr_S)
    assert (of.image_count_N >= latest.image_count_N).all()
    assert of_all.packing("train").padded_images and not dataset.packing("train").padded_images


def _latest(record: dict) -> list[int]:
    """Return the number of the latest image at each hour of a record, -1 without one."""
    return [int(np.flatnonzero(record["cxr_time_h"] <= h).max(initial=-1)) for h in record["label_time_h"]]


def test_images_are_those_that_an_hour_sees():
    """Hours 5 to 8. The image at 3 h is superseded before 5, that at 6.2 before 7, and that at 8.1 comes too late."""
    fields = {
        "num_hours": np.array([0, 4, 2]),
        "label_time_h": np.array([5, 6, 7, 8, 5, 6], np.float32),
        "label": np.zeros((6, 1), np.int8),
        "num_images": np.array([1, 6, 0]),
        "cxr_time_h": np.array([1, 3, 5, 6.2, 6.5, 8, 8.1], np.float32),
        "los_h": np.array([4, 8.5, 7], np.float32),
    }
    of = hours.of(fields, timestep_h=2)
    assert of.image_count_N.tolist() == [0, 3, 0] and of.image_first_N.tolist() == [0, 0, 3]
    assert of.image_of_J.tolist() == [1, 3, 4] and of.image_hour_J.tolist() == [0, 2, 3]
    assert of.has_cxr_S.tolist() == [True] * 4 + [False] * 2
    assert of.steps_S.tolist() == [2, 3, 3, 4, 2, 3]
    assert of.remaining_h_S.tolist() == [3.5, 2.5, 1.5, 0.5, 2, 1]
    assert of.rows(np.array([True, False, True])).tolist() == [4, 5]
    of_all = hours.of(fields, timestep_h=2, all_images=True)
    assert of_all.image_count_N.tolist() == [0, 5, 0] and of_all.image_hour_J.tolist() == [0, 0, 2, 2, 3]
    assert of_all.image_of_J.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(of_all.has_cxr_S, of.has_cxr_S)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_batch_holds_the_hours_and_images_of_its_records(dataset, hourly_shards, num_devices):
    stored = records.open_split(hourly_shards, "decompensation", "train")
    the_plan = plan.train_plan(
        dataset.lengths("train"),
        dataset.paired("train"),
        dataset.usable("train"),
        batch_size=32,
        seed=0,
        epoch=1,
        buckets=dataset.buckets,
        packing=dataset.packing("train"),
    )
    seen, most_images = 0, 0
    for batch in batches.batches(dataset, "train", the_plan, num_devices=num_devices):
        for device, row in np.argwhere(batch["valid"]).tolist():
            record = stored[int(batch["record"][device, row])]
            mask_H, num_hours = batch["hour_mask"][device, row], len(record["label"])
            assert mask_H.tolist() == [True] * num_hours + [False] * (len(mask_H) - num_hours)
            np.testing.assert_array_equal(batch["label"][device, row, :num_hours], record["label"])
            steps_H = batch["hour_step"][device, row, :num_hours]
            assert steps_H.tolist() == np.floor(record["label_time_h"] / 2).tolist()
            slots = np.flatnonzero(batch["image_mask"][device] & (batch["image_row"][device] == row))
            shown: list[int] = [-1] * num_hours
            for slot in slots.tolist():  # in order of time
                of = [np.array_equal(batch["image"][device, slot], image) for image in record["images"]].index(True)
                first = batch["image_hour"][device, slot]
                shown[first:] = [of] * (num_hours - first)
            assert shown == _latest(record)
            seen, most_images = seen + 1, max(most_images, len(slots))
        assert (batch["label"][~batch["hour_mask"]] == 0).all()
    assert seen == dataset.usable("train").sum() and most_images > 1


def test_one_pass_scores_as_a_run_on_each_prefix(hourly_config, hourly_shards):
    """From the records alone: each hour's own series, cut off before it, and its latest X-ray."""
    run = run_lib.open_run(hourly_config, parallel.devices(1))
    rng = np.random.default_rng(0)
    state = run.fresh_state()
    state = state.replace(params=jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype("f4"), state.params))
    eval_fn = parallel.compile_eval(run.options, "pmap", run.devices)
    include_N = run.dataset.paired("val")
    predicted = predictions.predict(run, eval_fn, parallel.replicate(state, run.devices), "val", include_N)
    assert len(predicted.score_NK) == run.dataset.hours["val"].count_N[include_N].sum()

    @jax.jit
    def plain(ehr, length, image, has_cxr):
        image = augment.prepare(image, run.options.image)
        ehr = (ehr - run.dataset.mean_F) / run.dataset.std_F
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        scored = run.options.model.apply(variables, ehr=ehr, length=length, image=image, has_cxr=has_cxr, train=False)
        return jax.nn.sigmoid(scored["logits"])

    stored, of = records.open_split(hourly_shards, "decompensation", "val"), run.dataset.hours["val"]
    expected, longest = [], int(run.dataset.lengths("val").max())
    chosen = []
    for i in np.flatnonzero(include_N).tolist():
        record = stored[i]
        latest = _latest(record)
        changes = np.flatnonzero(np.diff(latest, prepend=-2)).tolist()  # the first hours with each X-ray
        for h in {0, len(latest) - 1, *changes}:
            steps, image = int(record["label_time_h"][h] // 2), record["images"][max(latest[h], 0)]
            ehr = np.zeros((1, longest, 76), np.float32)
            ehr[0, :steps] = record["ehr"][:steps]
            expected.append(plain(ehr, np.array([steps]), image[None], np.array([latest[h] >= 0]))[0])
            chosen.append(np.flatnonzero(predicted.place_N == of.first_N[i] + h)[0])
    assert len(chosen) > 8
    np.testing.assert_allclose(predicted.score_NK[chosen], np.stack(expected), atol=1e-5)
    assert np.ptp(predicted.score_NK[chosen]) > 1e-3


def test_ehr_cannot_be_dropped_and_x_rays_can(dataset):
    with refused(field="drop_ehr"):
        missing.drop_modalities(dataset, 0.5, 0.0)
    dropped = missing.drop_modalities(dataset, 0.0, 1.0)
    assert dataset.num_images("train").sum() > dropped.num_images("train").sum() == 0


def test_a_plan_without_hours_is_unchanged(dataset):
    arguments = (dataset.lengths("val"), dataset.paired("val"), dataset.usable("val"))
    (paired, _) = plan.eval_plans(*arguments, batch_size=4, buckets=dataset.buckets)
    assert not {"hour", "image_of"} & plan.deal(paired, 0, 1).keys()
    hourly = dataclasses.replace(paired, packing=dataset.packing("val"))
    assert plan.deal(hourly, 0, 1)["image_mask"].sum() == dataset.num_images("val")[paired.paired_SP[0]].sum()
