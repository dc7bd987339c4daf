"""The loop of a sweep: groups of trials one after another, the trials of a group side by side.

Trials that differ only in what a step takes as an argument (learning rate, dropout, seed) form a
group: they see the same batches, read and sent once, in one compiled program.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, metrics, optim, parallel, train
from medfuse_jax import experiment as experiment_lib
from medfuse_jax import step as step_lib
from medfuse_jax.runs import warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.log import RunLog
from medfuse_jax.runtime import errors
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import frozen_encoders, results, stacked_step, trial_store
from medfuse_jax.sweep import lanes as lanes_lib
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.search import Trial

# What the trials of a group may differ in: arguments of the step, and how a state begins.
_WITHIN_A_GROUP = ("learning_rate", "model.dropout", "seed")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What all trials share. config: as given; encoders: all that a trial may start from; lanes: None to measure.

    in_rounds: whether trials of a group may follow once those there are trained. programs: each group's, by what its
    trials share, as long as trials may follow. features: of the frozen encoders, by what decides them.
    """

    config: ConfigDict
    workdir: Path
    encoders: dict
    lanes: int | None = None
    in_rounds: bool = False
    programs: dict = dataclasses.field(default_factory=dict)
    features: dict = dataclasses.field(default_factory=dict)

    def config_of(self, trial: Trial) -> ConfigDict:
        """The trial's whole config, with which `medfuse_jax.main` gives its numbers.

        Its pre-training is done: it starts from the encoders that the trials share, those that it would have trained.
        """
        config = trial.config(self.config)
        config.data.dir = str(Path(config.data.dir).absolute())
        for name in warm_start.staged(config):
            config.init[name] = str(self.encoders[name][0].absolute())
        config.pretrain = ConfigDict()
        return (
            frozen_encoders.without_augmentation(config)
            if frozen_encoders.can_cache(config, self.encoders_of(config))
            else config
        )

    def encoders_of(self, config: ConfigDict) -> dict:
        """What a trial of that config (of `config_of`) starts from."""
        return {name: self.encoders[name] for name, path in config.init.items() if path}

    def shared_by(self, trial: Trial) -> str:
        """What a trial has in common with all of its group; the same where the shards or the sweep were moved."""
        fields = config_lib.flat(self.config_of(trial))
        own = {str(folder.absolute()): folder.name for folder, _ in self.encoders.values()}
        fields |= {k: own.get(v, v) for k, v in fields.items() if k.startswith("init.")}
        left_out = {*_WITHIN_A_GROUP, "data.dir"}
        return json.dumps({k: v for k, v in fields.items() if k not in left_out}, sort_keys=True)


@dataclasses.dataclass
class Live:
    """A trial on its way. state: that of its last stop, on the host; losses: of the epoch so far."""

    trial: Trial
    config: ConfigDict
    workdir: Path
    state: object
    progress: optim.Progress
    log: RunLog
    keeper: trial_store.WholeKeeper | trial_store.FileKeeper
    losses: list[float] = dataclasses.field(default_factory=list)
    failure: str = ""

    @property
    def step(self) -> int:
        return int(self.state.step)


def groups(sweep: Sweep, trials: list[Trial]) -> list[list[Trial]]:
    """The trials by what they share, in the order of each group's first."""
    found = {}
    for trial in trials:
        found.setdefault(sweep.shared_by(trial), []).append(trial)
    return list(found.values())


def train_group(sweep: Sweep, trials: list[Trial], costs: Costs) -> None:
    """Trains the trials that have no record yet, to a record each.

    Goes on from each one's checkpoint. A trial whose loss is not finite fails alone. Where the memory is too small,
    fewer lanes run together, then fewer trials at once; a trial that does not fit alone fails.
    """
    todo = _without_record(sweep, trials)
    if not todo:
        return
    costs.trials += len(todo)
    try:
        program = _program(sweep, todo[0], costs)
    except stacked_step.OUT_OF_MEMORY as error:
        if not errors.is_out_of_memory(error):
            raise
        _record_short_of_memory(sweep, todo, "out of memory before the first step")
        return
    while todo:
        wave = program.fit.wave(todo, len(program.on))
        try:
            _train_wave(sweep, program, wave, costs)
        except stacked_step.OUT_OF_MEMORY as error:
            if not errors.is_out_of_memory(error):
                raise
            if not program.fit.halve(len(wave), len(program.on)):
                _record_short_of_memory(sweep, _without_record(sweep, wave), "out of memory")
        todo = _without_record(sweep, todo)
    if not sweep.in_rounds:
        sweep.programs.clear()


def _record_short_of_memory(sweep: Sweep, trials: list[Trial], what: str) -> None:
    """Not tried again by itself: what fails for its size would fail at every start."""
    for trial in trials:
        record = results.trial_dir(sweep.workdir, trial.number).relative_to(sweep.workdir) / "trial.json"
        why = f"{what}: where there is more, delete {record} and start again; else train smaller batches in a new sweep"
        results.write_record(sweep.workdir, trial, results.FAILED, why)


class Program:
    """One group's compiled steps, the devices they run on, and how many trials these fit."""

    def __init__(self, run: experiment_lib.Experiment, on: list[jax.Device], fit: lanes_lib.Fit):
        self.run, self.on, self.fit = run, on, fit
        # A step takes each trial's dropout as an argument: that of the group's first trial decides nothing.
        options = dataclasses.replace(run.options, model=run.options.model.clone(dropout=0.0))
        self.train_fn, self.eval_fn = _compiled(options, tuple(on))


@functools.lru_cache(maxsize=4)  # groups that differ in their data alone share them; of other groups, the last few stay
def _compiled(options: step_lib.StepOptions, on: tuple[jax.Device, ...]) -> tuple[Callable, Callable]:
    return stacked_step.compile_train(options, list(on)), stacked_step.compile_eval(options, list(on))


def _program(sweep: Sweep, trial: Trial, costs: Costs) -> Program:
    """The program of a trial's group, made once."""
    shared = sweep.shared_by(trial)
    if shared not in sweep.programs:
        on = parallel.devices()
        run = experiment_lib.open_experiment(sweep.config_of(trial), on[:1])
        encoders = sweep.encoders_of(run.config)
        if frozen_encoders.can_cache(run.config, encoders):
            decides = frozen_encoders.decides_features(run.config)
            if decides not in sweep.features:
                with costs.spent("encode_s"):
                    sweep.features[decides] = frozen_encoders.encode(run, encoders)
            run = frozen_encoders.with_features(run, sweep.features[decides])
        fit = lanes_lib.read(sweep.workdir, shared, sweep.lanes)
        sweep.programs[shared] = Program(run, on, fit)
    return sweep.programs[shared]


def _without_record(sweep: Sweep, trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if not results.record(sweep.workdir, trial)]


def _train_wave(sweep: Sweep, program: Program, trials: list[Trial], costs: Costs) -> None:
    run, on = program.run, program.on
    steps_per_epoch = len(run.train_plan(epoch=1))
    with contextlib.ExitStack() as closing:
        lives = _open(sweep, run, trials, steps_per_epoch, closing)
        lives = _settle(sweep, lives)
        most = _choose_lanes(program, lives)
        stacks, stacked = [], []
        while lives:
            # A kill between two trials' saves leaves some a stop ahead: they wait for the others.
            first = min(live.step for live in lives)
            here = [live for live in lives if live.step == first]
            if here != stacked:
                stacks, stacked = _stack(here, lanes_lib.lanes_for(len(here), most, len(on)), on), here
            last = _next_stop(first, steps_per_epoch, run.config)
            rate = _train_until(last, program, here, stacks, steps_per_epoch, costs)
            for live, state in zip(here, stacked_step.unstack(stacks)):
                live.state = state
            if last % steps_per_epoch == 0:
                _validate(program, here, stacks, last // steps_per_epoch, rate)
                rates = [live.progress.learning_rate for live in here]
                stacked_step.set_learning_rates(stacks, rates, on)
                for live in here:
                    live.state = live.state.replace(learning_rate=np.float32(live.progress.learning_rate))
            for live in here:
                if not live.failure:
                    is_best = live.progress.best_epoch * steps_per_epoch == live.step
                    live.keeper.save(live.state, live.progress, is_best)
            lives = _settle(sweep, lives)


def _open(sweep: Sweep, run, trials: list[Trial], steps_per_epoch: int, closing: contextlib.ExitStack) -> list[Live]:
    """The trials where their last checkpoints are, or newly begun."""
    lives, of_heads = [], isinstance(run, frozen_encoders.HeadExperiment)
    abstract = jax.eval_shape(lambda: frozen_encoders.fresh_heads(run, [0])[0]) if of_heads else run.abstract_state()
    for trial in trials:
        config, workdir = sweep.config_of(trial), results.trial_dir(sweep.workdir, trial.number)
        workdir_lib.claim(workdir, dataclasses.replace(run, config=config), by_sweep=True)
        keeper = closing.enter_context(contextlib.closing(trial_store.new_keeper(workdir, of_heads)))
        state, progress = keeper.latest(abstract) or (None, None)
        lives.append(Live(trial, config, workdir, state, progress, None, keeper))
    fresh = [live for live in lives if live.state is None]
    for live, state in zip(fresh, _fresh_states(run, fresh, sweep.encoders_of(run.config))):
        rate = live.config.learning_rate
        live.state = jax.device_get(state.replace(learning_rate=np.float32(rate)))
        live.progress = optim.Progress(learning_rate=rate)
    for live in lives:
        log = RunLog(live.workdir, live.config.name, 0, live.step, quiet=True)
        live.log = closing.enter_context(contextlib.closing(log))
    return lives


def _fresh_states(run, lives: list[Live], encoders: dict):
    """Each trial's first state, from its own seed. Trials of one seed share it, and all share the trained encoders."""
    seeds = [live.config.seed for live in lives]
    if not seeds:
        return
    if isinstance(run, frozen_encoders.HeadExperiment):
        yield from frozen_encoders.fresh_heads(run, seeds)
        return
    made = dict(zip(dict.fromkeys(seeds), run.fresh_states(list(dict.fromkeys(seeds)))))
    begun = warm_start.begin(made[seeds[0]], encoders)
    names = set(begun.params) if "model" in encoders else {f"{name}_encoder" for name in encoders}
    for seed in seeds:
        state = made[seed]
        taken = (
            {name: part for name, part in tree.items() if name in names} for tree in (begun.params, begun.batch_stats)
        )
        params, batch_stats = ({**own, **part} for own, part in zip((state.params, state.batch_stats), taken))
        yield state.replace(params=params, batch_stats=batch_stats)


def _stack(lives: list[Live], lanes: int, on: list[jax.Device]) -> list[stacked_step.Stack]:
    seeds, dropouts = [live.config.seed for live in lives], [live.config.model.dropout for live in lives]
    return stacked_step.stack([live.state for live in lives], seeds, dropouts, lanes, on)


def _choose_lanes(program: Program, lives: list[Live]) -> int:
    """Lanes a device, measured on the group's longest batch: what fits it fits all."""
    most = -(-len(lives) // len(program.on))

    def measure() -> dict[int, float]:
        here = [live for live in lives if live.step == lives[0].step]
        plan = program.run.train_plan(epoch=1)
        batch = next(program.run.batches("train", plan, start=plan.longest()))
        return lanes_lib.measure(
            program.train_fn, lambda lanes: _stack(here, lanes, program.on), most, batch, program.on
        )

    return lanes_lib.choose(program.fit, most, measure)


def _next_stop(step: int, steps_per_epoch: int, config: ConfigDict) -> int:
    """The next step at which trials are saved: the epoch's end, or one of config.checkpoint_every_steps."""
    end = (step // steps_per_epoch + 1) * steps_per_epoch
    every = config.checkpoint_every_steps
    return min(end, (step // every + 1) * every) if every else end


def _train_until(last: int, program: Program, lives: list[Live], stacks, steps_per_epoch: int, costs: Costs) -> float:
    """Steps up to `last`, all in one epoch; returns stays read a second. Losses go to the trials."""
    step = lives[0].step
    plan = program.run.train_plan(step // steps_per_epoch + 1)
    batches = program.run.batches("train", plan, start=step % steps_per_epoch)
    start_s, first, waiting = time.perf_counter(), step, None
    while step < last and not all(live.failure for live in lives):
        before_s = time.perf_counter()
        batch = next(batches)
        costs.input_s += time.perf_counter() - before_s
        losses = stacked_step.train_all(program.train_fn, stacks, batch, program.on)
        step += 1
        if waiting:  # of the step before, while this one runs
            _take_losses(lives, stacked_step.by_trial(waiting, stacks), step - 1)
        waiting = losses
    _take_losses(lives, stacked_step.by_trial(waiting, stacks), step)
    taken_s = time.perf_counter() - start_s
    costs.train_s, costs.steps = costs.train_s + taken_s, costs.steps + step - first
    return (step - first) * plan.batch_size / taken_s


def _take_losses(lives: list[Live], loss_by_trial: np.ndarray, step: int) -> None:
    for live, loss in zip(lives, loss_by_trial):
        if not live.failure:
            try:
                live.losses.append(train.check_finite(loss, step, live.config))
            except UserError as error:
                live.failure = str(error)


def _validate(program: Program, lives: list[Live], stacks, epoch: int, rate: float) -> None:
    """Scores the validation stays with every trial, and takes the result into its progress."""
    run = program.run
    if all(live.failure for live in lives):
        return

    def eval_fn(batch):
        return stacked_step.eval_all(program.eval_fn, stacks, batch, program.on)

    for live, predictions in zip(lives, evaluate.predict_each(run, eval_fn, len(lives), "val", run.selects("val"))):
        if not live.failure:
            try:
                auroc = metrics.macro(metrics.auroc(predictions.label_NK, predictions.score_NK))
            except UserError as error:
                live.failure = str(error)
        if not live.failure:
            at, losses, live.losses = (epoch, live.step), live.losses, []
            live.log.write(
                "train",
                *at,
                train_loss=float(np.mean(losses)),
                lr=live.progress.learning_rate,
                samples_per_s=round(rate, 2),
                num_steps=len(losses),
            )
            live.progress.update(epoch, predictions.loss, auroc, run.config.plateau_epochs)
            live.log.write("val", *at, val_loss=predictions.loss, val_auroc=auroc)
    best = max(lives, key=lambda live: live.progress.best_auroc)
    print(
        f"epoch {epoch}/{run.config.num_epochs}  {len(lives)} trials  best: trial {best.trial.number} "
        f"({best.trial.describe()})  val AUROC {best.progress.best_auroc:.4f}  {rate:.1f} stays/s each",
        flush=True,
    )


def _settle(sweep: Sweep, lives: list[Live]) -> list[Live]:
    """Records the trials that failed or came to their end; returns the others."""
    left = []
    for live in lives:
        reached = live.progress
        if live.failure:
            results.write_record(sweep.workdir, live.trial, results.FAILED, live.failure, epochs=reached.epoch)
        elif train.finished(reached, live.config):
            live.keeper.finish()
            results.write_record(
                sweep.workdir,
                live.trial,
                results.FINISHED,
                val_auroc=reached.best_auroc,
                best_epoch=reached.best_epoch,
                epochs=reached.epoch,
            )
        else:
            left.append(live)
    return left
