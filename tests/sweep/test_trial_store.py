"""Stores of trials: a trial resumes from what it started with, and a damaged file is named."""

import contextlib
import json
import shutil

import damage
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep_cases import RATES, sweep

from medfuse_jax import evaluate, step
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results, trial_store

_PROGRESS = Progress(epoch=1, learning_rate=0.1, best_auroc=0.6, best_epoch=1)


@pytest.fixture(scope="module")
def sweep_in_files(shared_tiny_config, tmp_path_factory):
    """(folder, config, rows) of a sweep of two trials that are stored in files."""
    config, folder = shared_tiny_config.copy_and_resolve_references(), tmp_path_factory.mktemp("sweep") / "sweep"
    config.method, config.num_epochs = "uni_ehr", 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trial_store, "open_store", lambda workdir, is_frozen: trial_store.FileStore(workdir))
        rows = sweep(config, folder, RATES, num_trials=2, lanes=1)
    return folder, config, rows


@pytest.fixture
def copied(sweep_in_files, tmp_path):
    """A copy of it, and the folders of the chosen trial and of the other."""
    folder, config, rows = sweep_in_files
    shutil.copytree(folder, tmp_path / "sweep")
    chosen, other = (results.trial_dir(tmp_path / "sweep", int(row["trial"])) for row in rows)

    def again(**more):
        return sweep(config, tmp_path / "sweep", RATES, num_trials=2, lanes=1, **more)

    return again, chosen, other, rows


def test_any_trial_stored_in_a_file_can_be_exported_and_scored(copied, capsys):
    again, chosen, other, rows = copied
    with pytest.raises(UserError) as error:
        evaluate.evaluate(other)
    assert error.value.field == "--export" and f"--export={int(other.name)}" in str(error.value)
    with pytest.raises(UserError) as error:
        again(export=[2])
    assert (error.value.field, error.value.value) == ("--export", 2)
    capsys.readouterr()
    again(export=[int(other.name)])
    assert "AUROC [95 % CI]" in capsys.readouterr().out, "the test result of the chosen trial"
    of_chosen = json.loads((chosen / "result.json").read_text())
    assert evaluate.evaluate(other)["loss"] != of_chosen["loss"]
    assert evaluate.evaluate(other, evaluate.Scored("val"))["subsets"]["all"]["auroc_macro"] == pytest.approx(
        float(rows[1]["val_auroc"]), abs=1e-6
    )


def test_the_file_is_scored_rather_than_older_checkpoints(copied):
    again, chosen, _, _ = copied
    before = json.loads((chosen / "result.json").read_text())
    with np.load(chosen / "state.npz") as stored:
        entries = dict(stored)
    entries["best/params.classifier.bias"] += 1
    np.savez(chosen / "state.npz", **entries)
    (chosen / "result.json").unlink()
    again()
    assert json.loads((chosen / "result.json").read_text())["loss"] > before["loss"] + 0.01


def test_a_trial_with_a_damaged_file_can_be_restarted(copied):
    again, chosen, _, rows = copied
    (chosen / "result.json").unlink()
    (chosen / "state.npz").write_bytes((chosen / "state.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"delete it and trial\.json beside it") as error:
        again()
    assert error.value.path == chosen / "state.npz" and "\n" not in str(error.value)
    for name in ("state.npz", "trial.json"):
        (chosen / name).unlink()
    assert again() == rows


def test_opening_a_store_removes_unfinished_files(tmp_path):
    (tmp_path / ".state.npz.4711.partial.npz").write_bytes(b"half a file")
    (tmp_path / ".trial.json.4711.partial.json").write_text("of another file")
    store = trial_store.open_store(tmp_path, is_frozen=True)
    assert [path.name for path in tmp_path.iterdir()] == [".trial.json.4711.partial.json"]
    store.save({"w": np.zeros(3)}, _PROGRESS, True)
    assert (tmp_path / "state.npz").exists()


def test_a_resumed_state_is_on_the_host(tmp_path):
    """No device could hold the states of all trials."""
    weights = {"w": jnp.arange(3.0)}
    state = step.TrainState(jnp.int32(1), weights, {}, weights, jnp.float32(0.1))
    abstract = jax.eval_shape(lambda: state)
    with contextlib.closing(trial_store.CheckpointStore(tmp_path)) as store:
        assert store.latest(abstract) is None
        store.save(state, _PROGRESS, True)
        store.wait()
        latest, _ = store.latest(abstract)
    for leaf in jax.tree.leaves(latest):
        assert not isinstance(leaf, jax.Array)
    assert latest.params["w"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.pop("latest/progress"), "progress"),
        (lambda d: d.pop("latest/params.w"), "/params.w is missing"),
        (lambda d: d.update({"latest/params.w": np.zeros(4)}), r"/params.w has shape \(4,\)"),
        (lambda d: d.update({"latest/progress": np.array('{"epoch": 1, "more": 2}')}), "more"),
    ],
)
def test_a_file_without_an_entry_is_refused(tmp_path, change, problem):
    state = {"params": {"w": np.zeros(3)}}
    trial_store.FileStore(tmp_path).save(state, _PROGRESS, True)
    with np.load(tmp_path / "state.npz") as stored:
        entries = dict(stored)
    change(entries)
    np.savez(tmp_path / "state.npz", **entries)
    with pytest.raises(UserError, match=problem) as error:
        trial_store.FileStore(tmp_path).latest(state)
    assert error.value.path == tmp_path / "state.npz" and "\n" not in str(error.value)


def _small_state(value):
    return step.TrainState(np.int32(value), {"w": np.full(9, value, np.float32)}, {}, {}, np.float32(0.1))


def _save_epochs(store, epochs):
    for epoch in epochs:
        progress = Progress(epoch=epoch, learning_rate=0.1, best_auroc=0.6, best_epoch=1)
        store.save(_small_state(epoch), progress, is_best=epoch == 1)


@pytest.mark.parametrize("spoil", [damage.cut, damage.flip, lambda path: path.unlink()])
def test_a_damaged_file_costs_one_save(tmp_path, capsys, spoil):
    _save_epochs(trial_store.FileStore(tmp_path), (1, 2, 3))
    spoil(tmp_path / "state.npz")
    resumed = trial_store.FileStore(tmp_path)
    found, progress = resumed.latest(_small_state(0))
    assert int(found.step) == progress.epoch == 2 and capsys.readouterr().out.count("\n") == 1
    _save_epochs(resumed, (3,))
    assert int(resumed.latest(_small_state(0))[0].step) == 3 and int(resumed.best(_small_state(0))[0].step) == 1
    assert capsys.readouterr().out == ""


def test_the_file_before_is_read_only_if_it_is_needed(tmp_path, monkeypatch):
    _save_epochs(trial_store.FileStore(tmp_path), (1, 2))
    read, read_whole = [], files.open_npz
    monkeypatch.setattr(files, "open_npz", lambda path: read.append(path.name) or read_whole(path))
    assert trial_store.FileStore(tmp_path).latest(_small_state(0))[1].epoch == 2 and read == ["state.npz"]
    for old, new in (("state.npz", "swap"), (trial_store.PREVIOUS, "state.npz"), ("swap", trial_store.PREVIOUS)):
        (tmp_path / old).rename(tmp_path / new)
    assert trial_store.FileStore(tmp_path).latest(_small_state(0))[1].epoch == 2 and trial_store.PREVIOUS in read


def test_a_file_stores_the_latest_and_the_best_state(tmp_path):
    def state(value):
        params = {"classifier": {"bias": np.full(3, value, np.float32)}}
        return step.TrainState(np.int32(value), params, {}, params, np.float32(0.1))

    store = trial_store.FileStore(tmp_path)
    assert store.latest(state(0)) is None
    store.save(state(1), _PROGRESS, True)
    resumed = trial_store.FileStore(tmp_path)
    resumed.latest(state(0))
    resumed.save(state(2), _PROGRESS, False)
    (latest, _), (best, progress) = resumed.latest(state(0)), resumed.best(state(0))
    assert (int(latest.step), int(best.step)) == (2, 1) and progress == _PROGRESS
    assert latest.params["classifier"]["bias"][0] == 2 and best.params["classifier"]["bias"][0] == 1
