"""A sweep's whole command compared with one run's, at the demo's sizes.

The encoders are trained once, before the timing. Every repeat starts in an empty folder and loads from the cache the
programs that the warm-up compiled.
"""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

from medfuse_jax.bench import clock
from medfuse_jax.bench.cases import Case
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

_CONFIG = Path(__file__).parents[2] / "configs" / "demo.py"


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return the records of a sweep of `num_trials` trials ('ours') and of one run. data is ignored."""
    if not _CONFIG.is_file():
        raise UserError(f"{_CONFIG} is missing: run this case from a clone of the repository", path=_CONFIG)
    with tempfile.TemporaryDirectory() as name:
        folder, count, costs = Path(name), itertools.count(), []
        say("training the encoders")
        cohort = f"--config.data.synthetic_stays={case.num_stays}"
        _run("medfuse_jax.main", folder / "encoders", "--config.num_epochs=1", cohort)
        trained = [f"--config.init.{e}={folder / 'encoders' / f'pretrain_{e}'}" for e in ("ehr", "cxr")]
        shared = [cohort, f"--config.method={case.method}", f"--config.num_epochs={case.num_epochs}", *trained]
        search = [
            "--search=lr:loguniform(1e-4,1e-2)",
            "--search=dropout:uniform(0.0,0.5)",
            f"--trials={case.num_trials}",
        ]

        def sweep() -> None:
            workdir = folder / f"sweep{next(count)}"
            _run("medfuse_jax.sweep", workdir, *shared, *search)
            costs.append(files.read_json(workdir / "costs.json", "the sweep writes it"))

        def run() -> None:
            _run("medfuse_jax.main", folder / f"run{next(count)}", *shared)

        seconds = clock.interleave({clock.OURS: sweep, "one_run": run}, case.warm_up, case.repeats, say)
    median = sorted(costs[case.warm_up :], key=lambda cost: cost["train_s"])[case.repeats // 2]
    rows = clock.records(seconds)
    rows[clock.OURS] |= {"num_trials": case.num_trials, "compile_cached_s": median["compile_s"]}
    rows[clock.OURS] |= {name: median[name] for name in ("startup_s", "encode_s", "input_s", "train_s", "steps")}
    return list(rows.values())


def _run(module: str, workdir: Path, *flags: str) -> None:
    command = [sys.executable, "-m", module, f"--config={_CONFIG}", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last_line = "".join(done.stderr.strip().splitlines()[-1:])
        raise UserError(f"the command {module} of the case failed: {last_line}", path=workdir)
