"""Combine the members' scores by a rule, and evaluate the result as a run's.

Shapes: N stays, K labels, M members.
"""

import itertools
from pathlib import Path

import numpy as np

from medfuse_jax import evaluate, metrics, parallel, schema
from medfuse_jax.ensemble import members as members_lib
from medfuse_jax.ensemble.members import Member
from medfuse_jax.runs import builds, sources
from medfuse_jax.runs import result as result_lib
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError, check_choice

RULES = {"average": "late_average", "weighted": "weighted_average", "by_cxr": "ensemble"}  # rule -> method
_WEIGHT_STEPS = 20  # weights are multiples of 1/20
_MAX_WEIGHTED = 5  # members: 10,626 weightings; 6 would have 53,130


def ensemble(runs: list[str], workdir: Path, rule: str = "average") -> dict:
    """Combine the members' scores on the test stays; write and return the result.

    runs: workdirs, each followed by `:head` to use a head other than the main one. Writes config.json,
    predictions_test.npz and result.json to the workdir, as a run does. Raises UserError if members differ in task,
    labels or splits, or if the workdir holds something else.
    """
    _check_runs(runs, rule)
    content = {"name": "ensemble", "method": RULES[rule], "rule": rule, "runs": runs}
    _check_free(workdir, content)
    members = [members_lib.open_member(run, "test", evaluate.evaluate) for run in runs]
    _check_comparable(members)
    _check_splits(members)
    other_data = _say_other_data(members)
    if (task := members[0].result["task"]) in schema.TASKS and schema.TASKS[task].hourly:
        raise UserError(f"--runs: ensembles of the hourly task {task} are not supported", field="--runs", value=task)
    with files.must_write(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / "config.json", files.sealed(content))
    joined = members_lib.join(members)
    score_NK, weights, selected_by = _combine(joined, runs, rule)
    scored = {name: joined[name] for name in members_lib.FIELDS} | {"scores": score_NK}
    first = members[0].result
    resample = result_lib.resample_by(first.get("resample", ""), scored)
    bootstrap = (first["subsets"]["all"]["num_bootstrap"], first["seed"], resample)
    titles = [member.title for member in members]
    names = [member.title if titles.count(member.title) == 1 else member.name for member in members]
    result = {
        **{field: first[field] for field in ("task", "labels", "seed")},
        "data": _data(members, other_data),
        "name": f"{rule} of {', '.join(runs)}",
        "method": RULES[rule],
        "split": "test",
        "num_params": sum({member.workdir: member.result["num_params"] for member in members}.values()),
        "best_epoch": None,
        "selected_by": selected_by,
        "loss": _mean_bce(scored),
        "num_left_out": _num_left_out(members, len(score_NK)),
        "members": [
            {"run": m.name, "method": m.result["method"], "weight": w, "step": m.result.get("step")}
            for m, w in zip(members, weights)
        ],
        "resample": resample,
        "subsets": result_lib.subsets(scored, *bootstrap, schema.label_types(first["task"], first["labels"])),
        "comparisons": [
            difference
            for member, name in zip(members, names)
            for difference in result_lib.compare(scored, member.predictions, name, *bootstrap)
        ],
        "environment": result_lib.environment(parallel.devices()),
    }
    result_lib.save(workdir, result_lib.TEST, scored, result)
    return result


# Checks


def _check_runs(runs: list[str], rule: str) -> None:
    check_choice("--rule", rule, RULES)
    expected = ""
    if rule == "by_cxr" and len(runs) != 2:
        expected = "needs two, the one for stays with an X-ray first"
    elif len(runs) < 2:
        expected = "needs two or more, comma-separated"
    elif rule == "weighted" and len(runs) > _MAX_WEIGHTED:
        expected = f"tries all weights in steps of 1/{_WEIGHT_STEPS}, so give at most {_MAX_WEIGHTED}"
    if expected:
        raise members_lib.error(f"--runs has {len(runs)} run(s); --rule={rule} {expected}", value=len(runs))
    keys = [(folder.resolve(), head) for folder, head in map(members_lib.folder_and_head, runs)]
    if repeated := [run for run, key in zip(runs, keys) if keys.count(key) > 1]:
        raise members_lib.error(f"--runs has {repeated[0]} twice: give each member once", value=repeated[0])


def _check_free(workdir: Path, content: dict) -> None:
    """Raise UserError if the workdir holds anything but this ensemble."""
    workdir_lib.check_outside_sweeps(workdir)
    path = workdir / "config.json"
    if path.exists() and files.read_json(path, "choose another --workdir") != content:
        raise UserError(f"{workdir} holds another run: choose another --workdir", field="--workdir", path=workdir)


def _check_comparable(members: list[Member]) -> None:
    first = members[0]
    for member, field in itertools.product(members[1:], ("task", "labels")):
        ours, theirs = member.result[field], first.result[field]
        if ours != theirs:
            details = f" ({ours} and {theirs})" if field == "task" else ""
            message = f"{member.name} and {first.name} cannot be combined: they differ in {field}{details}"
            raise members_lib.error(message, member.workdir, field)
    if schema.TASKS[first.result["task"]].cxr_only:
        raise members_lib.error(f"{first.name} scores X-rays, but an ensemble combines scores of stays", first.workdir)


def _check_splits(members: list[Member]) -> None:
    """Raise UserError if a member was trained or selected on patients of another member's test split."""
    runs = {workdir: member.name for member in members for workdir in _trained(member.workdir)}
    if len({files.read_json(workdir / "data.json", members_lib.GIVE_FINISHED).get("digest") for workdir in runs}) == 1:
        return  # the same shards
    indices = {workdir: sources.reopen(workdir).dataset.index for workdir in runs}
    for trained, tested in itertools.permutations(runs, 2):
        seen_N = np.concatenate([indices[trained][split]["subject_id"] for split in ("train", "val")])
        if num_leaked := len(np.intersect1d(seen_N, indices[tested]["test"]["subject_id"])):
            raise members_lib.error(
                f"{runs[trained]} and {runs[tested]} cannot be combined: {num_leaked} test patients of the second are "
                "train or val patients of the first; build both shards with the same --seed, --val_ids and --test_ids",
                trained,
                num_leaked,
            )


def _say_other_data(members: list[Member]) -> list[str]:
    """Print one warning if members were trained or scored on different data; return it as sentences."""
    other_data = builds.differing([(m.name, builds.read(m.workdir, m.result)) for m in members])
    if other_data:
        print(f"warning: {'; '.join(other_data)}", flush=True)
    return other_data


def _data(members: list[Member], other_data: list[str]) -> dict:
    """Return the 'data' of the result: the first member's, an unusual pairing of any, and how members' data differ."""
    data = dict(members[0].result["data"])
    for member in members:
        data |= builds.unusual(member.result["data"])
    return data | ({"other_data": other_data} if other_data else {})


def _trained(workdir: Path) -> list[Path]:
    """Return the workdirs of the trained runs behind a member: its own, or those of an ensemble's members."""
    if not workdir_lib.is_ensemble(workdir):
        return [workdir]
    runs = files.read_json(workdir / "config.json", members_lib.GIVE_FINISHED)["runs"]
    return [trained for run in runs for trained in _trained(members_lib.folder_and_head(run)[0])]


# Rules


def _combine(joined: dict, runs: list[str], rule: str) -> tuple[np.ndarray, list, str]:
    """Return the scores [N, K], the members' weights (None for by_cxr), and how the weights were selected."""
    if rule == "by_cxr":
        selected_by = "nothing: the first run for stays with an X-ray, the second for others"
        return _by_cxr(joined), [None] * len(runs), selected_by
    weights, selected_by = [1 / len(runs)] * len(runs), "nothing: equal weights"
    if rule == "weighted":
        validated = [members_lib.open_member(run, "val", evaluate.evaluate) for run in runs]
        weights, selected_by = _choose_weights(members_lib.join(validated))
    return _weighted_mean(joined["scores_MNK"], np.array(weights)), weights, selected_by


def _weighted_mean(score_MNK: np.ndarray, weight_M: np.ndarray) -> np.ndarray:
    """Return the weighted mean [N, K] over the members that score a stay; the plain mean if all their weights are 0."""
    is_scored_MNK = np.isfinite(score_MNK)
    weight_MNK = weight_M[:, None, None] * is_scored_MNK
    weight_MNK = np.where(weight_MNK.sum(0) > 0, weight_MNK, is_scored_MNK)
    return (np.where(is_scored_MNK, score_MNK, 0) * weight_MNK).sum(0) / weight_MNK.sum(0)


def _by_cxr(joined: dict) -> np.ndarray:
    score_NK = np.where(joined["has_cxr"][:, None], *joined["scores_MNK"])
    if num_missing := int(np.isnan(score_NK).any(1).sum()):
        message = f"{num_missing} stays are not scored by their run: give the run for stays with an X-ray first"
        raise members_lib.error(message, value=num_missing)
    return score_NK


def _choose_weights(joined: dict) -> tuple[list[float], str]:
    """Return the weights with the best macro AUROC, and a description. The weights nearest to equal win ties."""
    num_free = len(joined["scores_MNK"]) - 1
    parts = [p for p in itertools.product(range(_WEIGHT_STEPS + 1), repeat=num_free) if sum(p) <= _WEIGHT_STEPS]
    grid = [np.array([*part, _WEIGHT_STEPS - sum(part)]) / _WEIGHT_STEPS for part in parts]
    grid.sort(key=lambda weight_M: float(np.square(weight_M).sum()))  # max() returns the first of several maxima

    def auroc(weight_M: np.ndarray) -> float:
        return metrics.macro(metrics.auroc(joined["labels"], _weighted_mean(joined["scores_MNK"], weight_M)))

    description = f"macro AUROC of {len(joined['stay_id'])} validation stays, {len(grid)} weightings"
    return max(grid, key=auroc).tolist(), description


def _mean_bce(scored: dict) -> float:
    score_NK = np.clip(scored["scores"].astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(scored["labels"] == 1, np.log(score_NK), np.log1p(-score_NK)).mean())


def _num_left_out(members: list[Member], num_scored: int) -> int:
    """Return the number of stays of the split that no member scores."""
    num_stays = max(len(m.predictions["stay_id"]) + m.result.get("num_left_out", 0) for m in members)
    return max(0, num_stays - num_scored)
