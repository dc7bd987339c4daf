"""Stays with an X-ray but no time series, from shards to results; in training, absent modalities change nothing."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_cases import DISTINCT_METHODS

from medfuse_jax import augment, evaluate, records, schema, step
from medfuse_jax import config as config_lib
from medfuse_jax import run as run_lib
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints, workdir
from medfuse_jax.runs.progress import Progress

_ROWS, _STEPS, _LABELS = 5, 4, 3
_BOTH, _EHR, _IMAGE, _ALSO_BOTH, _PADDED = range(_ROWS)


@pytest.fixture(scope="module")
def cxr_only_shards(shards, tmp_path_factory):
    """The small cohort, every second paired stay of each split without its time series."""
    from data_prep.write import shards as shards_lib

    root = tmp_path_factory.mktemp("cxr_only")
    shutil.copytree(shards / "radiology", root / "radiology")
    (root / "pheno").mkdir()
    index, records_of = {}, {}
    for split in schema.SPLITS:
        index[split] = records.index(shards, "pheno", split)
        without = set(np.flatnonzero(index[split]["has_cxr"])[::2].tolist())
        index[split]["length"] = np.where(
            np.isin(np.arange(len(index[split]["length"])), list(without)), 0, index[split]["length"]
        )
        stored = records.open_split(shards, "pheno", split)

        def make(stored=stored, without=without):
            for i, record in enumerate(stored):
                image = np.zeros((0, 256, 256), np.uint8) if record["image"] is None else record["image"][None]
                ehr = record["ehr"][:0] if i in without else record["ehr"]
                yield {**record, "image": image, "ehr": ehr}

        records_of[split] = make
    manifest = json.loads((shards / "pheno" / "manifest.json").read_text())
    shards_lib.write(root / "pheno", schema.TASKS["pheno"], index, records_of, manifest)
    return root


@pytest.fixture
def cxr_only_config(tiny_config, cxr_only_shards):
    tiny_config.data.dir, tiny_config.num_epochs = str(cxr_only_shards), 1
    return tiny_config


def test_a_method_that_reads_both_scores_every_stay_and_reports_cxr_only_stays(cxr_only_config, tmp_path):
    run = run_lib.open_run(cxr_only_config)
    workdir.claim(tmp_path, run)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:  # untrained: what is scored is the same
        checkpoints.save(manager, run.fresh_state(), Progress(), is_best=True)
    result = evaluate.evaluate(tmp_path)
    assert result["best_epoch"] == 0 and result["selected_by"].startswith("not selected")
    with np.load(tmp_path / "predictions_test.npz") as stored:
        scored = dict(stored)
    index = records.index(cxr_only_config.data.dir, "pheno", "test")
    np.testing.assert_array_equal(scored["stay_id"], index["stay_id"])
    assert np.isfinite(scored["scores"]).all()
    alone_N = index["has_cxr"] & (index["length"] == 0)
    counts = {name: part["num_samples"] for name, part in result["subsets"].items()}
    assert counts["cxr_only"] == alone_N.sum() > 0 and counts["all"] == len(alone_N)
    assert counts["paired"] == (index["has_cxr"] & ~alone_N).sum() and counts["unpaired"] == (~index["has_cxr"]).sum()
    np.testing.assert_array_equal(scored["has_ehr"], index["length"] > 0)


@pytest.mark.parametrize("method", ["uni_ehr", "daft3"])
def test_a_method_that_needs_ehr_leaves_out_cxr_only_stays(cxr_only_config, method):
    cxr_only_config.method = method
    run = run_lib.open_run(cxr_only_config)
    index = run.dataset.index["train"]
    np.testing.assert_array_equal(run.selects("train"), index["length"] > 0)
    drawn = np.concatenate([run.train_plan(1).paired_SP.reshape(-1), run.train_plan(1).unpaired_SU.reshape(-1)])
    assert (index["length"][drawn[drawn >= 0]] > 0).all()


def test_paired_stays_have_both_modalities(cxr_only_config):
    cxr_only_config.data.train_stays = "paired"
    run = run_lib.open_run(cxr_only_config)
    index = run.dataset.index["train"]
    np.testing.assert_array_equal(run.selects("train"), index["has_cxr"] & (index["length"] > 0))


def _batch(seed=0):
    """Return rows with both, EHR alone, an X-ray alone, both, and a padded one; the last X-ray slot is empty."""
    rng = np.random.default_rng(seed)
    return {
        "label": (rng.random((_ROWS, _LABELS)) < 0.4).astype(np.float32),
        "valid": np.arange(_ROWS) != _PADDED,
        "row_id": np.arange(_ROWS, dtype=np.int32),
        "length": np.array([4, 2, 0, 3, 0], np.int32),
        "ehr": rng.normal(size=(_ROWS, _STEPS, 76)).astype(np.float32),
        "image": rng.integers(0, 256, (4, 32, 32), np.uint8),
        "image_row": np.array([_IMAGE, _BOTH, _ALSO_BOTH, 0], np.int32),
        "image_mask": np.array([True, True, True, False]),
    }


def _without(batch, part):
    if part == "cxr_encoder":
        return {**batch, "image_mask": np.zeros(4, bool)}
    return {**batch, "length": np.zeros(_ROWS, np.int32)}


_FAST, _SLOW = ("uni_cxr", "medfuse"), ("unified",)


@pytest.mark.parametrize(
    "method",
    [
        *_FAST,
        *(pytest.param(m, marks=pytest.mark.slow) for m in _SLOW),
        *(pytest.param(m, marks=pytest.mark.nightly) for m in DISTINCT_METHODS if m not in _FAST + _SLOW),
    ],
)
def test_absent_modalities_change_no_number_of_a_step_and_get_no_gradient(method):
    """Checked with the whole objective, plain gradients and batch statistics."""
    stage = {"stage": 1} if "stage" in registry.METHODS[method].fields else {}
    sizes = {"ehr_hidden": 8, "fusion_hidden": 8, "resnet_stage_sizes": (1, 1), "resnet_width": 4}
    options = step.StepOptions(
        model=registry.build(method, _LABELS, **sizes, **stage),
        optimizer=optax.identity(),
        image=augment.ImageOptions(**config_lib.section("image", resize_px=32, crop_px=32)),
        mean_F=(0.0,) * 76,
        std_F=(1.0,) * 76,
        weights=step.losses.Weights(**config_lib.section("loss", align=0.1)),
    )
    state = step.state_maker(options)(jax.random.key(0, impl="rbg"), 1.0)
    compiled = jax.jit(lambda s, b: step.train_step(options, s, b, jax.random.key(1)))
    scores_of = jax.jit(lambda b: step.eval_step(options, state, b)[0])
    clean = _batch()

    poisoned = {**clean, "ehr": clean["ehr"].copy(), "image": clean["image"].copy(), "label": clean["label"].copy()}
    poisoned["ehr"][[_IMAGE, _PADDED]] = np.nan
    poisoned["ehr"][_EHR, 2:] = np.nan
    poisoned["image"][3] = 255
    poisoned["label"][_PADDED] = 1
    after, after_poison = compiled(state, clean)[0], compiled(state, poisoned)[0]
    jax.tree.map(np.testing.assert_array_equal, after.params, after_poison.params)
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, after_poison.batch_stats)

    model = registry.METHODS[method].model_class
    for part, reads in (("ehr_encoder", model.uses_ehr), ("cxr_encoder", model.uses_cxr)):
        if reads:
            moved = compiled(state, _without(clean, part))[0]
            assert _largest_change(state.params[part], moved.params[part]) == 0
            assert _largest_change(state.batch_stats.get(part, {}), moved.batch_stats.get(part, {})) == 0
            assert _largest_change(state.params[part], after.params[part]) > 1e-6  # and what is there does

    scores_BK = scores_of(clean)
    if model.uses_cxr:
        changed = {**clean, "image": clean["image"].copy()}
        changed["image"][0] = 255 - changed["image"][0]
        for other in (changed, {**clean, "image_mask": np.array([False, True, True, False])}):
            moved_B = np.abs(scores_of(other) - scores_BK).max(1) > 0
            assert not moved_B[[_BOTH, _EHR, _ALSO_BOTH]].any() and moved_B[_IMAGE] == ("ehr" not in model.needs)


def _largest_change(a, b) -> float:
    return max((float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))), default=0.0)
