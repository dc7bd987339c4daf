"""The time from an empty process to the end of the first training step, with a cold and a warm compilation cache.

Each time is that of a process of its own: `python -m medfuse_jax.bench.first_step CASE`, CASE being the case as JSON.
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

from medfuse_jax.bench.cases import Case

_ROOT = Path(__file__).parents[2]


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """One record: seconds of one cold start, and the warm ones after it. data is not read."""
    with tempfile.TemporaryDirectory() as cache:
        say("cold start")
        cold = _start(case, cache)
        warm = []
        for repeat in range(case.repeats):
            say(f"warm start {repeat + 1}/{case.repeats}")
            warm.append(_start(case, cache))
    from medfuse_jax.bench import clock  # late: a child of this module times its own import of jax

    phases = {name: round(s, 2) for name, s in warm[len(warm) // 2]["phases"].items()}
    row = {"contender": "ours"} | clock.summary([start["seconds"] for start in warm])
    return [row | {"cold_s": round(cold["seconds"], 3), "warm_phases_s": phases}]


def _start(case: Case, cache: str) -> dict:
    # A child that took the GPU's memory beforehand would find what its parent holds missing.
    variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    variables["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "medfuse_jax.bench.first_step", json.dumps(dataclasses.asdict(case))]
    start = time.perf_counter()
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return {"seconds": time.perf_counter() - start, "phases": json.loads(done.stdout.splitlines()[-1])}


def _first_step(case: Case) -> dict[str, float]:
    """Does the first step of a run; seconds of each phase."""
    marks = [("", time.perf_counter())]
    import jax

    from medfuse_jax import parallel
    from medfuse_jax.bench import cohort, step

    marks.append(("import", time.perf_counter()))
    data = cohort.dataset(case)
    plan = cohort.sample(cohort.train_plan(case, data), data.lengths("train"), 1)
    batches = cohort.collate_all(data, plan, case.num_devices)
    marks.append(("plan and read", time.perf_counter()))
    on = parallel.devices(case.num_devices)
    options = step.step_options(case, data)
    state = parallel.replicate(step.fresh_state(options), on)
    jax.block_until_ready(state)
    marks.append(("initialise", time.perf_counter()))
    step = parallel.compile_train(options, case.parallel, on)
    jax.block_until_ready(step(state, next(parallel.prefetch(batches, on)), jax.random.key(0)))
    marks.append(("compile and step", time.perf_counter()))
    return {name: end - start for (_, start), (name, end) in itertools.pairwise(marks)}


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields["sizes"] = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in fields["sizes"])
    print(json.dumps(_first_step(Case(**fields))))
