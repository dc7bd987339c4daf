"""The training loop of a sweep: one group of trials after another, with the trials of a group side by side.

The trials of a group differ only in learning rate, dropout and seed, which the step takes as arguments. They share one
compiled program and one stream of batches.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import feed, parallel, schema, train
from medfuse_jax import run as run_lib
from medfuse_jax import step as step_lib
from medfuse_jax.runs import predictions as predictions_lib
from medfuse_jax.runs import warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.log import RunLog
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import errors, watchdog
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import frozen_encoders, pruning, results, stacked_step, trial_store
from medfuse_jax.sweep import lanes as lanes_lib
from medfuse_jax.sweep import leases as leases_lib
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.search import Trial

_WITHIN_A_GROUP = ("learning_rate", "model.dropout", "seed")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The parts of a sweep that all trials share.

    config: as given. encoders: name -> (workdir, run), all encoders that a trial may start from. leases: those of this
    process; None if it has the sweep to itself. lanes: None to measure them. pruning: one of `pruning.RULES`. divides:
    whether a trial may use several devices. features: those of frozen encoders, by `frozen_encoders.features_key`.
    """

    config: ConfigDict
    workdir: Path
    encoders: dict
    leases: leases_lib.Leases | None = None
    lanes: int | None = None
    pruning: str = pruning.NONE
    divides: bool = False
    features: dict = dataclasses.field(default_factory=dict)

    def config_of(self, trial: Trial) -> ConfigDict:
        """Return the trial's config, with which `medfuse_jax.main` gives the same results.

        It has no pre-training: the sweep has done it already, and the trial starts from the shared encoders.
        """
        config = trial.config(self.config)
        for name in ("dir", "cxr_features"):
            config.data[name] = config.data[name] and str(Path(config.data[name]).absolute())
        for name in warm_start.staged(config):
            config.init[name] = str(self.encoders[name][0].absolute())
        config.pretrain = ConfigDict()
        if frozen_encoders.can_cache(config, self.encoders_of(config)):
            config.update_from_flattened_dict(frozen_encoders.NO_AUGMENTATION)
        return config

    def encoders_of(self, config: ConfigDict) -> dict:
        """Return the encoders that a trial with this config (from `config_of`) starts from."""
        return {name: self.encoders[name] for name, path in config.init.items() if path}

    def group_key(self, trial: Trial) -> str:
        """Return the key of the trial's group, which stays the same if shards, features or the sweep are moved."""
        fields = config_lib.flat(self.config_of(trial))
        names = {str(folder.absolute()): folder.name for folder, _ in self.encoders.values()}
        fields |= {k: names.get(v, v) for k, v in fields.items() if k.startswith("init.")}
        may_move = {*config_lib.MOVABLE} - trial.values.keys()  # a search may compare files of features
        ignored = {*_WITHIN_A_GROUP, *may_move}
        return json.dumps({k: v for k, v in fields.items() if k not in ignored}, sort_keys=True)


@dataclasses.dataclass(eq=False)
class RunningTrial:
    """A trial in training. state: at its last save, on the host. losses: of the current epoch."""

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


def split_into_groups(sweep: Sweep, trials: list[Trial]) -> list[list[Trial]]:
    groups = {}
    for trial in trials:
        groups.setdefault(sweep.group_key(trial), []).append(trial)
    return list(groups.values())


def claim(sweep: Sweep, of_groups: list[list[Trial]]) -> list[Trial]:
    """Claim trials of the first group that has free ones: this process's share of them, or as many as it needs."""
    for group in of_groups:
        free = [trial for trial in without_record(sweep, group) if sweep.leases.is_free(trial.lease)]
        if free:
            share = max(_needed(sweep), -(-len(free) // max(1, sweep.leases.num_idle())))
            claimed = (trial for trial in free if sweep.leases.claim(trial.lease))
            return list(itertools.islice(claimed, share))
    return []


def _needed(sweep: Sweep) -> int:
    """Return how many trials keep this process's devices busy."""
    return 1 if sweep.divides else len(parallel.devices())


def _is_held(sweep: Sweep, trial: Trial) -> bool:
    return sweep.leases is None or sweep.leases.holds(trial.lease)


def train_group(sweep: Sweep, trials: list[Trial], costs: Costs) -> None:
    """Train the trials that have no record yet, from their last checkpoints, and write their records.

    If a trial's loss is not finite, only that trial fails. If the group runs out of memory, fewer lanes run together,
    then fewer trials at once. A trial that does not fit even alone fails. Trials that this process gives up, or whose
    leases it loses, are left to other processes.
    """
    program = None
    costs.trials += len(without_record(sweep, trials))
    while remaining := [trial for trial in without_record(sweep, trials) if _is_held(sweep, trial)]:
        wave, on = remaining, _devices(sweep, remaining)
        try:
            if program is None or program.devices != on:
                program = open_program(sweep, remaining[0], costs, on)
            wave = program.capacity.next_wave(remaining, len(program.devices))
            _train_wave(sweep, program, wave, costs)
        except stacked_step.OUT_OF_MEMORY as error:
            if not errors.is_out_of_memory(error):
                raise
            if program is None or not program.capacity.halve(len(wave), len(program.devices)):
                _record_out_of_memory(sweep, without_record(sweep, wave))
    for trial in trials if sweep.leases else ():
        sweep.leases.release(trial.lease)


def _record_out_of_memory(sweep: Sweep, trials: list[Trial]) -> None:
    """Record the trials as failed, since a rerun would run out of memory again."""
    for trial in trials:
        path = results.trial_dir(sweep.workdir, trial.number).relative_to(sweep.workdir) / "trial.json"
        hint = f"with more memory, delete {path} and rerun; otherwise start a new sweep with smaller batches"
        results.write_record(sweep.workdir, trial, results.FAILED, f"out of memory: {hint}")


def without_record(sweep: Sweep, trials: list[Trial]) -> list[Trial]:
    """Return the trials that have not ended."""
    return [trial for trial in trials if not results.record(sweep.workdir, trial)]


@dataclasses.dataclass(frozen=True)
class Program:
    """A group's data and compiled steps, its sets of devices, and how many trials these can take."""

    run: run_lib.Run
    devices: stacked_step.Devices
    capacity: lanes_lib.Capacity
    train_fn: Callable
    eval_fn: Callable
    steps_per_epoch: int


def _devices(sweep: Sweep, trials: list[Trial]) -> stacked_step.Devices:
    """Return a set of devices for each trial if trials may be divided and there are enough, else each device alone."""
    config, devices = sweep.config_of(trials[0]), parallel.devices()
    is_divided = sweep.divides and not frozen_encoders.can_cache(config, sweep.encoders_of(config))
    num_sets = len(trials) if is_divided else len(devices)
    return stacked_step.sets(devices, num_sets, (config.batch_size, config.eval.batch_size))


def open_program(sweep: Sweep, trial: Trial, costs: Costs, devices: stacked_step.Devices) -> Program:
    """Open the program of a trial's group. Encode the data if the group's frozen encoders have not run yet."""
    run = run_lib.open_run(sweep.config_of(trial), devices[0])
    encoders = sweep.encoders_of(run.config)
    if frozen_encoders.can_cache(run.config, encoders):
        key = frozen_encoders.features_key(run.config)
        if key not in sweep.features:
            with costs.timed("encode_s"):
                sweep.features[key] = frozen_encoders.encode(run, encoders)
        run = frozen_encoders.with_features(run, sweep.features[key])
    else:
        run = feed.place(run)
    # The step takes dropout as an argument, so reset it in the options: groups with equal models share a program.
    options = dataclasses.replace(run.options, model=run.options.model.clone(dropout=0.0))
    capacity = lanes_lib.read(sweep.workdir, sweep.group_key(trial), sweep.lanes)
    compiled = _compiled(options, tuple(map(tuple, devices)))
    return Program(run, devices, capacity, *compiled, len(run.train_plan(epoch=1)))


@functools.lru_cache(maxsize=8)  # keep only the programs of the latest groups
def _compiled(options: step_lib.StepOptions, devices: tuple[tuple[jax.Device, ...], ...]) -> tuple[Callable, Callable]:
    on = list(map(list, devices))
    return stacked_step.compile_train(options, on), stacked_step.compile_eval(options, on)


def _train_wave(sweep: Sweep, program: Program, trials: list[Trial], costs: Costs) -> None:
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
                if not _is_held(sweep, t.trial):
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
            if running and _devices(sweep, [t.trial for t in running]) != devices:
                return  # to resume with several devices for each


def _share(sweep: Sweep, trials: list[RunningTrial]) -> list[RunningTrial]:
    """Give up trials if other processes are idle, but keep as many as are needed here; return those kept.

    The others resume them from their last save.
    """
    if sweep.leases is None:
        return trials
    num_idle = sweep.leases.num_idle()
    kept = max(_needed(sweep), -(-len(trials) // (num_idle + 1)))
    for t in trials[kept:]:
        t.store.wait()
        sweep.leases.release(t.trial.lease)
    return trials[:kept]


def _open_trials(sweep: Sweep, run, trials: list[Trial], closing: contextlib.ExitStack) -> list[RunningTrial]:
    """Open the trials at their last checkpoints, or with new states if they have none."""
    opened, is_frozen = [], isinstance(run, frozen_encoders.FrozenEncoderRun)
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
        stack_with = functools.partial(_stack, at_one_step, devices=program.devices)
        return lanes_lib.measure(program.train_fn, stack_with, max_lanes, batch, program.devices)

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
                t.losses.append(train.check_finite(loss, step, t.config))
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
        t.progress.update(epoch, predictions.loss, score, run.config.plateau_epochs)
    best = max(trials, key=lambda t: t.progress.rank)
    print(
        f"epoch {epoch}/{run.config.num_epochs}  {len(trials)} trials  best: trial {best.trial.number} "
        f"({best.trial.describe()})  val {best.progress.describe(schema.selected_by(run.config.task))}  "
        f"{stays_per_s:.1f} stays/s each",
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
        if not _is_held(sweep, t.trial):
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
