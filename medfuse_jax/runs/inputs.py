"""What a run's model expects of its input: task, labels, channels, time step, and the train split's statistics.

Kept in the workdir's data.json from the start of training, so that the run scores other shards without its own.
`dataset` is a data.dataset.Dataset.

Shapes: F EHR channels.
"""

from pathlib import Path

import numpy as np

from medfuse_jax.data.cxr_features import Statistics
from medfuse_jax.data.modalities import static
from medfuse_jax.runs import builds
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

FILE = builds.FILE
_LISTS = ("labels", "channels", "mean", "std")
_SHOWN = 3  # names in a message


def describe(dataset) -> dict:
    """Return what `read` returns for a run that trains on this dataset, and the hashes 'digest' and 'shards'."""
    return {
        "digest": dataset.digest,
        "shards": dataset.shards_digest,
        "task": dataset.task.name,
        "labels": list(dataset.labels),
        "channels": list(dataset.manifest["channels"]),
        "timestep_h": dataset.manifest.get("timestep_h"),
        "profile": dataset.manifest.get("profile"),
        **builds.unusual(dataset.manifest),
        "mean": dataset.mean_F.tolist(),  # exact: a float32 is a float64
        "std": dataset.std_F.tolist(),
        "categories": static.categories(dataset.index["train"]) if "static" in dataset.extra else {},
    } | ({"cxr_features": _as_lists(dataset.cxr_statistics)} if dataset.cxr_statistics else {})


def _as_lists(statistics: Statistics) -> dict[str, list[float]]:
    return {"mean": statistics.mean_E.tolist(), "std": statistics.std_E.tolist()}


def read(workdir: Path) -> dict:
    """Return task, labels, channels, timestep_h, profile, mean, std [F], and categories of the static features; with
    precomputed features (data/cxr_features.py) also cxr_features, their Statistics.

    Raises UserError if the run was trained before data.json held them.
    """
    path = workdir / FILE
    how = "rerun the command that trained it, which adds them and trains no further"
    content = files.read_json(path, how)
    if missing := [name for name in ("task", *_LISTS, "categories") if name not in content]:
        message = f"{path} is of an older version, without {', '.join(missing)}: {how}"
        raise UserError(message, field="--workdir", path=path, value=missing)
    mean_F, std_F = (np.asarray(content[name], np.float32) for name in ("mean", "std"))
    if not mean_F.shape == std_F.shape == (len(content["channels"]),) or not (std_F > 0).all():
        raise UserError(f"{path} is damaged (mean and std): {how}", field="--workdir", path=path, value="mean")
    if "cxr_features" in content:
        of_features = (np.asarray(content["cxr_features"][name], np.float32) for name in ("mean", "std"))
        content["cxr_features"] = Statistics(*of_features)
    return content | {"mean": mean_F, "std": std_F}


def check(expected: dict, dataset, folder: Path) -> None:
    """Raise UserError if a dataset, in `folder`, does not hold what the run expects."""
    found = describe(dataset)
    for name in ("labels", "channels"):
        if expected[name] != found[name]:
            message = (
                f"the {name} of {folder} differ from the run's ({_difference(expected[name], found[name])}): "
                "build the shards with the version and options of the run's own"
            )
            raise UserError(message, field="--data", path=folder, value=name)
    run_h, found_h = expected.get("timestep_h"), found["timestep_h"]
    if run_h != found_h:
        message = (
            f"{folder} has time steps of {found_h} h, and the run was trained on {run_h} h: "
            f"build the shards with --timestep_h={run_h}"
        )
        raise UserError(message, field="--data", path=folder, value=found_h)


def _difference(expected: list, found: list) -> str:
    lacking, other = ([name for name in a if name not in b] for a, b in ((expected, found), (found, expected)))
    parts = [
        f"{what} {', '.join(map(repr, names[:_SHOWN]))}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in (("without", lacking), ("with", other))
        if names
    ]
    return "; ".join(parts) or "another order"
