"""The CPU cores that this process may use."""

import os


def usable() -> int:
    """Return the number of cores: those of the process's affinity, or where there is none (macOS), the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
