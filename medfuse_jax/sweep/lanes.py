"""How many trials a device computes in one call: measured, kept in a file, and halved where the memory is short.

Lanes are the trials of a device's call. What is measured is what a step of all trials takes with other lanes.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from medfuse_jax.runtime import errors
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results, stacked_step


@dataclasses.dataclass
class Fit:
    """What a group's trials fit, of each device. path: the file that keeps it for the next start.

    lanes: trials in one call, None: not known yet; given: by --lanes. at_once: trials in its memory, None: all so far.
    step_s: what was measured, seconds a step by lanes.
    """

    path: Path
    lanes: int | None = None
    at_once: int | None = None
    step_s: dict[str, float] = dataclasses.field(default_factory=dict)
    given: bool = False

    def keep(self) -> None:
        content = {"lanes": self.lanes, "at_once": self.at_once, "step_s": self.step_s}
        results.write_whole(self.path, json.dumps(content) + "\n")

    def wave(self, trials: list, num_devices: int) -> list:
        """The first trials that there is room for."""
        return trials[: self.at_once and self.at_once * num_devices]

    def halve(self, num_trials: int, num_devices: int) -> bool:
        """Makes less of the memory that so many trials did not fit: first of lanes, then of trials at once.

        False where nothing is left to halve: one trial a device, alone in its call.
        """
        a_device = math.ceil(num_trials / num_devices)
        lanes = min(self.lanes or 1, a_device)
        if lanes > 1:
            self.lanes = math.ceil(lanes / 2)
        elif a_device > 1:
            self.at_once = math.ceil(a_device / 2)
        else:
            self.at_once = 1
        self.keep()
        room = f"{self.at_once * num_devices} trials at once" if self.at_once else "all trials at once"
        print(f"out of memory: {self.lanes or 1} together and {room} from here on", flush=True)
        return max(lanes, a_device) > 1


def read(workdir: Path, shared: str, given: int | None = None) -> Fit:
    """What is kept of the group whose trials share `shared`; each process has devices of its own, and so a file.

    given: lanes that count in place of the kept.
    """
    group = hashlib.sha256(shared.encode()).hexdigest()[:12]
    path = workdir / "lanes" / f"{group}_{jax.process_index()}.json"
    try:
        kept = json.loads(path.read_text())
        lanes, at_once = kept["lanes"], kept.get("at_once")
        for number in (lanes, at_once):
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{number!r} is no number of trials")
    except FileNotFoundError:
        return Fit(path, given, given=bool(given))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and the lanes are measured again") from None
    return Fit(path, given or lanes, at_once, kept.get("step_s", {}), bool(given))


def choose(fit: Fit, most: int, measure: Callable[[], dict[int, float]]) -> int:
    """Lanes for at most `most` trials a device: those that fit, or the fastest of those that are now measured."""
    if most <= 1:
        return 1
    if fit.lanes is None:
        times_s = measure()
        print("a step of all trials: " + ", ".join(f"{n} together {s:.3f} s" for n, s in times_s.items()), flush=True)
        fit.lanes = min(times_s, key=times_s.get, default=1)
        fit.step_s = {str(lanes): step_s for lanes, step_s in times_s.items()}
        fit.keep()
    # Those that were measured stay when trials have ended: a resumed sweep has the numbers of one that was not stopped.
    return min(fit.lanes, most) if fit.at_once or fit.given else fit.lanes


def lanes_for(num_trials: int, most: int, num_devices: int) -> int:
    """Lanes a device for so many trials: few different numbers, as each is a compilation.

    As many as there are at first, then powers of two: of ten trials, the first that stop early
    free their place when eight are left.
    """
    a_device = math.ceil(num_trials / num_devices)
    return min(most, a_device if a_device >= most else 2 ** math.ceil(math.log2(a_device)))


def measure(
    train_fn: Callable,
    stack_with: Callable[[int], list[stacked_step.Stack]],
    most: int,
    batch: dict,
    on: list[jax.Device],
) -> dict[int, float]:
    """Seconds a step of all trials takes, the median of five, by lanes a device: 1, and on to `most` by doubling.

    Every number makes 2 ** n stacks of equal size, so none is padded with trials that nobody wants (ten trials: 1, 2,
    3, 5, 10). It ends with the first that is slower than one before it, or that does not fit the memory, which is left
    out. stack_with: lanes -> the trials stacked anew, one number at a time; what is trained here is thrown away.
    """
    times_s = {}
    for lanes in sorted({math.ceil(most / 2**n) for n in range(most.bit_length() + 1)}):
        try:
            times_s[lanes] = _time_step(train_fn, stack_with(lanes), batch, on)
        except stacked_step.OUT_OF_MEMORY as error:
            if not errors.is_out_of_memory(error):
                raise
            break
        if times_s[lanes] > min(times_s.values()):
            break
    return times_s


def _time_step(train_fn: Callable, stacks: list[stacked_step.Stack], batch: dict, on: list[jax.Device]) -> float:
    jax.block_until_ready(stacked_step.train_all(train_fn, stacks, batch, on))  # compiles
    taken_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        jax.block_until_ready(stacked_step.train_all(train_fn, stacks, batch, on))
        taken_s.append(time.perf_counter() - start_s)
    return float(np.median(taken_s))
