"""Folds: every patient is tested once, is in one split of every task, and no statistic sees a tested one."""

import numpy as np
import pytest
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax import predict, records, schema
from medfuse_jax import run as run_lib
from medfuse_jax.data import batches, folds
from medfuse_jax.data.dataset import open_dataset, with_cxr_dataset
from medfuse_jax.data.folds import Fold
from medfuse_jax.data.shards import Shards
from medfuse_jax.runs import sources, workdir
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

_COUNT = 4


def _subjects(index: dict, split: str) -> set[int]:
    return set(index[split]["subject_id"].tolist())


@pytest.fixture(scope="module")
def divided(shards):
    return [Shards(shards, "pheno", Fold(number, _COUNT)).index for number in range(_COUNT)]


def test_every_patient_is_tested_in_one_fold_and_no_stay_is_lost(divided, shards):
    whole = Shards(shards, "pheno", None).index
    patients = set().union(*(_subjects(whole, split) for split in schema.SPLITS))
    tested = [_subjects(index, "test") for index in divided]
    assert set().union(*tested) == patients and sum(map(len, tested)) == len(patients)
    for index in divided:
        parts = [_subjects(index, split) for split in schema.SPLITS]
        assert sum(map(len, parts)) == len(patients) and all(parts)
        stays = np.concatenate([index[split]["stay_id"] for split in schema.SPLITS])
        before = np.concatenate([whole[split]["stay_id"] for split in schema.SPLITS])
        assert sorted(stays) == sorted(before)


def test_five_folds_divide_patients_as_the_paper_does():
    ids = np.arange(20_000)
    split = Fold(2, 5).split_of(ids)
    shares = [(split == name).mean() for name in schema.SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    np.testing.assert_array_equal(Fold(2, 5).split_of(ids[::-1]), split[::-1])  # each patient by himself


@pytest.mark.parametrize("task", ["mortality", "radiology"])
def test_all_tasks_divide_a_patient_alike(divided, shards, task):
    """So the X-rays that pre-train a fold's encoder are none of its validation or test patients'."""
    for number, index in enumerate(divided):
        other = Shards(shards, task, Fold(number, _COUNT)).index
        held_out = _subjects(index, "val") | _subjects(index, "test")
        assert not held_out & _subjects(other, "train")
    whole = Shards(shards, task, None).index
    assert held_out & _subjects(whole, "train")  # as built, they would be: this test can fail


def test_records_follow_their_index(shards):
    dataset = open_dataset(shards, "pheno", fold=Fold(1, _COUNT))
    for split in schema.SPLITS:
        for i in range(len(dataset.splits[split])):
            batches.check(dataset.splits[split][i], dataset.index[split], i, split)
    assert dataset.digest != open_dataset(shards, "pheno", fold=Fold(2, _COUNT)).digest


def test_the_statistics_are_those_of_the_folds_training_stays(shards):
    dataset = open_dataset(shards, "pheno", fold=Fold(1, _COUNT))
    channel = schema.CONTINUOUS_CHANNELS[3]

    def over(*splits):
        return np.concatenate([r["ehr"][:, channel] for split in splits for r in dataset.splits[split]])

    assert dataset.mean_F[channel] == pytest.approx(over("train").mean(), rel=1e-5)
    assert dataset.std_F[channel] == pytest.approx(over("train").std(), rel=1e-5)
    assert dataset.mean_F[channel] != pytest.approx(over("train", "test").mean(), rel=1e-5)  # a leak is noticed
    assert dataset.mean_F[channel] != pytest.approx(open_dataset(shards, "pheno").mean_F[channel], rel=1e-5)


def test_the_hours_of_a_fold_are_those_of_its_stays(hourly_shards):
    fold, task = Fold(0, _COUNT), "decompensation"
    whole = {split: records.index(hourly_shards, task, split) for split in schema.SPLITS}
    place = folds.places(whole, fold, hourly_shards)
    index = folds.take(whole, place)
    hours = folds.take_parts({split: records.hours(hourly_shards, task, split) for split in schema.SPLITS}, place)
    stored = {split: records.open_split(hourly_shards, "decompensation", split) for split in schema.SPLITS}
    by_stay = {r["stay_id"]: r for split in schema.SPLITS for r in stored[split]}
    for split in schema.SPLITS:
        rows = [by_stay[stay_id] for stay_id in index[split]["stay_id"]]
        for name, expected in records.join_hours(rows, 1).items():
            np.testing.assert_array_equal(hours[split][name], expected)


def test_the_x_rays_of_a_fold_are_those_of_its_stays(images_config):
    data_dir = images_config.data.dir
    dataset = open_dataset(data_dir, "pheno", images="all", fold=Fold(0, _COUNT))
    for split in schema.SPLITS:
        stored, counted = dataset.splits[split], dataset.stay_images[split].image_count_N
        assert [len(stored[i]["images"]) for i in range(len(stored))] == counted.tolist()


def test_alternating_x_rays_are_divided_too(shards):
    dataset = with_cxr_dataset(open_dataset(shards, "pheno"), shards, "radiology", Fold(1, _COUNT))
    expected = Shards(shards, "radiology", Fold(1, _COUNT)).index["train"]["subject_id"]
    np.testing.assert_array_equal(dataset.cxr_dataset.index["train"]["subject_id"], expected)


@pytest.mark.parametrize(
    ("fields", "field"), [((1, 0), "fold"), ((3, 3), "fold"), ((0, 1), "fold"), ((1001, 0), "folds")]
)
def test_invalid_folds_are_refused(ehr_config, fields, field):
    ehr_config.data.folds, ehr_config.data.fold = fields
    with pytest.raises(UserError) as error:
        config_lib.validate(ehr_config)
    assert error.value.field == f"config.data.{field}"


def test_more_folds_than_patients_or_an_empty_split_are_refused_in_one_line(shards):
    with refused(field="config.data.folds", value=1000):
        Shards(shards, "pheno", Fold(0, 1000)).check_fold()
    index = {split: {"subject_id": np.arange(30) + 30 * i} for i, split in enumerate(schema.SPLITS)}
    with pytest.raises(UserError, match=r"has no \w+ patients") as error:
        for number in range(90):
            folds.places(index, Fold(number, 90), shards)
    assert "\n" not in str(error.value)


def test_an_encoder_trained_on_another_fold_is_refused(fusion_config, tmp_path):
    """Only the stages of its own fold, which the run trains itself, fit."""
    fusion_config.data.folds, fusion_config.data.fold = _COUNT, 1
    run = run_lib.open_run(fusion_config)
    given, stages = sources.find(run, tmp_path)
    assert {stage.config.data.fold for _, stage in stages.values()} == {1} and not given
    for changed in ({"data.fold": 2}, {"data.folds": 0, "data.fold": 0}):
        other = config_lib.stage(fusion_config, "cxr")
        other.update_from_flattened_dict(changed)
        with pytest.raises(UserError, match="was trained on"):
            sources.check(run, "cxr", tmp_path, run_lib.open_run(other))


def test_predicting_the_runs_own_shards_keeps_to_its_fold(ehr_config, shards, tmp_path):
    """Their own test split holds patients that the run was trained on."""
    ehr_config.data.folds, ehr_config.data.fold = _COUNT, 1
    run = run_lib.open_run(ehr_config)
    workdir.claim(tmp_path, run)

    def tested() -> list[int]:
        opened = predict._open_run(tmp_path, shards, run.devices, ("test",))
        return opened.dataset.index["test"]["stay_id"].tolist()

    assert tested() == run.dataset.index["test"]["stay_id"].tolist()
    known = files.read_json(tmp_path / "data.json", "")
    files.write_json(tmp_path / "data.json", files.sealed(known | {"shards": "of other patients"}))
    assert tested() == records.index(shards, "pheno", "test")["stay_id"].tolist()
