"""checkpoints: the best is the one that Progress chose; damage raises a UserError that names the file."""

import contextlib
import errno
import json
import shutil
from pathlib import Path

import damage
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from refusals import refused

from medfuse_jax.runs import checkpoints
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime.errors import UserError

NAN = float("nan")


@struct.dataclass
class State:
    step: jnp.ndarray
    w: jnp.ndarray
    learning_rate: jnp.ndarray


def _state(step):
    w = step + jnp.arange(64.0 * 64).reshape(64, 64) / 7  # not compressible: the largest file is the one with it
    return State(jnp.asarray(step), w, jnp.float32(1))


def _save_run(workdir, aurocs):
    """Save a state each epoch, as training does; return the best epoch."""
    progress = Progress(learning_rate=1.0)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        for epoch, auroc in enumerate(aurocs, start=1):
            is_best = progress.update(epoch, 1.0, auroc, plateau_epochs=10)
            checkpoints.save(manager, _state(epoch), progress, is_best)
        manager.wait_until_finished()
    return progress.best_epoch


@pytest.mark.parametrize(
    ("aurocs", "best"), [((0.6, 0.7, 0.65), 2), ((0.6, 0.7, 0.7, 0.65), 2), ((NAN, NAN, NAN), 1), ((NAN, 0.4, NAN), 2)]
)
def test_best_and_latest_are_kept(tmp_path, aurocs, best):
    assert _save_run(tmp_path, aurocs) == best
    restored = checkpoints.restore_best(tmp_path, _state(0))
    assert int(restored.step) == best and float(restored.w[0, 0]) == best
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        state, progress = checkpoints.resume(manager, _state(0))
    assert int(state.step) == progress.epoch == len(aurocs) and progress.best_epoch == best


def test_removed_best_checkpoint_is_reported(tmp_path):
    _save_run(tmp_path, (0.6, 0.7, 0.65))
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError) as caught:
        checkpoints.restore_best(tmp_path, _state(0))
    assert (caught.value.path, caught.value.value) == (tmp_path / "checkpoints", 2)


def test_checkpoint_within_an_epoch_is_the_latest_and_never_the_best(tmp_path):
    progress = Progress(learning_rate=1.0)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        checkpoints.save(manager, _state(1), progress, progress.update(1, 1.0, 0.6, plateau_epochs=10))
        checkpoints.save(manager, _state(2), progress, is_best=False)
        manager.wait_until_finished()
        assert int(checkpoints.resume(manager, _state(0))[0].step) == 2
    assert int(checkpoints.restore_best(tmp_path, _state(0)).step) == 1


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("epochs", [1, 4])
def test_a_kill_while_a_late_validation_is_saved_costs_nothing(tmp_path, monkeypatch, is_killed, epochs):
    """A signal has saved the last epoch's state before its validation, which now halves the learning rate."""
    _save_run(tmp_path, (0.6, 0.7, 0.65)[: epochs - 1])
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        progress = checkpoints.resume(manager, _state(0))[1] if epochs > 1 else Progress(learning_rate=1.0)
        checkpoints.save(manager, _state(epochs), progress, is_best=False)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        state, progress = checkpoints.resume(manager, _state(0))
        is_best = progress.update(epochs, 2.0, 0.8, plateau_epochs=-1 if epochs == 1 else 0)
        monkeypatch.setattr(Path, "replace", _be_killed if is_killed else Path.replace)
        with pytest.raises(KeyboardInterrupt) if is_killed else contextlib.nullcontext():
            checkpoints.save(manager, state.replace(learning_rate=jnp.float32(0.5)), progress, is_best)
        monkeypatch.undo()
    state, found = _resume(tmp_path)
    assert int(state.step) == epochs and float(state.learning_rate) == found.learning_rate == (1 if is_killed else 0.5)
    assert found.epoch == (epochs - 1 if is_killed else epochs)
    assert int(checkpoints.restore_best(tmp_path, _state(0)).step) == (2 if is_killed and epochs > 1 else epochs)


def _be_killed(*_):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    _save_run(folder, (0.6,))
    return folder


def _resume(workdir):
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        return checkpoints.resume(manager, _state(0))


@pytest.mark.parametrize(
    "spoil",
    [damage.cut, damage.flip, Path.unlink, pytest.param(lambda path: path.write_bytes(b""), marks=pytest.mark.nightly)],
)
def test_damage_to_any_file_is_one_line_or_changes_nothing(saved, tmp_path, spoil):
    """Restoring does not read every file: then the state must be exact."""
    names = [p.relative_to(saved) for p in saved.rglob("*") if p.is_file()]
    assert len(names) > 5
    refused = 0
    for name in names:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(saved, tmp_path / "run")
        spoil(tmp_path / "run" / name)
        try:
            restored = checkpoints.restore_best(tmp_path / "run", _state(0))
            np.testing.assert_array_equal(restored.w, _state(1).w)
        except UserError as error:
            assert "\n" not in str(error) and error.path.is_relative_to(tmp_path / "run" / "checkpoints")
            refused += 1
    assert refused >= 2


def _spoil_state(folder):
    damage.flip(max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0))


def _exchange_state(folder):
    """Put another state there, as bits do that flip where the storage does not notice it."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.with_name("3") / "state", folder / "state")


def _unseal(folder):
    path = folder / "note" / "metadata"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}))


def _interrupt_deletion(folder):
    shutil.rmtree(folder / "note")


@pytest.mark.parametrize("spoil", [_spoil_state, _exchange_state, _unseal, _interrupt_deletion])
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, capsys, spoil):
    _save_run(tmp_path / "run", (0.6, 0.7, 0.65, 0.64))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [2, 3, 4]
    spoil(folder / "4")
    if spoil in (_spoil_state, _exchange_state):  # of a finished run the best is scored, and the latest not read
        assert int(checkpoints.restore_best(tmp_path / "run", _state(0)).step) == 2
    else:
        with refused():
            checkpoints.restore_best(tmp_path / "run", _state(0))
    capsys.readouterr()
    with contextlib.closing(checkpoints.open_manager(tmp_path / "run")) as manager:
        state, progress = checkpoints.resume(manager, _state(0))
        assert (int(state.step), progress.epoch, progress.best_epoch) == (3, 3, 2)
        checkpoints.save(manager, _state(4), progress, progress.update(4, 1.0, 0.8, plateau_epochs=10))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and str(folder / "4") in printed and "step 3" in printed
    assert int(checkpoints.restore_best(tmp_path / "run", _state(0)).step) == 4
    assert (tmp_path / "run" / "damaged_checkpoint_4").is_dir()


def test_remains_of_an_interrupted_deletion_are_removed(tmp_path, capsys):
    _save_run(tmp_path, (0.6, 0.7, 0.65, 0.64))
    shutil.copytree(tmp_path / "checkpoints" / "3" / "state", tmp_path / "checkpoints" / "1" / "state")
    assert _resume(tmp_path)[1].epoch == 4 and capsys.readouterr().out == ""
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3", "4"]


def test_a_damaged_best_checkpoint_is_refused_before_more_is_trained(tmp_path):
    _save_run(tmp_path, (0.6, 0.7, 0.65, 0.64))
    _spoil_state(tmp_path / "checkpoints" / "2")
    for use in (_resume, lambda workdir: checkpoints.restore_best(workdir, _state(0))):
        with refused(path=tmp_path / "checkpoints" / "2"):
            use(tmp_path)
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_swapped_best_and_latest_are_noticed(tmp_path):
    _save_run(tmp_path, (0.6, 0.7, 0.65, 0.64))
    folder = tmp_path / "checkpoints"
    for old, new in (("2", "swap"), ("4", "2"), ("swap", "4")):
        (folder / old).rename(folder / new)
    for use in (_resume, lambda workdir: checkpoints.restore_best(workdir, _state(0))):
        with refused():
            use(tmp_path)


def test_a_run_whose_only_checkpoint_is_damaged_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    _spoil_state(tmp_path / "run" / "checkpoints" / "1")
    with refused(path=tmp_path / "run" / "checkpoints" / "1"):
        _resume(tmp_path / "run")


def test_folder_without_checkpoint_is_named(tmp_path):
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            checkpoints.restore_best(tmp_path, _state(0))
        assert caught.value.path == folder
        folder.mkdir(exist_ok=True)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")])
def test_out_of_memory_is_not_damage(error):
    """A sweep retries with fewer trials at once."""
    with pytest.raises(type(error)) as caught, checkpoints._as_user_error(Path("run/checkpoints/3")):
        raise error
    assert caught.value is error


def test_full_disk_is_not_damage():
    with pytest.raises(UserError, match=r"disk .* is full"), checkpoints._as_user_error(Path("run/checkpoints/3")):
        raise OSError(errno.ENOSPC, "No space left on device")
