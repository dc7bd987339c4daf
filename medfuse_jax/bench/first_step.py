"""The time from starting Python to the end of the first training step, with a cold and a warm compilation cache.

Each start is a separate process: `python -m medfuse_jax.bench.first_step CASE`, with CASE as JSON.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medfuse_jax.bench import cases
from medfuse_jax.bench.cases import Case

_ROOT = Path(__file__).parents[2]


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return one record, of one cold start and `repeats` warm ones. data is ignored."""
    from medfuse_jax.bench import clock  # imported here: the child process times its own import of numpy

    with tempfile.TemporaryDirectory() as cache:
        say("cold start")
        cold_s, _ = _start(case, cache)
        warm = []
        for repeat in range(case.repeats):
            say(f"warm start {repeat + 1}/{case.repeats}")
            warm.append(_start(case, cache))
    row = {"contender": clock.OURS} | clock.summary([seconds for seconds, _ in warm])
    return [row | {"cold_s": round(cold_s, 3), "warm_phases_s": warm[len(warm) // 2][1]}]


def _start(case: Case, cache: str) -> tuple[float, dict[str, float]]:
    """Run the child process; return its wall-clock seconds and the seconds of each phase."""
    # Do not preallocate: the parent process may hold most of the GPU's memory.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "medfuse_jax.bench.first_step", cases.to_json(case)]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - start, json.loads(done.stdout.splitlines()[-1])


def _first_step(case: Case) -> dict[str, float]:
    """Take the first step of a run; return the seconds of each phase."""
    marks = [("", time.perf_counter())]
    import jax

    from medfuse_jax import parallel
    from medfuse_jax.bench import cohort, step

    marks.append(("import", time.perf_counter()))
    sample = cohort.sample(dataclasses.replace(case, num_batches=1))
    marks.append(("plan and read", time.perf_counter()))
    on = parallel.devices(case.num_devices)
    options = step.step_options(case, sample.data)
    state = parallel.replicate(step.fresh_state(options), on)
    jax.block_until_ready(state)
    marks.append(("initialise", time.perf_counter()))
    train_fn = parallel.compile_train(options, case.parallel, on)
    jax.block_until_ready(train_fn(state, next(parallel.prefetch(sample.batches, on)), jax.random.key(0)))
    marks.append(("compile and step", time.perf_counter()))
    return {name: round(end - start, 2) for (_, start), (name, end) in itertools.pairwise(marks)}


if __name__ == "__main__":
    print(json.dumps(_first_step(cases.from_json(sys.argv[1]))))
