"""How a sweep's processes wait for each other's files: they share the sweep's folder and exchange no arrays."""

import time
from collections.abc import Callable

_POLL_S = 2.0


def wait_for(is_ready: Callable[[], bool], what: str) -> None:
    """Wait until files of other processes exist. jax ends this process if another one dies."""
    if not is_ready():
        print(f"waiting for {what}", flush=True)
        while not is_ready():
            time.sleep(_POLL_S)
