"""The folder of one run: claimed by one config and one set of shards, written by one process at a time."""

import contextlib
import json
from pathlib import Path

from medfuse_jax import config as config_lib
from medfuse_jax import experiment, schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

_SWEEP_DEPTH = 3  # trials/003/pretrain_ehr


def locked(workdir: Path) -> contextlib.AbstractContextManager:
    """Makes the folder and keeps a second process out of it while the block runs."""
    busy = f"another process is at work in {workdir}: wait for it, or give another --workdir"
    return files.locked(workdir / ".lock", f"--workdir={workdir}", busy)


def claim(workdir: Path, run: experiment.Experiment, by_sweep: bool = False) -> None:
    """Makes the workdir this run's, or refuses one that is no run's or another's: of another config or other shards.

    by_sweep: whether a sweep claims a folder inside its own, for a trial or a pre-training stage.
    """
    if not by_sweep:
        check_outside_sweeps(workdir)
    _check_a_runs(workdir)
    check_apart(workdir, run.config.data.dir)
    # A start that failed before anything was trained claims nothing.
    if any(any(workdir.glob(made)) for made in ("checkpoints", "pretrain_*/checkpoints", "result*.json")):
        # The sweep has compared its own config; its encoders' paths change when its folder is moved.
        ignored = ("init.ehr", "init.cxr") if by_sweep else ()
        if difference := config_lib.difference(config_lib.load(workdir / "config.json"), run.config, ignored):
            raise UserError(f"{workdir} holds another run ({difference}): choose another --workdir")
        _check_data(workdir, run)
    with files.must_write(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(workdir / "data.json", json.dumps({"digest": run.dataset.digest}) + "\n")
        config_lib.save(run.config, workdir / "config.json")


def check_outside_sweeps(workdir: Path) -> None:
    """Raises UserError if the workdir is inside a sweep's folder, where only the sweep writes.

    Looks as deep as a sweep's folders go, and through links both ways.
    """
    for path in (workdir.absolute(), workdir.resolve()):
        for above in path.parents[:_SWEEP_DEPTH]:
            if (above / "sweep.json").exists():
                raise UserError(f"{workdir} is in the folder of a sweep, {above}: choose another --workdir")


def check_apart(workdir: Path, data_dir: str) -> None:
    """Raises UserError where the workdir is the shards' folder, or lies in a dataset: who deletes it deletes those."""
    shards, folder = Path(data_dir).resolve(), workdir.resolve()
    if folder == shards or any(shards / task in (folder, *folder.parents) for task in schema.TASKS):
        raise UserError(f"{workdir} holds the shards (config.data.dir): choose another --workdir")


def is_ensemble(workdir: Path) -> bool:
    """Whether medfuse_jax.ensemble made the workdir."""
    try:
        content = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "rule" in content


def _check_a_runs(workdir: Path) -> None:
    """Raises UserError where the workdir holds an ensemble, a sweep or whatever else has no run's config."""
    path, what = workdir / "config.json", ""
    if (workdir / "sweep.json").exists():
        what = "a sweep"
    elif is_ensemble(workdir):
        what = "an ensemble"
    elif path.exists():
        try:
            config_lib.load(path)
        except UserError as error:
            what = f"no run of this version ({error})"
    if what:
        raise UserError(f"{workdir} holds {what}: choose another --workdir")


def open_run(workdir: Path, on: list | None = None, data_dir: str = "") -> experiment.Experiment:
    """The run that claimed the workdir; UserError where there is none, or its config or shards are no longer the same.

    on: its devices, by default all of this process. data_dir: where its shards were moved, which the workdir keeps.
    """
    if is_ensemble(workdir):
        raise UserError(f"{workdir} holds an ensemble, which has no weights: give the workdir of one of its runs")
    if (workdir / "sweep.json").exists():
        raise UserError(f"{workdir} holds a sweep: give one of its trials, such as {workdir / 'trials' / '000'}")
    config = config_lib.load(workdir / "config.json")
    if data_dir:
        config.data.dir = data_dir
    elif not Path(config.data.dir).is_dir():
        raise UserError(
            f"{config.data.dir}, where {workdir} had its shards, is no longer there: put it back, or say once where it "
            f"is: python -m medfuse_jax.evaluate --workdir={workdir} --data_dir=NEW"
        )
    run = experiment.open_experiment(config, on)
    _check_data(workdir, run)
    if data_dir:
        config_lib.save(config, workdir / "config.json")
    return run


def _check_data(workdir: Path, run: experiment.Experiment) -> None:
    path = workdir / "data.json"
    try:
        digest = json.loads(path.read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): start the run anew in another --workdir") from None
    if digest != run.dataset.digest:
        raise UserError(
            f"{run.config.data.dir}/{run.config.task} is no longer the build that {workdir} was trained on, so its "
            f"test stays may have been trained on{_or_else(run)}: put the shards back, or start anew in "
            "another --workdir"
        )


def _or_else(run: experiment.Experiment) -> str:
    """What beside the build may have changed."""
    config, others = run.config, []
    if run.dataset.extra:
        others.append(f"what table() of config.model.modalities={config.model.modalities} gives")
    if config.data.statistics != "train":
        others.append(f"what config.data.statistics={config.data.statistics} holds")
    return f" (or {' or '.join(others)} has changed)" if others else ""
