"""Cache XLA's compiled programs between runs; count compilations and their time."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

from medfuse_jax.runtime import files

# Compiler options for a program that runs only once, such as the drawing of initial weights. Not 0: at that level a
# ResNet-34's weights take 20 s to draw.
RUN_ONCE = {"xla_backend_optimization_level": 1}

_COMPILED = "/jax/core/compile/backend_compile_duration"


def enable_cache() -> None:
    """Turn on the persistent cache: later runs of the same model skip the compiler."""
    jax.config.update("jax_compilation_cache_dir", str(files.cache_dir() / "xla"))


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
