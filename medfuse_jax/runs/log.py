"""The log of a run: metrics.jsonl, TensorBoard events, and a progress bar (one line per epoch without a terminal)."""

import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from medfuse_jax.runtime import files


class RunLog:
    """Log of one run. Drops existing lines after `resume_step`, because those steps are trained again.

    quiet: no bar, no printed lines and no TensorBoard (an open file per run), for one of many runs.
    """

    def __init__(self, workdir: Path, name: str, num_steps: int, resume_step: int = 0, quiet: bool = False):
        self._quiet = quiet
        self._name = name
        self._path = workdir / "metrics.jsonl"
        _drop_after(self._path, resume_step)
        self._events = None if quiet else _Events(workdir / "tensorboard", resume_step + 1)
        self._bar = tqdm(
            total=num_steps,
            initial=resume_step,
            desc=name,
            unit="step",
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:10}| {elapsed}, {remaining} left{postfix}",
        )
        self._bar.set_postfix_str("compiling the first step")  # until the first `show`
        self._start_s = time.perf_counter()
        self._shown = {}

    def step(self, num_steps: int = 1) -> None:
        """Advance the bar by `num_steps`."""
        self._bar.update(num_steps)

    def show(self, **values: str) -> None:
        """Update the values shown beside the bar."""
        self._shown |= values
        self._bar.set_postfix_str("  ".join(f"{k} {v}" for k, v in self._shown.items()), refresh=False)

    def write(self, phase: str, epoch: int, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl, and write the same values to TensorBoard."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        line = {"phase": phase, "epoch": epoch, "step": step, **finite}
        line["time_s"] = round(time.perf_counter() - self._start_s, 3)
        with self._path.open("a") as file:  # opened for each line: a sweep logs hundreds of runs
            file.write(files.json_line(line))
        if self._events:
            # tensorboardX warns of every NaN, which the AUROC of labels without both classes is.
            self._events.write({f"{phase}/{key}": x for key, x in finite.items() if x is not None}, step)

    def line(self, text: str) -> None:
        """Print a line, unless there is a bar or the log is quiet."""
        if self._bar.disable and not self._quiet:
            print(f"{self._name}: {text}", flush=True)

    def close(self) -> None:
        self._bar.close()
        if self._events:
            self._events.close()


class NoLog:
    """The log of a process that does not write: every method does nothing."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


class _Events:
    """A file of scalars for TensorBoard, which hides those of earlier files from `purge_step` on.

    Not tensorboardX's SummaryWriter: its thread and queue can wait for ever when the process ends or the disk is full.
    """

    def __init__(self, folder: Path, purge_step: int):
        # Late: it imports torch where that is installed, which takes seconds.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            written = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self._file.write_event(written)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep only the lines up to `step`; say how many of them are damaged, which are dropped too."""
    if not path.exists():
        return
    lines = files.read_json_lines(path)
    kept = [line for line in lines if line and isinstance(line.get("step"), int) and line["step"] <= step]
    if damaged := lines.count(None):
        print(f"warning: {path}: dropped damaged lines ({damaged}, the first is line {lines.index(None) + 1})")
    files.write_text(path, "".join(map(files.json_line, kept)))
