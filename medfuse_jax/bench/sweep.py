"""A sweep beside a run of one of its trials, from start to end: whole commands, as a user types them.

On the demo's cohort and sizes. The encoders are trained once beforehand; every repeat begins in an empty folder,
with the programs that the warm-up compiled in the cache.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from medfuse_jax.bench import clock
from medfuse_jax.bench.cases import Case
from medfuse_jax.runtime.errors import UserError

_CONFIG = Path(__file__).parents[2] / "configs" / "demo.py"
_ONCE = re.compile(
    r"start-up ([\d.]+) s, encoding ([\d.]+) s, compilation ([\d.]+) s, waiting for input ([\d.]+) s; "
    r"(\d+) steps .* ([\d.]+) s"
)


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Two records: the sweep of `num_trials` trials, and one run. data is not read."""
    if not _CONFIG.is_file():
        raise UserError(f"{_CONFIG} is missing: run this case from a clone")
    with tempfile.TemporaryDirectory() as name:
        folder, count, said = Path(name), itertools.count(), []
        say("training the encoders")
        _run("medfuse_jax.main", folder / "encoders", "--config.num_epochs=1")
        trained = [f"--config.init.{e}={folder / 'encoders' / f'pretrain_{e}'}" for e in ("ehr", "cxr")]
        shared = [f"--config.method={case.method}", f"--config.num_epochs={case.num_epochs}", *trained]
        search = [
            "--search=lr:loguniform(1e-4,1e-2)",
            "--search=dropout:uniform(0.0,0.5)",
            f"--trials={case.num_trials}",
        ]

        def sweep() -> None:
            said.append(_run("medfuse_jax.sweep", folder / f"sweep{next(count)}", *shared, *search))

        def run() -> None:
            _run("medfuse_jax.main", folder / f"run{next(count)}", *shared)

        seconds = clock.interleave({"ours": sweep, "one_run": run}, case.warm_up, case.repeats, say)
    spent = sorted((once(text) for text in said[case.warm_up :]), key=lambda parts: parts[-1])
    startup_s, encode_s, compile_s, input_s, num_steps, train_s = spent[len(spent) // 2]
    rows = {name: clock.summary(taken) for name, taken in seconds.items()}
    rows["ours"] |= {"num_trials": case.num_trials, "startup_s": startup_s, "encode_s": encode_s}
    rows["ours"] |= {"compile_cached_s": compile_s, "input_s": input_s, "train_s": train_s, "steps": int(num_steps)}
    rows["one_run"]["time_over_ours"] = clock.ratio(seconds["one_run"], seconds["ours"])
    return [{"contender": name} | row for name, row in rows.items()]


def once(said: str) -> tuple[float, ...]:
    """What a sweep says its trials cost: seconds of start-up, encoding, compilation and input, steps, their seconds."""
    return tuple(float(part) for part in _ONCE.search(said).groups())


def _run(module: str, workdir: Path, *flags: str) -> str:
    """Runs a command to its end and returns what it printed."""
    command = [sys.executable, "-m", module, f"--config={_CONFIG}", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{module} failed in the sweep's benchmark: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout
