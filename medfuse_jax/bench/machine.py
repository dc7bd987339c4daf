"""The machine and software of a measurement, and the device's FLOP/s for matrix products."""

import datetime
import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax.runtime import cores

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
        "driver": _driver(),
        "cpu": _cpu_model(),
        "cores": cores.usable(),
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
    flops, seconds = time_products(precision)
    return flops / min(seconds)


@functools.cache
def copy_bytes_per_s() -> float:
    """Measure the bytes/s, read and written, of copies in the first device's memory; return the best of five."""
    num_bytes, seconds = time_copies()
    return num_bytes / min(seconds)


def time_products(precision: str, repeats: int = 5) -> tuple[float, list[float]]:
    """Return the operations of a large square matrix product, and its seconds in each repeat."""
    size = 1024 if jax.local_devices()[0].platform == "cpu" else 8192
    a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32), jnp.dtype(precision))
    return 2 * size**3, _time(jax.jit(lambda a: a @ a), a, repeats)


def time_copies(repeats: int = 5) -> tuple[float, list[float]]:
    """Return the bytes that a large copy reads and writes, and its seconds in each repeat."""
    x = jnp.ones((4 if jax.local_devices()[0].platform == "cpu" else 512) * 2**20, jnp.float32)
    return 2 * x.nbytes, _time(jax.jit(lambda x: x + 1), x, repeats)


def _time(function, x, repeats: int) -> list[float]:
    """Return the seconds of a call in each repeat of four."""
    function(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(4):
            out = function(x)
        out.block_until_ready()
        seconds.append((time.perf_counter() - start) / 4)
    return seconds


def why_no_torch() -> str:
    """Return why PyTorch cannot be timed beside jax, or ''. On a GPU it must use that GPU too."""
    backend = jax.default_backend()
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if backend == "cpu":
        return ""
    if backend != "gpu":
        return f"torch does not run on a {backend.upper()}"
    import torch

    return "" if torch.cuda.is_available() else "torch finds no GPU"


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


def _driver() -> str:
    """Return the version of NVIDIA's driver; '' without its tool."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
