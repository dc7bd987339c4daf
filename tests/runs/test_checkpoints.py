"""checkpoints: the best is the one that training called so; damage is named, never a traceback."""

import contextlib
import errno
import shutil
from pathlib import Path

import damage
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from medfuse_jax import optim
from medfuse_jax.runs import checkpoints
from medfuse_jax.runtime.errors import UserError


@struct.dataclass
class State:
    step: jnp.ndarray
    w: jnp.ndarray


def _state(step):
    return State(jnp.asarray(step), jnp.full((64, 64), float(step)))


def _save_run(workdir, aurocs):
    """Saves a state an epoch, as training does; returns the epoch that training called the best last."""
    progress = optim.Progress(learning_rate=1.0)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        for epoch, auroc in enumerate(aurocs, start=1):
            is_best = progress.update(epoch, 1.0, auroc, plateau_epochs=10)
            checkpoints.save(manager, _state(epoch), progress, is_best)
        manager.wait_until_finished()
    return progress.best_epoch


NAN = float("nan")


@pytest.mark.parametrize(
    ("aurocs", "best"), [((0.6, 0.7, 0.65), 2), ((0.6, 0.7, 0.7, 0.65), 2), ((NAN, NAN, NAN), 1), ((NAN, 0.4, NAN), 2)]
)
def test_the_best_is_the_one_that_training_called_so(tmp_path, aurocs, best):
    assert _save_run(tmp_path, aurocs) == best
    restored = checkpoints.restore_best(tmp_path, _state(0))
    assert int(restored.step) == best and float(restored.w[0, 0]) == best


def test_a_best_that_was_taken_away_is_missed(tmp_path):
    _save_run(tmp_path, (0.6, 0.7, 0.65))
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="no longer holds the best, of epoch 2"):
        checkpoints.restore_best(tmp_path, _state(0))


def test_the_latest_is_where_training_goes_on(tmp_path):
    _save_run(tmp_path, (0.6, 0.7, 0.65))
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        state, progress = checkpoints.restore_latest(manager, _state(0))
    assert int(state.step) == progress.epoch == 3 and progress.best_epoch == 2


def test_a_checkpoint_within_an_epoch_is_the_latest_and_never_the_best(tmp_path):
    progress = optim.Progress(learning_rate=1.0)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        checkpoints.save(manager, _state(1), progress, progress.update(1, 1.0, 0.6, plateau_epochs=10))
        checkpoints.save(manager, _state(2), progress, is_best=False)
        manager.wait_until_finished()
        assert int(checkpoints.restore_latest(manager, _state(0))[0].step) == 2
    assert int(checkpoints.restore_best(tmp_path, _state(0)).step) == 1


@pytest.mark.parametrize("spoil", [damage.cut, damage.flip, lambda path: path.write_bytes(b""), Path.unlink])
def test_whatever_file_is_damaged_the_error_is_one_line_or_the_state_is_right(tmp_path, spoil):
    """Every file of a checkpoint in turn. Some hold nothing that restoring reads: then it must be exact."""
    _save_run(tmp_path / "whole", (0.6,))
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()]
    assert len(names) > 5
    refused = 0
    for name in names:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        spoil(tmp_path / "run" / name)
        try:
            restored = checkpoints.restore_best(tmp_path / "run", _state(0))
            np.testing.assert_array_equal(restored.w, _state(1).w)
        except UserError as error:
            assert "\n" not in str(error) and "checkpoints" in str(error)
            refused += 1
    assert refused >= 2


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no trained model"):
        checkpoints.restore_best(tmp_path, _state(0))
    checkpoints.open_manager(tmp_path).close()
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.restore_best(tmp_path, _state(0))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")])
def test_too_little_memory_is_no_damage(error):
    """A sweep goes on with fewer trials at once."""
    with pytest.raises(type(error)) as caught, checkpoints._damage_named(Path("run/checkpoints/3")):
        raise error
    assert caught.value is error


def test_a_full_disk_is_no_damage():
    full = r"no space is left on the disk of run/checkpoints/3"
    with pytest.raises(UserError, match=full), checkpoints._damage_named(Path("run/checkpoints/3")):
        raise OSError(errno.ENOSPC, "No space left on device")
