"""Labels at every hour: when, which, and that the records say what may be read by then."""

import numpy as np
import pytest
from raw_tables import at, chart, image, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from medfuse_jax import config, records, schema
from medfuse_jax.runtime.errors import UserError

HEART_RATE = 220045


@pytest.fixture(scope="module", params=[1, 2])
def built(tmp_path_factory, request):
    """Stay 0 lasts 40.5 h; 1 dies at 30.25 h of 32; 2 dies in the hospital later; 3 is short; 4 starts late;
    5 dies at an hour that nobody wrote down; 6 stays 20 days; 7 starts at hour 10 sharp."""
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
    found = _records(built, "length_of_stay")
    assert sorted(found) == [0, 1, 2, 4, 5, 6, 7]  # stay 3 has no whole hour after the fourth
    assert found[0]["label_time_h"].tolist() == list(range(5, 41))
    # The first observation at 10.5 h is in the step that ends at 11 h, or at 12 h.
    assert found[4]["label_time_h"].tolist() == list(range(11 if built[1] == 1 else 12, 31))
    assert found[7]["label_time_h"][0] == 10  # the step that ends there holds it
    dying = _records(built, "decompensation")
    assert sorted(dying) == [0, 1, 2, 4, 6, 7]  # of stay 5 no hour of death is known
    assert dying[1]["label_time_h"].tolist() == list(range(5, 31))


def test_decompensation_is_death_within_24_h(built):
    found = _records(built, "decompensation")
    assert {n for n, r in found.items() if r["label"].any()} == {1, 2}
    assert found[1]["label_time_h"][found[1]["label"][:, 0] == 1].tolist() == list(range(7, 31))  # 30.25 - 6 > 24
    # Death at 60 h, after the stay: 60 - 36 is not less than 24.
    assert found[2]["label_time_h"][found[2]["label"][:, 0] == 1].tolist() == list(range(37, 51))


def test_length_of_stay_is_one_of_ten_bins(built):
    found = _records(built, "length_of_stay")
    for record in found.values():
        assert record["label"].shape == (len(record["label_time_h"]), 10) and (record["label"].sum(1) == 1).all()
        left = record["los_h"] - record["label_time_h"]
        place = record["label"].argmax(1)
        days = np.array([*schema.LENGTH_OF_STAY_EDGES_DAYS, np.inf])
        assert ((days[place] * 24 <= left + 1e-3) & (left < days[place + 1] * 24)).all()
    long = dict(zip(found[6]["label_time_h"].tolist(), found[6]["label"].argmax(1).tolist(), strict=True))
    assert (long[144], long[145], long[288], long[289], long[479]) == (9, 8, 8, 7, 0)
    assert len(schema.TASKS["length_of_stay"].labels) == 10


def test_what_may_be_read_is_not_later_than_the_prediction(built):
    for record in _records(built, "length_of_stay").values():
        visible = np.floor(record["label_time_h"] / built[1]).astype(int)
        assert visible.min() >= 1 and visible.max() <= len(record["ehr"])
        seen = record["ehr"][:, schema.CHANNELS.index("mask->Heart Rate")]
        assert all(seen[:steps].any() for steps in visible)


def test_images_are_all_those_of_the_stay_with_their_times(built):
    record = _records(built, "decompensation")[0]
    assert record["cxr_time_h"].tolist() == pytest.approx([3, 12.5], abs=1e-3)
    assert record["dicom_id"].split(" ") == ["image-0000-00", "image-0000-01"]
    assert record["images"].shape == (2, 256, 256) and record["image"] is None and record["has_cxr"]
    assert _records(built, "decompensation")[1]["images"].shape == (0, 256, 256)


def test_the_index_says_what_happened_at_any_time(built):
    for task in ("decompensation", "length_of_stay"):
        for split in schema.SPLITS:
            index = records.index(built[0], task, split)
            rows = list(records.open_split(built[0], task, split))
            assert index["label"].tolist() == [r["label"].max(0).tolist() for r in rows]
            assert index["length"].tolist() == [len(r["ehr"]) for r in rows]
            counts = records.manifest(built[0], task)["counts"]["predictions"][split]
            assert counts["times"] == sum(len(r["label"]) for r in rows)


@pytest.mark.parametrize("task", ["decompensation", "length_of_stay"])
def test_training_refuses_them_by_name(task):
    values = config.default()
    values.task = task
    with pytest.raises(UserError, match=f"config.task is '{task}', whose labels are per step.*choose one of pheno"):
        config.validate(values)
