"""What a call of a step costs the host: in one process, against one of two that train one run together.

One process calls as config.parallel says; the devices of two are always a mesh, as by shard_map (parallel.py). The step
touches as many arrays as MedFuse's and computes next to nothing, so that its time is that of the call. The processes
have one device each and exchange nothing within the step: how long that takes depends on the network. CPUs stand for
any device, because the call's cost is the host's.

Each start is a separate process: `python -m medfuse_jax.bench.dispatch NUM_PROCESSES PROCESS PORT PARALLEL`.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from medfuse_jax.bench.cases import Case

_ROOT = Path(__file__).parents[2]
_NUM_LEAVES = 438  # parameters and Adam moments of MedFuse with a ResNet-34
_NUM_CALLS = 100
_ONE_DEVICE = "--xla_force_host_platform_device_count=1"


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return the records of 'ours' (one process) and 'two_processes', in seconds a call. data is ignored."""
    from medfuse_jax.bench import clock  # imported here: the child processes start faster

    seconds: dict[str, list[float]] = {clock.OURS: [], "two_processes": []}
    for repeat in range(case.repeats):
        say(f"repeat {repeat + 1}/{case.repeats}")
        for name, num_processes in ((clock.OURS, 1), ("two_processes", 2)):
            seconds[name].append(_start(num_processes, case.parallel))
    return list(clock.records(seconds).values())


def _start(num_processes: int, parallel: str) -> float:
    """Run the processes; return the first one's seconds a call: the fastest tenth, which other load hardly changes."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _ONE_DEVICE}
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    running = []
    for i in range(num_processes):
        arguments = [str(num_processes), str(i), str(port), parallel]
        command = [sys.executable, "-m", "medfuse_jax.bench.dispatch", *arguments]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [child.communicate()[0] for child in running]
    if failed := [child.returncode for child in running if child.returncode]:
        raise RuntimeError(f"a process of {num_processes} ended with status {failed[0]}")
    return float(printed[0].splitlines()[-1])


def _seconds_a_call(num_processes: int, process: int, port: int, mode: str) -> float:
    import jax
    import numpy as np

    from medfuse_jax import parallel
    from medfuse_jax.runtime import hosts

    if num_processes > 1:
        hosts.start_training(f"localhost:{port}", num_processes, process, detect=False)
    on = parallel.devices()
    state = parallel.replicate({f"leaf_{i}": np.zeros(4, np.float32) for i in range(_NUM_LEAVES)}, on)
    batch = parallel.divide({"x": np.zeros((1, 4), np.float32)}, on)

    def step(state, batch):
        return jax.tree.map(lambda leaf: leaf + 1, state), batch["x"].sum()

    step_fn = parallel.over_devices(step, mode, on, in_axes=(None, 0), out_axes=None, donate_argnums=0)
    taken = []
    for _ in range(_NUM_CALLS):
        start = time.perf_counter()
        state, _ = step_fn(state, batch)
        taken.append(time.perf_counter() - start)
        jax.block_until_ready(state)
    return statistics.quantiles(taken, n=10)[0]


if __name__ == "__main__":
    print(_seconds_a_call(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
