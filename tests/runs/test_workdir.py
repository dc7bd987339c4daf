"""workdir: one config, one set of shards, one process at a time."""

import json
import shutil
import subprocess
import sys

import pytest

from medfuse_jax import run as run_lib
from medfuse_jax.runs import sources, workdir
from medfuse_jax.runtime.errors import TryLater, UserError


@pytest.fixture(scope="module")
def uni_ehr(shared_tiny_config):
    config = shared_tiny_config.copy_and_resolve_references()
    config.method = "uni_ehr"
    return run_lib.open_run(config)


@pytest.fixture
def run(uni_ehr):
    config = uni_ehr.config.copy_and_resolve_references()
    return run_lib.Run(config, uni_ehr.dataset, uni_ehr.options, uni_ehr.devices)


def _refused(call, *args) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return caught.value


def test_claimed_workdir_reopens_as_the_same_run(run, tmp_path):
    workdir.claim(tmp_path / "run", run)
    workdir.claim(tmp_path / "run", run)
    assert sources.reopen(tmp_path / "run").dataset.digest == run.dataset.digest


@pytest.mark.parametrize("inside", ["", "pheno/run", "radiology"])
def test_shards_are_not_a_workdir(run, shards, inside):
    before = sorted(shards.rglob("*"))
    assert _refused(workdir.claim, shards / inside, run).path == shards
    assert sorted(shards.rglob("*")) == before


def test_moved_shards_are_the_same(run, tmp_path, shards):
    workdir.claim(tmp_path / "run", run)
    (tmp_path / "run" / "checkpoints").mkdir()
    shutil.copytree(shards, tmp_path / "moved")
    run.config.data.dir = str(tmp_path / "moved")
    workdir.claim(tmp_path / "run", run_lib.open_run(run.config))
    assert sources.reopen(tmp_path / "run").config.data.dir == str(tmp_path / "moved")


@pytest.mark.parametrize("trained", ["pretrain_ehr/checkpoints", "result.json"])
def test_another_config_is_refused_once_trained(run, tmp_path, trained):
    workdir.claim(tmp_path, run)
    run.config.learning_rate *= 2
    workdir.claim(tmp_path, run)
    (tmp_path / trained).mkdir(parents=True)
    workdir.claim(tmp_path, run)
    run.config.learning_rate *= 2
    error = _refused(workdir.claim, tmp_path, run)
    assert error.path == tmp_path and "config.learning_rate" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("config.json", {"name": "ensemble", "rule": "average", "runs": ["a", "b"]}, "an ensemble"),
        ("sweep.json", {}, "a sweep"),
        ("config.json", {"name": "old"}, None),
        ("result.json", {}, None),
    ],
)
def test_other_content_is_left_unchanged(run, tmp_path, name, content, kind):
    (tmp_path / name).write_text(json.dumps(content))
    error = _refused(workdir.claim, tmp_path, run)
    assert error.value == kind if kind else str(tmp_path / "config.json") in str(error)
    if kind:
        assert _refused(sources.reopen, tmp_path).path == tmp_path
    assert json.loads((tmp_path / name).read_text()) == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "folder", ["sweep/trials/003", "sweep/new", "sweep/trials/003/pretrain_ehr", "link", "sweep/elsewhere/003"]
)
def test_folders_inside_a_sweep_are_refused(tmp_path, folder):
    """Also through a link into the sweep, and through one that leads out of it."""
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    (tmp_path / "link").symlink_to(sweep / "trials" / "003")
    (tmp_path / "scratch").mkdir()
    (sweep / "elsewhere").symlink_to(tmp_path / "scratch")
    assert _refused(workdir.check_outside_sweeps, tmp_path / folder).path == sweep


def test_folders_beside_a_sweep_are_allowed(run, tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    workdir.check_outside_sweeps(tmp_path / "a" / "b" / "c" / "run")


def test_new_place_of_the_shards_is_given_once(run, tmp_path):
    workdir.claim(tmp_path, run)
    config = json.loads((tmp_path / "config.json").read_text())
    moved, config["data"]["dir"] = config["data"]["dir"], str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    _refused(sources.reopen, tmp_path)  # it was changed under its seal
    del config["seal"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = _refused(sources.reopen, tmp_path)
    assert (error.field, error.path) == ("--data_dir", tmp_path / "gone")
    _refused(sources.reopen, tmp_path, None, str(tmp_path))
    assert sources.reopen(tmp_path, data_dir=moved).config.data.dir == moved
    assert sources.reopen(tmp_path).config.data.dir == moved


@pytest.mark.parametrize("use", [workdir.claim, lambda path, run: sources.reopen(path)])
def test_changed_shards_are_refused(run, tmp_path, use):
    workdir.claim(tmp_path, run)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "data.json").write_text(json.dumps({"digest": "of an older build"}))
    assert _refused(use, tmp_path, run).value == [f"{run.config.data.dir}/pheno"]
    (tmp_path / "data.json").unlink()
    assert _refused(use, tmp_path, run).path == tmp_path / "data.json"


def test_changed_statistics_are_refused(run, tmp_path):
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"mean": [0.0] * 76, "std": [1.0] * 76}))
    run.config.data.statistics = str(path)
    workdir.claim(tmp_path / "run", run_lib.open_run(run.config))
    path.write_text(json.dumps({"mean": [50.0] * 76, "std": [9.0] * 76}))
    assert f"config.data.statistics={path}" in _refused(sources.reopen, tmp_path / "run").value


def test_second_process_is_kept_out_until_the_first_ends(tmp_path):
    hold = (
        "import sys, pathlib, medfuse_jax.runs.workdir as w\n"
        "with w.locked(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(TryLater), workdir.locked(tmp_path / "run"):
            pass
        holder.kill()
    with workdir.locked(tmp_path / "run"):
        pass


def test_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir="), workdir.locked(tmp_path / "file"):
        pass
