"""What a run writes down as it goes: metrics.jsonl, TensorBoard events, and a progress bar.

On a terminal there is one bar a run; elsewhere a plain line an epoch.
"""

import json
import math
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from medfuse_jax.runtime import files


class RunLog:
    """One run's record. Lines of steps after `resume_step` (a kill came before their checkpoint) are dropped.

    quiet: for one run of many: no bar, no lines, no TensorBoard (a thread and an open file each).
    """

    def __init__(self, workdir: Path, name: str, num_steps: int, resume_step: int = 0, quiet: bool = False):
        self._quiet = quiet
        self._name = name
        self._path = workdir / "metrics.jsonl"
        _drop_after(self._path, resume_step)
        self._tensorboard = None if quiet else SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        self._bar = tqdm(
            total=num_steps,
            initial=resume_step,
            desc=name,
            unit="step",
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:10}| {elapsed}, {remaining} left{postfix}",
        )
        self._bar.set_postfix_str("compiling the first step")  # until `show` says more
        self._start_s = time.perf_counter()
        self._shown = {}

    def step(self, num_steps: int = 1) -> None:
        """Moves the bar on."""
        self._bar.update(num_steps)

    def show(self, **shown: str) -> None:
        """Changes what is written beside the bar."""
        self._shown |= shown
        self._bar.set_postfix_str("  ".join(f"{k} {v}" for k, v in self._shown.items()), refresh=False)

    def write(self, phase: str, epoch: int, step: int, **values: float) -> None:
        """Adds one line to metrics.jsonl and the same values to TensorBoard."""
        known = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        line = {"phase": phase, "epoch": epoch, "step": step, **known}
        line["time_s"] = round(time.perf_counter() - self._start_s, 3)
        with self._path.open("a") as file:  # not kept open: a sweep has hundreds of runs
            file.write(json.dumps(line) + "\n")
        for key, value in values.items() if self._tensorboard else ():
            self._tensorboard.add_scalar(f"{phase}/{key}", value, step)

    def line(self, text: str) -> None:
        """A plain log line, where there is no bar."""
        if self._bar.disable and not self._quiet:
            print(f"{self._name}: {text}", flush=True)

    def close(self) -> None:
        self._bar.close()
        if self._tensorboard:
            self._tensorboard.close()


def _drop_after(path: Path, step: int) -> None:
    """Keeps the whole lines up to `step` (a kill can leave half a line, a full disk a damaged one)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    files.write_text(path, "".join(kept))
