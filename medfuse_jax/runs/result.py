"""What a result and a predictions file hold, and how they are named, written and read.

Shapes: N scored records, K labels.
"""

import dataclasses
import platform
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from medfuse_jax import metrics
from medfuse_jax.runs import subgroups
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError, check_choice

_PACKAGES = ("medfuse_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Scored:
    """What to score of a run; determines the names of the result and predictions files.

    head: a classifier head other than the main one, such as 'ehr_only', which scores the stays it can.
    drop_ehr, drop_cxr: the fraction of paired stays scored without that modality (data/missing.py).
    """

    split: str = "test"
    head: str = ""
    drop_ehr: float = 0.0
    drop_cxr: float = 0.0

    @property
    def dropped(self) -> dict[str, float]:
        return {name: part for name, part in (("ehr", self.drop_ehr), ("cxr", self.drop_cxr)) if part}

    @property
    def _name(self) -> str:
        """The part of the file names that identifies what is scored: test, val_joint_drop_cxr_0.5 or the like."""
        return "_".join([self.split, *filter(None, [self.head]), *(f"drop_{n}_{p:g}" for n, p in self.dropped.items())])

    def predictions_path(self, workdir: Path) -> Path:
        return workdir / f"predictions_{self._name}.npz"

    def result_path(self, workdir: Path) -> Path:
        """Return result.json for the test split as it is, otherwise result_val_joint_drop_cxr_0.5.json or the like."""
        return workdir / ("result.json" if self == TEST else f"result_{self._name}.json")


TEST = Scored()
RESAMPLES = ("patient", "stay")  # what the bootstrap draws; for X-rays without a stay, 'stay' is an X-ray


def save(workdir: Path, what: Scored, scored: dict, result: dict) -> None:
    """Write the predictions `scored` and their `result` to the workdir.

    Both files store the result's step, if it has one. If the process is killed between the two, their steps differ.
    """
    stamp = {"step": result["step"]} if "step" in result else {}
    with files.written_whole(what.predictions_path(workdir)) as unfinished:
        np.savez(unfinished, **scored, **stamp)
    files.write_json(what.result_path(workdir), files.sealed(metrics.to_json(result)))


def read_predictions(path: Path, names: tuple[str, ...], what_to_do: str) -> dict:
    """Return the named arrays of a predictions file, and its 'step' or None; raise UserError if it is damaged."""
    try:
        with files.open_npz(path) as stored:
            arrays = {name: stored[name] for name in names}
            return arrays | {"step": int(stored["step"]) if "step" in stored else None}
    except files.DAMAGED_NPZ as error:
        raise UserError(f"{path} cannot be read ({error}): {what_to_do}", path=path) from None


def resample_by(given: str, scored: dict) -> str:
    """Return what the bootstrap draws: `given`, or by default the patients, if one of them has several records."""
    if given:
        check_choice("--resample", given, RESAMPLES)
        return given
    return "patient" if len(np.unique(scored["subject_id"])) < len(scored["subject_id"]) else "stay"


def _groups(scored: dict, resample: str) -> np.ndarray | None:
    if resample == "patient":
        return scored["subject_id"]
    return scored["stay_id"] if "hour" in scored else None


def row_keys(scored: dict) -> np.ndarray:
    """Return an id for each row of predictions: its stay, and in an hourly task also its hour."""
    if "hour" not in scored:
        return scored["stay_id"]
    return scored["stay_id"] * 2**20 + np.round(scored["hour"] * 60).astype(np.int64)  # 2**20 minutes: two years


def subsets(
    scored: dict, num_bootstrap: int, seed: int, resample: str, label_types: dict[str, list[int]] | None = None
) -> dict:
    """Return metrics with bounds for all scored records and for each subset by modality.

    resample: see RESAMPLES. label_types: see `schema.label_types`.
    """
    evaluated = {}
    for name, include_N in _masks(scored).items():
        part = {field: values[include_N] for field, values in scored.items()}
        evaluated[name] = subgroups.measure(part, num_bootstrap, seed, _groups(part, resample), label_types)
    return evaluated


def by_subgroup(scored: dict, num_bootstrap: int, seed: int, resample: str) -> list[dict]:
    """Return the metrics by group of patients; see `subgroups.describe`."""
    return subgroups.describe(scored, num_bootstrap, seed, _groups(scored, resample))


def compare(scored: dict, other: dict, against: str, num_bootstrap: int, seed: int, resample: str) -> list[dict]:
    """Return this run's metrics minus those of another, named `against`, on the stays and resamples they share."""
    keys = row_keys(scored), row_keys(other)
    _, ours, theirs = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    if not len(ours):
        return []
    order = np.argsort(ours)  # record order, as in `subsets`
    ours, theirs = ours[order], theirs[order]
    common = {name: values[ours] for name, values in scored.items()}
    other = {name: other[name][theirs] for name in ("scores", "predicted_h") if name in other}
    comparisons = []
    for name, include_N in _masks(common).items():
        part = {field: values[include_N] for field, values in common.items()}
        before = part | {field: values[include_N] for field, values in other.items()}
        difference = subgroups.difference(before, part, num_bootstrap, seed, _groups(part, resample))
        comparisons.append({"against": against, "subset": name, **difference})
    return comparisons


def _masks(scored: dict) -> dict[str, np.ndarray]:
    """Return the non-empty subsets of the scored records as masks, bool [N]; only 'all' for X-rays without stays.

    had_both: the stays that were paired before a modality was dropped from some (Hayat et al. 2022, Figure A2).
    """
    has_cxr_N, has_ehr_N = scored["has_cxr"], scored["has_ehr"]
    had_cxr_N, had_ehr_N = scored.get("had_cxr", has_cxr_N), scored.get("had_ehr", has_ehr_N)
    masks = {"all": np.ones_like(has_cxr_N)}
    if not had_ehr_N.any():
        return masks
    masks |= {"paired": has_cxr_N & has_ehr_N, "unpaired": ~has_cxr_N, "cxr_only": has_cxr_N & ~has_ehr_N}
    if "had_cxr" in scored:
        masks["had_both"] = had_cxr_N & had_ehr_N
    return {name: mask for name, mask in masks.items() if mask.any()}


def environment(devices: list[jax.Device]) -> dict:
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        return "not installed"
