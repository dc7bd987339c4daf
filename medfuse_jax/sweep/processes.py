"""Several processes, on one machine or many: what starts them, and which trials are whose.

Processes share nothing but the sweep's folder: no number crosses between trials, so none crosses
between processes. jax.distributed gives each its number and its devices.
"""

import dataclasses
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable

import jax

from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import TryLater, UserError

_WAIT_S = 2.0
_SHUTDOWN_S = 3600  # the others wait so long at their end for the first one's test result and page


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the `count` processes that share a sweep; the first is number 0."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def part(self, items: list, dealt: int = 0) -> list:
        """This process' part of items dealt in turn. dealt: how many were before; the next process goes on."""
        return items[(self.number - dealt) % self.count :: self.count]


def start(coordinator: str | None, num_processes: int | None, process: int | None, detect: bool) -> Process:
    """Starts jax.distributed where asked to; returns this process.

    By flags (coordinator 'host:port'), or detect: by what jax finds (Cloud TPU, Slurm, Open MPI, Kubernetes).
    """
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself, and nothing stops
    given = [value is not None for value in (coordinator, num_processes, process)]
    if any(given) and not all(given):
        raise UserError("give --coordinator=HOST:PORT, --num_processes and --process together, or none of them")
    if all(given):
        if not 0 <= process < num_processes:
            raise UserError(f"--process={process}: with --num_processes={num_processes} give 0 to {num_processes - 1}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={coordinator} is not HOST:PORT, such as node1:8476")
        if process == 0:
            _check_free(coordinator, int(port))
        try:
            jax.distributed.initialize(coordinator, num_processes, process, shutdown_timeout_seconds=_SHUTDOWN_S)
        except jax.errors.JaxRuntimeError as error:
            raise TryLater(
                f"--coordinator={coordinator}: process {process} cannot start ({_first_line(error)}); do all "
                "processes name the same one, and do they all run?"
            ) from None
    elif detect:
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=_SHUTDOWN_S)
        except (ValueError, RuntimeError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
            raise TryLater(
                f"--distributed: jax finds no cluster here ({_first_line(error)}); "
                "give --coordinator=HOST:PORT, --num_processes and --process"
            ) from None
    return Process(jax.process_index(), jax.process_count())


def _check_free(coordinator: str, port: int) -> None:
    """UserError where another program has the port: jax 0.10 then ends in a segmentation fault."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(f"--coordinator={coordinator}: the port is taken ({error.strerror}); give another") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def run(work: Callable[[], None]) -> None:
    """Runs one process' work. One that an error or a signal ends leaves at once: at jax's own end of a process it
    would wait for all others, and they for its trials."""
    try:
        work()
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        print(
            command_line.in_one_line(error, resumes=True) or traceback.format_exc().rstrip(),
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(command_line.status(error))


def wait_for(are_there: Callable[[], Iterable[bool]], what: str) -> None:
    """Waits until all that other processes write is there; jax ends this process if one of them dies."""
    said = False
    while not all(are_there()):
        if not said:
            print(f"waiting for {what}", flush=True)
            said = True
        time.sleep(_WAIT_S)
