"""Measure speed: `python -m medfuse_jax.bench [--preset=NAME] [--json=FILE]`.

It needs only jax, flax, optax and numpy, and makes up its input. It also measures PyTorch and scikit-learn where they
are installed; the 'feed' cases need grain. The presets are in `medfuse_jax/bench/cases.py`.
"""

import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import re
import shlex
import sys
import time

from absl import flags

from medfuse_jax.bench import cases
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

# Set before jax starts: torch shares the GPU, so jax must not reserve all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    chosen, budget_s = _choose(values)
    if values.list:
        print("\n".join(case.name for case in chosen))
        return
    out = files.open_to_append(values.json, "--json") if values.json else None
    if values.preset == "tiny":
        print("tiny only checks that everything runs; use --preset=cpu to measure", file=sys.stderr)
    start = time.perf_counter()
    for number, case in enumerate(chosen, start=1):
        elapsed_s = time.perf_counter() - start
        say = _progress(f"[{number}/{len(chosen)}, {elapsed_s:.0f} s] {case.name}: ")
        reason = _why_not(case)
        if budget_s and elapsed_s > budget_s:
            reason = f"the budget of {budget_s:.0f} s is used up"
        if reason:
            say(f"left out: {reason}", end="\n")
            continue
        _measure(case, values, say, out)
    print(f"{time.perf_counter() - start:.0f} s")


def _choose(values) -> tuple[list[cases.Case], float | None]:
    """Return the preset's cases that --only matches, changed by the other flags, and the budget in seconds."""
    preset, budget_s = cases.preset(values.preset)
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
    return chosen, budget_s


def _measure(case: cases.Case, values, say, out) -> None:
    """Measure a case, print its records and write them to `out`."""
    from medfuse_jax.bench import clock, machine  # late, so that a wrong flag is refused before jax starts
    from medfuse_jax.runtime import compilation

    compilation.use_cuda_graphs()  # as the commands that train

    data = None
    if values.data_dir and case.kind in ("step", "feed", "parts", "trials"):
        from medfuse_jax.data import dataset
        from medfuse_jax.models import registry

        model_class = registry.METHODS[case.method].model_class
        uses = {"use_ehr": model_class.uses_ehr, "use_cxr": model_class.uses_cxr}
        data = dataset.open_dataset(values.data_dir, "pheno", max_buckets=case.max_buckets, **uses)
    before = machine.moment()
    rows = importlib.import_module(f"medfuse_jax.bench.{case.kind}").measure(case, data, say)
    gc.collect()  # the PyTorch graphs hold memory in reference cycles
    say("", end="\r")
    environment = machine.environment() | before
    if "torch" in sys.modules:
        from medfuse_jax.bench import torch_peer

        environment |= torch_peer.environment()
    first = {"case": case.name, "input": "shards" if data else "made up", "command": _command()}
    last = {"settings": dataclasses.asdict(case) | {"sizes": dict(case.sizes)}, "environment": environment}
    for row in rows:
        record = first | row | last
        print(clock.line(record))
        if out:
            print(json.dumps(record), file=out, flush=True)


def _why_not(case: cases.Case) -> str:
    """Return why this machine cannot run a case, or ''."""
    import jax

    if case.kind == "feed" and importlib.util.find_spec("grain") is None:
        return "grain is not installed (pip install grain)"
    if case.num_devices > len(jax.local_devices()):
        return f"it needs {case.num_devices} devices, and this machine has {len(jax.local_devices())}"
    return ""


def _progress(prefix: str):
    """Return a function that shows progress on one line of a terminal; a text whose `end` is a newline always shows."""

    def say(text: str, end: str = "\r") -> None:
        if end == "\n" or sys.stderr.isatty():
            width = 118
            print(f"{(prefix + text)[:width]:{width}}", end=end, file=sys.stderr, flush=True)

    return say


def _command() -> str:
    """Return the command as typed, without the folders of its paths."""
    arguments = [re.sub(r"=.*/", "=", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", "medfuse_jax.bench", *arguments])


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string(
        "preset", "tiny", f"Which cases to measure: {', '.join(cases.PRESETS)}. tiny only checks that they run."
    )
    flags.DEFINE_string("only", None, "Regular expression: measure only the cases whose name it matches.")
    flags.DEFINE_bool("list", False, "Print the names of the cases and exit.")
    flags.DEFINE_string("json", None, "File to append the records to, one JSON object a line.")
    flags.DEFINE_string("data_dir", None, "Phenotyping shards to take batches from instead of making them up.")
    flags.DEFINE_integer("repeats", None, "Timed repeats of every contender.", lower_bound=1)
    flags.DEFINE_integer("warm_up", None, "Untimed passes of every contender before the first repeat.", lower_bound=0)
    flags.DEFINE_integer("trials", None, "Number of trials in the cases 'trials' and 'sweep'.", lower_bound=1)
    flags.DEFINE_enum("precision", None, ["float32", "bfloat16"], "Precision of our code and of torch_tuned.")
    flags.DEFINE_bool("ours_only", False, "Do not measure PyTorch or scikit-learn.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
