"""Divide trials into groups, and train one group after another; wave.py trains a group's trials side by side.

The trials of a group differ only in learning rate, dropout and seed, which the step takes as arguments. They share one
compiled program and one stream of batches.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax

from medfuse_jax import feed
from medfuse_jax import run as run_lib
from medfuse_jax import step as step_lib
from medfuse_jax.runtime import errors
from medfuse_jax.sweep import caching, frozen_encoders, results, stacked_step
from medfuse_jax.sweep import lanes as lanes_lib
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.sweep import Sweep
from medfuse_jax.sweep.trial import Trial
from medfuse_jax.sweep.wave import Program, devices_for, num_needed, train_wave


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
            share = max(num_needed(sweep), -(-len(free) // max(1, sweep.leases.num_idle())))
            claimed = (trial for trial in free if sweep.leases.claim(trial.lease))
            return list(itertools.islice(claimed, share))
    return []


def train_group(sweep: Sweep, trials: list[Trial], costs: Costs) -> None:
    """Train the trials that have no record yet, from their last checkpoints, and write their records.

    If a trial's loss is not finite, only that trial fails. If the group runs out of memory, fewer lanes run together,
    then fewer trials at once. A trial that does not fit even alone fails. Trials that this process gives up, or whose
    leases it loses, are left to other processes.
    """
    program = None
    costs.trials += len(without_record(sweep, trials))
    while remaining := [trial for trial in without_record(sweep, trials) if sweep.holds(trial)]:
        wave, on = remaining, devices_for(sweep, remaining)
        try:
            if program is None or program.devices != on:
                program = open_program(sweep, remaining[0], costs, on)
            wave = program.capacity.next_wave(remaining, len(program.devices))
            train_wave(sweep, program, wave, costs)
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


def open_program(sweep: Sweep, trial: Trial, costs: Costs, devices: stacked_step.Devices) -> Program:
    """Open the program of a trial's group. Encode the data if the group's frozen encoders have not run yet."""
    run = run_lib.open_run(sweep.config_of(trial), devices[0])
    encoders = sweep.encoders_of(run.config)
    if caching.can_cache(run.config, encoders):
        key = caching.features_key(run.config)
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
