"""Configs: every file in configs/ is valid; a wrong field, type or value is one line with the nearest right name."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax.config import __main__ as config_page
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


def test_a_run_may_resume_with_other_execution_only_fields():
    config, other = config_lib.default(), config_lib.default()
    other.placement, other.profile_steps, other.recurrence, other.parallel = "device", "2:3", "pallas", "shard_map"
    assert config_lib.difference(config, other) == ""
    assert config_lib.parse_profile_steps(config) == (0, 0) and config_lib.parse_profile_steps(other) == (2, 3)


def test_the_config_of_an_older_run_is_read(tmp_path):
    config = config_lib.default()
    config.placement = "stream"
    config_lib.save(config, tmp_path / "config.json")
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["seal"], stored["data"]["readers"], stored["recurrence"]  # fields that a version may add
    del stored["model"]["cxr_encoder"], stored["eval"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    loaded = config_lib.load(tmp_path / "config.json")
    assert (loaded.data.readers, loaded.recurrence, loaded.placement) == (0, "auto", "stream")
    assert not config_lib.difference(config, loaded)
    del stored["method"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with refused(field="config.method"):
        config_lib.load(tmp_path / "config.json")


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
def test_a_stage_equal_to_the_run_is_left_out(changes, stages):
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    config.update(changes)
    assert sorted(config_lib.stages(config)) == sorted(stages)


def test_a_stage_follows_its_own_section():
    """It ignores fields of the fusion run alone; those of its own section apply, and can be set by flag."""
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    fusion = {"data.ehr_only_ratio": 0.2, "model.batch_norm": "frozen", "model.freeze_encoders": True}
    fusion |= {"data.drop_ehr": 0.1, "data.drop_cxr": 0.5, "profile_steps": "500:510", "init.ehr": "runs/other"}
    fusion |= {"data.train_stays": "paired", "data.val_stays": "paired"}
    config.update_from_flattened_dict(fusion)
    config_lib.validate(config)
    for name in ("ehr", "cxr"):
        stage = config_lib.flat(config_lib.stage(config, name))
        assert [stage[field] for field in fusion] == [config_lib.FIELDS[field].default for field in fusion]
    config.pretrain.cxr.model.batch_norm = "frozen"
    config.pretrain.ehr.data.train_stays = "paired"
    config_lib.validate(config)
    assert config_lib.stage(config, "cxr").model.batch_norm == "frozen"
    assert config_lib.stage(config, "ehr").data.train_stays == "paired"


def test_a_method_without_fusion_has_nothing_to_train_beside_frozen_encoders():
    config = config_lib.default()
    config.method, config.model.freeze_encoders = "uni_ehr", True
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert caught.value.field == "config.model.freeze_encoders"


def test_a_stage_keeps_what_it_does_not_change():
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    stage = config_lib.stage(config, "cxr")
    assert (stage.task, stage.method, stage.batch_size) == ("radiology", "uni_cxr", config.batch_size)
    assert not stage.pretrain


def test_a_stage_of_another_kind_of_task_ignores_how_hours_are_weighted():
    config = _load(_ROOT / "configs" / "decompensation.py").get_config()
    config.loss.weighting = "stay"
    config.pretrain = {"cxr": config_lib.pretraining(method="uni_cxr", task="radiology")}
    config.pretrain.ehr = config_lib.pretraining(method="uni_ehr")
    config_lib.validate(config)
    assert [config_lib.stage(config, name).loss.weighting for name in ("cxr", "ehr")] == ["hour", "stay"]
    config.pretrain.cxr.loss.weighting = "stay"
    with refused(field="config.pretrain.cxr.loss.weighting", value="stay"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("task", "phenotype", "pheno"),
        ("loss.weighting", "stays", "stay"),
        ("method", "medfuze", "medfuse"),
        ("parallel", "pmapp", "pmap"),
        ("placement", "devise", "device"),
        ("profile_steps", "5", ""),
        ("profile_steps", "0:3", ""),
        ("profile_steps", "6:3", ""),
        ("data.dir", "gs://bucket/shards", ""),
        ("batch_size", 0, ""),
        ("batch_size", 1.5, ""),
        ("learning_rate", -1.0, ""),
        ("images_per_batch", 17, ""),
        ("data.ehr_only_ratio", 1.5, ""),
        ("image.crop_px", 300, ""),
        ("model.resnet_stage_sizes", (1, 2), ""),
        ("model.resnet_stage_sizes", (1, 1, 1.5, 1), ""),
        ("model.resnet_stage_sizes", ("a", 1, 1, 1), ""),
        ("image.scale", ("a", 1), ""),
        ("model.ehr_hidden", 10**9, ""),
        ("batch_size", 10**12, ""),
        ("seed", -1, ""),
        ("image.scale", (1.0,), ""),
        ("image.scale", (0.0, 0.0), ""),
        ("image.translation", -5.0, ""),
        ("model.missing_cxr", "learned", "learnt"),
        ("model.missing_cxr", "zeros", ""),
        ("encoders", "pretraind", "pretrained"),
        ("data.cxr_task", "pheno", ""),
        ("loss.align", -1.0, ""),
        ("loss.align", 0.1, ""),
        ("loss.cxr_only", 0.0, ""),
        ("loss.weighting", "stay", ""),
        ("pretrain", 5, ""),
        ("pretrain.ehr", 5, ""),
        ("data", 5, ""),
    ],
)
def test_a_wrong_value_is_refused_by_field_value_and_nearest_choice(field, value, nearest):
    config = config_lib.default()
    section, _, name = field.rpartition(".")
    with (config[section] if section else config).ignore_type():
        (config[section] if section else config)[name] = value
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert (caught.value.field, caught.value.value, caught.value.nearest) == (f"config.{field}", value, nearest)
    assert str(caught.value).startswith(f"config.{field} is ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pretrain", "field", "nearest"),
    [
        ({"cxr": {"init": {"cxr": "a"}}}, "config.pretrain.cxr.init", ""),
        ({"cxr": {"encoders": "random"}}, "config.pretrain.cxr.encoders", ""),
        ({"cxr": {"pretrain": {"ehr": {}}}}, "config.pretrain.cxr.pretrain", ""),
        ({"cx": {}}, "config.pretrain stage", "cxr"),
        ({"ehr": {"learning_rat": 1.0}}, "config.pretrain.ehr.learning_rat", "learning_rate"),
        ({"ehr": {"learning_rate": "fast"}}, "config.pretrain.ehr.learning_rate", ""),
        ({"ehr": {"batch_size": 0}}, "config.pretrain.ehr.batch_size", ""),
        ({"ehr": {"images_per_batch": 99}}, "config.pretrain.ehr.images_per_batch", ""),
    ],
)
def test_a_wrong_stage_is_refused_by_its_field(pretrain, field, nearest):
    config = config_lib.default()
    config.pretrain = ConfigDict(pretrain)
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert (caught.value.field, caught.value.nearest) == (field, nearest)


def test_an_unknown_field_is_refused_with_the_nearest_name():
    config = config_lib.default()
    config.data.dirr = "shards"
    with pytest.raises(
        UserError, match=r"config\.data\.dirr is not a field of a config\. Did you mean config\.data\.dir\?"
    ):
        config_lib.validate(config)


def test_a_new_field_is_one_row(monkeypatch, tmp_path):
    """A row alone gives a field its default, its checks, its flag's type, its place on disk and in the docs."""
    row = config_lib.Field(0.5, "a toy", low=0, high=1)
    monkeypatch.setitem(config_lib.FIELDS, "model.toy", row)
    config = config_lib.default()
    config.pretrain.ehr = config_lib.pretraining(method="uni_ehr")
    config_lib.validate(config)
    config.pretrain.ehr.model.toy = 0.25
    assert config.model.toy == 0.5 and config_lib.stage(config, "ehr").model.toy == 0.25
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json").model.toy == 0.5
    assert (
        "model.toy" in config_lib.names(searchable=True)
        and "`model.toy` | `0.5` | 0 to 1 | a toy | yes |" in config_lib.table()
    )
    config.model.toy = 2.0
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert caught.value.field == "config.model.toy"


def test_the_page_lists_every_field():
    page = (_ROOT / "docs" / "config.md").read_text()
    assert config_lib.table() in page, "run python -m medfuse_jax.config --write=docs/config.md"


def test_writing_the_table_leaves_the_rest_of_the_page(tmp_path):
    page = tmp_path / "config.md"
    page.write_text("before\n\n| field | default |\n|---|---|\n| `lost` | 1 |\n\nafter\n")
    config_page.write(page)
    assert page.read_text() == f"before\n\n{config_lib.table()}\n\nafter\n"
    page.write_text("no table")
    with refused(field="--write"):
        config_page.write(page)


def test_init_takes_a_whole_model_or_a_part_but_not_both():
    config = config_lib.default()
    config.init.model, config.init.cxr = "runs/a", "runs/b"
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert caught.value.field == "config.init.model"


@pytest.mark.parametrize(
    ("method", "loss"),
    [("mmtm3", "align"), ("mmtm4", "ehr_only"), ("unified", "cxr_only"), ("drfuse", "ranking"), ("shaspec", "domain")],
)
def test_a_loss_weight_applies_to_methods_with_that_loss_but_not_to_their_stages(method, loss):
    config = _load(_ROOT / "configs" / "pheno.py").get_config()
    config.update_from_flattened_dict({"method": method, f"loss.{loss}": 0.5})
    config_lib.validate(config)
    assert config_lib.stage(config, "ehr").loss == config_lib.default().loss


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is of another version or was edited: config.pretrain is missing"),
        ("[]", "holds no JSON object"),
        ('{"name": ', "cannot be read"),
    ],
)
def test_an_incomplete_config_is_refused(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        config_lib.load(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


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


def test_a_missing_config_flag_is_one_line():
    done = subprocess.run([sys.executable, "-m", "medfuse_jax.main"], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "--config" in done.stderr
