"""Several processes, on one machine or many: what starts them, and which trials are whose.

Processes share nothing but the sweep's folder: no number crosses between trials, so none crosses
between processes. jax.distributed gives each its number and its devices.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable

import jax

from medfuse_jax.errors import UserError

_WAIT_S = 2.0
_SHUTDOWN_S = 3600  # the others wait so long at their end for the first one's test result and page


def start(coordinator: str | None, num_processes: int | None, process: int | None, detect: bool) -> tuple[int, int]:
    """Starts jax.distributed where asked to; returns (this process' number, how many there are).

    By flags (coordinator 'host:port'), or detect: by what jax finds (Cloud TPU, Slurm, Open MPI, Kubernetes).
    """
    given = [value is not None for value in (coordinator, num_processes, process)]
    if any(given) and not all(given):
        raise UserError("give --coordinator=HOST:PORT, --num_processes and --process together, or none of them")
    if all(given):
        if not 0 <= process < num_processes:
            raise UserError(f"--process={process}: with --num_processes={num_processes} give 0 to {num_processes - 1}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as node1:8476")
        jax.distributed.initialize(coordinator, num_processes, process, shutdown_timeout_seconds=_SHUTDOWN_S)
    elif detect:
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_S)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: jax finds no cluster here ({str(error).splitlines()[0]}); "
                "give --coordinator=HOST:PORT, --num_processes and --process"
            ) from None
    return jax.process_index(), jax.process_count()


def run(work: Callable[[], None]) -> None:
    """Runs one process' work. One that a UserError ends leaves at once: else all would wait for it at their end."""
    try:
        work()
    except UserError as error:
        if jax.process_count() == 1:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def mine(items: list, process: int, num_processes: int) -> list:
    """Every num_processes-th item from this process' number on."""
    return items[process::num_processes]


def wait_for(are_there: Callable[[], Iterable[bool]], what: str) -> None:
    """Waits until all that other processes write is there; jax ends this process if one of them dies."""
    said = False
    while not all(are_there()):
        if not said:
            print(f"waiting for {what}", flush=True)
            said = True
        time.sleep(_WAIT_S)
