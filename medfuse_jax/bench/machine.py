"""The machine and software of a measurement, and the device's FLOP/s for matrix products."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_VARIABLES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "NPROC", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@functools.cache
def environment() -> dict:
    """Describe the machine and software, to repeat a measurement; without names of folders, hosts or users."""
    devices = jax.local_devices()
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        "commit": _commit(),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "num_local_devices": len(devices),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def moment() -> dict:
    """Return the current time and load average, for the record of a case."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"time": now, "load_average": round(os.getloadavg()[0], 2)}


@functools.cache
def matrix_flops_per_s(precision: str) -> float:
    """Measure the FLOP/s of a large square matrix product on the first device; return the best of five."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32), jnp.dtype(precision))
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            product = multiply(a, a)
        product.block_until_ready()
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / min(seconds)


def peak_device_bytes() -> int | None:
    """Return the first device's peak memory since the process began; None on a CPU, which does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _commit() -> str:
    """Return the code's commit, with '+' if files are modified; '' outside a git checkout."""
    git = functools.partial(
        subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20
    )
    try:
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return commit + "+" * bool(git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
