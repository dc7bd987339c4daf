"""The best and the latest checkpoint of a run, stored with orbax.

A checkpoint is a TrainState and its Progress, numbered by step. A process killed during a save leaves only a
temporary folder, which orbax ignores and removes.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from logging import LogRecord
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import errors, files, hosts
from medfuse_jax.runtime.errors import TryLater, UserError

IMPORT_NOTE = "import.json"  # says where imported weights came from; absent for a trained run


def _is_useful(record: LogRecord) -> bool:
    """Return False for what orbax says of a leftover temporary folder, which the next save replaces, or a full disk."""
    is_full = bool(record.exc_info) and errors.is_disk_full(record.exc_info[1])  # orbax raises it too
    return not is_full and "Attempted to create temporary directory" not in record.getMessage()


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    """Open the run's checkpoints. Only the latest is kept, and the best according to `Progress`."""
    # Give best_fn as well as the policy: without it, best_step() of orbax 0.12 returns the latest step.
    policies = ocp.checkpoint_managers
    best_policy = policies.BestN(get_metric_fn=_best_order, reverse=False, n=1)
    policy = policies.AnyPreservationPolicy([policies.LatestN(1), best_policy])
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_best_order, best_mode="max")
    folder = (workdir / "checkpoints").absolute()
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
        return ocp.CheckpointManager(folder, options=options, item_names=("state", "progress"))


def save(manager: ocp.CheckpointManager, state, progress: Progress, is_best: bool) -> None:
    """Save a state and its progress in the background. is_best: whether this state is the best so far.

    Of the processes that train one run together, all of which have the whole state, the first saves it.
    """
    if not hosts.is_first():
        return
    if int(state.step) in manager.all_steps():  # saved before a signal kept it from being validated
        manager.delete(int(state.step))
    if jax.process_count() > 1:  # orbax refuses one process's device arrays, and writes host arrays in process 0 only
        state = jax.device_get(state)
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
        ),
        # Progress alone decides what is best: orbax treats ties and NaN differently.
        metrics={"best_order": progress.epoch if is_best else -1},
        force=True,
    )


def restore_latest(manager: ocp.CheckpointManager, state) -> tuple[Any, Progress] | None:
    """Return the latest (state, progress), shaped like `state`; None if nothing is saved."""
    with _as_user_error(manager.directory):
        step = manager.latest_step()
    return None if step is None else _restore(manager, step, state)


def restore_best(workdir: Path, state):
    """Return the state with the best validation AUROC, shaped like `state`; raise UserError if there is none."""
    return restore_best_with_progress(workdir, state)[0]


def restore_best_with_progress(workdir: Path, state) -> tuple[Any, Progress]:
    with _open_trained(workdir) as manager:
        return best(manager, state)


def best(manager: ocp.CheckpointManager, state) -> tuple[Any, Progress] | None:
    """Return the (state, progress) with the best validation AUROC, shaped like `state`; None if nothing is saved."""
    step = _best_step(manager)
    if step is None:
        return None
    epoch = _latest_progress(manager).best_epoch
    restored, progress = _restore(manager, step, state)
    if epoch and progress.epoch != epoch:
        message = f"{manager.directory} lacks the best checkpoint (epoch {epoch}): restore it, or train again"
        raise UserError(message, path=manager.directory, value=epoch)
    return restored, progress


def reached(workdir: Path) -> tuple[int, Progress]:
    """Return the best checkpoint's step and the latest progress, without reading a state; raise UserError if none."""
    with _open_trained(workdir) as manager:
        return _best_step(manager), _latest_progress(manager)


def any_saved(workdir: Path) -> bool:
    """Return whether there is a checkpoint to resume from, without creating a folder."""
    if not (workdir / "checkpoints").is_dir():
        return False
    with contextlib.closing(open_manager(workdir)) as manager, _as_user_error(manager.directory):
        return manager.latest_step() is not None


def imported(workdir: Path) -> dict:
    """Return the note that `torch_import` wrote beside imported weights; {} for a trained run.

    Keys: 'file', 'sha256', 'modules' (modules of the model that the file held), 'unused' (entries of the file that the
    model does not use).
    """
    path = workdir / IMPORT_NOTE
    return files.read_json(path, "import the weights again into another --workdir") if path.exists() else {}


@contextlib.contextmanager
def _open_trained(workdir: Path) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints of a run that has at least one; otherwise raise UserError, without creating a folder."""
    folder = workdir / "checkpoints"
    if not folder.is_dir() and (workdir / "state.npz").exists():
        export = f"--export={int(workdir.name) if workdir.name.isdecimal() else 'TRIAL'}"
        message = f"{workdir} is a trial without a checkpoint: repeat the sweep's command with {export} to write it"
        raise UserError(message, field="--export", path=workdir)
    if not folder.is_dir():
        raise UserError(f"{workdir} holds no trained model: run medfuse_jax.main first", path=folder)
    with contextlib.closing(open_manager(workdir)) as manager:
        if _best_step(manager) is None:
            raise UserError(f"{folder} holds no checkpoint: run medfuse_jax.main --workdir={workdir}", path=folder)
        yield manager


def _best_step(manager: ocp.CheckpointManager) -> int | None:
    with _as_user_error(manager.directory):
        return manager.best_step()


def _latest_progress(manager: ocp.CheckpointManager) -> Progress:
    with _as_user_error(manager.directory):
        latest = manager.restore(manager.latest_step(), args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        return Progress(**latest["progress"])


def _restore(manager: ocp.CheckpointManager, step: int, state) -> tuple[Any, Progress]:
    # Restore onto one local device, so that a checkpoint opens on any number of devices.
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local), state)
    with _as_user_error(manager.directory / str(step)):
        restored = manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()),
        )
        return restored["state"], Progress(**restored["progress"])


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
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"{path} does not match this run's model or is damaged ({first_line[:200]})"
        raise UserError(f"{message}: restore a copy, or start again in another --workdir", path=path) from None


def _best_order(metrics: dict) -> float:
    return metrics["best_order"]
