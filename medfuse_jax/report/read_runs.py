"""Workdirs read back: what a run left behind, as far as it went. Never imports jax.

A workdir holds config.json, metrics.jsonl, predictions_<split>.npz and result.json;
pre-training runs are folders inside the workdir of the run they were made for.
"""

import dataclasses
import datetime
import json
import math
import numbers
import os
from pathlib import Path

import numpy as np

from medfuse_jax import ranks, schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

METHOD_NAMES = {
    "uni_ehr": "EHR only (LSTM)",
    "uni_cxr": "X-ray only (ResNet)",
    "early": "Early fusion",
    "joint": "Joint fusion",
    "joint_zeros": "Joint fusion, zeros",
    "joint_learnable": "Joint fusion, learnt vector",
    "medfuse": "MedFuse",
    "medfuse_attention": "MedFuse, attention",
    "mmtm3": "MMTM, layer 3",
    "mmtm4": "MMTM, layer 4",
    "daft3": "DAFT, layer 3",
    "daft4": "DAFT, layer 4",
    "unified": "Unified",
    "late_average": "Late average",
    "weighted_average": "Weighted average",
    "ensemble": "Ensemble, by X-ray",
}
TASK_NAMES = {
    "pheno": "Phenotyping",
    "mortality": "In-hospital mortality",
    "radiology": "Radiology findings",
    "decompensation": "Decompensation",
    "length_of_stay": "Length of stay",
}
SUBSETS = ("all", "paired", "unpaired", "cxr_only", "had_both")
OUTSIDE_ITS_CI = (
    "A value outside its own interval: with few positives, resamples that repeat them score higher, so that interval "
    "is not to be relied on."
)
_ATTENTION = ("time_weights", "length", "modality_weights", "modalities")
_NOT_RUNS = {"checkpoints", "tensorboard", "report"}


@dataclasses.dataclass(eq=False)
class Run:
    """What is known of one run; None or empty where it has not come to it.

    name: unique among the runs shown. train, val: the lines of metrics.jsonl by epoch.
    predictions: scores [N, K], labels bool [N, K], age [N] or None, paired bool [N] or None, attention: {} or
    time_weights [N, T], length [N], modality_weights [N, M], modalities [M]. problems: what could not be read.
    """

    folder: Path
    name: str
    config: dict
    result: dict | None
    train: dict[int, dict]
    val: dict[int, dict]
    predictions: dict | None
    problems: list[str]
    is_pretraining: bool
    color: int = 0

    @property
    def task(self) -> str:
        return str((self.result or {}).get("task") or self.config.get("task") or "unknown task")

    @property
    def method(self) -> str:
        return str((self.result or {}).get("method") or self.config.get("method") or self.folder.name)

    @property
    def label_names(self) -> list[str]:
        known = schema.TASKS[self.task].labels if self.task in schema.TASKS else ()
        return [str(name) for name in (self.result or {}).get("labels") or known]

    @property
    def is_synthetic(self) -> bool:
        if section(self.result or {}, "data").get("synthetic"):
            return True
        folder = section(self.config, "data").get("dir")
        manifest = _read_json(Path(str(folder)) / self.task / "manifest.json") if folder else {}
        return bool(manifest.get("synthetic")) or "synthetic" in str(manifest.get("source", "")).lower()

    @property
    def finished(self) -> datetime.datetime | None:
        """When the result was written."""
        path = self.folder / "result.json"
        return datetime.datetime.fromtimestamp(path.stat().st_mtime).astimezone() if path.exists() else None

    @property
    def chosen_epoch(self) -> int | None:
        """The epoch of the best checkpoint, None where nothing was chosen; of an unfinished run, the best so far."""
        if self.result and isinstance(self.result.get("best_epoch"), int):
            return self.result["best_epoch"] or None  # 0: imported, or evaluated before the first validation
        aurocs = series(self.val, "val_auroc")
        return max(aurocs, key=aurocs.get) if aurocs else None


def method_name(method) -> str:
    """What a method is called; one that nobody knows, by what stands in its place."""
    return METHOD_NAMES.get(method, str(method))


def title(result: dict) -> str:
    """What a result's method is called, with the modalities beside EHR and X-ray that it had."""
    return " + ".join(
        [method_name(result.get("method")), *(Path(name).stem for name in result.get("modalities") or [])]
    )


def find_runs(roots: list[Path]) -> list[Run]:
    """The runs at and below some folders, pre-training before what starts from it; UserError where one has none."""
    if not roots:
        raise UserError("--runs names no folder: give workdirs, or folders that hold workdirs")
    folders = {folder.resolve(): folder for root in roots for folder in _run_folders(root)}
    runs = [read_run(path) for path in folders.values()]
    _name_and_color(runs, Path(os.path.commonpath([root.resolve() for root in roots])))
    return runs


def _run_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"--runs={root} is not a folder: give workdirs, or folders that hold workdirs")
    folders = []
    for folder, _, names in os.walk(root):
        path = Path(folder)
        inside = path.relative_to(root).parts
        if _NOT_RUNS.isdisjoint(inside) and {"result.json", "metrics.jsonl"} & set(names):
            folders.append(path)
    if not folders:
        raise UserError(
            f"no run in {root}: no folder at or below it holds a result.json or a metrics.jsonl; "
            "start one with `python -m medfuse_jax.main --config=configs/demo.py --workdir=DIR`"
        )
    # Below a folder first, else by name: files come in no order of their own.
    folders.sort(key=lambda path: [*path.relative_to(root).parts, "\uffff"])
    return folders


def read_run(folder: Path) -> Run:
    """Reads a workdir as far as it goes; what is damaged is said in `problems`."""
    problems = []
    config = _read_json(folder / "config.json", problems)
    result = _read_json(folder / "result.json", problems) or None
    if result and not _is_result(result):
        problems.append(f"{folder / 'result.json'} is not an evaluation's result: run medfuse_jax.evaluate again")
        result = None
    train, val = _read_lines(folder / "metrics.jsonl", problems)
    predictions = _read_predictions(folder / "predictions_test.npz", problems)
    return Run(folder, "", config, result, train, val, predictions, problems, folder.name.startswith("pretrain_"))


def scores_all(result: dict | None) -> bool:
    """Whether a run scores every record of its split, so that its scores of all are beside others' of all."""
    return not (result or {}).get("num_left_out")


def subsets(result: dict) -> dict[str, dict]:
    """The subsets' scores that tables set beside other runs'; 'all' only of a run that scores all, or has no part."""
    found = {name: section(result["subsets"], name) for name in SUBSETS}
    found = {name: scores for name, scores in found.items() if scores}
    if not scores_all(result) and len(found) > 1:
        found.pop("all", None)
    return found


def outside_its_ci(scores: dict) -> bool:
    """Whether a mean lies outside its own percentile interval, as an AUPRC of few positives may."""
    means = ((scores.get(f"{name}_macro"), *pair(scores.get(f"{name}_macro_ci"))) for name in ("auroc", "auprc"))
    return any(None not in values and not values[1] <= values[0] <= values[2] for values in means)


def comparisons(result: dict) -> list[dict]:
    """The differences to other runs on a known subset; that on 'all' only where both score all."""
    number_of_all = section(result["subsets"], "all").get("num_samples")
    known = [other for other in result.get("comparisons") or [] if other.get("subset") in SUBSETS]
    return [
        other
        for other in known
        if other["subset"] != "all" or (scores_all(result) and other.get("num_samples") == number_of_all)
    ]


def unit(task: str) -> str:
    """What the task's records are: 'stays', also of a task that is not known, or 'images'."""
    return schema.TASKS[task].unit if task in schema.TASKS else "stays"


def series(lines: dict[int, dict], field: str) -> dict[int, float]:
    """One field by epoch, where it is a finite number."""
    values = {epoch: line.get(field) for epoch, line in sorted(lines.items())}
    return {epoch: v for epoch, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def number(value, digits: int = 3, sign: bool = False) -> str:
    """A number as tables show it; '–' where there is none. Signed with a true minus."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def pair(ends) -> tuple:
    """(low, high) of an interval, or two None where there is none."""
    return tuple(ends) if isinstance(ends, list | tuple | np.ndarray) and len(ends) == 2 else (None, None)


def section(content: dict, name: str) -> dict:
    """A part of a config or a result, {} where it is missing."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _name_and_color(runs: list[Run], root: Path) -> None:
    """Names runs by method, with the folder where that is not enough; the first that is no pre-training is colour 0."""
    for run in runs:
        run.name = title({"method": run.method, **(run.result or {})})
    names = [(run.task, run.name) for run in runs]
    for run, name in zip(runs, names):
        if names.count(name) > 1:
            inside = run.folder.resolve().relative_to(root)
            run.name += f" ({inside if inside.parts else run.folder.resolve().name})"
    for color, run in enumerate(sorted(runs, key=lambda run: run.is_pretraining)):
        run.color = color


def _read_json(path: Path, problems: list[str] | None = None) -> dict:
    """A JSON object; {} where there is none, with the problem noted where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if problems is not None:
            problems.append(f"{path} cannot be read ({error})")
        return {}
    if not isinstance(content, dict):
        if problems is not None:
            problems.append(f"{path} holds a {type(content).__name__}, not an object")
        return {}
    return content


def _is_result(result: dict) -> bool:
    labels, subsets, comparisons = (result.get(key) for key in ("labels", "subsets", "comparisons"))
    if not isinstance(labels, list) or not isinstance(subsets, dict) or not isinstance(comparisons, list):
        return False
    if not isinstance(result.get("num_left_out", 0), int):
        return False
    per_label = ("auroc", "auprc", "auroc_ci", "auprc_ci", "num_positive")
    for scores in subsets.values():
        if not isinstance(scores, dict):
            return False
        if any(not isinstance(scores.get(key), list) or len(scores[key]) != len(labels) for key in per_label):
            return False
    return all(isinstance(scores, dict) for scores in comparisons)


def _read_lines(path: Path, problems: list[str]) -> tuple[dict[int, dict], dict[int, dict]]:
    """The train and the val lines of a metrics.jsonl by epoch. A half-written last line is left out."""
    phases, damaged = {"train": {}, "val": {}}, []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        problems.append(f"{path} cannot be read ({error.strerror})")
        lines = []
    for i, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            phases[line["phase"]][int(line["epoch"])] = line
        except (ValueError, KeyError, TypeError):
            damaged.append(i)
    if damaged and damaged != [len(lines)]:  # the last may be just being written
        problems.append(f"{path}: line {damaged[0]} is damaged and left out ({len(damaged)} such)")
    return phases["train"], phases["val"]


def _read_predictions(path: Path, problems: list[str]) -> dict | None:
    try:
        with np.load(path) as stored:
            scores_NK, labels_NK = stored["scores"], stored["labels"]
            age_N = stored.get("age")
            has = [stored[name] for name in ("has_ehr", "has_cxr") if name in stored]
            attention = {name: stored[name] for name in _ATTENTION if name in stored}
    except FileNotFoundError:
        return None
    except files.DAMAGED_NPZ as error:
        problems.append(f"{path} cannot be read ({error}): run medfuse_jax.evaluate again")
        return None
    try:
        labels_NK, scores_NK = ranks.check(labels_NK, scores_NK)
    except UserError as error:
        problems.append(f"{path}: {error}")
        return None
    if age_N is not None and age_N.shape != (len(scores_NK),):
        problems.append(f"{path}: ages have shape {age_N.shape}, scores {scores_NK.shape}")
        age_N = None
    if any(has_N.shape != (len(scores_NK),) or has_N.dtype != bool for has_N in has):
        problems.append(f"{path}: has_ehr and has_cxr are not one bool a stay: run medfuse_jax.evaluate again")
        has = []
    paired_N = has[0] & has[1] if len(has) == 2 else None
    if attention and not _is_attention(attention, len(scores_NK)):
        problems.append(f"{path}: the attention weights are not one row a stay: run medfuse_jax.evaluate again")
        attention = {}
    return {"scores": scores_NK, "labels": labels_NK, "age": age_N, "paired": paired_N, "attention": attention}


def _is_attention(found: dict, num_stays: int) -> bool:
    if set(found) != set(_ATTENTION):
        return False
    rows = {"time_weights": 2, "modality_weights": 2, "length": 1}
    if any(found[name].ndim != ndim or len(found[name]) != num_stays for name, ndim in rows.items()):
        return False
    fits = found["length"].max(initial=0) <= found["time_weights"].shape[1]
    return bool(fits and found["modalities"].shape == found["modality_weights"].shape[1:])
