"""The arenas of the C library's allocator, counted in a process of many threads."""

import os
import platform
import subprocess
import sys

import pytest

from medfuse_jax.runtime import allocator

_COUNT = """
import ctypes, sys, threading
from medfuse_jax.runtime import allocator
if sys.argv[1] == "limited":
    allocator.limit_arenas()
barrier = threading.Barrier(20)
def allocate():
    barrier.wait()
    kept = [bytes(10_000) for _ in range(50)]
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def _num_arenas(limited, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | variables
    command = [sys.executable, "-c", _COUNT, "limited" if limited else "default"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts glibc's arenas")
def test_threads_share_few_arenas():
    assert _num_arenas(limited=False) > 4, "the test cannot tell"
    assert _num_arenas(limited=True) <= 4
    assert _num_arenas(limited=True, MALLOC_ARENA_MAX="6") > 4, "the user's own limit holds"


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("called"))
    allocator.limit_arenas()
