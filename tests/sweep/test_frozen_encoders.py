"""Trials on frozen encoders: the whole model's results, from features that are computed once."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from model_cases import equations
from refusals import refused
from sweep_cases import PRETRAIN, RATES, assert_as_alone, assert_resumes, sweep, train_alone

from medfuse_jax import parallel, step
from medfuse_jax import run as run_lib
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints, warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import caching, frozen_encoders, groups, results, trial_store, wave
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.sweep import Sweep
from medfuse_jax.sweep.trial import Trial


@pytest.mark.nightly  # the fast version is test_methods_on_frozen_encoders_share_features_and_score_as_the_whole_model
def test_trials_on_frozen_encoders_have_the_results_of_single_runs(tiny_config, tmp_path, monkeypatch):
    for name, changes in {
        "ehr": {"method": "uni_ehr", "seed": 5},
        "cxr": {"method": "uni_cxr", "task": "radiology", "seed": 6},
    }.items():
        pretrained = tiny_config.copy_and_resolve_references()
        pretrained.update_from_flattened_dict(changes | {"num_epochs": 1})
        train_alone(pretrained, tmp_path / name)
        tiny_config.init[name] = str(tmp_path / name)
    tiny_config.method = "early"
    specs = [*RATES, "dropout:uniform(0.0,0.5)", "seed:int(0,100)"]
    rows = sweep(tiny_config, tmp_path / "sweep", specs, num_trials=5)
    assert [row["status"] for row in rows] == ["finished"] * 5
    chosen = results.trial_dir(tmp_path / "sweep", int(rows[0]["trial"]))
    assert_as_alone(chosen, tmp_path / "alone", monkeypatch, tolerance=2e-5)
    with_checkpoint = [path.parent for path in (tmp_path / "sweep" / "trials").glob("*/checkpoints")]
    assert with_checkpoint == [chosen], "only the chosen trial is exported"


@pytest.mark.parametrize("changes", [{"model.cxr_encoder": "features"}, {"method": "uni_ehr"}])
def test_varying_images_that_are_not_read_is_refused(tiny_config, changes):
    values = {"image.crop_px": 28, "learning_rate": 1e-3}
    caching.check_values(values, tiny_config, {})
    tiny_config.update_from_flattened_dict(changes)
    with refused(field="image.crop_px"):
        caching.check_values(values, tiny_config, {})


def test_varying_the_augmentation_of_frozen_encoders_is_refused(tiny_config, tmp_path):
    tiny_config.method = "early"
    tiny_config.pretrain.update(PRETRAIN)
    with pytest.raises(UserError) as error:
        sweep(tiny_config, tmp_path, ["image.rotation_deg:uniform(0,45)"])
    assert error.value.field == "image.rotation_deg" and str(error.value).startswith("trial 0 (image.rotation_deg")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("task", "shared"), [("pheno", True), ("decompensation", False)])
def test_features_are_shared_where_a_stay_has_one_score(tiny_config, task, shared):
    tiny_config.method, tiny_config.task = "early", task
    assert caching.can_cache(tiny_config, dict.fromkeys(("ehr", "cxr"))) == shared


def test_features_are_not_shared_if_a_stay_may_have_several_x_rays(tiny_config):
    tiny_config.method, tiny_config.model.freeze_encoders = "medfuse", True
    encoders = dict.fromkeys(("ehr", "cxr"))
    assert caching.can_cache(tiny_config, encoders)
    tiny_config.data.images = "all"
    assert not caching.can_cache(tiny_config, encoders)


def _untrained(config, workdir):
    """Return a run with a checkpoint of its initial weights."""
    run = run_lib.open_run(config)
    workdir_lib.claim(workdir, run)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        checkpoints.save(manager, run.fresh_state(), Progress(epoch=1, learning_rate=0.1, best_epoch=1), True)
    return workdir, run


@pytest.fixture(scope="module")
def encoders(shared_tiny_config, tmp_path_factory):
    opened = {}
    for seed, (name, changes) in enumerate(PRETRAIN.items(), start=5):
        config = shared_tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes | {"seed": seed})  # not the seed of a trial
        opened[name] = _untrained(config, tmp_path_factory.mktemp("encoders") / name)
    return opened


@pytest.fixture
def frozen_config(tiny_config, encoders):
    tiny_config.method, tiny_config.model.freeze_encoders = "medfuse", True
    for name, (folder, _) in encoders.items():
        tiny_config.init[name] = str(folder)
    return tiny_config


@pytest.mark.slow
def test_methods_on_frozen_encoders_share_features_and_score_as_the_whole_model(frozen_config, encoders, tmp_path):
    """The config with another modality needs features of its own."""
    trials = [Trial(i, {"method": name}) for i, name in enumerate(registry.with_field("frozen_encoders"))]
    trials.append(Trial(len(trials), {"method": "medfuse", "model.modalities": "static"}))
    together, costs, cached = Sweep(frozen_config, tmp_path, encoders), Costs(), []
    for trial in trials:
        if not caching.can_cache(trial.config(frozen_config), encoders):
            continue
        cached.append(trial.values["method"])
        run = groups.open_program(together, trial, costs, wave.devices_for(together, [trial])).run
        score_BK = _scorer(run)(run.fresh_state())
        assert np.isfinite(score_BK).all()
    assert cached == ["early", "joint", "joint_zeros", "joint_learnable", "medfuse", "drfuse", "shaspec", "medfuse"]
    assert len(together.features) == 2 and costs.encode_s > 0
    whole = run_lib.open_run(together.config_of(trials[-1]), jax.local_devices()[:1])
    state, scorer = whole.fresh_state(), _scorer(whole)
    np.testing.assert_allclose(scorer(warm_start.begin(state, encoders)), score_BK, atol=1e-5)
    assert np.abs(scorer(state) - score_BK).max() > 1e-3, "other encoders differ by more than the tolerance"


def test_the_abstract_state_is_that_of_a_fresh_state_without_encoders(frozen_config):
    """Resuming and exporting a trial read its file by this state."""
    run = frozen_encoders.with_features(run_lib.open_run(frozen_config, jax.local_devices()[:1]), {})
    abstract, fresh = run.abstract_state(), run.fresh_state()
    assert "classifier" in abstract.params and not {"ehr_encoder", "cxr_encoder"} & abstract.params.keys()
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (np.shape(b), b.dtype)), abstract, fresh)


def _scorer(run):
    """Return a function that scores the first validation batch with a state."""
    batch = parallel.one_device(next(run.batches("val", run.eval_plans("val", run.selects("val"))[0])))
    eval_fn = jax.jit(functools.partial(step.eval_step, run.options))
    return lambda state: np.asarray(eval_fn(state, batch)[0])


def _precisions(jaxpr) -> list:
    """Return the precision of each product and convolution, also in inner jaxprs."""
    products = ("dot_general", "conv_general_dilated")
    return [equation.params["precision"] for equation in equations(jaxpr) if equation.primitive.name in products]


def test_features_are_as_precise_as_in_the_whole_model(frozen_config):
    """Accelerators round the inputs of float32 products unless the precision forbids it."""
    frozen_config.precision = "float32"
    run = run_lib.open_run(frozen_config, jax.local_devices()[:1])
    batch = parallel.one_device(next(run.batches("val", run.eval_plans("val", run.selects("val"))[0])))
    state = run.abstract_state()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    encode = functools.partial(frozen_encoders.encode_step, run.options)
    precisions = _precisions(jax.make_jaxpr(encode)(variables, batch).jaxpr)
    assert len(precisions) > 8 and set(precisions) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_features_are_computed_once_for_all_groups_that_share_them(frozen_config, encoders, tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(frozen_encoders, "encode", lambda run, encoders: encoded.append(run.config) or {})
    values = [{}, {"beta2": 0.9}, {"data.ehr_only_ratio": 0.5}, {"batch_size": 16}, {"model.fusion_hidden": 4}]
    values += [{"method": "early"}, {"image.resize_px": 48, "image.crop_px": 48}, {"data.val_stays": "paired"}]
    together, costs = Sweep(frozen_config, tmp_path, encoders), Costs()
    trials = [Trial(i, changed) for i, changed in enumerate(values)]
    for trial in trials:
        groups.open_program(together, trial, costs, wave.devices_for(together, [trial]))
    assert [config.image.resize_px for config in encoded] == [32, 48, 32]
    assert len({together.group_key(trial) for trial in trials}) == len(trials)


@pytest.mark.parametrize("spec", ["model.ehr_hidden:choice(8,16)", "method:choice(uni_ehr,joint)"])
def test_a_trial_that_does_not_match_the_shared_encoders_is_refused(frozen_config, tmp_path, spec):
    frozen_config.method, frozen_config.model.freeze_encoders = "joint", False
    with pytest.raises(UserError, match=r"^trial \d \(") as error:
        sweep(frozen_config, tmp_path, [spec], num_trials=2)
    assert error.value.field.startswith("config.init.")
    assert not any(tmp_path.iterdir())


@pytest.mark.nightly
def test_a_stopped_sweep_on_frozen_encoders_resumes_to_the_same_table(frozen_config, tmp_path, monkeypatch):
    specs = [*RATES, "dropout:uniform(0,0.5)", "seed:int(0,50)"]
    assert_resumes(frozen_config, tmp_path, monkeypatch, specs, 2, num_trials=3, store_class=trial_store.FileStore)


def test_weights_of_losses_share_features(tiny_config):
    """Only what the frozen encoders compute counts."""
    key = caching.features_key(tiny_config)
    for name in tiny_config.loss:
        tiny_config.loss[name] = "stay" if name == "weighting" else 0.5
    assert caching.features_key(tiny_config) == key
    tiny_config.model.ehr_hidden += 1
    assert caching.features_key(tiny_config) != key
