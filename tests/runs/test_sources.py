"""sources: the runs that a run starts from, and the reasons to refuse one."""

import contextlib
import shutil
from pathlib import Path

import pytest
from refusals import refused

from medfuse_jax import run as run_lib
from medfuse_jax.runs import checkpoints, sources, workdir
from medfuse_jax.runs.progress import Progress


@pytest.mark.parametrize(
    ("method", "wanted"), [("medfuse", {"ehr", "cxr"}), ("daft3", {"ehr", "cxr"}), ("uni_ehr", set())]
)
def test_stages_of_encoders_that_the_method_lacks_are_skipped(fusion_config, tmp_path, method, wanted):
    fusion_config.method = method
    assert set(sources.find(run_lib.open_run(fusion_config), tmp_path)[1]) == wanted


def _keep(folder, config):
    """Make a workdir with a checkpoint of untrained weights; return its run."""
    run = run_lib.open_run(config)
    workdir.claim(folder, run)
    with contextlib.closing(checkpoints.open_manager(folder)) as manager:
        checkpoints.save(manager, run.fresh_state(), Progress(), is_best=True)
    return run


def test_config_init_needs_weights_until_the_run_has_a_checkpoint(tiny_config, tmp_path):
    """The source of a run's initial weights is read once and may then be deleted."""
    source = tiny_config.copy_and_resolve_references()
    source.method = tiny_config.method = "uni_ehr"
    tiny_config.init.ehr = str(tmp_path / "source")
    workdir.claim(tmp_path / "source", run_lib.open_run(source))
    run = run_lib.open_run(tiny_config)
    with refused(path=tmp_path / "source" / "checkpoints"):
        sources.find(run, tmp_path / "run")
    (tmp_path / "source" / "checkpoints").mkdir()
    with refused(path=tmp_path / "source" / "checkpoints"):
        sources.find(run, tmp_path / "run")
    _keep(tmp_path / "source", source)
    assert set(sources.find(run, tmp_path / "run")[0]) == {"ehr"}
    _keep(tmp_path / "run", tiny_config)
    shutil.rmtree(tmp_path / "source")
    assert sources.find(run, tmp_path / "run") == ({}, {})
    with refused(path=tmp_path / "source" / "config.json"):
        sources.find(run, tmp_path / "other")


def test_freezing_batch_statistics_that_nothing_trains_is_refused(fusion_config, tmp_path):
    fusion_config.model.batch_norm = "frozen"
    assert set(sources.find(run_lib.open_run(fusion_config), tmp_path)[1]) == {"ehr", "cxr"}
    fusion_config.pretrain.cxr.model = {"batch_norm": "frozen"}
    with refused(field="config.model.batch_norm"):
        sources.find(run_lib.open_run(fusion_config), tmp_path)
    fusion_config.encoders = "random"
    with refused(field="config.model.batch_norm"):
        sources.find(run_lib.open_run(fusion_config), tmp_path)
    fusion_config.method = "uni_ehr"
    sources.find(run_lib.open_run(fusion_config), tmp_path)


@pytest.mark.parametrize("changes", [{"method": "early"}, {"model.freeze_encoders": True}])
def test_a_frozen_encoder_that_nothing_trains_is_refused(fusion_config, tmp_path, changes):
    fusion_config.update_from_flattened_dict(changes)
    assert set(sources.find(run_lib.open_run(fusion_config), tmp_path)[1]) == {"ehr", "cxr"}
    del fusion_config.pretrain.cxr
    with refused(field="config.pretrain.cxr"):
        sources.find(run_lib.open_run(fusion_config), tmp_path)
    fusion_config.encoders = "random"
    with refused(field="config.pretrain.ehr"):
        sources.find(run_lib.open_run(fusion_config), tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"method": "daft3"}, {}),  # which has no stage 4
        ({"model.resnet_stage_sizes": (1, 2, 1, 1)}, {}),
        ({}, {"model.resnet_stage_sizes": (1, 2, 1, 1)}),
        ({"model.resnet_stage_sizes": (1, 1, 2, 1)}, {"method": "daft3"}),
    ],
)
def test_an_image_encoder_with_fewer_or_other_stages_is_refused(tiny_config, tmp_path, theirs, ours):
    def opened(changes):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        return run_lib.open_run(config)

    with refused(field="config.init.cxr"):
        sources.check(opened(ours), "cxr", tmp_path, opened(theirs))


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"method": "uni_cxr", "task": "radiology"}, "ehr"), ({"model.ehr_hidden": 16}, "ehr"), ({}, "cxr")],
)
def test_an_encoder_that_the_method_or_the_source_lacks_is_refused(tiny_config, tmp_path, changes, name):
    pretrained = tiny_config.copy_and_resolve_references()
    pretrained.method = "uni_ehr"
    tiny_config.update_from_flattened_dict(changes)
    run, source = (run_lib.open_run(config) for config in (tiny_config, pretrained))
    with refused(field=f"config.init.{name}"):
        sources.check(run, name, tmp_path / "source", source)


@pytest.mark.parametrize("name", ["ehr", "model"])
def test_an_encoder_of_another_kind_is_refused_by_its_field(tiny_config, tmp_path, name):
    other = tiny_config.copy_and_resolve_references()
    other.model.ehr_encoder = "transformer"
    run, source = (run_lib.open_run(config) for config in (tiny_config, other))
    with refused(field=f"config.init.{name}", value="transformer") as caught:
        sources.check(run, name, tmp_path, source)
    assert "config.model.ehr_encoder" in str(caught.value)


@pytest.mark.parametrize(("theirs", "ours"), [("joint", "early"), ("mmtm3", "mmtm4"), ("medfuse", "medfuse_attention")])
def test_starting_from_a_whole_model_of_another_method_is_refused(tiny_config, tmp_path, theirs, ours):
    source, run = (run_lib.open_run(_with_method(tiny_config, method)) for method in (theirs, ours))
    with refused(field="config.init.model"):
        sources.check(run, "model", tmp_path, source)


def test_joint_and_joint_zeros_are_the_same_model(tiny_config, tmp_path):
    source, run = (run_lib.open_run(_with_method(tiny_config, m)) for m in ("joint", "joint_zeros"))
    sources.check(run, "model", tmp_path, source)


def _with_method(config, method):
    config = config.copy_and_resolve_references()
    config.method = method
    return config


def test_an_encoder_trained_on_test_patients_is_refused(tiny_config, tmp_path):
    run, source = (run_lib.open_run(tiny_config) for _ in range(2))
    sources.check(run, "ehr", tmp_path, source)
    seen = source.dataset.index["train"]["subject_id"]
    seen[:2] = run.dataset.index["test"]["subject_id"][0], run.dataset.index["val"]["subject_id"][0]
    with refused(path=Path(tiny_config.data.dir)):
        sources.check(run, "ehr", tmp_path, source)
