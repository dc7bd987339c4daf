"""Checkpoints: the best and the latest state of a run, by orbax.

A checkpoint is a TrainState and its optim.Progress, under the step's number. A kill during a
save leaves only a temporary folder, which orbax ignores and cleans up.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from logging import LogRecord
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging

from medfuse_jax import optim
from medfuse_jax.runtime import errors
from medfuse_jax.runtime.errors import UserError

IMPORT_NOTE = "import.json"  # beside weights that were imported, not trained here


def _is_news(record: LogRecord) -> bool:
    """Whether a user can do anything about it: a kill during a save leaves a folder that the next save replaces."""
    return "Attempted to create temporary directory" not in record.getMessage()


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    """The run's checkpoints, which keep the latest step and the one that `optim.Progress` calls the best."""
    # best_fn beside the policy: with the policy alone, orbax 0.12's best_step() is the latest.
    policy = ocp.checkpoint_managers.AnyPreservationPolicy(
        [
            ocp.checkpoint_managers.LatestN(1),
            ocp.checkpoint_managers.BestN(get_metric_fn=_best_order, reverse=False, n=1),
        ]
    )
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_best_order, best_mode="max")
    folder = (workdir / "checkpoints").absolute()
    logging.get_absl_logger().addFilter(_is_news)  # the same one again is no second
    if jax.process_count() > 1:  # each process trains runs of its own: none waits for another at a save
        folder.mkdir(parents=True, exist_ok=True)
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process{jax.process_index()}",
        )
        options = dataclasses.replace(options, create=False, multiprocessing_options=alone)
    with _damage_named(folder):
        return ocp.CheckpointManager(folder, options=options, item_names=("state", "progress"))


def save(manager: ocp.CheckpointManager, state, progress: optim.Progress, is_best: bool) -> None:
    """Saves in the background. is_best: whether this very state is progress's best."""
    if jax.process_count() > 1:  # orbax refuses a process' own device arrays; host arrays it writes in process 0
        state = jax.device_get(state)
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
        ),
        # One judge of what is best: orbax would settle ties and nan another way than Progress does.
        metrics={"best_order": progress.epoch if is_best else -1},
        force=True,
    )


def restore_latest(manager: ocp.CheckpointManager, state) -> tuple[object, optim.Progress] | None:
    """The latest (state, progress) laid out as `state`, or None where nothing is saved."""
    with _damage_named(manager.directory):
        step = manager.latest_step()
    return None if step is None else _restore(manager, step, state)


def restore_best(workdir: Path, state):
    """The state of the best validation AUROC, laid out as `state`; UserError where there is none."""
    return restore_best_with_progress(workdir, state)[0]


def restore_best_with_progress(workdir: Path, state) -> tuple[object, optim.Progress]:
    """The same, and the progress at it."""
    with _open_trained(workdir) as manager:
        return best(manager, state)


def reached(workdir: Path) -> tuple[int, optim.Progress]:
    """The step of the best checkpoint, and the progress at the latest; no state is read. UserError as restore_best."""
    with _open_trained(workdir) as manager:
        return _best_step(manager), _latest_progress(manager)


def any_saved(workdir: Path) -> bool:
    """Whether there is a checkpoint to go on from; makes no folder."""
    if not (workdir / "checkpoints").is_dir():
        return False
    with contextlib.closing(open_manager(workdir)) as manager, _damage_named(manager.directory):
        return manager.latest_step() is not None


@contextlib.contextmanager
def _open_trained(workdir: Path) -> Iterator[ocp.CheckpointManager]:
    """A run's checkpoints, of which there is at least one; else UserError, and nothing is made."""
    folder = workdir / "checkpoints"
    if not folder.is_dir() and (workdir / "state.npz").exists():
        raise UserError(
            f"{workdir} is a trial kept in state.npz: to write its checkpoint, give the sweep's command again with "
            f"--export={int(workdir.name) if workdir.name.isdecimal() else 'TRIAL'}"
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: {workdir} holds no trained model; run medfuse_jax.main first")
    with contextlib.closing(open_manager(workdir)) as manager:
        if _best_step(manager) is None:
            raise UserError(f"{folder} holds no checkpoint: run medfuse_jax.main with --workdir={workdir} first")
        yield manager


def best(manager: ocp.CheckpointManager, state) -> tuple[object, optim.Progress] | None:
    """The (state, progress) of the best validation AUROC, laid out as `state`, or None where nothing is saved."""
    step = _best_step(manager)
    if step is None:
        return None
    epoch = _latest_progress(manager).best_epoch
    restored, progress = _restore(manager, step, state)
    if epoch and progress.epoch != epoch:
        raise UserError(f"{manager.directory} no longer holds the best, of epoch {epoch}: put it back, or train anew")
    return restored, progress


def _best_step(manager: ocp.CheckpointManager) -> int | None:
    with _damage_named(manager.directory):
        return manager.best_step()


def _latest_progress(manager: ocp.CheckpointManager) -> optim.Progress:
    with _damage_named(manager.directory):
        latest = manager.restore(manager.latest_step(), args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        return optim.Progress(**latest["progress"])


def imported(workdir: Path) -> dict:
    """What `torch_import` noted of the weights it put into a workdir, {} where the run was trained.

    'file', 'sha256', 'modules' (those the file held, by their names in the model), 'unused' (entries).
    """
    path = workdir / IMPORT_NOTE
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): import the weights again into another --workdir") from None


def _restore(manager: ocp.CheckpointManager, step: int, state) -> tuple[object, optim.Progress]:
    # With a sharding of this machine: a checkpoint opens on any number of devices.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    with _damage_named(manager.directory / str(step)):
        restored = manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()),
        )
        return restored["state"], optim.Progress(**restored["progress"])


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What goes wrong while a checkpoint is read is said in one line that names it."""
    try:
        yield
    except Exception as error:  # orbax raises a bare Exception for a damaged file
        if errors.is_out_of_memory(error):  # the checkpoint is whole, and a sweep goes on with fewer trials at once
            raise
        if errors.is_disk_full(error):
            raise UserError(f"no space is left on the disk of {path}: free some, and it can be read") from None
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} does not fit this run's model or is damaged ({first_line[:200]}): put a whole copy in its "
            "place, or start anew in another --workdir"
        ) from None


def _best_order(metrics: dict) -> float:
    return metrics["best_order"]
