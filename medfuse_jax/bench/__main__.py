"""Measure speed: `python -m medfuse_jax.bench [--preset=NAME] [--minutes=N] [--json=FILE]`.

It needs only jax, flax, optax, numpy and absl, and makes up its input. It also measures PyTorch and scikit-learn where
they are installed. The presets are in `medfuse_jax/bench/cases.py`. Each case runs in a process of its own, in order of
importance; its records are printed, and written to the file, as it ends.
"""

import dataclasses
import json
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from medfuse_jax.bench import cases, clock, isolated
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

_GRACE_S = 10.0  # that a running case gets beyond the budget
_MAX_SHARE = 0.5  # of the budget, that one case may take: it may hang

# Read when jax starts: torch shares the GPU, so jax must not reserve all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    chosen, budget_s = _choose(values)
    if values.list:
        print("\n".join(case.name for case in chosen))
        return
    if values.data_dir and not Path(values.data_dir).is_dir():
        raise UserError(f"--data_dir={values.data_dir} is no folder", field="--data_dir", path=values.data_dir)
    out = files.open_to_append(values.json, "--json") if values.json else None
    if values.preset == "tiny" or values.tiny:
        print("tiny sizes only check that everything runs; their numbers mean nothing", file=sys.stderr)
    start = time.perf_counter()
    if values.preset in cases.PLATFORMS and not values.tiny:
        isolated.require(cases.PLATFORMS[values.preset])
    with tempfile.TemporaryDirectory() as cache:
        if values.preset in cases.PLATFORMS:  # cases share programs, and their time is short
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        missing = _measure_all(chosen, budget_s, start, values, out)
    print(f"{time.perf_counter() - start:.0f} s")
    for outcome in (isolated.FAILED, isolated.OUT_OF_TIME, isolated.LEFT_OUT, isolated.NOT_REACHED):
        if names := [name for name, ended in missing if ended == outcome]:
            print(f"{outcome}: {'; '.join(names)}")
    if any(ended == isolated.FAILED for _, ended in missing):
        sys.exit(1)


def _measure_all(chosen: list[cases.Case], budget_s: float | None, start: float, values, out) -> list[tuple[str, str]]:
    """Measure the cases in order; print and write each one's records. Return (name, outcome) of those without."""
    missing, described = [], False
    for number, case in enumerate(chosen, start=1):
        elapsed_s = time.perf_counter() - start
        prefix = f"[{number}/{len(chosen)}, {elapsed_s:.0f} s] {case.name}: "
        first = {"case": case.name, "input": "shards" if values.data_dir else "made up", "command": _command()}
        if budget_s is not None and elapsed_s >= budget_s:
            rows: list[dict] = [
                {"outcome": isolated.NOT_REACHED, "reason": f"the budget of {budget_s:.0f} s is used up"}
            ]
        else:
            limit_s = None if budget_s is None else _limit_s(budget_s, elapsed_s)
            rows = isolated.measure(case, values.data_dir or "", prefix, limit_s)
        for row in rows:
            record = first | row
            if "outcome" in row:
                missing.append((case.name, row["outcome"]))
                isolated.progress(prefix)(f"{row['outcome']}: {row['reason']}", end="\n")
            else:
                if not described:
                    described = True
                    print(_machine(row["environment"]), flush=True)
                print(clock.line(record), flush=True)
            if out:
                print(json.dumps(record), file=out, flush=True)
    return missing


def _limit_s(budget_s: float, elapsed_s: float) -> float:
    """Return the seconds that the next case may take."""
    return min(_MAX_SHARE * budget_s, budget_s - elapsed_s) + _GRACE_S


def _machine(environment: dict) -> str:
    """Return a line on the device, its driver and the versions."""
    names = ("driver", "python", "jax", "jaxlib", "flax", "torch")
    versions = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    return ", ".join([f"{environment['num_local_devices']} x {environment['device']}", *versions])


def _choose(values) -> tuple[list[cases.Case], float | None]:
    """Return the preset's cases that --only matches, changed by the other flags, and the budget in seconds."""
    preset, budget_s = cases.preset(values.preset)
    if values.tiny:
        preset = [cases.shrink(case) for case in preset]
        preset = list({case.name: case for case in preset}.values())
    fields = {
        "repeats": values.repeats,
        "warm_up": values.warm_up,
        "num_trials": values.trials,
        "precision": values.precision,
        "peers": () if values.ours_only else None,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        pattern = re.compile(values.only or "")
    except re.error as error:
        message = f"--only={values.only} is not a regular expression ({error})"
        raise UserError(message, field="--only", value=values.only) from None
    changed = [dataclasses.replace(case, **fields) for case in preset]
    chosen = [case for case in changed if pattern.search(case.name)]
    if not chosen:
        names = "; ".join(case.name for case in changed)
        message = f"--only={values.only} matches no case of --preset={values.preset}: {names}"
        raise UserError(message, field="--only", value=values.only)
    return chosen, budget_s if values.minutes is None else 60 * values.minutes


def _command() -> str:
    """Return the command as typed, without the folders of its paths."""
    arguments = [re.sub(r"=.*/", "=", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", "medfuse_jax.bench", *arguments])


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string(
        "preset", "tiny", f"Which cases to measure: {', '.join(cases.PRESETS)}. tiny only checks that they run."
    )
    flags.DEFINE_float("minutes", None, "Time budget, instead of the preset's.", lower_bound=0.0)
    flags.DEFINE_bool("tiny", False, "Shrink the preset's cases, to check on any machine that they run.")
    flags.DEFINE_string("only", None, "Regular expression: measure only the cases whose name it matches.")
    flags.DEFINE_bool("list", False, "Print the names of the cases and exit.")
    flags.DEFINE_string("json", None, "File to append the records to, one JSON object a line.")
    flags.DEFINE_string("data_dir", None, "Shards to take batches from instead of making them up.")
    flags.DEFINE_integer("repeats", None, "Timed repeats of every contender.", lower_bound=1)
    flags.DEFINE_integer("warm_up", None, "Untimed passes of every contender before the first repeat.", lower_bound=0)
    flags.DEFINE_integer("trials", None, "Number of trials in the cases 'trials' and 'sweep'.", lower_bound=1)
    flags.DEFINE_enum("precision", None, ["float32", "bfloat16"], "Precision of our code and of torch_tuned.")
    flags.DEFINE_bool("ours_only", False, "Do not measure PyTorch or scikit-learn.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
