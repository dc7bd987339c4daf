"""End a command in time: after SIGTERM or Ctrl-C, and after a wait that has lasted too long.

A signal interrupts the main thread (`Stopped`), except in a training loop, which defers it, saves and then stops. A
thread ends the process if that takes too long: Python would otherwise obey no signal while a library works or waits,
or if an exception is lost in a callback.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from medfuse_jax.runtime.errors import is_disk_full

SIGNAL_LIMIT_S = 25.0  # from a signal to the end of the process: schedulers kill it after 30 s
_TICK_S = 1.0
_AGAIN_S = 1.0  # an earlier second Ctrl-C is the first one, sent on by another program

_signalled_s: float | None = None  # time.monotonic() of the first signal
_deferrals = 0
_is_lost = False  # whether a `Stopped` was lost in a callback
_interrupted = "interrupted"  # the line to end with
_waits: dict[int, list] = {}  # thread -> seconds left, and the line to end with
on_signal: Callable[[], None] | None = None  # called at every signal, by the main thread


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C has arrived. The message, if any, says what is saved."""


def start(line: str) -> None:
    """Obey signals from now on, in the main thread of a command. line: to end with after a signal."""
    global _interrupted
    _interrupted = line
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # wakes the thread, whatever the main thread does
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)
    sys.unraisablehook = _note_lost
    threading.Thread(target=_watch, args=(reading,), name="watchdog", daemon=True).start()


def received() -> bool:
    """Return whether a signal has arrived."""
    return _signalled_s is not None


def check() -> None:
    """Raise Stopped if a signal has arrived."""
    if received():
        raise Stopped


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Do not interrupt the block, which looks at `received` itself."""
    global _deferrals
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
    check()


@contextlib.contextmanager
def within(seconds: float, line: str) -> Iterator[Callable[[], None]]:
    """End the process with this line if the block, or the time since the last call of what it yields, is longer."""
    thread, wait = threading.get_ident(), [seconds, line]
    outer, _waits[thread] = _waits.get(thread), wait

    def renew() -> None:
        wait[0] = seconds

    try:
        yield renew
    finally:
        if outer is None:
            del _waits[thread]
        else:
            _waits[thread] = outer


def leave(line: str, status: int = 1, flush: bool = True) -> NoReturn:
    """Print a last line and end the process, without waiting for its threads, some of which may wait for ever."""
    with contextlib.suppress(OSError, ValueError):  # a full disk, or a closed terminal
        if flush and threading.current_thread() is threading.main_thread():  # else it may hold what a flush waits for
            sys.stdout.flush()
            sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    os._exit(status)


def _handle(number: int, frame) -> None:
    global _signalled_s, _is_lost
    if on_signal:
        on_signal()
    is_first, was_lost, _is_lost = not received(), _is_lost, False
    now_s = time.monotonic()
    if is_first:
        _signalled_s = now_s
    elif number == signal.SIGINT and not was_lost and now_s - _signalled_s > _AGAIN_S:
        leave(_interrupted, flush=False)  # the main thread may be writing to a terminal that does not read
    if (is_first or was_lost) and not _deferrals:
        if _is_importing(frame):
            leave(_interrupted)
        raise Stopped


def _is_importing(frame) -> bool:
    """Return whether a module is being imported: jaxlib's crash (SIGSEGV) if an exception is raised meanwhile."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _note_lost(unraisable) -> None:
    """Remember a Stopped that was raised in a callback, such as jax's at garbage collection, to raise it again.

    Do not print what follows a full disk, such as tensorstore's answer for each array after a save has failed.
    """
    global _is_lost
    if issubclass(unraisable.exc_type, Stopped):
        _is_lost = True
        return
    error = unraisable.exc_value
    if error is None or not (is_disk_full(error) or str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _watch(reading: int) -> None:
    left_s, last_s = None, time.monotonic()
    while True:
        if select.select([reading], [], [], _TICK_S)[0]:
            sent = set(os.read(reading, 100))
            if left_s is None and sent & {signal.SIGINT, signal.SIGTERM}:
                left_s = SIGNAL_LIMIT_S
        elif _is_lost:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        # Time in which the whole process was suspended does not count.
        now_s = time.monotonic()
        passed_s, last_s = min(now_s - last_s, 2 * _TICK_S), now_s
        if left_s is not None and (left_s := left_s - passed_s) <= 0:
            leave(_interrupted)
        for wait in list(_waits.values()):
            wait[0] -= passed_s
            if wait[0] <= 0:
                leave(f"error: {wait[1]}")
