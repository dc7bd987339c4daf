"""Checkpoints: the best and the latest state of a run, by orbax.

A checkpoint is a TrainState and its optim.Progress, under the step's number. A kill during a
save leaves only a temporary folder, which orbax ignores and cleans up.
"""

import contextlib
import dataclasses
import math
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from medfuse_jax import optim
from medfuse_jax.errors import UserError

NOT_VALIDATED = -1.0  # as the AUROC of a checkpoint within an epoch: below any


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    """The run's checkpoints, which keep the latest step and the one of the best validation AUROC."""
    # best_fn beside the policy: with the policy alone, orbax 0.12's best_step() is the latest.
    policy = ocp.checkpoint_managers.AnyPreservationPolicy(
        [
            ocp.checkpoint_managers.LatestN(1),
            ocp.checkpoint_managers.BestN(get_metric_fn=_auroc, reverse=False, n=1),
        ]
    )
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_auroc, best_mode="max")
    return ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(), options=options, item_names=("state", "progress")
    )


def save(manager: ocp.CheckpointManager, state, progress: optim.Progress, val_auroc: float) -> None:
    """Saves in the background. val_auroc: of this very state, or NOT_VALIDATED; nan beats the latter alone."""
    if math.isnan(val_auroc):  # a validation set without an AUROC still needs one checkpoint to call the best
        val_auroc = NOT_VALIDATED / 2
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
        ),
        metrics={"val_auroc": float(val_auroc)},
        force=True,
    )


def restore_latest(manager: ocp.CheckpointManager, state) -> tuple[object, optim.Progress] | None:
    """The latest (state, progress) laid out as `state`, or None where nothing is saved."""
    step = manager.latest_step()
    if step is None:
        return None
    return _restore(manager, step, state)


def restore_best(workdir: Path, state):
    """The state of the best validation AUROC, laid out as `state`; UserError where there is none."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: {workdir} holds no trained model; run medfuse_jax.main first")
    with contextlib.closing(open_manager(workdir)) as manager:
        step = manager.best_step()
        if step is None:
            raise UserError(f"{folder} holds no checkpoint: run medfuse_jax.main with --workdir={workdir} first")
        return _restore(manager, step, state)[0]


def _restore(manager: ocp.CheckpointManager, step: int, state) -> tuple[object, optim.Progress]:
    # With a sharding of this machine: a checkpoint opens on any number of devices.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    try:
        restored = manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()),
        )
    except (ValueError, KeyError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"{manager.directory}/{step} does not fit this run's model or is damaged ({first_line[:200]}); "
            "start anew in another --workdir"
        ) from None
    return restored["state"], optim.Progress(**restored["progress"])


def _auroc(metrics: dict) -> float:
    return metrics["val_auroc"]
