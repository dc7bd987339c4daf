"""Heads on frozen encoders: the whole model's numbers from features that are computed once."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from model_cases import equations
from sweep_cases import (
    PRETRAIN,
    RATES,
    assert_as_alone,
    assert_goes_on_as_whole,
    sweep,
    train_alone,
)

from medfuse_jax import experiment, parallel, step
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints, warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import frozen_encoders, results, search, trial_store
from medfuse_jax.sweep import groups as run_lib
from medfuse_jax.sweep.costs import Costs


@pytest.mark.slow  # its shorter sibling is test_heads_of_every_method_that_freezes_its_encoders
def test_trials_of_frozen_encoders_are_runs_alone_and_encode_once(tiny_config, tmp_path, monkeypatch):
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
    assert with_checkpoint == [chosen], "a head is written with its encoders only where it is chosen"


def test_ways_of_augmenting_are_refused_where_images_are_encoded_once(tiny_config, tmp_path):
    tiny_config.method = "early"
    tiny_config.pretrain.update(PRETRAIN)
    with pytest.raises(UserError, match=r"trial 0 \(X-ray\.rotation_deg .*\): X-ray\.rotation_deg changes nothing"):
        sweep(tiny_config, tmp_path, ["image.rotation_deg:uniform(0,45)"])
    assert not any(tmp_path.iterdir())


def _untrained(config, workdir):
    """A run as train.train leaves it, with its first weights."""
    run = experiment.open_experiment(config)
    workdir_lib.claim(workdir, run)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        checkpoints.save(manager, run.fresh_state(), Progress(epoch=1, learning_rate=0.1, best_epoch=1), True)
    return workdir, run


@pytest.fixture(scope="module")
def encoders(shared_tiny_config, tmp_path_factory):
    made = {}
    for seed, (name, changes) in enumerate(PRETRAIN.items(), start=5):
        config = shared_tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes | {"seed": seed})  # not that of a trial
        made[name] = _untrained(config, tmp_path_factory.mktemp("encoders") / name)
    return made


@pytest.fixture
def frozen_config(tiny_config, encoders):
    tiny_config.method, tiny_config.model.freeze_encoders = "medfuse", True
    for name, (folder, _) in encoders.items():
        tiny_config.init[name] = str(folder)
    return tiny_config


_CAN_FREEZE = registry.with_field("frozen_encoders")


def test_heads_of_every_method_that_freezes_its_encoders_run_or_are_no_heads(frozen_config, encoders, tmp_path):
    """One encoding serves them all, but for the one whose batches hold a modality more."""
    trials = [search.Trial(i, {"method": name}) for i, name in enumerate(_CAN_FREEZE)]
    trials.append(search.Trial(len(trials), {"method": "medfuse", "model.modalities": "static"}))
    together, costs, of_heads = run_lib.Sweep(frozen_config, tmp_path, encoders), Costs(), []
    for trial in trials:
        if not frozen_encoders.can_cache(trial.config(frozen_config), encoders):
            continue
        of_heads.append(trial.values["method"])
        run = run_lib._program(together, trial, costs).run
        (state,) = frozen_encoders.fresh_heads(run, [0])
        score_BK = _scores_of_first_batch(run, state)
        assert np.isfinite(score_BK).all()
    assert of_heads == ["early", "joint", "joint_zeros", "joint_learnable", "medfuse", "medfuse"]
    assert len(together.features) == 2 and costs.encode_s > 0
    whole = experiment.open_experiment(together.config_of(trials[-1]), jax.local_devices()[:1])
    whole_state = warm_start.begin(whole.fresh_state(), encoders)
    np.testing.assert_allclose(_scores_of_first_batch(whole, whole_state), score_BK, atol=1e-5)
    of_other_encoders = _scores_of_first_batch(whole, whole.fresh_state())
    assert np.abs(of_other_encoders - score_BK).max() > 1e-3, "the tolerance shows the features of another encoder"


def _scores_of_first_batch(run, state):
    plan = run.eval_plans("val", run.selects("val"))[0]
    batch = parallel.merge(next(run.batches("val", plan)))
    return np.asarray(jax.jit(functools.partial(step.eval_step, run.options))(state, batch)[0])


def _precisions(jaxpr) -> list:
    """Of each product and convolution, those of the programs within among them."""
    products = ("dot_general", "conv_general_dilated")
    return [equation.params["precision"] for equation in equations(jaxpr) if equation.primitive.name in products]


def test_features_are_as_precise_as_the_whole_model_makes_them(frozen_config):
    """In float32, accelerators round what a product multiplies unless it says not to."""
    frozen_config.precision = "float32"
    run = experiment.open_experiment(frozen_config, jax.local_devices()[:1])
    batch = parallel.merge(next(run.batches("val", run.eval_plans("val", run.selects("val"))[0])))
    variables = jax.eval_shape(lambda: {k: getattr(run.fresh_state(), k) for k in ("params", "batch_stats")})
    encode = functools.partial(frozen_encoders.encode_step, run.options)
    precisions = _precisions(jax.make_jaxpr(encode)(variables, batch).jaxpr)
    assert len(precisions) > 8 and set(precisions) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_features_are_computed_once_for_all_that_shares_them(frozen_config, encoders, tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(frozen_encoders, "encode", lambda run, encoders: encoded.append(run.config) or {})
    values = [{}, {"beta2": 0.9}, {"data.ehr_only_ratio": 0.5}, {"batch_size": 16}, {"model.fusion_hidden": 4}]
    values += [{"method": "early"}, {"image.resize_px": 48, "image.crop_px": 48}, {"data.val_stays": "paired"}]
    together, costs = run_lib.Sweep(frozen_config, tmp_path, encoders), Costs()
    for i, changed in enumerate(values):
        run_lib._program(together, search.Trial(i, changed), costs)
    assert [config.image.resize_px for config in encoded] == [32, 48, 32] and len(together.programs) == len(values)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("model.ehr_hidden:choice(8,16)", r"trial \d \(model.ehr_hidden 16\): the ehr encoder .* has other sizes"),
        ("method:choice(uni_ehr,joint)", r"trial \d \(method uni_ehr\): .* the method uni_ehr has no cxr_encoder"),
    ],
)
def test_a_trial_that_the_shared_encoders_do_not_fit_is_refused_before_any_is_trained(
    frozen_config, tmp_path, spec, said
):
    frozen_config.method, frozen_config.model.freeze_encoders = "joint", False
    with pytest.raises(UserError, match=said):
        sweep(frozen_config, tmp_path, [spec], num_trials=2)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stopped_sweep_of_heads_goes_on_to_the_same_table(frozen_config, tmp_path, monkeypatch):
    specs = [*RATES, "dropout:uniform(0,0.5)", "seed:int(0,50)"]
    assert_goes_on_as_whole(frozen_config, tmp_path, monkeypatch, specs, lanes=2, keeper_kind=trial_store.FileKeeper)
