"""What the trainings reached: the chosen run of each, its learning rate and its predictions."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate
from medfuse_jax.ensemble import members
from medfuse_jax.paper import scores
from medfuse_jax.paper.scores import Model, Scores, TaskResults
from medfuse_jax.paper.trainings import Training
from medfuse_jax.runs import result as result_lib
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.sweep import results as sweep_results

PAIRED_WORDS = "the validation stays with an X-ray"


def chosen_folder(folder: Path) -> Path:
    """Return the workdir of a training's chosen run. Raise UserError if it has not ended."""
    return sweep_results.chosen_dir(folder) if workdir_lib.is_sweep(folder) else folder


def rate_of(folder: Path) -> float:
    return config_lib.load(chosen_folder(folder) / "config.json").learning_rate


def folders_by_value(training: Training, folder: Path) -> dict:
    """Return value -> workdir of a training with listed values."""
    return {value: sweep_results.trial_dir(folder, n) for n, value in enumerate(training.values)}


def finished_trials(folder: Path) -> list[Path]:
    """Return the workdirs of a sweep's finished trials."""
    numbers = sorted(int(path.name) for path in (folder / "trials").glob("*") if path.name.isdecimal())
    return [sweep_results.trial_dir(folder, n) for n in numbers if sweep_results.has_finished(folder, n)]


def score(training: Training, folder: Path) -> None:
    """Score the runs of a training that may be chosen on the validation stays, while their program is compiled."""
    runs: Iterable[Path] = folders_by_value(training, folder).values() or [chosen_folder(folder)]
    if training.is_chosen_twice:
        runs = finished_trials(folder)
    for run in runs:
        members.open_member(str(run), "val", evaluate.evaluate)


def gather(
    task: str,
    index: dict,
    labels: list[str],
    trainings: list[Training],
    folder_of: Callable[[Training], Path],
    failed: dict[str, str],
) -> TaskResults:
    """Read the results of one task's trainings, scoring on the validation and test stays what is not scored yet.

    The depth of MMTM and DAFT, and the share of EHR-only stays, are chosen by the validation AUROC. A rate searched on
    all stays is chosen twice: on all validation stays (E1, ...) and on those with an X-ray (E1_paired, ...).
    index: of the training stays. failed: id -> why.
    """
    results = TaskResults(task, labels, scores.prevalence(index["label"]))
    own = [t for t in trainings if t.task == task]
    for training in own:
        if training.id in failed:
            results.missing[training.id] = failed[training.id]
        elif not training.values and training.id not in ("E3", "A2_lstm"):
            results.models[training.id] = _model(training, chosen_folder(folder_of(training)))
            if training.is_chosen_twice:
                _choose_rate(results, training, folder_of(training))
    for id in ("M5", "M6"):
        _choose_depth(results, id)
    for training in own:
        if training.id == "OPT" and training.id not in failed and "M9" in results.models:
            _choose_share(results, training, folder_of(training))
    return results


def _model(training: Training, folder: Path) -> Model:
    test, val = (members.open_member(str(folder), split, evaluate.evaluate) for split in ("test", "val"))
    read = [scores.read(member.predictions) for member in (test, val)]
    return Model(training.id, training.title, folder, rate_of(folder), read[0], read[1], on_paired=training.is_paired)


def _choose_rate(results: TaskResults, training: Training, folder: Path) -> None:
    """Add the model that a search on all stays gives if its rate is chosen on the validation stays with an X-ray.

    There is none without such stays. Each trial's epoch is the one that all of its validation stays selected.
    """
    first = results.models[training.id]
    if not first.val.has_cxr.any():
        return
    vals = {path: _val(path).paired for path in finished_trials(folder)}
    best = max(vals, key=lambda path: scores.rank(vals[path]))
    model = first if best == first.folder else _model(training, best)
    choice = scores.chosen_on(vals[best], PAIRED_WORDS)
    id = f"{training.id}_paired"
    results.models[id] = dataclasses.replace(model, id=id, choice=choice, on_paired=True)


def _val(folder: Path) -> Scores:
    return scores.read(members.open_member(str(folder), "val", evaluate.evaluate).predictions)


def _choose_depth(results: TaskResults, id: str) -> None:
    """Add the better of two depths, on the paired validation stays, as M5 or M6."""
    depths = [model for name, model in results.models.items() if name.startswith(f"{id}_")]
    if depths:
        best = max(depths, key=lambda model: scores.rank(model.val.paired))
        results.models[id] = dataclasses.replace(best, id=id)


def _choose_share(results: TaskResults, training: Training, folder: Path) -> None:
    """Add OPT, chosen on all validation stays as the text says, and OPT_paired, on those with an X-ray as released."""
    m9 = results.models["M9"]
    folders = folders_by_value(training, folder) | {1.0: m9.folder}
    for share, path in folders.items():
        results.opt_by_share[share] = _val(path)
    for id, on_paired, words in (("OPT", False, "all validation stays"), ("OPT_paired", True, PAIRED_WORDS)):
        vals = {share: val.paired if on_paired else val for share, val in results.opt_by_share.items()}
        if not len(vals[1.0].stay_id):
            continue
        share = max(vals, key=lambda s: (scores.rank(vals[s]), -s))
        choice = f"{round(100 * share)} % of the EHR-only stays, {scores.chosen_on(vals[share], words)}"
        named = dataclasses.replace(training, id=id, title="MedFuse (OPTIMAL)")
        results.models[id] = dataclasses.replace(
            _model(named, folders[share]),
            choice=choice,
            on_paired=on_paired,
            without_cxr=_without_cxr(folders[share]),
        )


def _without_cxr(folder: Path) -> Scores:
    """Return a run's scores of the test stays without any X-ray."""
    dropped = result_lib.Scored("test", drop_cxr=1.0)
    path = dropped.predictions_path(folder)
    if not path.exists():
        evaluate.evaluate(folder, dropped)
    return scores.read_dropped(path)
