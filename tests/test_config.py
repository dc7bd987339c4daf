"""Configs: every file in configs/ is valid; a wrong field, type or value is one line with the nearest right name."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parent.parent
_CONFIGS = sorted((_ROOT / "configs").glob("*.py"))


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid_and_named_after_its_file(path):
    config = _load(path).get_config()
    config_lib.validate(config)
    assert config.name == path.stem


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda p: p.stem)
def test_every_config_gives_a_command_that_names_it(path):
    assert f"python -m medfuse_jax.main --config=configs/{path.name}" in _load(path).__doc__


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda p: p.stem)
def test_a_saved_config_is_read_back_the_same(path, tmp_path):
    config = _load(path).get_config()
    config_lib.save(config, tmp_path / "config.json")
    loaded = config_lib.load(tmp_path / "config.json")
    assert config_lib.difference(config, loaded) == ""
    loaded.learning_rate = 0.5
    there = f"config.learning_rate is {config.learning_rate} there and 0.5 here"
    assert config_lib.difference(config, loaded) == there
    loaded.method, loaded.batch_size = "joint", 99
    method = f"config.method is {config.method} there and joint here"
    assert config_lib.difference(config, loaded) == f"{method} (also: config.batch_size, config.learning_rate)"


def test_a_run_from_before_there_was_a_choice_of_recurrence_is_read(tmp_path):
    config_lib.save(config_lib.default(), tmp_path / "config.json")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["recurrence"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert config_lib.load(tmp_path / "config.json").recurrence == "chunks"


def test_what_changes_only_how_a_run_is_run_makes_no_other_run():
    config = config_lib.default()
    other = config_lib.default()
    other.placement, other.profile_steps, other.recurrence = "device", "2:3", "pallas"
    assert config_lib.difference(config, other) == ""
    assert config_lib.profile_steps(config) == (0, 0) and config_lib.profile_steps(other) == (2, 3)


def test_num_epochs_reaches_the_pretraining_stages():
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    config.num_epochs = 3
    assert [config_lib.stage(config, name).num_epochs for name in ("ehr", "cxr")] == [3, 3]
    config.pretrain.ehr.num_epochs = 5
    assert config_lib.stage(config, "ehr").num_epochs == 5 and config.num_epochs == 3


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, ["ehr", "cxr"]),
        ({"encoders": "random"}, []),
        ({"method": "early"}, ["ehr", "cxr"]),
        ({"method": "uni_ehr"}, ["cxr"]),  # which main leaves out: the method has no X-ray encoder
        ({"method": "uni_cxr"}, ["ehr", "cxr"]),  # from the radiology labels to the task's
    ],
)
def test_stages_are_those_that_are_not_the_run_itself(changes, stages):
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    config.update(changes)
    assert sorted(config_lib.stages(config)) == sorted(stages)


def test_a_stage_is_of_whole_stays_and_trains_all_of_its_encoder():
    """What is of the fusion alone does not reach it; what the stage itself sets does."""
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    fusion = {"data.ehr_only_ratio": 0.2, "model.batch_norm": "frozen", "model.freeze_encoders": True}
    fusion |= {"data.drop_ehr": 0.1, "data.drop_cxr": 0.5, "profile_steps": "500:510", "init.ehr": "runs/other"}
    config.update_from_flattened_dict(fusion)
    config_lib.validate(config)
    for name in ("ehr", "cxr"):
        stage = config_lib.flat(config_lib.stage(config, name))
        assert [stage[field] for field in fusion] == [1.0, "batch", False, 0.0, 0.0, "", ""]
    config.pretrain.cxr.model = ConfigDict({"batch_norm": "frozen"})
    assert config_lib.stage(config, "cxr").model.batch_norm == "frozen"


def test_a_method_without_fusion_has_nothing_to_train_beside_frozen_encoders():
    config = config_lib.default()
    config.method, config.model.freeze_encoders = "uni_ehr", True
    with pytest.raises(UserError, match=r"config.model.freeze_encoders is true, and the method 'uni_ehr'"):
        config_lib.validate(config)


def test_a_stage_keeps_what_it_does_not_change():
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    stage = config_lib.stage(config, "cxr")
    assert (stage.task, stage.method, stage.batch_size) == ("radiology", "uni_cxr", config.batch_size)
    assert not stage.pretrain


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("task", "phenotype", "Did you mean 'pheno'?"),
        ("method", "medfuze", "Did you mean 'medfuse'?"),
        ("parallel", "pmapp", "Did you mean 'pmap'?"),
        ("placement", "devise", "Did you mean 'device'?"),
        ("profile_steps", "5", "give the first and last step, such as '20:25'"),
        ("profile_steps", "0:3", "give the first and last"),
        ("profile_steps", "6:3", "give the first and last"),
        ("batch_size", 0, "config.batch_size is 0; it must be at least 1"),
        ("learning_rate", -1.0, "config.learning_rate is -1.0; it must be between 0.0 and 1.0"),
        ("images_per_batch", 17, "config.images_per_batch is 17; it must be between 0 and 16"),
        ("data.ehr_only_ratio", 1.5, "between 0.0 and 1.0"),
        ("image.crop_px", 300, "between 32 and 256"),
        ("model.resnet_stage_sizes", (1, 2), "give four numbers"),
        ("seed", -1, "config.seed is -1; it must be between 0"),
        ("image.scale", (1.0,), "config.image.scale is (1.0,); give the least and the most"),
        ("image.scale", (0.0, 0.0), "config.image.scale is (0.0, 0.0); give the least and the most"),
        ("image.translation", -5.0, "config.image.translation is -5.0"),
        ("model.missing_cxr", "learned", "Did you mean 'learnt'?"),
        ("model.missing_cxr", "zeros", "the method 'medfuse' puts nothing in a missing X-ray's place"),
        ("encoders", "pretraind", "Did you mean 'pretrained'?"),
        ("data.cxr_task", "pheno", "config.data.cxr_task is 'pheno'; it must be one of radiology"),
        ("loss.align", -1.0, "config.loss.align is -1.0; it must be between"),
        ("loss.align", 0.1, "the method 'medfuse' has no such loss: leave it out, or take mmtm3 or mmtm4"),
        ("pretrain", 5, "config.pretrain is 5; it must hold the fields ehr, cxr"),
        ("pretrain.ehr", 5, "config.pretrain.ehr is 5; it must hold the fields batch_size, beta2"),
        ("pretrain.cxr", {"init": {"cxr": "a"}}, "config.pretrain.cxr.init is given, and a stage starts at random"),
        ("pretrain.cxr", {"encoders": "random"}, "config.pretrain.cxr.encoders is given"),
        ("pretrain.cxr", {"pretrain": {"ehr": {}}}, "give that run here as config.init.cxr"),
        ("pretrain.cx", {}, "Did you mean 'cxr'?"),
        ("loss.cxr_only", 0.0, "'medfuse' has no such loss: leave it out, or take unified or mmtm3 or mmtm4"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field, value, said):
    config = config_lib.default()
    section, _, name = field.rpartition(".")
    with (config[section] if section else config).ignore_type():
        (config[section] if section else config)[name] = value
    with pytest.raises(UserError, match=re.escape(said)):
        config_lib.validate(config)


def test_a_whole_model_and_a_part_of_one_are_not_both_a_start():
    config = config_lib.default()
    config.init.model, config.init.cxr = "runs/a", "runs/b"
    with pytest.raises(UserError, match=r"config\.init\.model is 'runs/a', a whole model, and config\.init\.cxr is"):
        config_lib.validate(config)


@pytest.mark.parametrize(("method", "loss"), [("mmtm3", "align"), ("mmtm4", "ehr_only"), ("unified", "cxr_only")])
def test_a_weight_of_a_loss_is_of_the_methods_that_have_it_and_not_of_their_stages(method, loss):
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    config.update_from_flattened_dict({"method": method, f"loss.{loss}": 0.5})
    config_lib.validate(config)
    assert config_lib.stage(config, "ehr").loss == config_lib.default().loss


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is of another version or was edited: config.batch_size is missing"),
        ("[]", "it holds no fields"),
        ('{"name": ', "cannot be read"),
    ],
)
def test_a_config_that_is_not_whole_is_refused(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        config_lib.load(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_a_field_too_many_is_refused_with_the_nearest_name():
    config = config_lib.default()
    config.pretrain.ehr = {"learning_rat": 1.0}
    with pytest.raises(
        UserError, match=r"pretrain\.ehr\.learning_rat is not.*Did you mean config\.pretrain\.ehr\.learning_rate\?"
    ):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.learning_rate=fast", "--config.learning_rate=fast"),
        ("--config.method=medfuze", "medfuse"),
        ("--workdirr=x", "workdir"),
        ("leftover", "leftover"),
    ],
)
def test_a_wrong_flag_ends_the_command_in_one_line(argument, said):
    config = [] if argument.startswith("--config=") else ["--config=configs/pheno.py"]
    done = subprocess.run(
        [sys.executable, "-m", "medfuse_jax.main", *config, argument], cwd=_ROOT, capture_output=True, text=True
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and said in lines[0]


def test_no_config_at_all_says_which_there_are():
    done = subprocess.run([sys.executable, "-m", "medfuse_jax.main"], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "--config" in done.stderr
