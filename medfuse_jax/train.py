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

from medfuse_jax import config as config_lib
from medfuse_jax import feed as feed_lib
from medfuse_jax import parallel, schema
from medfuse_jax import run as run_lib
from medfuse_jax.models.model import variable_shapes
from medfuse_jax.models.recurrence import supported
from medfuse_jax.runs import alone, checkpoints, warm_start
from medfuse_jax.runs import predictions as predictions_lib
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.log import NoLog, RunLog
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import compilation, hosts, watchdog
from medfuse_jax.runtime.errors import UserError


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
    config = run.config
    state = parallel.replicate(state, run.devices)
    run = feed_lib.place(run)
    if config.placement == "auto" and not run.held:
        print(f"{config.name}: batches are streamed, as config.placement=auto decides (docs/performance.md)")
    feed = feed_lib.open_feed(run)
    eval_fn = parallel.compile_eval(run.options, config.parallel, run.devices)
    apart = alone.views(run)
    key = parallel.replicate(jax.random.key(config.seed), run.devices)
    # Every epoch has the same number of steps: it draws other stays, but equally many.
    steps_per_epoch = len(run.train_plan(epoch=1))
    step = int(state.step)

    unit, measure = run.dataset.task.unit, schema.selected_by(config.task)
    profiled = profiled_steps(run) if hosts.is_first() else (0, 0)
    if 0 < profiled[0] <= step:
        print(f"no trace: step {profiled[0]} of config.profile_steps={config.profile_steps} has been trained already")
    if run.dataset.use_ehr and (reason := supported.why_unsupported(config, run.devices)):
        print(f"config.recurrence={config.recurrence!r} {reason}; using 'chunks'")

    with (
        contextlib.closing(_open_log(workdir, config, steps_per_epoch * config.num_epochs, step)) as log,
        contextlib.ExitStack() as profile,
        compilation.counted() as compiled,
        hosts.answering() as answered,
        watchdog.deferred(),  # the loop saves first
    ):

        def training_s() -> float:
            """Return the time on a clock that stops while XLA compiles, so that rates cover steps and tracing only."""
            return time.perf_counter() - compiled.seconds

        def check_ours() -> None:
            if not is_ours():
                raise TakenOver(f"another process trains {workdir}")

        _profile(profile, profiled, workdir, step, state)
        while not progress.is_finished(config):
            epoch = progress.epoch + 1
            plan = run.train_plan(epoch)
            epoch_end = epoch * steps_per_epoch
            done = step - epoch_end + steps_per_epoch  # all, if a signal kept the epoch from being validated
            stops = [s - epoch_end + steps_per_epoch for s in _stops(step, epoch_end, config, profiled)]
            losses, samples, start_s, must_stop = [], 0, training_s(), False
            for moved, loss in feed(state, plan, done, stops, key):  # after a step, or after several in one call
                state = moved
                answered()
                losses.append(loss)
                step += loss.size
                samples += plan.batch_size * loss.size
                if len(losses) > 1:  # the previous call's, while this one runs
                    shown = check_finite(losses[-2], step - loss.size, config)
                    log.show(loss=f"{shown:.3f}", rate=f"{samples / (training_s() - start_s):.1f} {unit}/s")
                log.step(loss.size)
                _profile(profile, profiled, workdir, step, state)
                must_stop = hosts.must_stop()
                if must_stop and step < epoch_end:
                    check_ours()
                    check_finite(losses[-1], step, config)
                    progress.add(losses)
                    _stop(manager, state, progress, config)
                if step < epoch_end and _saves_at(step, config):
                    check_ours()
                    check_finite(losses[-1], step, config)  # never save weights that are not finite
                    progress.add(losses)
                    checkpoints.save(manager, state, progress, is_best=False)
            check_ours()
            speed = ""
            if losses:  # empty if a signal came before this epoch was validated: its training is logged already
                check_finite(losses[-1], step, config)
                progress.add(losses)
                rate = round(samples / (training_s() - start_s), 2)
                log.write(
                    "train",
                    epoch,
                    step,
                    train_loss=progress.train_loss,  # of the whole epoch, also if resumed within it
                    lr=progress.learning_rate,
                    samples_per_s=rate,
                    num_steps=progress.num_steps,
                )
                speed = f"  {rate:.1f} {unit}/s"
            try:
                if must_stop:
                    raise watchdog.Stopped
                predictions = predictions_lib.predict(run, eval_fn, state, "val", run.selects("val"))
                of_each = alone.score(run, apart, eval_fn, state)
            except watchdog.Stopped:
                _stop(manager, state, progress, config)
            answered()
            check_ours()
            train_loss = progress.train_loss
            score, scores = predictions_lib.selecting(run, predictions)
            is_best = progress.update(epoch, predictions.loss, score, config.plateau_epochs)
            state = state.replace(learning_rate=parallel.replicate(np.float32(progress.learning_rate), run.devices))
            log.write("val", epoch, step, val_loss=predictions.loss, **scores, **of_each)
            checkpoints.save(manager, state, progress, is_best)
            score_text = "–" if np.isnan(score) else f"{score:.4f}"
            log.show(**{"epoch": f"{epoch}/{config.num_epochs}", measure: score_text})
            log.line(
                f"epoch {epoch}/{config.num_epochs}  loss {train_loss:.4f}  val loss {predictions.loss:.4f}  "
                f"val {measure} {score_text}{' (best)' if is_best else ''}{speed}"
            )
        manager.wait_until_finished()
    hosts.wait("trained")  # the others read what the first has saved


def _open_log(workdir: Path, config: ConfigDict, num_steps: int, step: int) -> RunLog | NoLog:
    return RunLog(workdir, config.name, num_steps, step) if hosts.is_first() else NoLog()


def _stop(manager, state, progress: Progress, config: ConfigDict) -> NoReturn:
    """Save, and stop as a signal to a process of this training asks for."""
    if manager.latest_step() != int(state.step):
        checkpoints.save(manager, state, progress, is_best=False)
        manager.wait_until_finished()
    hosts.wait("stopped")
    raise watchdog.Stopped(f"{config.name}: step {int(state.step)} is saved")


def preflight(run: run_lib.Run, stages: dict[str, tuple[Path, run_lib.Run]], says: bool = True) -> None:
    """Raise UserError now for anything that would otherwise stop the run or its stages after hours of training.

    says: whether to print that the validation loss will select a model, where there is no AUROC.
    """
    run.check_any("test", run.dataset.usable("test"))
    run.check_any("val", run.selects("val"))
    profiled_steps(run)
    if run.dataset.use_ehr:
        supported.check(run.config, run.devices)
    for trained in (*(staged for _, staged in stages.values()), run):
        _check_memory(trained)
        feed_lib.choose_parts(trained)
        if says and trained.selected_by_loss:
            unit = trained.dataset.task.unit
            print(f"{trained.config.name}: no label has both classes in the validation {unit} ", end="")
            print("that select the model, so there is no AUROC: their loss selects it", flush=True)


def _check_memory(run: run_lib.Run) -> None:
    """Raise UserError if the weights alone, with Adam's moments, exceed this machine's memory: XLA would abort."""
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_state_shapes(run)))
    if num_bytes > (memory := hosts.memory_bytes()):
        what = f"{run.config.name}: the weights and Adam's moments take {num_bytes / 1e9:.0f} GB, and this machine has "
        raise UserError(f"{what}{memory / 1e9:.0f} GB: reduce the sizes in config.model", field="config.model")


def _state_shapes(run: run_lib.Run):
    """Return the shapes of the weights and Adam's moments."""
    if run.options.model.recurrence == "chunks":
        return run.abstract_state()  # which training asks for again: the model is traced once
    # Other kernels can be traced on their own devices only; no weight depends on the kernel.
    extra = {name: of["train"][:1] for name, of in run.dataset.extra.items()}
    variables = variable_shapes(run.options.model.clone(recurrence="chunks"), extra)
    return variables, variables["params"], variables["params"]


def profiled_steps(run: run_lib.Run) -> tuple[int, int]:
    """Return the first and last step to profile, or (0, 0) for none; raise UserError if the run has fewer steps."""
    config = run.config
    first, last = config_lib.profile_steps(config)
    if last and last > (num_steps := len(run.train_plan(epoch=1)) * config.num_epochs):
        what = f"config.profile_steps is {config.profile_steps}, and {config.name} has {num_steps} steps"
        raise UserError(what, field="config.profile_steps", value=config.profile_steps)
    return first, last


def _profile(profile: contextlib.ExitStack, profiled: tuple[int, int], workdir: Path, step: int, state) -> None:
    """Start the trace just before the first profiled step, and write it after the last."""
    first, last = profiled
    if step in (first - 1, last):
        jax.block_until_ready(state)
    if step == last:
        profile.close()
    elif step == first - 1:
        profile.callback(tqdm.write, f"the trace of steps {first} to {last} is in {workdir / 'profile'}")
        profile.enter_context(jax.profiler.trace(workdir / "profile", create_perfetto_trace=True))


def _stops(step: int, epoch_end: int, config: ConfigDict, profiled: tuple[int, int]) -> list[int]:
    """Return the steps of this epoch after which the state is needed, to be saved or traced."""
    wanted = {profiled[0] - 1, profiled[1], epoch_end}
    return [s for s in range(step + 1, epoch_end + 1) if s in wanted or _saves_at(s, config)]


def _saves_at(step: int, config: ConfigDict) -> bool:
    """Return whether config.checkpoint_every_steps asks for a checkpoint at this step."""
    return bool(config.checkpoint_every_steps) and step % config.checkpoint_every_steps == 0


def check_finite(loss: jax.Array, step: int, config: ConfigDict) -> float:
    """Return the last of the given losses, that of `step`; raise UserError if any is not finite."""
    losses = np.atleast_1d(loss)
    if not np.isfinite(losses).all():
        first = int(np.argmin(np.isfinite(losses)))
        raise UserError(
            f"{config.name}: the loss of step {step - len(losses) + 1 + first} is {losses[first]}; try a lower "
            f"config.learning_rate (now {config.learning_rate}) or config.precision=float32",
            field="config.learning_rate",
            value=config.learning_rate,
        )
    return float(losses[-1])
