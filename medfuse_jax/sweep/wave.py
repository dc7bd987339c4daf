"""Trials of one group that train side by side, from their last checkpoints to their records."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import parallel, schema
from medfuse_jax import run as run_lib
from medfuse_jax import step as step_lib
from medfuse_jax.runs import predictions as predictions_lib
from medfuse_jax.runs import warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.log import RunLog
from medfuse_jax.runs.progress import Progress, check_finite
from medfuse_jax.runtime import watchdog
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import caching, pruning, results, stacked_step, trial_store
from medfuse_jax.sweep import lanes as lanes_lib
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.sweep import Sweep
from medfuse_jax.sweep.trial import Trial


@dataclasses.dataclass(frozen=True)
class Program:
    """A group's data and compiled steps, its sets of devices, and how many trials these can take."""

    run: run_lib.Run
    devices: stacked_step.Devices
    capacity: lanes_lib.Capacity
    train_fn: Callable
    eval_fn: Callable
    steps_per_epoch: int


def devices_for(sweep: Sweep, trials: list[Trial]) -> stacked_step.Devices:
    """Return a set of devices for each trial if trials may be divided and there are enough, else each device alone."""
    config, devices = sweep.config_of(trials[0]), parallel.devices()
    is_divided = sweep.divides and not caching.can_cache(config, sweep.encoders_of(config))
    num_sets = len(trials) if is_divided else len(devices)
    return stacked_step.sets(devices, num_sets, (config.batch_size, config.eval.batch_size))


def num_needed(sweep: Sweep) -> int:
    """Return how many trials keep this process's devices busy."""
    return 1 if sweep.divides else len(parallel.devices())


@dataclasses.dataclass(eq=False)
class RunningTrial:
    """A trial in training. state: at its last save, on the host. losses: since then."""

    trial: Trial
    config: ConfigDict
    workdir: Path
    store: trial_store.CheckpointStore | trial_store.FileStore
    state: step_lib.TrainState | None
    progress: Progress | None
    log: RunLog | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    failure: str = ""

    @property
    def step(self) -> int:
        return int(self.state.step)

    @property
    def reached(self) -> tuple[int, int]:
        """The last validated epoch and the step: one at the end of an epoch may have been validated or not."""
        return self.progress.epoch, self.step


def train_wave(sweep: Sweep, program: Program, trials: list[Trial], costs: Costs) -> None:
    """Train trials side by side until each has ended, or the rest may use several devices each.

    After a signal, save them and raise Stopped.
    """
    steps_per_epoch, devices = program.steps_per_epoch, program.devices
    with contextlib.ExitStack() as closing:
        running = _record_ended(sweep, _open_trials(sweep, program.run, trials, closing))
        lanes = _choose_lanes(program, running)
        stacks, stacked = [], []
        closing.enter_context(watchdog.deferred())
        while running:
            # If a process was killed between two trials' saves, some trials are one save ahead: they wait.
            reached = min(t.reached for t in running)
            current = [t for t in running if t.reached == reached]
            if current != stacked:
                stacks = _stack(current, lanes_lib.lanes_for(len(current), lanes, len(devices)), devices)
                stacked = current
            epoch_end = (reached[0] + 1) * steps_per_epoch
            last = _next_save(reached[1], epoch_end, program.run.config)
            stays_per_s = _train_until(last, epoch_end, program, current, stacks, costs)
            for t, state in zip(current, stacked_step.unstack(stacks)):
                t.state = state
                if not sweep.holds(t.trial):
                    t.failure = "another process has taken it over"
            if current[0].step == epoch_end:
                with contextlib.suppress(watchdog.Stopped):  # then they are saved as they are
                    _validate(program, current, stacks, reached[0] + 1, stays_per_s)
                rates = [t.progress.learning_rate for t in current]
                stacked_step.set_learning_rates(stacks, rates, devices)
                for t, rate in zip(current, rates):
                    t.state = t.state.replace(learning_rate=np.float32(rate))
            for t in current:
                if not t.failure and t.reached != reached:
                    t.progress.add(t.losses)
                    t.store.save(t.state, t.progress, is_best=t.progress.best_epoch * steps_per_epoch == t.step)
            if watchdog.received():
                saved = [t for t in current if not t.failure]
                for t in saved:
                    t.store.wait()
                trials_are = "1 trial is" if len(saved) == 1 else f"{len(saved)} trials are"
                raise watchdog.Stopped(f"{trials_are} saved at step {current[0].step}")
            running = _share(sweep, _record_ended(sweep, running))
            if running and devices_for(sweep, [t.trial for t in running]) != devices:
                return  # to resume with several devices for each


def _share(sweep: Sweep, trials: list[RunningTrial]) -> list[RunningTrial]:
    """Give up trials if other processes are idle, but keep as many as are needed here; return those kept.

    The others resume them from their last save.
    """
    if sweep.leases is None:
        return trials
    num_idle = sweep.leases.num_idle()
    kept = max(num_needed(sweep), -(-len(trials) // (num_idle + 1)))
    for t in trials[kept:]:
        t.store.wait()
        sweep.leases.release(t.trial.lease)
    return trials[:kept]


def _open_trials(sweep: Sweep, run, trials: list[Trial], closing: contextlib.ExitStack) -> list[RunningTrial]:
    """Open the trials at their last checkpoints, or with new states if they have none."""
    opened, is_frozen = [], caching.can_cache(run.config, sweep.encoders_of(run.config))
    abstract = run.abstract_state()
    for trial in trials:
        config, workdir = sweep.config_of(trial), results.trial_dir(sweep.workdir, trial.number)
        workdir_lib.claim(workdir, dataclasses.replace(run, config=config), by_sweep=True)
        store = closing.enter_context(contextlib.closing(trial_store.open_store(workdir, is_frozen)))
        state, progress = store.latest(abstract) or (None, None)
        opened.append(RunningTrial(trial, config, workdir, store, state, progress))
    new = [t for t in opened if t.state is None]
    encoders = {} if is_frozen else sweep.encoders_of(run.config)
    for t, state in zip(new, _initial_states(run, [t.config.seed for t in new], encoders)):
        t.state = state.replace(learning_rate=np.float32(t.config.learning_rate))
        t.progress = Progress(learning_rate=t.config.learning_rate)
    for t in opened:
        log = RunLog(t.workdir, t.config.name, 0, t.step, quiet=True)
        t.log = closing.enter_context(contextlib.closing(log))
    return opened


def _initial_states(run, seeds: list[int], encoders: dict) -> list[step_lib.TrainState]:
    """Return one state per seed, on the host, with the encoders' weights filled in."""
    unique = list(dict.fromkeys(seeds))
    trained = warm_start.restore(encoders)
    states = (warm_start.fill(state, trained) for state in run.fresh_states(unique))
    by_seed = dict(zip(unique, map(jax.device_get, states)))
    return [by_seed[seed] for seed in seeds]


def _stack(trials: list[RunningTrial], lanes: int, devices: stacked_step.Devices) -> list[stacked_step.Stack]:
    seeds, dropouts = [t.config.seed for t in trials], [t.config.model.dropout for t in trials]
    return stacked_step.stack([t.state for t in trials], seeds, dropouts, lanes, devices)


def _choose_lanes(program: Program, trials: list[RunningTrial]) -> int:
    """Return the lanes per device, measured on the longest batch: lanes that fit with it fit with any batch."""
    max_lanes = -(-len(trials) // len(program.devices))

    def measure() -> dict[int, float]:
        at_one_step = [t for t in trials if t.step == trials[0].step]
        plan = program.run.train_plan(epoch=1)
        batch = next(program.run.batches("train", plan, start=plan.longest()))

        def seconds_with(lanes: int) -> float:
            stacks = _stack(at_one_step, lanes, program.devices)
            return stacked_step.step_s(program.train_fn, stacks, batch, program.devices)

        return lanes_lib.measure(seconds_with, max_lanes)

    return lanes_lib.choose(program.capacity, max_lanes, measure)


def _next_save(step: int, epoch_end: int, config: ConfigDict) -> int:
    """Return the next step to save at: the epoch's end, or earlier by config.checkpoint_every_steps."""
    every = config.checkpoint_every_steps
    return min(epoch_end, (step // every + 1) * every) if every else epoch_end


def _train_until(
    last: int, epoch_end: int, program: Program, trials: list[RunningTrial], stacks, costs: Costs
) -> float:
    """Train up to step `last` of the epoch, or a signal, and add to the trials' losses; return the stays per second."""
    step = first = trials[0].step
    plan = program.run.train_plan(epoch_end // program.steps_per_epoch)
    batches = program.run.batches("train", plan, start=step - epoch_end + program.steps_per_epoch)
    start_s, pending = time.perf_counter(), None
    while step < last and not all(t.failure for t in trials) and not watchdog.received():
        wait_s = time.perf_counter()
        batch = next(batches)
        costs.input_s += time.perf_counter() - wait_s
        losses = stacked_step.train_all(program.train_fn, stacks, batch, program.devices)
        step += 1
        if pending:  # fetch the previous step's losses while this step runs
            _add_losses(trials, stacked_step.by_trial(pending, stacks), step - 1)
        pending = losses
    if pending:
        _add_losses(trials, stacked_step.by_trial(pending, stacks), step)
    taken_s = time.perf_counter() - start_s
    costs.train_s, costs.steps = costs.train_s + taken_s, costs.steps + step - first
    return (step - first) * plan.batch_size / taken_s


def _add_losses(trials: list[RunningTrial], loss_M: np.ndarray, step: int) -> None:
    for t, loss in zip(trials, loss_M):
        if not t.failure:
            try:
                t.losses.append(check_finite(loss, step, t.config))
            except UserError as error:
                t.failure = str(error)


def _validate(program: Program, trials: list[RunningTrial], stacks, epoch: int, stays_per_s: float) -> None:
    """Score the validation stays with every trial; update its progress and log."""
    run = program.run
    if all(t.failure for t in trials):
        return

    def eval_fn(batch):
        return stacked_step.eval_all(program.eval_fn, stacks, batch, program.devices)

    for t in (t for t in trials if t.losses and not t.failure):
        t.progress.add(t.losses)
        trained = {"train_loss": t.progress.train_loss, "num_steps": t.progress.num_steps}
        trained |= {"lr": t.progress.learning_rate, "samples_per_s": round(stays_per_s, 2)}
        t.log.write("train", epoch, t.step, **trained)
    scored = predictions_lib.predict_each(run, eval_fn, len(trials), "val", run.selects("val"))
    for t, predictions in zip(trials, scored):
        if t.failure:
            continue
        try:
            score, scores = predictions_lib.selecting(run, predictions)
        except UserError as error:
            t.failure = str(error)
            continue
        t.log.write("val", epoch, t.step, val_loss=predictions.loss, **scores)
        if t.progress.update(epoch, predictions.loss, score, run.config.plateau_epochs):
            t.progress.temperature = predictions_lib.temperature(run, predictions)
    running = [t for t in trials if not t.failure]
    if not running:
        return
    best = max(running, key=lambda t: t.progress.rank)
    print(
        f"epoch {epoch}/{run.config.num_epochs}  {len(running)} trials  best: trial {best.trial.number} "
        f"({best.trial.describe()})  val {best.progress.describe(schema.selected_by(run.config.task))}  "
        f"{stays_per_s:.1f} {run.dataset.task.unit}/s each",
        flush=True,
    )


def _record_ended(sweep: Sweep, trials: list[RunningTrial]) -> list[RunningTrial]:
    """Write the records of the trials that have ended; return those that go on, in this process."""
    running, compared = [], pruning.read(sweep.workdir) if sweep.pruning != pruning.NONE else {}
    for t in trials:
        reached = t.progress
        numbers: dict = {"val_auroc": reached.best_auroc, "best_epoch": reached.best_epoch, "epochs": reached.epoch}
        if reached.by_loss:
            numbers["val_loss"] = reached.selected_loss
        if not sweep.holds(t.trial):
            continue
        if t.failure:
            results.write_record(sweep.workdir, t.trial, results.FAILED, t.failure, epochs=reached.epoch)
        elif reached.is_finished(t.config):
            t.store.wait()
            results.write_record(sweep.workdir, t.trial, results.FINISHED, **numbers)
        elif pruning.is_hopeless(sweep.pruning, sweep.workdir, compared, t.trial.number, reached.epoch):
            t.store.wait()
            results.write_record(sweep.workdir, t.trial, results.PRUNED, f"by {sweep.pruning}", **numbers)
        else:
            running.append(t)
    return running
