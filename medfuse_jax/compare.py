"""Compare two runs on the stays that both score: `python -m medfuse_jax.compare --a=DIR --b=DIR`.

A run is a workdir, another classifier head of its model (`DIR:ehr_only`), an ensemble, or a sweep, which stands for its
chosen trial. Its predictions are read from its workdir; if they are missing or from older weights, they are made first.
Both runs are scored on the same bootstrap resamples. All differences are b minus a.

Shapes: N stays, K labels.
"""

from pathlib import Path

import numpy as np
from absl import flags

from medfuse_jax import evaluate, metrics, schema
from medfuse_jax.ensemble import members as members_lib
from medfuse_jax.ensemble.members import Member
from medfuse_jax.report import terminal
from medfuse_jax.runs import builds, result
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime import command_line, compilation, files
from medfuse_jax.runtime.errors import UserError, check_choice
from medfuse_jax.sweep import results as sweep_results


def compare(a: str, b: str, split: str = "test", num_bootstrap: int = 1000, seed: int = 0, resample: str = "") -> dict:
    """Return the differences b - a of AUROC and average precision, macro and per label, on the stays that both score.

    For labels that are ordered bins (length of stay) also of the linear kappa and the mean absolute deviation, hours.

    resample: what a resample draws, 'patient' or 'stay'; by default see `result.resample_by`.

    Returns a dict: a and b ('run', 'method', 'step', 'num_samples', and an
    unusual 'pairing'), task, split, labels, resample, other_data (what differs
    between the runs' data, in words; usually []), and differences: a
    `metrics.compare`, and `metrics.compare_ordinal` of ordered bins, with its 'subset' for all common stays, for those
    with an X-ray and for those without.
    Raises UserError if the runs differ in task or labels, or have no stay in common.
    """
    check_choice("--split", split, schema.SPLITS)
    check_choice("--resample", resample, ("", *result.RESAMPLES))
    member_a, member_b = (_open(run, split, flag) for run, flag in ((a, "--a"), (b, "--b")))
    _check_comparable(member_a, member_b)
    of_a, of_b = _common(member_a, member_b)
    other_data = builds.differing([(m.name, builds.read(m.workdir, m.result)) for m in (member_a, member_b)])
    for difference in other_data:
        print(f"warning: {difference}", flush=True)
    resample = result.resample_by(resample, of_b)
    return {
        **{name: _described(member) for name, member in (("a", member_a), ("b", member_b))},
        **{field: member_a.result[field] for field in ("task", "labels")},
        "split": split,
        "resample": resample,
        "other_data": other_data,
        "differences": result.compare(of_b, of_a, member_a.name, num_bootstrap, seed, resample),
    }


def _open(run: str, split: str, flag: str) -> Member:
    folder, head = members_lib.folder_and_head(run)
    if workdir_lib.is_sweep(folder):
        folder = sweep_results.chosen_dir(folder)
        run = f"{folder}:{head}" if head else str(folder)
    return members_lib.open_member(run, split, evaluate.evaluate, flag)


def _check_comparable(a: Member, b: Member) -> None:
    for field in ("task", "labels"):
        ours, theirs = b.result[field], a.result[field]
        if ours != theirs:
            details = f" ({theirs} and {ours})" if field == "task" else ""
            message = f"{a.name} and {b.name} cannot be compared: they differ in {field}{details}"
            raise members_lib.error(message, b.workdir, field, "--b")
    if schema.TASKS[a.result["task"]].cxr_only:
        message = f"{a.name} scores X-rays, which have no stay_id to match: give runs of a task with stays"
        raise members_lib.error(message, a.workdir, a.result["task"], "--a")


def _common(a: Member, b: Member) -> tuple[dict, dict]:
    """Return the predictions of a and of b on the stays that both score, in the order of stay_id."""
    joined = members_lib.join([a, b], "--b")
    in_both_N = np.isfinite(joined["scores_MNK"]).all((0, 2))
    if not in_both_N.any():
        message = f"{a.name} and {b.name} have no stay in common: give runs scored on the same split of one build"
        raise members_lib.error(message, b.workdir, 0, "--b")
    predicted = {name: key for name, key in members_lib.PREDICTED.items() if key in joined}
    same = {name: values[in_both_N] for name, values in joined.items() if name not in predicted.values()}
    of_a, of_b = (same | {name: joined[key][m, in_both_N] for name, key in predicted.items()} for m in range(2))
    return of_a, of_b


def _described(member: Member) -> dict:
    known = {name: member.result[name] for name in ("method", "step") if name in member.result}
    known |= builds.unusual(member.result.get("data", {}))
    return {"run": member.name, "num_samples": len(member.predictions["stay_id"])} | known


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    compilation.configure()
    if options.json and Path(options.json).is_dir():
        raise UserError(f"--json={options.json} is a folder: give a file", field="--json", path=options.json)
    compared = compare(options.a, options.b, options.split, options.num_bootstrap, resample=options.resample)
    compared = metrics.to_json(compared)
    if options.json:
        with files.must_write(f"--json={options.json}"):
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            files.write_json(Path(options.json), compared)
    print(terminal.differences(compared))  # last: `| head` ends the command here
    if options.json:
        print(f"\nwritten: {options.json}")


if __name__ == "__main__":
    flags.DEFINE_string("a", None, "A finished run: DIR, DIR:HEAD, an ensemble or a sweep.", required=True)
    flags.DEFINE_string("b", None, "The run to compare it with.", required=True)
    flags.DEFINE_string("split", "test", "train, val or test.")
    flags.DEFINE_integer("num_bootstrap", 1000, "Number of bootstrap resamples.", lower_bound=1)
    flags.DEFINE_string("resample", "", "What they draw: patient or stay; default: see docs/evaluation.md.")
    flags.DEFINE_string("json", "", "Also write all numbers to this file.")
    command_line.run(main)
