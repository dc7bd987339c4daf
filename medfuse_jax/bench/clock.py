"""Taking turns and telling the time: repeats interleaved, median and spread."""

import time
from collections.abc import Callable

import numpy as np


def interleave(runs: dict[str, Callable[[], None]], warm_up: int, repeats: int, say=lambda text: None) -> dict:
    """{name: [seconds of each repeat]}; within a repeat every contender has its turn, in an order that rotates."""
    for name, run in runs.items():
        for i in range(warm_up):
            say(f"{name}: warm-up {i + 1}/{warm_up}")
            run()
    seconds = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(repeats):
        say(f"repeat {repeat + 1}/{repeats}")
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict:
    """Median, least and most of some repeats, and all of them."""
    return {
        "repeats": len(seconds),
        "seconds": round(float(np.median(seconds)), 6),
        "seconds_min": round(min(seconds), 6),
        "seconds_max": round(max(seconds), 6),
        "seconds_all": [round(s, 6) for s in seconds],
    }


def ratio(slower: list[float], faster: list[float]) -> dict:
    """How many times longer one contender took than the other, repeat by repeat: median, least and most.

    of_best: of the fastest repeats of both, which what else the machine did disturbed least.
    """
    each = np.asarray(slower) / np.asarray(faster)
    out = {"median": np.median(each), "min": np.min(each), "max": np.max(each), "of_best": min(slower) / min(faster)}
    return {key: round(float(value), 3) for key, value in out.items()}
