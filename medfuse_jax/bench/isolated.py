"""Measure a case in a process of its own, so that a crash, a hang or a lack of memory of one does not end the rest.

The child is `python -m medfuse_jax.bench.isolated REQUEST ROWS`: REQUEST is JSON, and it writes its records to the file
ROWS. What it or a library prints goes to stderr.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from medfuse_jax.bench import cases
from medfuse_jax.bench.cases import Case
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]
_START_S = 180  # within which jax must find the device
LEFT_OUT, FAILED, OUT_OF_TIME, NOT_REACHED = "left out", "failed", "out of time", "not reached"
_ENDED = "ended after"


def measure(case: Case, data_dir: str, prefix: str, limit_s: float | None = None) -> list[dict]:
    """Return the case's records. One that could not be measured is a row with an 'outcome' and its 'reason'.

    prefix: of the lines that show progress. limit_s: seconds after which the process is ended.
    """
    rows, problem = _child({"case": cases.to_json(case), "data_dir": data_dir, "prefix": prefix}, limit_s)
    # Its records may be there although it did not end, or not well.
    return rows or [{"outcome": OUT_OF_TIME if problem.startswith(_ENDED) else FAILED, "reason": problem}]


def require(platform: str) -> None:
    """Raise UserError if jax finds no device of this platform ('gpu', 'tpu')."""
    rows, problem = _child({"platform": platform}, _START_S)
    found = rows[0]["platform"] if rows else problem
    if found != platform:
        raise UserError(
            f"jax finds no {platform.upper()} here (found: {found}): install the extra '{platform}', or rehearse with "
            "--tiny",
            field="--preset",
            value=platform,
        )


def _child(request: dict, limit_s: float | None) -> tuple[list[dict], str]:
    """Return the rows that the child wrote, and how it ended if that was not well."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "medfuse_jax.bench.isolated", json.dumps(request), str(path)]
        # A session of its own: whatever the child started is ended with it.
        streams: dict = {"stdin": subprocess.DEVNULL, "stdout": 2, "start_new_session": True}
        child = subprocess.Popen(command, env=environment, **streams)
        try:
            code = child.wait(limit_s)
            problem = f"killed by signal {-code}" if code < 0 else f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"{_ENDED} {limit_s:.0f} s, its share of the time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines], problem


def _run(case: Case, data_dir: str, prefix: str) -> list[dict]:
    """Measure the case in this process, which is the child."""
    from medfuse_jax.runtime import compilation

    compilation.use_cuda_graphs()  # as the commands that train, and before jax looks for devices
    from medfuse_jax.bench import machine

    if reason := _why_not(case):
        return [{"outcome": LEFT_OUT, "reason": reason}]
    say, before = progress(prefix), machine.moment()
    rows = importlib.import_module(f"medfuse_jax.bench.{case.kind}").measure(case, _data(case, data_dir), say)
    gc.collect()  # the PyTorch graphs hold memory in reference cycles
    say("", end="\r")
    environment = machine.environment() | before
    if sys.modules.get("torch"):
        from medfuse_jax.bench import torch_peer

        environment |= torch_peer.environment()
    last = {"settings": dataclasses.asdict(case) | {"sizes": dict(case.sizes)}, "environment": environment}
    return [row if "outcome" in row else row | last for row in rows]


def _data(case: Case, data_dir: str):
    """Return the opened shards, for the kinds of case that take batches; None if there are none."""
    if not data_dir or case.kind not in ("step", "feed", "parts", "trials", "trace", "reading", "hourly"):
        return None
    from medfuse_jax.data import dataset
    from medfuse_jax.models import registry

    model_class = registry.METHODS[case.method].model_class
    uses = {"use_ehr": model_class.uses_ehr, "use_cxr": model_class.uses_cxr}
    task = "decompensation" if case.kind == "hourly" else "pheno"
    return dataset.open_dataset(data_dir, task, max_buckets=case.max_buckets, **uses)


def _why_not(case: Case) -> str:
    """Return why this machine cannot run a case, or ''."""
    import jax

    if case.num_devices > len(jax.local_devices()):
        return f"it needs {case.num_devices} devices, and this machine has {len(jax.local_devices())}"
    return ""


def progress(prefix: str):
    """Return a function that shows progress on one line of a terminal; a text whose `end` is a newline always shows."""

    def say(text: str, end: str = "\r") -> None:
        if end == "\n" or sys.stderr.isatty():
            width = 118
            print(f"{(prefix + text)[:width]:{width}}", end=end, file=sys.stderr, flush=True)

    return say


def _answer(request: dict) -> list[dict]:
    try:
        if "platform" in request:
            import jax

            return [{"platform": jax.default_backend()}]
        return _run(cases.from_json(request["case"]), request["data_dir"], request["prefix"])
    except Exception as error:  # whatever it is, the other cases run
        if not isinstance(error, UserError):
            traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [{"outcome": FAILED, "reason": reason, "platform": reason}]


if __name__ == "__main__":
    answered = _answer(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text("".join(json.dumps(row) + "\n" for row in answered))
