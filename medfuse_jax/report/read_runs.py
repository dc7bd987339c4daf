"""Read the workdirs of runs, finished or not. Never imports jax.

A workdir holds config.json, metrics.jsonl, predictions_<split>.npz and result.json. A run's pre-training runs are
folders inside its workdir.
"""

import dataclasses
import datetime
import os
from pathlib import Path

from medfuse_jax import ranks, schema
from medfuse_jax.report.read_fields import section, series
from medfuse_jax.report.wording import of_fold, title
from medfuse_jax.runs import builds
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

_PER_LABEL = ("auroc", "auprc", "auroc_ci", "auprc_ci", "num_positive")
_ATTENTION_NDIM = {"time_weights": 2, "length": 1, "modality_weights": 2, "modalities": 1}
_OF_RUNS = {"result.json", "metrics.jsonl", "data.json"}  # the last is all that a run has that failed in epoch 1
_NOT_RUNS = {"checkpoints", "tensorboard", "report"}


@dataclasses.dataclass(eq=False)
class Run:
    """A run as its workdir shows it. Fields that it has not reached yet are None or empty.

    name: unique among the runs shown. train, val: the lines of metrics.jsonl by epoch.
    predictions: scores [N, K], labels bool [N, K], age [N], paired bool [N], attention: {} or time_weights [N, T],
    length [N], modality_weights [N, M], modalities [M]. problems: messages on files that could not be read. robustness:
    the content of robustness.json (evaluate.write_robustness). data: the content of data.json.
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
    robustness: dict = dataclasses.field(default_factory=dict)
    data: dict = dataclasses.field(default_factory=dict)
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
        return [str(name) for name in (self.result or {}).get("labels", known)]

    @property
    def is_synthetic(self) -> bool:
        if section(self.result or {}, "data").get("synthetic"):
            return True
        folder = section(self.config, "data").get("dir")
        manifest = _read_json(Path(str(folder)) / self.task / "manifest.json", []) if folder else {}
        return bool(manifest.get("synthetic")) or "synthetic" in str(manifest.get("source", "")).lower()

    @property
    def pairing_note(self) -> str:
        return builds.note(section(self.result or {}, "data")) or builds.note(self.data)

    @property
    def finished_at(self) -> datetime.datetime | None:
        """The time when the result was written; None without a result."""
        path = self.folder / "result.json"
        return datetime.datetime.fromtimestamp(path.stat().st_mtime).astimezone() if path.exists() else None

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best checkpoint (so far, if the run is unfinished); None if there is none."""
        if self.result and isinstance(self.result.get("best_epoch"), int):
            return self.result["best_epoch"] or None  # 0 if imported, or evaluated before the first validation
        name, values = self.selecting
        best = min if name == "loss" else max
        return best(values, key=values.get) if values else None

    @property
    def selecting(self) -> tuple[str, dict[int, float]]:
        """The name of the validation score that selects the model, and its values by epoch: the loss without AUROC."""
        name = schema.selected_by(self.task)
        values = series(self.val, f"val_{name.lower()}")
        return (name, values) if values or not self.val else ("loss", series(self.val, "val_loss"))

    def scores(self, subset: str = "all") -> dict:
        """Return the result's scores on a subset of the test split; {} if there are none."""
        return section(section(self.result or {}, "subsets"), subset)


def find_runs(roots: list[Path]) -> list[Run]:
    """Return the runs at and below `roots`, each pre-training run before the run that uses it.

    Raises UserError for a root that is not a folder or holds no run.
    """
    if not roots:
        raise UserError("--runs is empty: give workdirs, or folders that hold workdirs", field="--runs")
    folders = {folder.resolve(): folder for root in roots for folder in _run_folders(root)}
    runs = [read_run(folder) for folder in folders.values()]
    _name_and_color(runs, Path(os.path.commonpath([root.resolve() for root in roots])))
    return runs


def _run_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        message = f"--runs={root} is not a folder: give workdirs, or folders that hold workdirs"
        raise UserError(message, field="--runs", path=root)
    folders = []
    for name, _, file_names in os.walk(root):
        folder = Path(name)
        if _OF_RUNS & set(file_names) and _NOT_RUNS.isdisjoint(folder.relative_to(root).parts):
            folders.append(folder)
    if not folders:
        raise UserError(
            f"no run in {root}: no folder at or below it holds a result.json, metrics.jsonl or data.json; "
            "start one with `python -m medfuse_jax.main --config=configs/demo.py --workdir=DIR`",
            field="--runs",
            path=root,
        )
    # os.walk has no fixed order. Sort by name, with a folder after its subfolders.
    return sorted(folders, key=lambda folder: [*folder.relative_to(root).parts, "\uffff"])


def _name_and_color(runs: list[Run], root: Path) -> None:
    """Name runs by method and fold, plus the folder if these repeat. Pre-training runs get the last colours."""
    for run in runs:
        run.name = title({"method": run.method, **(run.result or {})}) + of_fold(run.result or run.config)
    names = [(run.task, run.name) for run in runs]
    for run, name in zip(runs, names):
        if names.count(name) > 1:
            inside = run.folder.resolve().relative_to(root)
            run.name += f" ({inside if inside.parts else run.folder.resolve().name})"
    for color, run in enumerate(sorted(runs, key=lambda run: run.is_pretraining)):
        run.color = color


def read_run(folder: Path) -> Run:
    """Read a workdir. Damaged files are ignored and listed in `problems`."""
    problems = []
    config = _read_json(folder / "config.json", problems)
    result = _read_json(folder / "result.json", problems) or None
    if result and not _is_result(result):
        problems.append(f"{folder / 'result.json'} is not the result of an evaluation: run medfuse_jax.evaluate again")
        result = None
    train, val = _read_metrics(folder / "metrics.jsonl", problems)
    predictions = _read_predictions(folder / "predictions_test.npz", problems)
    robustness = _read_json(folder / "robustness.json", problems)
    is_pretraining = folder.name.startswith("pretrain_")
    data = _read_json(folder / "data.json", problems)
    return Run(folder, "", config, result, train, val, predictions, problems, is_pretraining, robustness, data)


def _read_json(path: Path, problems: list[str]) -> dict:
    """Read a JSON object; return {} if the file is missing or damaged. Add damage to `problems`."""
    if not path.exists():
        return {}
    try:
        return files.read_json(path, "it is left out")
    except UserError as error:
        problems.append(str(error))
        return {}


def _is_result(result: dict) -> bool:
    """Return whether the fields that the report reads have the expected types."""
    types = {"labels": list, "subsets": dict, "comparisons": list, "num_left_out": int}
    if not all(isinstance(result.get(key), kind) for key, kind in types.items()):
        return False
    subsets = list(result["subsets"].values())
    if not all(isinstance(scores, dict) for scores in [*subsets, *result["comparisons"]]):
        return False
    columns = [scores.get(key) for scores in subsets for key in _PER_LABEL]
    return all(isinstance(column, list) and len(column) == len(result["labels"]) for column in columns)


def _read_metrics(path: Path, problems: list[str]) -> tuple[dict[int, dict], dict[int, dict]]:
    """Return the train and the val lines of metrics.jsonl, by epoch."""
    phases, damaged = {"train": {}, "val": {}}, []
    try:
        lines = files.read_json_lines(path)
    except OSError as error:
        if path.exists():
            problems.append(f"{path} cannot be read ({error.strerror})")
        return {}, {}
    for i, line in enumerate(lines, start=1):
        try:
            phases[line["phase"]][int(line["epoch"])] = line
        except (ValueError, KeyError, TypeError):  # also of None, a damaged line
            damaged.append(i)
    if damaged:
        problems.append(f"{path}: dropped damaged lines ({len(damaged)}, the first is line {damaged[0]})")
    return phases["train"], phases["val"]


def _read_predictions(path: Path, problems: list[str]) -> dict | None:
    try:
        with files.open_npz(path) as stored:
            arrays = {name: stored[name] for name in ("scores", "labels", "age", "has_ehr", "has_cxr")}
            attention = {name: stored[name] for name in _ATTENTION_NDIM if name in stored}
        labels_NK, scores_NK = ranks.check(arrays["labels"], arrays["scores"])
    except FileNotFoundError:
        return None
    except files.DAMAGED_NPZ as error:  # includes the UserError of ranks.check
        problems.append(f"{path} cannot be read ({error}): run medfuse_jax.evaluate again")
        return None
    if any(arrays[name].shape != (len(scores_NK),) for name in ("age", "has_ehr", "has_cxr")):
        problems.append(f"{path} holds arrays of different lengths: run medfuse_jax.evaluate again")
        return None
    if attention and not _is_attention(attention, len(scores_NK)):
        problems.append(f"{path} holds damaged attention weights: run medfuse_jax.evaluate again")
        attention = {}
    paired_N = arrays["has_ehr"].astype(bool) & arrays["has_cxr"].astype(bool)
    return {"scores": scores_NK, "labels": labels_NK, "age": arrays["age"], "paired": paired_N, "attention": attention}


def _is_attention(arrays: dict, num_stays: int) -> bool:
    if {name: values.ndim for name, values in arrays.items()} != _ATTENTION_NDIM:
        return False
    if {len(arrays[name]) for name in ("time_weights", "length", "modality_weights")} != {num_stays}:
        return False
    is_padded = arrays["length"].max(initial=0) <= arrays["time_weights"].shape[1]
    return bool(is_padded and arrays["modalities"].shape == arrays["modality_weights"].shape[1:])
