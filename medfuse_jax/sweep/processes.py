"""A sweep's processes, on one machine or several: how they start, and which trials each one trains.

Processes share only the sweep's folder and exchange no arrays. jax.distributed gives each its number and devices.
"""

import dataclasses
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

import jax

from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import TryLater, UserError

_POLL_S = 2.0
_SHUTDOWN_TIMEOUT_S = 3600  # how long the other processes wait at the end, while the first scores the chosen trial


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the `count` processes that share a sweep; the first is number 0."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share(self, items: list, num_dealt: int = 0) -> list:
        """Return this process's share of items, which are dealt in turn after `num_dealt` earlier ones."""
        return items[(self.number - num_dealt) % self.count :: self.count]


def start(coordinator: str | None, num_processes: int | None, process: int | None, detect: bool) -> Process:
    """Start jax.distributed if asked to; return this process.

    coordinator: 'host:port'. detect: use the cluster that jax finds (Cloud TPU, Slurm, Open MPI, Kubernetes) instead.
    """
    jax.config.update("jax_enable_preemption_service", False)  # the service would swallow SIGTERM
    given = [value is not None for value in (coordinator, num_processes, process)]
    if any(given) and not all(given):
        message = "give --coordinator=HOST:PORT, --num_processes and --process together, or none of them"
        raise UserError(message, field="--coordinator")
    if all(given):
        _check(coordinator, num_processes, process)
    if all(given) or detect:
        flags = (coordinator, num_processes, process) if all(given) else ()
        try:
            jax.distributed.initialize(*flags, shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S)
        except (ValueError, RuntimeError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if flags:
                message = f"--coordinator={coordinator}: process {process} cannot connect ({reason}); start all "
                raise TryLater(f"{message}processes with the same coordinator", field="--coordinator") from None
            message = f"--distributed: jax found no cluster ({reason}); give --coordinator=HOST:PORT, --num_processes "
            raise TryLater(f"{message}and --process", field="--distributed") from None
    return Process(jax.process_index(), jax.process_count())


def _check(coordinator: str, num_processes: int, process: int) -> None:
    """Raise UserError for invalid flags, or if the first process cannot use the port."""
    if not 0 <= process < num_processes:
        message = f"--process={process}: with --num_processes={num_processes} give 0 to {num_processes - 1}"
        raise UserError(message, field="--process", value=process)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        message = f"--coordinator={coordinator} is not HOST:PORT, such as node1:8476"
        raise UserError(message, field="--coordinator", value=coordinator)
    if process == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:  # in which case jax 0.10 would crash with a segmentation fault
            message = f"--coordinator={coordinator}: the port is in use ({error.strerror}); give another"
            raise UserError(message, field="--coordinator", value=coordinator) from None


def run(work: Callable[[], None]) -> None:
    """Run this process's work. If it fails or is interrupted, exit at once.

    jax's own shutdown would wait for the other processes, which in turn wait for this process's trials.
    """
    try:
        work()
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        message = command_line.in_one_line(error, resumes=True) or traceback.format_exc().rstrip()
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(command_line.status(error))


def wait_for(is_ready: Callable[[], bool], what: str) -> None:
    """Wait until files of other processes exist. jax ends this process if another one dies."""
    if not is_ready():
        print(f"waiting for {what}", flush=True)
        while not is_ready():
            time.sleep(_POLL_S)
