"""How XLA compiles: its flags, the cache of compiled programs, a count of compilations and their time."""

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator

import jax

from medfuse_jax.runtime import files

# Compiler options for a program that runs only once, such as the drawing of initial weights. Not 0: at that level a
# ResNet-34's weights take 20 s to draw.
RUN_ONCE = {"xla_backend_optimization_level": 1}

# Graphs of two launches on: an epoch in one call is a loop and what sets its start, fewer than XLA's least, five.
_GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONVOLUTION --xla_gpu_graph_min_graph_size=2"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def configure() -> None:
    """Set XLA up for a command, before jax looks for devices.

    Turns on the persistent cache (later runs of the same model skip the compiler), in a folder of the user's own unless
    JAX_COMPILATION_CACHE_DIR names another, such as one that several hosts share; and, on GPUs, CUDA graphs.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(files.cache_dir() / "xla"))
    use_cuda_graphs()


def optimise_little() -> None:
    """Let XLA compile in a third of the time, before jax looks for devices: for models too small to run for long."""
    add_xla_flag("--xla_backend_optimization_level=0")
    if jax.__version__.startswith("0.10."):  # later versions do not know the flag
        add_xla_flag("--xla_cpu_use_fusion_emitters=false")


def use_cuda_graphs() -> None:
    """Let XLA put loops and convolutions into CUDA graphs too, where there may be a GPU, before jax looks for it.

    A step is then a few launches instead of hundreds. If XLA_FLAGS says anything about CUDA graphs, that holds.
    """
    if has_cuda_plugin() and _GRAPHS.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        add_xla_flag(_GRAPHS)


def add_xla_flag(flag: str) -> None:
    """Add to XLA_FLAGS, which XLA reads when it is first used."""
    given = os.environ.get("XLA_FLAGS", "")
    if flag not in given.split():
        os.environ["XLA_FLAGS"] = f"{given} {flag}".strip()


def has_cuda_plugin() -> bool:
    """Return whether jax's CUDA plug-in is installed: in the environment, or in a folder on the path."""
    return any(point.name.startswith("xla_cuda") for point in importlib.metadata.entry_points(group="jax_plugins"))


@dataclasses.dataclass
class Count:
    """Number of programs compiled, and seconds spent compiling them."""

    number: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Count compilations inside the block."""
    count = Count()

    def listen(event: str, duration_s: float, **_) -> None:
        if event == _COMPILED:
            count.number += 1
            count.seconds += duration_s

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
