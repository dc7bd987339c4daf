"""The folder of one run: claimed by one config and one set of shards, written by one process at a time.

`run` is a run.Run.
"""

import contextlib
from pathlib import Path

from medfuse_jax import config as config_lib
from medfuse_jax import schema
from medfuse_jax.runs import inputs
from medfuse_jax.runtime import files, hosts
from medfuse_jax.runtime.errors import UserError

_SWEEP_DEPTH = 3  # trials/003/pretrain_ehr


def locked(workdir: Path) -> contextlib.AbstractContextManager:
    """Create the folder and keep other commands out of it while the block runs."""
    if not hosts.is_first():
        return contextlib.nullcontext()
    busy = f"another process is using {workdir}: wait for it, or give another --workdir"
    return files.locked(workdir / ".lock", f"--workdir={workdir}", busy)


def claim(workdir: Path, run, by_sweep: bool = False) -> None:
    """Claim the workdir for this run, or raise UserError, as `check` does."""
    check(workdir, run, by_sweep)
    if hosts.is_first():
        _write_claim(workdir, run)
    hosts.wait(f"claimed {workdir}")


def check(workdir: Path, run, by_sweep: bool = False) -> None:
    """Raise UserError if the workdir holds a run with another config or other data, or something other than a run.

    by_sweep: whether a sweep claims one of its own folders, for a trial or a pre-training stage.
    """
    _check_no_other_kind(workdir)
    check_outside_shards(workdir, run.config.data.dir)
    # A run that failed before anything was trained may be replaced.
    if any(any(workdir.glob(pattern)) for pattern in ("checkpoints", "pretrain_*/checkpoints", "result*.json")):
        # The sweep has compared its own config. The paths of its encoders change if its folder is moved.
        ignored = ("init.ehr", "init.cxr") if by_sweep else ()
        if difference := config_lib.difference(config_lib.load(workdir / "config.json"), run.config, ignored):
            raise UserError(f"{workdir} holds another run ({difference}): choose another --workdir", path=workdir)
        check_data(workdir, run)


def _write_claim(workdir: Path, run) -> None:
    with files.must_write(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / inputs.FILE, files.sealed(inputs.describe(run.dataset)))
        config_lib.save(run.config, workdir / "config.json")


def check_outside_sweeps(workdir: Path) -> None:
    """Raise UserError if the workdir is inside a sweep's folder, even by a link: only the sweep writes there."""
    for path in (workdir.absolute(), workdir.resolve()):
        for parent in path.parents[:_SWEEP_DEPTH]:
            if (parent / "sweep.json").exists():
                raise UserError(f"{workdir} is inside a sweep, {parent}: choose another --workdir", path=parent)


def check_outside_shards(workdir: Path, data_dir: str, flag: str = "--workdir") -> None:
    """Raise UserError if the workdir is the shards' folder or inside a dataset: deleting the run would delete data."""
    shards, folder = Path(data_dir).resolve(), workdir.resolve()
    if folder == shards or any(shards / task in (folder, *folder.parents) for task in schema.TASKS):
        raise UserError(f"{workdir} holds the shards: choose another {flag}", field=flag, path=shards)


def check_data(workdir: Path, run) -> None:
    """Raise UserError if the run's shards are not those that the workdir was trained on."""
    path = workdir / inputs.FILE
    trained = files.read_json(path, "start again in another --workdir")
    if trained.get("digest") == run.dataset.digest:
        return
    config, sources = run.config, [f"{run.config.data.dir}/{run.config.task}"]
    if run.dataset.extra:
        sources.append(f"the tables of config.model.modalities={config.model.modalities}")
    if run.dataset.cxr_features:
        widths = len(run.dataset.cxr_statistics.mean_E), len(trained.get("cxr_features", {}).get("mean", ()))
        if widths[0] != widths[1]:
            what = f"{config.data.cxr_features} has {widths[0]} features an X-ray, {workdir} was trained on {widths[1]}"
            raise UserError(
                f"{what}: give the file that it was trained on",
                field="config.data.cxr_features",
                path=config.data.cxr_features,
            )
        sources.append(f"config.data.cxr_features={config.data.cxr_features}")
    if config.data.statistics != "train":
        sources.append(f"config.data.statistics={config.data.statistics}")
    raise UserError(
        f"the data changed after {workdir} was trained ({' or '.join(sources)}), so its test stays may have been "
        "trained on: restore the data, or start again in another --workdir",
        path=path,
        value=sources,
    )


def check_has_weights(workdir: Path) -> None:
    """Raise UserError for the workdir of an ensemble."""
    if is_ensemble(workdir):
        raise UserError(f"{workdir} holds an ensemble, which has no weights: give a run's workdir", path=workdir)


def check_reads_features(workdir: Path, config, cxr_features: Path | str) -> None:
    """Raise UserError if --cxr_features is given, and the run of this config reads no precomputed features."""
    if cxr_features and not config_lib.reads_features(config):
        what = f"--cxr_features={cxr_features}, and {workdir} reads no precomputed features: leave it out"
        raise UserError(what, field="--cxr_features", value=str(cxr_features))


def is_ensemble(workdir: Path) -> bool:
    """Return whether medfuse_jax.ensemble created the workdir."""
    try:
        return "rule" in files.read_json(workdir / "config.json", "")
    except UserError:
        return False


def is_sweep(workdir: Path) -> bool:
    return (workdir / "sweep.json").exists()


def _check_no_other_kind(workdir: Path) -> None:
    """Raise UserError if the workdir holds an ensemble, a sweep or an unreadable config."""
    if is_sweep(workdir) or is_ensemble(workdir):
        kind = "a sweep" if is_sweep(workdir) else "an ensemble"
        raise UserError(f"{workdir} holds {kind}, not a run: choose another --workdir", path=workdir, value=kind)
    path = workdir / "config.json"
    if path.exists():
        try:
            config_lib.load(path)
        except UserError as error:
            raise UserError(f"{workdir} holds no run that can be read ({error})", path=path) from None
