"""Lanes: trials that a device computes together in one call. Their number is measured, and halved if out of memory.

The time of one step of all trials is measured for several numbers of lanes, and stored in one file per group.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path

from medfuse_jax.runtime import errors, files
from medfuse_jax.runtime.errors import UserError

_HINT = "delete it to measure the lanes again"


@dataclasses.dataclass
class Capacity:
    """How many trials of a group one device can take. path: the file that stores it.

    lanes: trials per call; None until measured. is_given: whether --lanes sets it. at_once: the most trials in memory;
    None for no limit.
    """

    path: Path
    lanes: int | None = None
    at_once: int | None = None
    is_given: bool = False

    def write(self) -> None:
        from medfuse_jax.sweep import results  # late: the benchmark measures lanes on machines without ml_collections

        results.write_json(self.path, {"lanes": self.lanes, "at_once": self.at_once})

    def next_wave(self, trials: list, num_devices: int) -> list:
        """Return as many of the first trials as fit in memory."""
        return trials[: self.at_once and self.at_once * num_devices]

    def halve(self, num_trials: int, num_devices: int) -> bool:
        """Halve the lanes, or else the trials in memory, after `num_trials` trials ran out of memory.

        Returns False if each device had only one trial already.
        """
        per_device = math.ceil(num_trials / num_devices)
        lanes = min(self.lanes or 1, per_device)
        if lanes > 1:
            self.lanes = math.ceil(lanes / 2)
        else:
            self.at_once = math.ceil(per_device / 2)
        self.write()
        limit = f"{self.at_once * num_devices} trials" if self.at_once else "all trials"
        print(f"out of memory: continuing with {self.lanes or 1} lanes and {limit} at once", flush=True)
        return max(lanes, per_device) > 1


def read(workdir: Path, group_key: str, given: int | None = None) -> Capacity:
    """Read a group's stored capacity. given: --lanes, which replaces the stored lanes."""
    digest = hashlib.sha256(group_key.encode()).hexdigest()[:12]
    path = workdir / "lanes" / f"{digest}.json"
    if not path.exists():
        return Capacity(path, given, is_given=bool(given))
    stored = files.read_json(path, _HINT)
    lanes, at_once = stored.get("lanes", ""), stored.get("at_once")
    for number in (lanes, at_once):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"{path} is damaged ({number!r} is not a number of trials): {_HINT}", path=path)
    return Capacity(path, given or lanes, at_once, bool(given))


def choose(capacity: Capacity, max_lanes: int, measure: Callable[[], dict[int, float]]) -> int:
    """Return the number of lanes for at most `max_lanes` trials per device; measure it if it is not known yet."""
    if max_lanes <= 1:
        return 1
    if capacity.lanes is None:
        times_s = measure()
        shown = ", ".join(f"{lanes}: {step_s:.3f}" for lanes, step_s in times_s.items())
        print(f"seconds per step of all trials, by lanes: {shown}", flush=True)
        capacity.lanes = min(times_s, key=times_s.get, default=1)
        if capacity.path.exists():  # another host was faster: with equal lanes, all round alike
            capacity.lanes = files.read_json(capacity.path, _HINT)["lanes"]
        else:
            capacity.write()
    # A resumed sweep keeps the measured lanes even if fewer trials are left: its results must not change.
    return min(capacity.lanes, max_lanes) if capacity.at_once or capacity.is_given else capacity.lanes


def lanes_for(num_trials: int, max_lanes: int, num_devices: int) -> int:
    """Return the lanes per device for the trials that still run: `max_lanes`, then powers of two.

    Each number of lanes is a compilation, so few are used: ten trials keep ten lanes until only eight trials are left.
    """
    per_device = math.ceil(num_trials / num_devices)
    return min(max_lanes, per_device if per_device >= max_lanes else 2 ** math.ceil(math.log2(per_device)))


def measure(seconds_with: Callable[[int], float], max_lanes: int) -> dict[int, float]:
    """Return the seconds per step of all trials, by lanes: 1, then about double, up to `max_lanes`.

    Each number divides the trials into 2 ** n stacks with as little padding as possible (ten trials: 1, 2, 3, 5, 10).
    Stops after the first number that is slower than an earlier one, and before one that runs out of memory.
    seconds_with: lanes -> seconds, of trials that it stacks anew.
    """
    times_s = {}
    for lanes in sorted({math.ceil(max_lanes / 2**n) for n in range(max_lanes.bit_length() + 1)}):
        try:
            times_s[lanes] = seconds_with(lanes)
        except (RuntimeError, MemoryError) as error:  # jax's error is a RuntimeError
            if not errors.is_out_of_memory(error):
                raise
            break
        if times_s[lanes] > min(times_s.values()):
            break
    return times_s
