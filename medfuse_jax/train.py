"""The training loop of one run, read from top to bottom."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from medfuse_jax import feed as feed_lib
from medfuse_jax import parallel, schema
from medfuse_jax import run as run_lib
from medfuse_jax.models.recurrence import supported
from medfuse_jax.runs import alone, checkpoints, warm_start
from medfuse_jax.runs import predictions as predictions_lib
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.log import NoLog, RunLog
from medfuse_jax.runs.progress import Progress, check_finite
from medfuse_jax.runtime import compilation, hosts, watchdog


class TakenOver(Exception):
    """Another process trains this run now."""


def train(
    run: run_lib.Run,
    workdir: Path,
    encoders: dict[str, tuple[Path, run_lib.Run]] | None = None,
    is_ours: Callable[[], bool] = lambda: True,
) -> None:
    """Train one run to its end, resuming from its latest checkpoint.

    Write metrics.jsonl, tensorboard/ and checkpoints/ (the best by validation AUROC, and the latest) into the workdir,
    and profile/ if config.profile_steps is set. encoders: 'ehr' and 'cxr' -> the finished run to start from. is_ours:
    False if another process has taken the run over; asked before each line of the log and each checkpoint.
    Raise UserError if a checkpoint cannot be read or the loss is not finite; TakenOver.
    """
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        resumed = checkpoints.resume(manager, run.abstract_state())
        hosts.check_same("checkpoints", str(int(resumed[0].step)) if resumed else "none")
        if resumed:
            state, progress = resumed
        else:
            if (workdir / "metrics.jsonl").exists():
                print(f"{workdir} was started before but has no checkpoint: training restarts", flush=True)
            state = warm_start.begin(run.fresh_state(), encoders or {})
            progress = Progress(learning_rate=run.config.learning_rate)
        if not progress.is_finished(run.config):
            _loop(run, workdir, manager, state, progress, is_ours)


def pretrain(stages: dict[str, tuple[Path, run_lib.Run]], by_sweep: bool = False, **options) -> None:
    """Train the given pre-training stages, each in its folder. by_sweep: see `workdir.claim`. options: of `train`."""
    for folder, staged in stages.values():
        workdir_lib.claim(folder, staged, by_sweep)
        train(staged, folder, **options)


def _loop(run: run_lib.Run, workdir: Path, manager, state, progress: Progress, is_ours: Callable[[], bool]) -> None:
    config, step = run.config, int(state.step)
    state = parallel.replicate(state, run.devices)
    run = feed_lib.place(run)
    _say_choices(run)
    feed = feed_lib.open_feed(run)
    eval_fn = parallel.compile_eval(run.options, config.parallel, run.devices)
    apart = alone.views(run)
    key = parallel.replicate(jax.random.key(config.seed), run.devices)
    # Every epoch has the same number of steps: it draws other stays, but equally many.
    steps_per_epoch = len(run.train_plan(epoch=1))
    unit, measure = run.dataset.task.unit, schema.selected_by(config.task)
    losses: list[jax.Array] = []  # of the steps since the last `settle`

    with (
        contextlib.closing(_Trace(run, workdir, step)) as trace,
        contextlib.closing(_open_log(workdir, config, steps_per_epoch * config.num_epochs, step)) as log,
        compilation.counted() as compiled,
        hosts.answering() as answered,
        watchdog.deferred(),  # the loop saves first
    ):

        def training_s() -> float:
            """Return the time on a clock that stops while XLA compiles, so that rates cover steps and tracing only."""
            return time.perf_counter() - compiled.seconds

        def settle() -> None:
            """Give `progress` the losses since the last call. Call it before anything is written.

            Raise TakenOver if another process trains the run, UserError if the last loss is not finite.
            """
            if not is_ours():
                raise TakenOver(f"another process trains {workdir}")
            if losses:
                check_finite(losses[-1], step, config)
                progress.add(losses)

        trace.reached(step, state)
        while not progress.is_finished(config):
            epoch = progress.epoch + 1
            plan = run.train_plan(epoch)
            start, end = (epoch - 1) * steps_per_epoch, epoch * steps_per_epoch
            stops = [s for s in range(step + 1, end + 1) if s == end or trace.needs(s) or _saves_at(s, config)]
            first, begun_s, must_stop = step, training_s(), False
            # Yields after each step or, where an epoch is one call, at each stop; not at all if a resumed epoch lacks
            # only its validation.
            trained = feed(state, plan, step - start, [s - start for s in stops], key)
            for state, loss in trained:
                answered()
                if losses:  # of the previous call, while this one runs
                    last_loss = check_finite(losses[-1], step, config)
                    rate = (step - first) * plan.batch_size / (training_s() - begun_s)
                    log.show(loss=f"{last_loss:.3f}", rate=f"{rate:.1f} {unit}/s")
                losses.append(loss)
                step += loss.size
                log.step(loss.size)
                trace.reached(step, state)
                must_stop = hosts.must_stop()
                if must_stop and step < end:
                    settle()
                    _stop(manager, state, progress, config)
                if step < end and _saves_at(step, config):
                    settle()
                    checkpoints.save(manager, state, progress, is_best=False)
            settle()
            rate = round((step - first) * plan.batch_size / (training_s() - begun_s), 2)
            train_loss = progress.train_loss  # of the whole epoch, also if resumed within it
            if step > first:
                values = {"lr": progress.learning_rate, "samples_per_s": rate, "num_steps": progress.num_steps}
                log.write("train", epoch, step, train_loss=train_loss, **values)
            if must_stop:
                _stop(manager, state, progress, config)

            try:
                predictions = predictions_lib.predict(run, eval_fn, state, "val", run.selects("val"))
                of_each = alone.score(run, apart, eval_fn, state)
            except watchdog.Stopped:
                _stop(manager, state, progress, config)
            answered()
            settle()
            score, scores = predictions_lib.selecting(run, predictions)
            is_best = progress.update(epoch, predictions.loss, score, config.plateau_epochs)
            if is_best:
                progress.temperature = predictions_lib.temperature(run, predictions)
            state = state.replace(learning_rate=parallel.replicate(np.float32(progress.learning_rate), run.devices))
            log.write("val", epoch, step, val_loss=predictions.loss, **scores, **of_each)
            checkpoints.save(manager, state, progress, is_best)
            score_text = "–" if np.isnan(score) else f"{score:.4f}"
            log.show(**{"epoch": f"{epoch}/{config.num_epochs}", measure: score_text})
            log.line(
                f"epoch {epoch}/{config.num_epochs}  loss {train_loss:.4f}  val loss {predictions.loss:.4f}  "
                f"val {measure} {score_text}{' (best)' if is_best else ''}{f'  {rate:.1f} {unit}/s' if rate else ''}"
            )
        manager.wait_until_finished()
    hosts.wait("trained")  # the others read what the first has saved


def _open_log(workdir: Path, config: ConfigDict, num_steps: int, step: int) -> RunLog | NoLog:
    return RunLog(workdir, config.name, num_steps, step) if hosts.is_first() else NoLog()


def _say_choices(run: run_lib.Run) -> None:
    """Print where the run departs from its config, and what 'auto' has chosen."""
    config = run.config
    if config.placement == "auto" and not run.held:
        print(f"{config.name}: batches are streamed, as config.placement=auto decides (docs/performance.md)")
    if run.dataset.use_ehr and (reason := supported.why_unsupported(config, run.devices)):
        print(f"config.recurrence={config.recurrence!r} {reason}; using 'chunks'")


class _Trace:
    """A profiler's trace of the steps that config.profile_steps names, if any."""

    def __init__(self, run: run_lib.Run, workdir: Path, step: int):
        self._first, self._last = run.profiled_steps()  # in every process: they stop at the same steps
        self._folder, self._open = workdir / "profile", contextlib.ExitStack()
        if 0 < self._first <= step and hosts.is_first():
            steps = run.config.profile_steps
            print(f"no trace: step {self._first} of config.profile_steps={steps} has been trained already")

    def needs(self, step: int) -> bool:
        """Return whether the trace begins or ends after this step."""
        return step in (self._first - 1, self._last)

    def reached(self, step: int, state) -> None:
        """Begin just before the first of the steps, and write the trace after the last."""
        if self.needs(step):
            jax.block_until_ready(state)
            if step == self._last:
                self.close()
            elif hosts.is_first():
                self._open.callback(
                    tqdm.write, f"the trace of steps {self._first} to {self._last} is in {self._folder}"
                )
                self._open.enter_context(jax.profiler.trace(self._folder, create_perfetto_trace=True))

    def close(self) -> None:
        self._open.close()


def _stop(manager, state, progress: Progress, config: ConfigDict) -> NoReturn:
    """Save, and stop as a signal to a process of this training asks for."""
    if manager.latest_step() != int(state.step):
        checkpoints.save(manager, state, progress, is_best=False)
        manager.wait_until_finished()
    hosts.wait("stopped")
    raise watchdog.Stopped(f"{config.name}: step {int(state.step)} is saved")


def _saves_at(step: int, config: ConfigDict) -> bool:
    """Return whether config.checkpoint_every_steps asks for a checkpoint at this step."""
    return bool(config.checkpoint_every_steps) and step % config.checkpoint_every_steps == 0
