"""Leases: which of the processes that share a sweep's folder does which part of the work.

A lease is a file NAME.N. A process claims NAME by creating the file, which only one process can do, and shows that it
is alive by writing to it every few seconds. If a file stops changing, its owner is dead or cut off, and another process
takes NAME over by creating NAME.N+1. The highest number is valid. No file is replaced or deleted, so two processes
cannot take over the same lease.

Clocks of different hosts are not compared: a process measures with its own clock how long a file has not changed.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from medfuse_jax.runtime import files

HEARTBEAT_S = 10.0
STALE_S = 60.0  # more than a few heartbeats: NFS may show a change late
POLL_S = 2.0
T = TypeVar("T")
_RELEASED = {"released": True}


@dataclasses.dataclass(frozen=True)
class _Held:
    """A lease of this process. is_locked: whether the system locks the file for as long as the process lives."""

    path: Path
    file: int
    is_locked: bool


class Leases:
    """The leases of one process in a folder; a context manager, whose end releases all of them.

    A process that has no trials to train, or is not ready to, is marked as idle by a lease of its own.
    """

    def __init__(self, folder: Path):
        self._folder, self._idle = folder, f"idle-{secrets.token_hex(6)}"
        self._held: dict[str, _Held] = {}
        self._seen: dict[Path, tuple[bytes, float]] = {}  # a file's content, and since when it has not changed
        self._lock, self._ended = threading.RLock(), threading.Event()

    def __enter__(self) -> "Leases":
        with files.must_write(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._beat_until_ended, daemon=True).start()
        self.claim(self._idle)
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._unmark_idle()
        for name in list(self._held):
            self.release(name)

    def claim(self, name: str) -> bool:
        """Claim a lease if it is free; return whether this process now holds it."""
        number, why = self._latest(name)
        if name in self._held or not why:
            return False
        path = self._path(name, number + 1)
        with files.must_write(path):
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                return False
            with self._lock:
                held = _Held(path, file, _try_lock(file))  # locked first: content without a lock means that it ended
                _write(file, _describe(held, 0))
                self._held[name] = held
        if number >= 0 and why != "released":
            print(f"taking over {name}: {why}", flush=True)
        return True

    def is_free(self, name: str) -> bool:
        return name not in self._held and bool(self._latest(name)[1])

    def holds(self, name: str) -> bool:
        """Return whether this process still holds a lease: after a suspension, another may have taken it over."""
        held = self._held.get(name)
        if held is None:
            return False
        if self._path(name, int(held.path.suffix[1:]) + 1).exists():
            print(f"another process has taken over {name}, because this one was suspended or cut off", flush=True)
            self._close(name)
            return False
        return True

    def release(self, name: str) -> None:
        """Give back a lease if this process holds it, so that others need not wait until it is stale."""
        if held := self._held.get(name):
            with self._lock, contextlib.suppress(OSError):  # it then becomes stale
                _write(held.file, _RELEASED)
            self._close(name)

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Wait until this process can claim a lease, and hold it during the block."""
        if not self.claim(name):
            print(f"waiting for the process that holds {name}", flush=True)
            while not self.claim(name):
                time.sleep(POLL_S)
        try:
            yield
        finally:
            self.release(name)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Do not count this process as idle during the block."""
        self._unmark_idle()
        try:
            yield
        finally:
            self.claim(self._idle)

    def num_idle(self) -> int:
        """Return how many living processes are idle; this one counts too."""
        names = [path.stem for path in self._folder.glob("idle-*.0")]
        free = [name for name in names if self.is_free(name)]
        for name in free:
            self._path(name, 0).unlink(missing_ok=True)
        return len(names) - len(free)

    def claimed(self, claim: Callable[[], T], missing: Callable[[], list], what: str) -> Iterator[T]:
        """Yield what this process claims of some work until all is done, and wait while others do the rest."""
        is_waiting = False
        while missing():
            if work := claim():
                is_waiting = False
                yield work
            elif missing():
                if not is_waiting:
                    print(f"waiting for {what} of other processes", flush=True)
                is_waiting = True
                time.sleep(POLL_S)

    def _unmark_idle(self) -> None:
        if self._idle in self._held:
            self._close(self._idle)
            self._path(self._idle, 0).unlink(missing_ok=True)

    def _path(self, name: str, number: int) -> Path:
        return self._folder / f"{name}.{number}"

    def _latest(self, name: str) -> tuple[int, str]:
        """Return a lease's highest number, -1 if it was never claimed, and why it is free; '' if it is not."""
        numbers = [path.suffix[1:] for path in self._folder.glob(f"{name}.*")]
        number = max((int(number) for number in numbers if number.isdecimal()), default=-1)
        return number, self._why_free(self._path(name, number)) if number >= 0 else "new"

    def _why_free(self, path: Path) -> str:
        """Return 'released', or how its owner was found to have ended; '' if the owner may be alive."""
        with files.must_write(path):
            try:
                file = os.open(path, os.O_RDWR)  # NFS asks its server when a file is opened, not at every stat
            except FileNotFoundError:
                return "released"
            try:
                content = os.read(file, 1000)
                owner = _parse(content)
                has_ended = owner.get("is_locked") and owner["kernel"] == _kernel() and _try_lock(file)
            finally:
                os.close(file)
        if owner == _RELEASED:
            return "released"
        before, since_s = self._seen.get(path, (b"", 0.0))
        if content != before or not since_s:
            since_s = time.monotonic()
            self._seen[path] = content, since_s
        silent_s = time.monotonic() - since_s
        who = f"process {owner.get('process')} on {owner.get('host')}"
        if has_ended:
            return f"{who} has ended"
        return f"no sign of life from {who} for {silent_s:.0f} s" if silent_s >= STALE_S else ""

    def _beat_until_ended(self) -> None:
        beat = 0
        while not self._ended.wait(HEARTBEAT_S):
            beat += 1
            with self._lock:
                for held in self._held.values():
                    with contextlib.suppress(OSError):  # if the filesystem stays away, others take over
                        _write(held.file, _describe(held, beat))

    def _close(self, name: str) -> None:
        with self._lock:
            if held := self._held.pop(name, None):
                os.close(held.file)


@functools.cache
def _kernel() -> str:
    """Return what identifies the running kernel, on which locks of files are reliable; '' if it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _describe(held: _Held, beat: int) -> dict:
    is_locked = held.is_locked and bool(_kernel())
    owner = {"host": socket.gethostname(), "process": os.getpid(), "kernel": _kernel(), "is_locked": is_locked}
    return owner | {"beat": beat}


def _write(file: int, content: dict) -> None:
    """Write a lease in place: a suspended owner that wakes up writes to its own file, never to its successor's."""
    os.pwrite(file, json.dumps(content).ljust(400).encode() + b"\n", 0)
    os.fsync(file)


def _parse(content: bytes) -> dict:
    """Return a lease's content; {} if it is just being written, or damaged: it then counts by whether it changes."""
    try:
        parsed = json.loads(content)
    except ValueError:
        return {}
    is_valid = isinstance(parsed, dict) and (parsed == _RELEASED or parsed.keys() >= {"host", "process", "kernel"})
    return parsed if is_valid else {}


def _try_lock(file: int) -> bool:
    """Return whether the file could be locked: False if another process has locked it, or if there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
