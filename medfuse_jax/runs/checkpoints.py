"""The best and the latest two checkpoints of a run, stored with orbax.

A checkpoint, numbered by step, is a TrainState and a note: its Progress and the hash of the state, under a seal. So
damage is noticed: training goes on from the previous checkpoint, and a damaged best one is refused. A process killed
during a save leaves only a temporary folder, which orbax ignores and removes.
"""

import contextlib
import dataclasses
import errno
import gc
import hashlib
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from logging import LogRecord
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import errors, files, hosts, watchdog
from medfuse_jax.runtime.errors import TryLater, UserError

_HOW = "restore a copy, or rerun the command that trained it, which goes on from the previous checkpoint"
_NOT_NOW = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT)  # what may pass
# Of orbax: about a temporary folder that the next save replaces, at each epoch that is shorter than a save, and about a
# damaged file that nothing needs.
_USELESS = (
    "Attempted to create temporary directory",
    "Waiting for previous save to complete took",
    "Failed to read Metadata file",
)
IMPORT_NOTE = "import.json"  # says where imported weights came from; absent for a trained run


def _is_useful(record: LogRecord) -> bool:
    """Return False for orbax's messages about a full disk, which it raises too, and for those of _USELESS."""
    is_full = bool(record.exc_info) and errors.is_disk_full(record.exc_info[1])
    return not is_full and not any(text in record.getMessage() for text in _USELESS)


class _BestAndLatest(ocp.checkpoint_managers.PreservationPolicy):
    """Keep the best checkpoint, the latest, and the one before, in case the latest is damaged."""

    def __init__(self, folder: Path):
        self._folder = folder

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        saved = _steps(self._folder)  # without the one that is being saved
        best = _best_step(self._folder, saved) if saved else None
        return [i >= len(checkpoints) - 2 or found.step == best for i, found in enumerate(checkpoints)]


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    """Open the run's checkpoints. Only the latest two are kept, and the best according to `Progress`."""
    folder = (workdir / "checkpoints").absolute()
    options = ocp.CheckpointManagerOptions(preservation_policy=_BestAndLatest(folder))
    logging.get_absl_logger().addFilter(_is_useful)  # adding the same function again does nothing
    if jax.process_count() > 1:  # the first saves what all have, so a save must not wait for the others
        folder.mkdir(parents=True, exist_ok=True)
        own_process = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process{jax.process_index()}",
        )
        options = dataclasses.replace(options, create=False, multiprocessing_options=own_process)
    with _as_user_error(folder):
        manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "note"))
    manager.reached_preemption = lambda step: False  # jax has one counter of such calls, which is hosts.must_stop's
    return manager


def save(manager: ocp.CheckpointManager, state, progress: Progress, is_best: bool) -> None:
    """Save a state and its progress in the background. is_best: whether this state is the best so far.

    Of the processes that train one run together, all of which have the whole state, the first saves it.
    """
    if not hosts.is_first():
        return
    step = int(state.step)
    if step in manager.all_steps():  # saved before a signal kept it from being validated
        _replace_note(Path(manager.directory), step, progress, is_best)
        return
    if jax.process_count() > 1:  # orbax refuses one process's device arrays, and writes host arrays in process 0 only
        state = jax.device_get(state)
    note = {"step": step, "is_best": is_best, "state_sha256": _digest(state), "progress": dataclasses.asdict(progress)}
    manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), note=ocp.args.JsonSave(files.sealed(note))),
        force=True,
    )


def _replace_note(folder: Path, step: int, progress: Progress, is_best: bool) -> None:
    """Write what validation has found into the note of a checkpoint whose state is the same, at once."""
    note = _note(folder, step) | {"is_best": is_best, "progress": dataclasses.asdict(progress)}
    files.write_json(_note_path(folder, step), files.sealed(note))


def resume(manager: ocp.CheckpointManager, state) -> tuple[Any, Progress] | None:
    """Return the latest intact (state, progress), shaped like `state`; None if nothing is saved.

    Damaged newer checkpoints are moved aside, with a line that says so; what an interrupted deletion left is removed.
    Raises UserError if none is intact, or if the best is not: the run would end without it. Raises TryLater if one
    cannot be read now.
    """
    folder, resumed, damaged = Path(manager.directory), None, {}
    steps = _steps(folder)
    for step in reversed(steps):
        try:
            resumed = _restore(manager, step, state)
            break
        except TryLater:
            raise
        except UserError as error:
            watchdog.check()  # a library's answer to a signal is no damage
            damaged[step] = error
    if not resumed:
        if damaged:
            raise damaged[max(damaged)]
        return None
    last = int(resumed[0].step)
    best_step = _check_best(folder, [step for step in steps if step <= last], resumed[1])
    if best_step != last:
        _restore(manager, best_step, state)
    left = [step for step in steps if step < last and not _note_path(folder, step).exists()]
    for step in left if hosts.is_first() else ():
        shutil.rmtree(folder / str(step))
    for step in damaged if hosts.is_first() else ():
        aside = folder.with_name(f"damaged_checkpoint_{step}")
        print(f"warning: {folder / str(step)} is damaged, and now {aside}: training goes on from step {last}")
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
    if damaged or left:
        manager.reload()
    return resumed


def restore_best(workdir: Path, state):
    """Return the state with the best validation AUROC, shaped like `state`; raise UserError if there is none."""
    return restore_best_with_progress(workdir, state)[0]


def restore_best_with_progress(workdir: Path, state) -> tuple[Any, Progress]:
    step, _ = reached(workdir)
    with contextlib.closing(open_manager(workdir)) as manager:
        return _restore(manager, step, state)


def reached(workdir: Path) -> tuple[int, Progress]:
    """Return the best checkpoint's step and the latest progress, without reading a state; raise UserError if none."""
    folder = workdir / "checkpoints"
    if not folder.is_dir() and (workdir / "state.npz").exists():
        export = f"--export={int(workdir.name) if workdir.name.isdecimal() else 'TRIAL'}"
        message = f"{workdir} is a trial without a checkpoint: repeat the sweep's command with {export} to write it"
        raise UserError(message, field="--export", path=workdir)
    if not folder.is_dir():
        raise UserError(f"{workdir} holds no trained model: run medfuse_jax.main first", path=folder)
    if not (steps := _steps(folder)):
        raise UserError(f"{folder} holds no checkpoint: run medfuse_jax.main --workdir={workdir}", path=folder)
    progress = _progress(_note(folder, steps[-1]))
    return _check_best(folder, steps, progress), progress


def is_best(workdir: Path, state, progress: Progress) -> bool:
    """Return whether the best checkpoint, as its note says, is this state with this progress."""
    folder = workdir / "checkpoints"
    with contextlib.suppress(UserError):
        note = _note(folder, reached(workdir)[0])
        return _progress(note) == progress and note["state_sha256"] == _digest(state)
    return False


def any_saved(workdir: Path) -> bool:
    """Return whether there is a checkpoint to resume from, without creating a folder."""
    return bool(_steps(workdir / "checkpoints"))


def imported(workdir: Path) -> dict:
    """Return the note that `torch_import` wrote beside imported weights; {} for a trained run.

    Keys: 'file', 'sha256', 'modules' (modules of the model that the file held), 'unused' (entries of the file that the
    model does not use).
    """
    path = workdir / IMPORT_NOTE
    return files.read_json(path, "import the weights again into another --workdir") if path.exists() else {}


def _steps(folder: Path) -> list[int]:
    """Return the numbers of the saved steps, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def _note_path(folder: Path, step: int) -> Path:
    return folder / str(step) / "note" / "metadata"


def _note(folder: Path, step: int) -> dict:
    """Return what `save` noted of a step; raise UserError if it is damaged, or is another step's."""
    note = files.read_json(_note_path(folder, step), _HOW, must_be_sealed=True)
    if note["step"] != step:
        raise UserError(f"{folder / str(step)} is the checkpoint of step {note['step']}: {_HOW}", path=folder)
    return note


def _progress(note: dict) -> Progress:
    return Progress(**note["progress"])


def _best_step(folder: Path, steps: list[int]) -> int:
    """Return the best of the steps whose notes are intact; the latest step if none of these is a best one."""
    best = steps[-1]
    for step in steps:
        with contextlib.suppress(UserError):
            best = step if _note(folder, step)["is_best"] else best
    return best


def _check_best(folder: Path, steps: list[int], latest: Progress) -> int:
    """Return the best of the steps; raise UserError unless it is of the epoch that `latest` says."""
    step = _best_step(folder, steps)
    note = _note(folder, step)
    if latest.best_epoch and not (note["is_best"] and _progress(note).epoch == latest.best_epoch):
        message = f"{folder} lacks the best checkpoint (epoch {latest.best_epoch}): restore it, or train again"
        raise UserError(message, path=folder, value=latest.best_epoch)
    return step


def _restore(manager: ocp.CheckpointManager, step: int, state) -> tuple[Any, Progress]:
    folder = Path(manager.directory)
    note = _note(folder, step)
    # Restore onto one local device, so that a checkpoint opens on any number of devices.
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local), state)
    with _quiet_coroutines(), _as_user_error(folder / str(step)):
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        if _digest(restored) != note["state_sha256"]:
            raise ValueError("its content is not what was saved")
    progress = _progress(note)
    # The saved one is older if the note was replaced.
    return restored.replace(learning_rate=jnp.asarray(progress.learning_rate, jnp.float32)), progress


@contextlib.contextmanager
def _quiet_coroutines() -> Iterator[None]:
    """Keep Python from printing the tracebacks of coroutines that orbax leaves behind when it finds damage."""
    before = sys.unraisablehook
    try:
        yield
    except UserError as error:
        sys.unraisablehook = lambda unraisable: None
        left = error.__context__
        while left is not None:
            traceback.clear_frames(left.__traceback__)
            left.__traceback__, left = None, left.__cause__ or left.__context__
        gc.collect()
        raise
    finally:
        sys.unraisablehook = before


def _digest(state) -> str:
    """Return the SHA-256 of a state's arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Turn any error while reading a checkpoint, except out of memory, into a UserError that names the path."""
    try:
        yield
    except Exception as error:  # orbax raises a bare Exception for a damaged file
        if errors.is_out_of_memory(error):  # not damage: a sweep retries with fewer trials at once
            raise
        if errors.is_disk_full(error):
            raise TryLater(f"the disk of {path} is full: free some space and try again", path=path) from None
        if isinstance(error, OSError) and error.errno in _NOT_NOW:
            raise TryLater(f"{path} cannot be read now ({error.strerror}): try again", path=path) from None
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"{path} does not match this run's model or is damaged ({first_line[:200]})"
        raise UserError(f"{message}: restore a copy, or start again in another --workdir", path=path) from None
