"""Measures speed: `python -m medfuse_jax.bench [--preset=NAME] [--json=FILE]`.

Runs with jax, flax, optax and numpy alone, on made-up arrays; torch and scikit-learn are measured beside ours where
they are installed, and the 'feed' cases need grain. What the presets hold: `medfuse_jax/bench/cases.py`.
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
from pathlib import Path

from absl import flags

from medfuse_jax.bench import cases, table
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

# Before jax starts: torch shares the GPU, so jax must not take it whole. Fragmentation costs nothing measurable here.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_MODULES = {
    "step": "step_case",
    "feed": "step_case",
    "lstm": "lstm_case",
    "bootstrap": "bootstrap_case",
    "first_step": "first_step",
    "parts": "parts_case",
    "trials": "trials_case",
    "sweep": "sweep_case",
}


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    chosen, budget_s = cases.preset(values.preset)
    chosen = [_changed(case, values) for case in chosen]
    if values.only:
        chosen = [case for case in chosen if _matches(values.only, case.name)]
        if not chosen:
            names = "; ".join(case.name for case in cases.preset(values.preset)[0])
            raise UserError(f"--only={values.only} matches no case of --preset={values.preset}: {names}")
    if values.list:
        print("\n".join(case.name for case in chosen))
        return
    out = _open(values.json)
    if values.preset == "tiny":
        print("tiny: a check that everything runs; its numbers mean nothing (--preset=cpu measures)", file=sys.stderr)
    start = time.perf_counter()
    for number, case in enumerate(chosen, start=1):
        spent = time.perf_counter() - start
        say = _progress(f"[{number}/{len(chosen)}, {spent:.0f} s] {case.name}: ")
        reason = _cannot(case) or (budget_s and spent > budget_s and f"{budget_s:.0f} s are spent")
        if reason:
            say(f"left out: {reason}", end="\n")
            continue
        for row in measure(case, values, say):
            print(table.line(row))
            if out:
                print(json.dumps(row), file=out, flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


def measure(case: cases.Case, values, say) -> list[dict]:
    """The case's records, with all that is needed to repeat them."""
    from medfuse_jax.bench import machine  # late: a wrong flag is refused before jax starts

    data = None
    if values.data_dir and case.kind in ("step", "feed", "parts", "trials"):
        from medfuse_jax.data import batches
        from medfuse_jax.models import registry

        method, _ = registry.METHODS[case.method]
        uses = {"use_ehr": method.uses_ehr, "use_cxr": method.uses_cxr, "max_buckets": case.max_buckets}
        data = batches.open_dataset(values.data_dir, "pheno", **uses)
    before = machine.moment()
    rows = importlib.import_module(f"medfuse_jax.bench.{_MODULES[case.kind]}").measure(case, data, say)
    gc.collect()  # the peers' graphs hold memory in cycles
    say("", end="\r")
    environment = machine.environment()
    if "torch" in sys.modules:
        from medfuse_jax.bench import torch_peer

        environment = environment | torch_peer.environment()
    settings = dataclasses.asdict(case) | {"sizes": dict(case.sizes)}
    about = {"case": case.name, "input": "shards" if data else "made up", "command": _command()}
    return [about | row | {"settings": settings, "environment": environment | before} for row in rows]


def _cannot(case: cases.Case) -> str:
    """Why a case cannot run here, '' where it can."""
    import jax

    if case.kind == "feed" and importlib.util.find_spec("grain") is None:
        return "grain is not installed (pip install grain)"
    if case.num_devices > len(jax.local_devices()):
        return f"it needs {case.num_devices} devices, there are {len(jax.local_devices())}"
    return ""


def _changed(case: cases.Case, values) -> cases.Case:
    """The case with what the command line sets."""
    given = {
        "repeats": values.repeats,
        "warm_up": values.warm_up,
        "num_trials": values.trials,
        "precision": values.precision,
        "peers": () if values.ours_only else None,
    }
    return dataclasses.replace(case, **{name: value for name, value in given.items() if value is not None})


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"--only={pattern} is not a regular expression ({error})") from None


def _open(path: str | None):
    if not path:
        return None
    with files.must_write(f"--json={path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a")


def _progress(prefix: str):
    """Says what is going on, on one line of the terminal; nothing where the output is no terminal."""

    def say(text: str, end: str = "\r") -> None:
        if end == "\n" or sys.stderr.isatty():
            width = 118
            print(f"{(prefix + text)[:width]:{width}}", end=end, file=sys.stderr, flush=True)

    return say


def _command() -> str:
    """The command as typed, its paths without their folders."""
    given = [re.sub(r"=.*/", "=", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", "medfuse_jax.bench", *given])


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string(
        "preset",
        "tiny",
        f"Which cases: {', '.join(cases.PRESETS)}; tiny checks that all of it runs, its numbers mean nothing.",
    )
    flags.DEFINE_string("only", None, "A regular expression: only the cases whose name it finds.")
    flags.DEFINE_bool("list", False, "Print the names of the cases and end.")
    flags.DEFINE_string("json", None, "A file to append the records to, one line of JSON a contender.")
    flags.DEFINE_string("data_dir", None, "Shards of phenotyping to take batches from, instead of made-up arrays.")
    flags.DEFINE_integer("repeats", None, "Repeats of every contender.", lower_bound=1)
    flags.DEFINE_integer("warm_up", None, "Passes of every contender before the first that counts.", lower_bound=0)
    flags.DEFINE_integer("trials", None, "Trials of the sweeps' cases.", lower_bound=1)
    flags.DEFINE_enum("precision", None, ["float32", "bfloat16"], "Of ours and of torch_tuned.")
    flags.DEFINE_bool("ours_only", False, "Without what ours is compared with in PyTorch and scikit-learn.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
