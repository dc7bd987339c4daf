"""Dropped modalities: index and records agree, and scoring does without them."""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from medfuse_jax import evaluate
from medfuse_jax import run as run_lib
from medfuse_jax.data import batches, missing
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.runs import checkpoints, workdir
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def whole(shards):
    return open_dataset(shards, "pheno")


def _both(dataset, split="train"):
    return dataset.index[split]["has_cxr"] & (dataset.index[split]["length"] > 0)


def test_nothing_is_dropped_by_default(whole):
    assert missing.drop_modalities(whole, 0.0, 0.0) is whole


def test_a_stay_loses_one_modality_in_index_and_record(whole):
    less = missing.drop_modalities(whole, drop_ehr=0.4, drop_cxr=0.6)
    part, before, both_N = less.index["train"], whole.index["train"], _both(whole)
    assert not _both(less).any()
    lost_ehr_N, lost_cxr_N = both_N & (part["length"] == 0), both_N & ~part["has_cxr"]
    assert lost_ehr_N.any() and lost_cxr_N.any() and (lost_ehr_N ^ lost_cxr_N == both_N).all()
    np.testing.assert_array_equal(part["length"][~both_N], before["length"][~both_N])
    for i in (int(np.flatnonzero(lost_ehr_N)[0]), int(np.flatnonzero(lost_cxr_N)[0]), int(np.flatnonzero(~both_N)[0])):
        record = less.splits["train"][i]
        batches.check(record, part, i, "train")
        assert (record["image"] is not None) == part["has_cxr"][i]
        if not lost_ehr_N[i]:
            np.testing.assert_array_equal(record["ehr"], whole.splits["train"][i]["ehr"])


def test_a_larger_fraction_includes_the_stays_of_a_smaller_one(whole):
    few, many = (missing.drop_modalities(whole, 0.0, share).index["train"]["has_cxr"] for share in (0.3, 0.7))
    assert (few | ~many).all() and few.sum() > many.sum() > 0
    assert few.sum() == pytest.approx(0.7 * _both(whole).sum(), abs=4 * _both(whole).sum() ** 0.5)


def test_the_index_keeps_what_a_stay_had_originally(whole):
    twice = missing.drop_modalities(missing.drop_modalities(whole, 0.0, 0.5), 0.5, 0.0)
    for split, before in whole.index.items():
        np.testing.assert_array_equal(twice.index[split]["had_cxr"], before["has_cxr"])
        np.testing.assert_array_equal(twice.index[split]["had_ehr"], before["length"] > 0)
        assert (twice.index[split]["has_cxr"] != before["has_cxr"]).any()


@pytest.mark.parametrize("shares", [(-0.1, 0.0), (0.6, 0.6), (0.0, float("nan"))])
def test_impossible_fractions_are_refused(whole, shares):
    with pytest.raises(UserError, match="give fractions from 0 to 1"):
        missing.drop_modalities(whole, *shares)


def test_a_config_without_ehr_trains_on_images_alone(tiny_config):
    tiny_config.data.drop_ehr = 1.0
    run = run_lib.open_run(tiny_config)
    batch = next(batches.batches(run.dataset, "train", run.train_plan(1)))
    image_rows = batch["image_row"][batch["image_mask"]]
    assert len(image_rows) and (batch["length"][0][image_rows] == 0).all()


def test_scoring_does_without_dropped_modalities(tiny_config, tmp_path):
    """The run is on paired stays, of which none is left to count the steps of an epoch."""
    tiny_config.data.train_stays = tiny_config.data.val_stays = "paired"
    run = run_lib.open_run(tiny_config)
    workdir.claim(tmp_path, run)
    state = run.fresh_state().replace(step=jnp.int32(3 * len(run.train_plan(1))))
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:  # untrained: what is scored is the same
        checkpoints.save(manager, state, Progress(epoch=3, best_epoch=3), is_best=True)
    whole = evaluate.evaluate(tmp_path)
    less = evaluate.evaluate(tmp_path, evaluate.Scored(drop_cxr=1.0))
    assert whole["best_epoch"] == less["best_epoch"] == 3
    assert less["selected_by"] == "AUROC on the paired validation stays"
    counts, counts_less = ({name: part["num_samples"] for name, part in r["subsets"].items()} for r in (whole, less))
    assert set(counts) == {"all", "paired", "unpaired"}
    assert counts_less == {"all": counts["all"], "unpaired": counts["all"], "had_both": counts["paired"]}
    stored = json.loads((tmp_path / "result_test_drop_cxr_1.json").read_text())
    assert stored["dropped"] == {"cxr": 1.0} and "dropped" not in json.loads((tmp_path / "result.json").read_text())
    with (
        np.load(tmp_path / "predictions_test_drop_cxr_1.npz") as scored,
        np.load(tmp_path / "predictions_test.npz") as w,
    ):
        has_cxr_N = w["has_cxr"]
        assert not scored["has_cxr"].any() and has_cxr_N.any()
        np.testing.assert_array_equal(scored["had_cxr"], has_cxr_N)
        assert scored["had_ehr"].all() and "had_cxr" not in w
        np.testing.assert_allclose(scored["scores"][~has_cxr_N], w["scores"][~has_cxr_N], atol=1e-6)
        assert np.abs(scored["scores"][has_cxr_N] - w["scores"][has_cxr_N]).max() > 1e-4
