"""Members: finished runs, or heads of their models, with their predictions, made first if they are missing or old.

Shapes: N stays, K labels, M members.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from medfuse_jax import config as config_lib
from medfuse_jax import schema
from medfuse_jax.runs import checkpoints
from medfuse_jax.runs import result as result_lib
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

FIELDS = ("stay_id", "subject_id", "labels", "has_ehr", "has_cxr", "age")  # of a predictions file, beside the scores
PREDICTED = {"scores": "scores_MNK", "predicted_h": "predicted_h_MN"}  # what members differ in -> its name in `join`
_OF_HOURS = ("hour", "remaining_h")
_OF_BINS = ("predicted_h",)  # of exclusive labels
GIVE_FINISHED = "give a finished run"


@dataclasses.dataclass(frozen=True)
class Member:
    """A finished run, or another head of its model, with its predictions on one split (arrays by name)."""

    workdir: Path
    head: str
    result: dict
    predictions: dict

    @property
    def name(self) -> str:
        return f"{self.workdir}:{self.head}" if self.head else str(self.workdir)

    @property
    def title(self) -> str:
        return f"{self.result['method']}:{self.head}" if self.head else self.result["method"]


def folder_and_head(run: str) -> tuple[Path, str]:
    if ":" in run and not Path(run).is_dir():
        folder, _, head = run.rpartition(":")
        return Path(folder), head
    return Path(run), ""


def open_member(run: str, split: str, evaluate: Callable, flag: str = "--runs") -> Member:
    """Return a member with its predictions on a split; make them if missing or not from its best checkpoint.

    evaluate: evaluate.evaluate, given by the commands. flag: the one that names the run, for errors.
    """
    workdir, head = folder_and_head(run)
    what, step = result_lib.Scored(split, head), _best_step(workdir, flag)
    member = _read(workdir, what, step)
    if member is None:
        evaluate(workdir, what)
        member = _read(workdir, what, step)
        assert member, "evaluate has just written the files of this step"
    return member


def _read(workdir: Path, what: result_lib.Scored, step: int | None) -> Member | None:
    """Return a member from its files; None if one is missing or not from checkpoint `step`.

    step: None accepts any step that is the same in both files.
    """
    path, result_path = what.predictions_path(workdir), what.result_path(workdir)
    if not (path.exists() and result_path.exists()):
        return None
    hint = f"run medfuse_jax.evaluate --workdir={workdir} again"
    result = files.read_json(result_path, hint)
    task = schema.TASKS[result["task"]]
    names = ("scores", *FIELDS, *(_OF_HOURS if task.hourly else ()), *(_OF_BINS if task.exclusive else ()))
    predictions = result_lib.read_predictions(path, names, hint)
    steps = {result.get("step"), predictions.pop("step")}
    is_current = len(steps) == 1 if step is None else steps == {step}
    return Member(workdir, what.head, result, predictions) if is_current else None


def _best_step(workdir: Path, flag: str) -> int | None:
    """Return the step of a member's best checkpoint, None if it has only predictions. Raise UserError if unfinished."""
    if not (workdir / "checkpoints").is_dir():
        _check_up_to_date(workdir, flag)
        return None
    step, progress = checkpoints.reached(workdir)
    config = config_lib.load(workdir / "config.json")
    # A sweep may keep only the best checkpoint of a trial that it stopped.
    if not progress.is_finished(config) and not (workdir / "trial.json").exists():
        message = f"{workdir} is unfinished (epoch {progress.epoch} of {config.num_epochs}): resume the run first"
        raise error(message, workdir, progress.epoch, flag)
    return step


def _check_up_to_date(workdir: Path, flag: str) -> None:
    """Raise UserError if members of the ensemble in `workdir` were trained further after it was made."""
    for member in _test_result(workdir).get("members", []):
        folder, _ = folder_and_head(member["run"])
        step = _best_step(folder, flag) or _test_result(folder).get("step")
        if step not in (None, member.get("step")):
            message = f"{workdir} combines older weights of {member['run']}: run the ensemble again"
            raise error(message, workdir, step, flag)


def _test_result(workdir: Path) -> dict:
    """Return the result on the test split; {} if there is none."""
    path = result_lib.TEST.result_path(workdir)
    return files.read_json(path, GIVE_FINISHED) if path.exists() else {}


def join(members: list[Member], flag: str = "--runs") -> dict:
    """Return the predictions on every stay, or every hour of one, that any member scores.

    stay_id, subject_id, labels, has_ehr, has_cxr, age, hour and remaining_h are as in a predictions file. scores_MNK,
    and predicted_h_MN of exclusive labels, are NaN where a member does not score a stay.
    """
    predicted = {name: key for name, key in PREDICTED.items() if name in members[0].predictions}
    names = [name for name in members[0].predictions if name not in predicted]
    stacked = {name: np.concatenate([member.predictions[name] for member in members]) for name in names}
    key_N, first_N = np.unique(result_lib.row_keys(stacked), return_index=True)
    joined = {name: values[first_N] for name, values in stacked.items()}
    for name, key in predicted.items():
        joined[key] = np.full((len(members), len(key_N), *members[0].predictions[name].shape[1:]), np.nan)
    for m, member in enumerate(members):
        rows = np.searchsorted(key_N, result_lib.row_keys(member.predictions))
        differs_N = (joined["labels"][rows] != member.predictions["labels"]).any(-1)
        if differs_N.any():
            stay_id = int(member.predictions["stay_id"][differs_N][0])
            message = f"{member.name} has other labels for stay {stay_id} than {members[0].name}"
            raise error(message, member.workdir, stay_id, flag)
        for name, key in predicted.items():
            joined[key][m, rows] = member.predictions[name]
    return joined


def error(message: str, path: Path | None = None, value: object = None, flag: str = "--runs") -> UserError:
    return UserError(message, field=flag, path=path, value=value)
