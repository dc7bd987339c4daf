"""Several processes, on one machine or many, that train one run together (`main --distributed`).

They form one mesh of devices: each reads and holds its own part of a batch, and the first alone writes and prints. The
processes of a sweep do not: they share only files (sweep/leases.py).
"""

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from medfuse_jax.runtime import command_line, watchdog
from medfuse_jax.runtime.errors import TryLater, UserError

_SHUTDOWN_TIMEOUT_S = 3600  # how long the other processes wait at the end, while the first scores and reports
ANSWER_LIMIT_S = 900.0  # for a step that needs all processes, or an epoch in one call
_LOST_PEER = ("Gloo", "NCCL", "peer", "heartbeat", "coordination service")  # in jax's errors, by what connects devices
_num_asked = 0  # calls of must_stop
_one_training = False  # whether this process's devices are part of one mesh over all processes


def start_training(coordinator: str | None, num_processes: int | None, process: int | None, detect: bool) -> None:
    """Start jax.distributed, if asked to, for one training over the devices of all processes.

    coordinator: 'host:port'. detect: use the cluster that jax finds (Cloud TPU, Slurm, Open MPI, Kubernetes) instead.
    A signal to any of them then stops all at the same step (`must_stop`).
    """
    global _one_training
    _initialize(coordinator, num_processes, process, detect)
    _one_training = jax.process_count() > 1
    if jax.distributed.is_initialized():  # also of one process: jax has taken SIGTERM over
        _tell_jax_of_signals()
    if _one_training:
        _connect()
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def _tell_jax_of_signals() -> None:
    """Obey SIGTERM again, which jax has taken over to tell the other processes of it, and tell jax of every signal."""
    c_signal = ctypes.CDLL(None).signal
    c_signal.restype, c_signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    ours = signal.getsignal(signal.SIGINT)
    theirs = ctypes.CFUNCTYPE(None, ctypes.c_int)(c_signal(signal.SIGTERM, None))
    watchdog.on_signal = lambda: theirs(signal.SIGTERM)
    signal.signal(signal.SIGTERM, ours)


def _connect() -> None:
    """Sum over all devices once: on CPUs a process waits only 30 s for another, which may compile for longer."""
    mesh = jax.make_mesh((len(jax.devices()),), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("device"))
    ones = np.ones(jax.local_device_count(), np.float32)
    jax.block_until_ready(jax.jit(lambda x: x.sum())(jax.make_array_from_process_local_data(sharding, ones)))


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def spans() -> bool:
    """Return whether this process trains one run together with others."""
    return _one_training


def is_first() -> bool:
    """Return whether this process writes and prints: the first of one training, or any process that trains alone."""
    return not _one_training or jax.process_index() == 0


def wait(name: str) -> None:
    """Wait until all processes of one training are here."""
    if _one_training:
        with answering():
            multihost_utils.sync_global_devices(name)


def check_same(what: str, content: str) -> None:
    """Raise UserError, in every process, if the processes of one training differ in `content`."""
    if _one_training:
        digest = np.frombuffer(hashlib.sha256(content.encode()).digest(), np.uint8)
        with answering():
            gathered = multihost_utils.process_allgather(digest)
        if len(np.unique(gathered, axis=0)) > 1:
            raise UserError(f"the processes have different {what}: start all of them with the same flags and data")


def must_stop() -> bool:
    """Return whether to stop because a process of this training has received a signal: the same in all at each call.

    Call it after every step and batch, of which all processes have equally many.
    """
    global _num_asked
    _num_asked += 1
    return multihost_utils.reached_preemption_sync_point(_num_asked) if _one_training else watchdog.received()


def answering() -> contextlib.AbstractContextManager[Callable[[], None]]:
    """End this process if the others do not answer in the block, or since the last call of what it yields."""
    if not _one_training:
        return contextlib.nullcontext(lambda: None)
    line = f"no answer from the other processes of this training for {ANSWER_LIMIT_S:.0f} s: one hangs or has lost its "
    return watchdog.within(ANSWER_LIMIT_S, f"{line}connection; end all of them and rerun the command to resume")


def to_host(tree):
    """Return a tree whose arrays are divided over several processes as host arrays, whole; any other as it is."""
    if not _one_training:
        return tree
    with answering():
        return multihost_utils.process_allgather(tree, tiled=True)


def _initialize(coordinator: str | None, num_processes: int | None, process: int | None, detect: bool) -> None:
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


def _check(coordinator: str, num_processes: int, process: int) -> None:
    """Raise UserError for invalid flags, or if the first process cannot use the port."""
    if num_processes < 1:
        message = f"--num_processes={num_processes}: give the number of processes, at least 1"
        raise UserError(message, field="--num_processes", value=num_processes)
    if not 0 <= process < num_processes:
        message = f"--process={process}: with --num_processes={num_processes} give 0 to {num_processes - 1}"
        raise UserError(message, field="--process", value=process)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        message = f"--coordinator={coordinator} is not HOST:PORT, such as node1:8476 (a port is 1 to 65535)"
        raise UserError(message, field="--coordinator", value=coordinator)
    if process == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:  # in which case jax 0.10 would crash with a segmentation fault
            message = f"--coordinator={coordinator}: the port is in use ({error.strerror}); give another"
            raise UserError(message, field="--coordinator", value=coordinator) from None


def run(work: Callable[[], None]) -> None:
    """Run this process's work. If it fails or is interrupted, exit at once.

    jax's own shutdown would wait for the other processes, which in turn wait for this one.
    """
    try:
        work()
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        message = command_line.in_one_line(error, resumes=True) or traceback.format_exc().rstrip()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(text in str(error) for text in _LOST_PEER):
            reason = " ".join(str(error).split())[:120]
            message = f"error: another process of this training has ended: rerun all of them to resume ({reason})"
        watchdog.leave(message, command_line.status(error))
