"""workdir: one config, one set of shards, one process at a time."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from medfuse_jax import experiment
from medfuse_jax.runs import workdir
from medfuse_jax.runtime.errors import UserError


@pytest.fixture
def run(tiny_config):
    tiny_config.method = "uni_ehr"
    return experiment.open_experiment(tiny_config)


def test_a_claimed_workdir_is_opened_again_as_the_same_run(run, tmp_path):
    workdir.claim(tmp_path / "run", run)
    workdir.claim(tmp_path / "run", run)
    assert workdir.open_run(tmp_path / "run").dataset.digest == run.dataset.digest


@pytest.mark.parametrize("inside", ["", "pheno", "pheno/run", "radiology"])
def test_the_shards_are_no_workdir(run, shards, inside):
    before = sorted(shards.rglob("*"))
    with pytest.raises(UserError, match="holds the shards"):
        workdir.claim(shards / inside, run)
    assert sorted(shards.rglob("*")) == before


def test_shards_that_were_moved_are_the_same(run, tmp_path, shards):
    workdir.claim(tmp_path / "run", run)
    (tmp_path / "run" / "checkpoints").mkdir()
    shutil.copytree(shards, tmp_path / "moved")
    run.config.data.dir = str(tmp_path / "moved")
    workdir.claim(tmp_path / "run", experiment.open_experiment(run.config))
    assert workdir.open_run(tmp_path / "run").config.data.dir == str(tmp_path / "moved")


def test_another_config_is_refused(run, tmp_path):
    workdir.claim(tmp_path, run)
    run.config.learning_rate *= 2
    workdir.claim(tmp_path, run)  # nothing is trained yet
    (tmp_path / "pretrain_ehr" / "checkpoints").mkdir(parents=True)
    run.config.learning_rate *= 2
    with pytest.raises(UserError, match=r"holds another run \(config.learning_rate is .* there and .* here\)"):
        workdir.claim(tmp_path, run)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", {"name": "ensemble", "rule": "average", "runs": ["a", "b"]}, "holds an ensemble"),
        ("sweep.json", {}, "holds a sweep"),
        ("result.json", {}, r"config\.json is missing"),
    ],
)
def test_what_is_no_run_is_left_as_it_is(run, tmp_path, name, content, said):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        workdir.claim(tmp_path, run)
    assert json.loads((tmp_path / name).read_text()) == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "folder",
    [
        "sweep/trials/003",
        "sweep/pretrain_ehr",
        "sweep/new",
        "sweep/trials/003/pretrain_ehr",
        "link",
        "sweep/elsewhere/003",
    ],
)
def test_the_folders_of_a_sweep_are_its_own(run, tmp_path, folder):
    """Also through a link into it, and through one that leads out of it."""
    swept = tmp_path / "sweep"
    swept.mkdir()
    (swept / "sweep.json").write_text("{}")
    (tmp_path / "link").symlink_to(swept / "trials" / "003")
    (tmp_path / "scratch").mkdir()
    (swept / "elsewhere").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match=rf"is in the folder of a sweep, {swept}: choose another --workdir"):
        workdir.claim(tmp_path / folder, run)
    assert {path.name for path in swept.iterdir()} == {"sweep.json", "elsewhere"}
    assert not any((tmp_path / "scratch").iterdir())
    workdir.claim(swept / "trials" / "003", run, by_sweep=True)


def test_runs_beside_a_sweep_are_not_in_it(run, tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    workdir.claim(tmp_path / "a" / "b" / "c" / "run", run)


def test_shards_that_were_moved_are_said_once(run, tmp_path):
    workdir.claim(tmp_path, run)
    config = json.loads((tmp_path / "config.json").read_text())
    there, config["data"]["dir"] = config["data"]["dir"], str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"gone, where .* had its shards, is no longer there: .* --data_dir=NEW$"):
        workdir.open_run(tmp_path)
    with pytest.raises(UserError, match="holds no dataset for the task"):
        workdir.open_run(tmp_path, data_dir=str(tmp_path))
    assert workdir.open_run(tmp_path, data_dir=there).config.data.dir == there
    assert workdir.open_run(tmp_path).config.data.dir == there, "the workdir keeps it"


def test_an_ensemble_has_no_weights_to_open(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rule": "average", "runs": ["a", "b"]}))
    with pytest.raises(UserError, match="holds an ensemble, which has no weights"):
        workdir.open_run(tmp_path)


def test_a_scored_run_without_its_checkpoints_is_still_another(run, tmp_path):
    workdir.claim(tmp_path, run)
    (tmp_path / "result.json").write_text("{}")
    workdir.claim(tmp_path, run)
    run.config.learning_rate *= 2
    with pytest.raises(UserError, match="holds another run"):
        workdir.claim(tmp_path, run)


@pytest.mark.parametrize("use", [lambda path, run: workdir.claim(path, run), lambda path, run: workdir.open_run(path)])
def test_other_shards_in_the_same_place_are_refused(run, tmp_path, use):
    workdir.claim(tmp_path, run)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "data.json").write_text(json.dumps({"digest": "of an older build"}))
    with pytest.raises(UserError, match=r"is no longer the build that .* was trained on"):
        use(tmp_path, run)
    (tmp_path / "data.json").unlink()
    with pytest.raises(UserError, match=r"data\.json cannot be read"):
        use(tmp_path, run)


def test_statistics_that_have_changed_are_refused(run, tmp_path):
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"mean": [0.0] * 76, "std": [1.0] * 76}))
    run.config.data.statistics = str(path)
    workdir.claim(tmp_path / "run", experiment.open_experiment(run.config))
    path.write_text(json.dumps({"mean": [50.0] * 76, "std": [9.0] * 76}))
    with pytest.raises(UserError, match=r"\(or what config\.data\.statistics=.*statistics\.json holds has changed\)"):
        workdir.open_run(tmp_path / "run")


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    hold = (
        "import sys, pathlib, medfuse_jax.runs.workdir as w\n"
        "with w.locked(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as holder:
        assert holder.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another process is at work in"), workdir.locked(tmp_path / "run"):
            pass
        holder.kill()
    with workdir.locked(tmp_path / "run"):
        pass


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file cannot be written"), workdir.locked(tmp_path / "file"):
        pass
