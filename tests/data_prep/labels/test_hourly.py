"""Hourly labels: their times and values, and what their records contain."""

import datetime

import numpy as np
import polars as pl
import pytest
from build_cases import assert_same_as_tfds
from raw_tables import at, chart, image, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.write import datasets
from medfuse_jax import records, schema

HEART_RATE = 220045


@pytest.fixture(scope="module", params=[1, 2])
def built(tmp_path_factory, request):
    """Build eight stays at 1 h and 2 h steps.

    Stay 0 lasts 40.5 h; 1 dies at 30.25 h of 32; 2 dies in hospital later; 3 is short; 4 has its first event at 10.5 h;
    5 dies at an unknown hour; 6 lasts 20 days; 7 has its first event at exactly 10 h.
    """
    root = tmp_path_factory.mktemp("steps")
    los_h = [40.5, 32, 50, 4.5, 30, 30, 480, 30]
    changes = [{} for _ in los_h]
    changes[1] = {"deathtime": at(30.25)}
    changes[2] = {"deathtime": at(60)}
    changes[5] = {"dod": "2150-01-02"}
    stays, charts = [], []
    for n, hours in enumerate(los_h):
        stays.append(stay(n, outtime=at(hours), dischtime=at(hours + 48), los=str(hours / 24), **changes[n]))
        first = {4: 10.5, 7: 10}.get(n, 0.5)
        charts += [chart(n, h, HEART_RATE, "70") for h in np.arange(first, min(hours, 60), 1)]
    images = [image(0, 3), image(0, 12.5, k=1), image(0, 20, "PA", k=2), image(0, 41, k=3)]
    iv, cxr = write_mimic_iv(root / "iv", stays, charts), write_mimic_cxr(root / "cxr", images, size=(16, 16))
    build.build(iv, cxr, root / "out", timestep_h=request.param, tasks=["decompensation", "length_of_stay"])
    return root / "out", request.param


def _records(built, task):
    return {r["stay_id"] - 30_000_000: r for s in schema.SPLITS for r in records.open_split(built[0], task, s)}


def test_prediction_times_are_the_whole_hours_after_the_fourth(built):
    by_stay = _records(built, "length_of_stay")
    assert sorted(by_stay) == [0, 1, 2, 4, 5, 6, 7]  # stay 3 has no whole hour after the fourth
    assert by_stay[0]["label_time_h"].tolist() == list(range(5, 41))
    # The first observation at 10.5 h is in the step that ends at 11 h, or at 12 h.
    assert by_stay[4]["label_time_h"].tolist() == list(range(11 if built[1] == 1 else 12, 31))
    assert by_stay[7]["label_time_h"][0] == 10  # an event on the edge is in the step that ends there
    by_stay = _records(built, "decompensation")
    assert sorted(by_stay) == [0, 1, 2, 4, 6, 7]  # stay 5 has no known hour of death
    assert by_stay[1]["label_time_h"].tolist() == list(range(5, 31))


def test_decompensation_is_death_within_24_h(built):
    by_stay = _records(built, "decompensation")
    assert {n for n, r in by_stay.items() if r["label"].any()} == {1, 2}
    positive = {n: r["label_time_h"][r["label"][:, 0] == 1].tolist() for n, r in by_stay.items()}
    assert positive[1] == list(range(7, 31))  # 30.25 - 6 > 24
    assert positive[2] == list(range(37, 51))  # death at 60 h, after the stay: 60 - 36 is not less than 24


def test_length_of_stay_is_one_of_ten_bins(built):
    by_stay = _records(built, "length_of_stay")
    for record in by_stay.values():
        assert record["label"].shape == (len(record["label_time_h"]), 10) and (record["label"].sum(1) == 1).all()
        remaining = record["los_h"] - record["label_time_h"]
        bins = record["label"].argmax(1)
        days = np.array([*schema.LENGTH_OF_STAY_EDGES_DAYS, np.inf])
        assert ((days[bins] * 24 <= remaining + 1e-3) & (remaining < days[bins + 1] * 24)).all()
    bin_of = dict(zip(by_stay[6]["label_time_h"].tolist(), by_stay[6]["label"].argmax(1).tolist(), strict=True))
    assert [bin_of[hour] for hour in (144, 145, 288, 289, 479)] == [9, 8, 8, 7, 0]


def test_every_prediction_has_a_completed_step_with_an_observation(built):
    for record in _records(built, "length_of_stay").values():
        completed = np.floor(record["label_time_h"] / built[1]).astype(int)
        assert completed.min() >= 1 and completed.max() <= len(record["ehr"])
        observed = record["ehr"][:, schema.CHANNELS.index("mask->Heart Rate")]
        assert all(observed[:steps].any() for steps in completed)


def test_records_have_all_images_of_the_stay_with_their_times(built):
    record = _records(built, "decompensation")[0]
    assert record["cxr_time_h"].tolist() == pytest.approx([3, 12.5], abs=1e-3)
    assert record["dicom_id"].split(" ") == ["image-0000-00", "image-0000-01"]
    assert record["images"].shape == (2, 256, 256) and record["image"] is None and record["has_cxr"]
    assert _records(built, "decompensation")[1]["images"].shape == (0, 256, 256)


def test_an_x_ray_is_unknown_at_an_hour_just_before_it():
    """Its time is stored in float32, which cannot tell 300 h and 0.05 s from 300 h."""
    intime, hours, after_ms = datetime.datetime(2150, 1, 1), (0, 1, 300, 2047), (-50, 0, 1, 50, 500)
    times = [intime + datetime.timedelta(hours=h, milliseconds=ms) for h in hours for ms in after_ms]
    pairs = pl.DataFrame({"stay_id": 1, "dicom_id": list(map(str, times)), "cxr_time": times})
    images = datasets.images_by_stay(pl.DataFrame({"stay_id": 1, "intime": intime}), pairs)[1]
    known = [time_h <= h for (_, time_h), h in zip(images, np.repeat(np.float32(hours), len(after_ms)), strict=True)]
    assert known == [True, True, False, False, False] * len(hours)


def test_the_index_is_positive_for_a_label_at_any_time(built):
    for task in ("decompensation", "length_of_stay"):
        for split in schema.SPLITS:
            index = records.index(built[0], task, split)
            rows = list(records.open_split(built[0], task, split))
            assert index["label"].tolist() == [r["label"].max(0).tolist() for r in rows]
            assert index["length"].tolist() == [len(r["ehr"]) for r in rows]
            counts = records.manifest(built[0], task)["counts"]["predictions"][split]
            assert counts["times"] == sum(len(r["label"]) for r in rows)


def test_the_hours_of_a_split_are_those_of_its_records(built):
    for task in ("decompensation", "length_of_stay"):
        for split in schema.SPLITS:
            rows, hours = list(records.open_split(built[0], task, split)), records.hours(built[0], task, split)
            assert hours["num_hours"].tolist() == [len(r["label"]) for r in rows]
            assert hours["num_images"].tolist() == [len(r["images"]) for r in rows]
            for name in records.HOURS_FIELDS:
                stored = [np.atleast_1d(r[name]) for r in rows]
                np.testing.assert_array_equal(hours[name], np.concatenate([hours[name][:0], *stored]))


@pytest.mark.parametrize("task", ["decompensation", "length_of_stay"])
def test_records_are_equal_to_those_that_tfds_reads(built, task):
    assert_same_as_tfds(built[0], task)
