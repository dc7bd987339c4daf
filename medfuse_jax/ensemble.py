"""Finished runs scored together: `python -m medfuse_jax.ensemble --runs=A,B --workdir=C`.

A member is a workdir, or one classifier of its model: `DIR:ehr_only`. Its predictions are read
from its workdir, and made first where they are not there or of older weights. What stands for a stay is, by --rule:

    average    the mean of the members' probabilities, of those that score the stay: the late
               average of uni_ehr and uni_cxr, or of MMTM's two classifiers of one modality
    weighted   the same with weights chosen by macro AUROC on the validation stays alone
    by_image    the first member where the stay has an X-ray, the second where it has none:
               the ensemble of Table A3 (Hayat et al. 2022), MedFuse first, the LSTM second

Shapes: N stays, K labels, M members.
"""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
from absl import flags

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, metrics, parallel, schema
from medfuse_jax.report import terminal
from medfuse_jax.runs import checkpoints, sources
from medfuse_jax.runs import result as result_lib
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime import command_line, compilation, files
from medfuse_jax.runtime.errors import UserError, check_choice

METHODS = {"average": "late_average", "weighted": "weighted_average", "by_image": "ensemble"}
_FIELDS = ("stay_id", "labels", "has_ehr", "has_cxr", "age")  # of a predictions file, beside the scores
_NO_RESULT = "give a finished run"
_WEIGHT_STEPS = 20  # weights are tried in steps of 1/20
_MAX_WEIGHTED = 5  # members: 10,626 weightings; of 6 there are 53,130


@dataclasses.dataclass(frozen=True)
class Member:
    """A finished run, or one classifier (head) of its model."""

    workdir: Path
    head: str
    result: dict

    @property
    def name(self) -> str:
        return f"{self.workdir}:{self.head}" if self.head else str(self.workdir)


def ensemble(runs: list[str], workdir: Path, rule: str = "average") -> dict:
    """Combines the members' scores on the test stays, and scores that: writes and returns the result.

    runs: workdirs, each with `:head` for another classifier than the main one. Leaves config.json,
    predictions_test.npz and result.json in the workdir, as a run does. UserError where members are
    of different tasks, labels or splits, a stay has different labels, or the workdir holds something else.
    """
    check_choice("--rule", rule, METHODS)
    num_members = len(runs)
    if num_members < 2 or (rule == "by_image" and num_members > 2):
        wanted = (
            "two, the one for stays with an X-ray first" if rule == "by_image" else "two or more, with commas between"
        )
        raise UserError(f"--runs names {num_members} run(s); --rule={rule} combines {wanted}")
    if rule == "weighted" and num_members > _MAX_WEIGHTED:
        raise UserError(
            f"--runs names {num_members} runs; --rule=weighted tries every weighting in steps of 1/{_WEIGHT_STEPS}, so "
            f"give it at most {_MAX_WEIGHTED}"
        )
    same = [(folder.resolve(), head) for folder, head in map(_folder_and_head, runs)]
    if twice := [run for run, one in zip(runs, same) if same.count(one) > 1]:
        raise UserError(f"--runs names {twice[0]} twice: give each member once")
    content = {"name": "ensemble", "method": METHODS[rule], "rule": rule, "runs": runs}
    _check_free(workdir, content)
    tests = [_scored(run, "test") for run in runs]
    members = [member for member, _ in tests]
    _check_fit(members)
    _check_splits(members)
    _claim(workdir, content)
    weight_M, selected_by = np.full(num_members, 1 / num_members), "nothing: equal weights"
    if rule == "weighted":
        weight_M, selected_by = _chosen_weights(_aligned([_scored(run, "val") for run in runs]))
    elif rule == "by_image":
        selected_by = "nothing: the first run where there is an X-ray, the second where there is none"
    together = _aligned(tests)
    scored = {name: together[name] for name in _FIELDS}
    scored["scores"] = _by_image(together) if rule == "by_image" else _weighted(together["scores_MNK"], weight_M)
    first = members[0].result
    bounds = (first["subsets"]["all"]["num_bootstrap"], first["seed"])
    result = {
        **{field: first[field] for field in ("task", "data", "labels", "seed")},
        "name": f"{rule} of {', '.join(runs)}",
        "method": METHODS[rule],
        "split": "test",
        "num_params": sum({member.workdir: member.result["num_params"] for member in members}.values()),
        "best_epoch": None,
        "selected_by": selected_by,
        "loss": _mean_bce(scored),
        "num_left_out": _num_left_out(tests, len(together["stay_id"])),
        "members": [_listed(m, None if rule == "by_image" else float(w)) for m, w in zip(members, weight_M)],
        "subsets": result_lib.subsets(scored, *bounds),
        "comparisons": [
            difference
            for member, other in tests
            for difference in result_lib.compare(scored, other, _title(member, members), *bounds)
        ],
        "environment": result_lib.environment(parallel.devices()),
    }
    result_lib.save(workdir, result_lib.Scored(), scored, result)
    return result


def _listed(member: Member, weight: float | None) -> dict:
    result = member.result
    return {"run": member.name, "method": result["method"], "weight": weight, "step": result.get("step")}


def _check_free(workdir: Path, content: dict) -> None:
    """Raises UserError where the workdir is something else's than this ensemble's."""
    workdir_lib.check_outside_sweeps(workdir)
    path = workdir / "config.json"
    if path.exists() and files.read_json(path, "choose another --workdir") != content:
        raise UserError(f"{workdir} holds another run: choose another --workdir")


def _claim(workdir: Path, content: dict) -> None:
    with files.must_write(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / "config.json", content)


def _scored(run: str, split: str) -> tuple[Member, dict]:
    """A member and its predictions on a split, made where they are not there or not of its best checkpoint."""
    workdir, head = _folder_and_head(run)
    what, step = result_lib.Scored(split, head), _best_step(workdir)
    found = _stored(run, workdir, what, step)
    if found is None:
        evaluate.evaluate(workdir, what)
        found = _stored(run, workdir, what, step)
        assert found, "they are of the checkpoint that was there a moment ago"
    return found


def _stored(run: str, workdir: Path, what: result_lib.Scored, step: int | None) -> tuple[Member, dict] | None:
    """A member as its files say; None where one is missing, or they are not of the checkpoint `step`.

    step: None where any will do, but the same for both files.
    """
    path, result_path = what.predictions_path(workdir), what.result_path(workdir)
    if not (path.exists() and result_path.exists()):
        return None
    hint = f"run medfuse_jax.evaluate --workdir={workdir} again"
    result, part = files.read_json(result_path, hint), result_lib.read_predictions(path, ("scores", *_FIELDS), hint)
    steps = {result.get("step"), part.pop("step")}
    is_of = len(steps) == 1 if step is None else steps == {step}
    return (Member(workdir, what.head, result), part) if is_of else None


def _best_step(workdir: Path) -> int | None:
    """The step of a member's best checkpoint, None where only its predictions are left; UserError if unfinished."""
    if not (workdir / "checkpoints").is_dir():
        return _check_up_to_date(workdir)
    step, progress = checkpoints.reached(workdir)
    config = config_lib.load(workdir / "config.json")
    # Of a trial that its sweep ended, the best alone may be kept.
    if not progress.is_finished(config) and not (workdir / "trial.json").exists():
        raise UserError(
            f"{workdir} is not finished (epoch {progress.epoch} of {config.num_epochs}): let medfuse_jax.main end it"
        )
    return step


def _result(workdir: Path) -> dict:
    """The result on the test split, {} where there is none."""
    path = result_lib.Scored().result_path(workdir)
    return files.read_json(path, _NO_RESULT) if path.exists() else {}


def _check_up_to_date(workdir: Path) -> None:
    """Raises UserError where an ensemble was made of weights that its members have since trained on from."""
    for member in _result(workdir).get("members", []):
        folder, _ = _folder_and_head(member["run"])
        step = _best_step(folder)
        if (step or _result(folder).get("step")) not in (None, member.get("step")):
            raise UserError(f"{workdir} was made of older weights of {member['run']}: make that ensemble again")


def _check_fit(members: list[Member]) -> None:
    first = members[0]
    for member in members:
        for field in ("task", "labels"):
            if member.result[field] != first.result[field]:
                raise UserError(
                    f"{member.name} and {first.name} cannot be combined: they differ in {field} "
                    f"({_short(member.result[field])} and {_short(first.result[field])})"
                )
    if schema.TASKS[first.result["task"]].cxr_only:
        raise UserError(f"{first.name} scores X-rays, which have no stay to match by; an ensemble is of stays")


def _check_splits(members: list[Member]) -> None:
    """Raises UserError where a member was trained or selected on patients whom another is tested on."""
    runs = {workdir: member.name for member in members for workdir in _trained(member.workdir)}
    if len({files.read_json(workdir / "data.json", _NO_RESULT).get("digest") for workdir in runs}) == 1:
        return  # the same shards
    index = {workdir: sources.open_run(workdir).dataset.index for workdir in runs}
    for ours, theirs in itertools.permutations(runs, 2):
        seen_N = np.concatenate([index[ours][split]["subject_id"] for split in ("train", "val")])
        if leaked := len(np.intersect1d(seen_N, index[theirs]["test"]["subject_id"])):
            raise UserError(
                f"{runs[ours]} and {runs[theirs]} cannot be combined: {leaked} test patients of the second are train "
                "or val patients of the first; build the shards of both with the same --seed, --val_ids and --test_ids"
            )


def _trained(workdir: Path) -> list[Path]:
    """The workdirs of the runs that were trained for a member: its own, or those of an ensemble's members."""
    if not workdir_lib.is_ensemble(workdir):
        return [workdir]
    runs = files.read_json(workdir / "config.json", _NO_RESULT)["runs"]
    return [trained for run in runs for trained in _trained(_folder_and_head(run)[0])]


def _folder_and_head(run: str) -> tuple[Path, str]:
    if ":" in run and not Path(run).is_dir():
        folder, _, head = run.rpartition(":")
        return Path(folder), head
    return Path(run), ""


def _short(value) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else str(value)


def _aligned(scored: list[tuple[Member, dict]]) -> dict:
    """The members' predictions on every stay that any of them scores.

    stay_id, labels, has_ehr, has_cxr, age as in a predictions file, and scores_MNK, NaN where a
    member does not score a stay.
    """
    stay_id_N = np.unique(np.concatenate([part["stay_id"] for _, part in scored]))
    num_labels = scored[0][1]["labels"].shape[1]
    together = {"stay_id": stay_id_N, "scores_MNK": np.full((len(scored), len(stay_id_N), num_labels), np.nan)}
    filled_N = np.zeros(len(stay_id_N), bool)
    for m, (member, part) in enumerate(scored):
        at = np.searchsorted(stay_id_N, part["stay_id"])
        together["scores_MNK"][m, at] = part["scores"]
        for name in _FIELDS[1:]:
            values = together.setdefault(name, np.zeros((len(stay_id_N), *part[name].shape[1:]), part[name].dtype))
            if name == "labels" and (values[at] != part[name])[filled_N[at]].any():
                differing = part["stay_id"][filled_N[at] & (values[at] != part[name]).any(-1)][0]
                raise UserError(f"{member.name} has other labels for stay {differing} than {scored[0][0].name}")
            values[at] = part[name]
        filled_N[at] = True
    return together


def _weighted(score_MNK: np.ndarray, weight_M: np.ndarray) -> np.ndarray:
    """The weighted mean of the members that score a stay; their plain mean where all of those weigh nothing."""
    present_MNK = np.isfinite(score_MNK)
    weight_MNK = weight_M[:, None, None] * present_MNK
    weight_MNK = np.where(weight_MNK.sum(0) > 0, weight_MNK, present_MNK)
    return (np.where(present_MNK, score_MNK, 0) * weight_MNK).sum(0) / weight_MNK.sum(0)


def _by_image(together: dict) -> np.ndarray:
    score_NK = np.where(together["has_cxr"][:, None], *together["scores_MNK"])
    if missing := int(np.isnan(score_NK).any(1).sum()):
        raise UserError(f"{missing} stays are not scored by the run that is to score them: mind the order of --runs")
    return score_NK


def _chosen_weights(together: dict) -> tuple[np.ndarray, str]:
    """The weights of the best macro AUROC on what is given, the nearest to equal of the best."""
    num_members = len(together["scores_MNK"])
    parts = itertools.product(range(_WEIGHT_STEPS + 1), repeat=num_members - 1)
    grid = [
        np.array([*part, _WEIGHT_STEPS - sum(part)]) / _WEIGHT_STEPS for part in parts if sum(part) <= _WEIGHT_STEPS
    ]
    grid.sort(key=lambda weight_M: float(np.square(weight_M).sum()))  # of equals the first is taken

    def auroc(weight_M: np.ndarray) -> float:
        return metrics.macro(metrics.auroc(together["labels"], _weighted(together["scores_MNK"], weight_M)))

    return max(grid, key=auroc), f"macro AUROC of {len(together['stay_id'])} validation stays, {len(grid)} weightings"


def _mean_bce(scored: dict) -> float:
    score_NK = np.clip(scored["scores"].astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(scored["labels"] == 1, np.log(score_NK), np.log1p(-score_NK)).mean())


def _num_left_out(scored: list[tuple[Member, dict]], num_scored: int) -> int:
    """Stays of the split that no member scores."""
    in_split = max(len(part["stay_id"]) + member.result.get("num_left_out", 0) for member, part in scored)
    return max(0, in_split - num_scored)


def _title(member: Member, members: list[Member]) -> str:
    """A member's method and classifier, or its path if another member has the same."""

    def named(one: Member) -> str:
        return f"{one.result['method']}:{one.head}" if one.head else one.result["method"]

    return named(member) if sum(named(one) == named(member) for one in members) == 1 else member.name


def main(argv: list[str]) -> None:
    compilation.keep()
    result = ensemble(flags.FLAGS.runs, Path(flags.FLAGS.workdir), flags.FLAGS.rule)
    print(terminal.table([result]))
    print(f"\nwritten: {result_lib.Scored().result_path(Path(flags.FLAGS.workdir))}")


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Workdirs of finished runs, each DIR or DIR:HEAD.", required=True)
    flags.DEFINE_string("workdir", None, "Folder for the ensemble's predictions and result.", required=True)
    flags.DEFINE_string("rule", "average", "average, weighted or by_image.")
    command_line.run(main)
