"""Keep the C library's memory allocator from growing through a long run."""

import ctypes
import os
import platform

_M_ARENA_MAX = -8  # of glibc's malloc.h
_ARENAS = 4


def limit_arenas() -> None:
    """Let all threads share a few of glibc's arenas, before they are made; does nothing without glibc.

    By default the hundred threads of jax, orbax and grain have up to 8 arenas a core, and what is freed in one is not
    used in another, so that a process takes more memory than it uses (docs/reliability.md). MALLOC_ARENA_MAX, if set,
    takes precedence.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)
