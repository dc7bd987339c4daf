"""What the trainings reached: the chosen run of each, its learning rate and its predictions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, records
from medfuse_jax.ensemble import members
from medfuse_jax.paper import scores
from medfuse_jax.paper.scores import Model, TaskResults, auroc
from medfuse_jax.paper.trainings import Training
from medfuse_jax.runs import result as result_lib
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.sweep import results as sweep_results


def chosen_folder(folder: Path) -> Path:
    """Return the workdir of a training's chosen run. Raise UserError if it has not ended."""
    return sweep_results.chosen_dir(folder) if workdir_lib.is_sweep(folder) else folder


def rate_of(folder: Path) -> float:
    return config_lib.load(chosen_folder(folder) / "config.json").learning_rate


def folders_by_value(training: Training, folder: Path) -> dict:
    """Return value -> workdir of a training with listed values."""
    return {value: sweep_results.trial_dir(folder, n) for n, value in enumerate(training.values)}


def score(training: Training, folder: Path) -> None:
    """Score the runs of a training on the validation stays, while their compiled program is at hand."""
    runs = folders_by_value(training, folder).values() or [chosen_folder(folder)]
    for run in runs:
        members.open_member(str(run), "val", evaluate.evaluate)


def gather(
    task: str, data_dir: str, trainings: list[Training], folder_of: Callable[[Training], Path], failed: dict[str, str]
) -> TaskResults:
    """Read the results of one task's trainings, scoring on the validation and test stays what is not scored yet.

    The depth of MMTM and DAFT, and the share of EHR-only stays, are chosen by the validation AUROC. failed: id -> why.
    """
    manifest, index = records.manifest(data_dir, task), records.index(data_dir, task, "train")
    results = TaskResults(task, list(manifest["labels"]), index["label"].mean(0))
    own = [t for t in trainings if t.task == task]
    for training in own:
        if training.id in failed:
            results.missing[training.id] = failed[training.id]
        elif not training.values and training.id not in ("E3", "A2_lstm"):
            results.models[training.id] = _model(training, chosen_folder(folder_of(training)))
    for id in ("M5", "M6"):
        _choose_depth(results, id)
    for training in own:
        if training.id == "OPT" and training.id not in failed and "M9" in results.models:
            _choose_share(results, training, folder_of(training))
    return results


def _model(training: Training, folder: Path) -> Model:
    test, val = (members.open_member(str(folder), split, evaluate.evaluate) for split in ("test", "val"))
    read = [scores.read(member.predictions) for member in (test, val)]
    return Model(training.id, training.title, folder, rate_of(folder), read[0], read[1])


def _choose_depth(results: TaskResults, id: str) -> None:
    """Add the better of two depths, on the paired validation stays, as M5 or M6."""
    depths = [model for name, model in results.models.items() if name.startswith(f"{id}_")]
    if depths:
        best = max(depths, key=lambda model: auroc(model.val.paired))
        results.models[id] = dataclasses.replace(best, id=id)


def _choose_share(results: TaskResults, training: Training, folder: Path) -> None:
    """Add OPT, chosen on all validation stays as the text says, and OPT_paired, on those with an X-ray as released."""
    m9 = results.models["M9"]
    folders = folders_by_value(training, folder) | {1.0: m9.folder}
    for share, path in folders.items():
        member = members.open_member(str(path), "val", evaluate.evaluate)
        results.opt_by_share[share] = scores.read(member.predictions)
    for id, choose_on, words in (
        ("OPT", lambda val: val, "all validation stays"),
        ("OPT_paired", lambda val: val.paired, "the validation stays with an X-ray"),
    ):
        aurocs = {share: auroc(choose_on(val)) for share, val in results.opt_by_share.items()}
        share = max(aurocs, key=lambda s: (aurocs[s], -s))
        choice = f"{round(100 * share)} % of the EHR-only stays, chosen on {words}"
        named = dataclasses.replace(training, id=id, title="MedFuse (OPTIMAL)")
        results.models[id] = dataclasses.replace(_model(named, folders[share]), choice=choice)
    opt = results.models["OPT"].folder
    dropped = result_lib.Scored("test", drop_cxr=1.0)
    path = dropped.predictions_path(opt)
    if not path.exists():
        evaluate.evaluate(opt, dropped)
    results.without_cxr = scores.read_dropped(path)
