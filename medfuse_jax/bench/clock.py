"""Time contenders in turn, summarise their times and format them."""

import time
from collections.abc import Callable

import numpy as np

OURS = "ours"  # the contender that the others are compared with


def interleave(runs: dict[str, Callable], warm_up: int, repeats: int, say=lambda text: None) -> dict:
    """Run all contenders once per repeat, each time starting with the next one; return {name: seconds per repeat}."""
    for name, run in runs.items():
        for i in range(warm_up):
            say(f"{name}: warm-up {i + 1}/{warm_up}")
            run()
    seconds = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(repeats):
        say(f"repeat {repeat + 1}/{repeats}")
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def records(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Return {name: record}; every record but ours has 'time_over_ours'."""
    rows = {name: {"contender": name} | summary(taken) for name, taken in seconds.items()}
    for name in rows:
        if name != OURS:
            rows[name]["time_over_ours"] = ratio(seconds[name], seconds[OURS])
    return rows


def summary(seconds: list[float]) -> dict:
    """Return the median, minimum and maximum of the repeats, and every repeat."""
    return {
        "repeats": len(seconds),
        "seconds": round(float(np.median(seconds)), 6),
        "seconds_min": round(min(seconds), 6),
        "seconds_max": round(max(seconds), 6),
        "seconds_all": [round(s, 6) for s in seconds],
    }


def ratio(slower: list[float], faster: list[float]) -> dict:
    """Return the median, minimum and maximum of the repeats' ratios; of_best: the ratio of the two fastest repeats."""
    each = np.asarray(slower) / np.asarray(faster)
    out = {"median": np.median(each), "min": np.min(each), "max": np.max(each), "of_best": min(slower) / min(faster)}
    return {key: round(float(value), 3) for key, value in out.items()}


def line(row: dict) -> str:
    """Format a record as one line: case, contender, time, spread, rate and remark."""
    spread = f"{format_s(row['seconds']):>8} ({format_s(row['seconds_min'])}-{format_s(row['seconds_max'])})"
    rate = f"{row['samples_per_s']:>9.1f} samples/s" if "samples_per_s" in row else ""
    return f"{row['case']:<44} {row['contender']:<15} {spread:<26} {rate:<20} {_remark(row)}".rstrip()


def _remark(row: dict) -> str:
    parts = []
    if "time_over_ours" in row:
        parts.append(f"{row['time_over_ours']['median']:.2f} x ours' time")
    if error := row.get("difference_from_plain_scan"):
        parts.append(f"{error:.0e} off")
    if "cold_s" in row:
        parts.append(f"warm; cold {row['cold_s']:.1f} s")
    if row.get("images_per_s_device"):
        parts.append(f"{row['images_per_s_device']:.1f} images/s")
    parts += [f"{row[name]:.4g} {unit}" for name, unit in _UNITS.items() if row.get(name) is not None]
    shares = {"share_of_matrix_rate": "matrix rate", "share_of_peak": "peak"}
    parts += [f"{row[name]:.1%} of {what}" for name, what in shares.items() if row.get(name) is not None]
    bounds = {"roofline_s": "roofline", "measured_roofline_s": "measured roofline"}
    parts += [f"{what} {format_s(row[name])}" for name, what in bounds.items() if row.get(name) is not None]
    if not parts and "padded_share_run" in row:
        parts.append(f"{row['padded_share_run']:.1%} padded")
    parts += [f"without {name} ({reason})" for name, reason in row.get("left_out", {}).items()]
    return ", ".join(parts)


_UNITS = {
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "gb_per_repeat_device": "GB",
    "rows_per_s": "rows/s",
    "rows_per_cpu_s": "rows a CPU second",
    "launches_a_step": "launches a step",
    "device_events_a_step": "on the device a step",
    "compiled_kernels_a_step": "compiled",
}


def format_s(seconds: float) -> str:
    """Format a time in s or ms, with three significant digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
