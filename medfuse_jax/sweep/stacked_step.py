"""Training of many trials in one step: states with a trial axis, one batch for all, no sums across trials.

Shapes: D devices, V lanes (trials that a device computes together in one call), M trials, B rows, K labels.

Trials are divided over devices by pmap, and the lanes of a device are one vmap of the train step. With one lane per
device, the program is that of a single run, called once per trial.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import parallel
from medfuse_jax import step as step_lib

OUT_OF_MEMORY = (jax.errors.JaxRuntimeError, MemoryError)  # on a device, on the host


@dataclasses.dataclass
class Stack:
    """D x V trials: trial i is lane i % V of device i // V. Lanes past num_trials repeat the first trial.

    state: leaves [D, V, ...]; key, dropout: [D, V]. All trials are at the same step.
    """

    state: step_lib.TrainState
    key: jax.Array
    dropout: jax.Array
    num_trials: int


def stack(
    states: list[step_lib.TrainState], seeds: list[int], dropouts: list[float], lanes: int, on: list[jax.Device]
) -> list[Stack]:
    """Stack the trials into as few stacks of D x lanes as possible. States must be at the same step, and are copied."""
    size, stacks = len(on) * lanes, []
    assert len({int(state.step) for state in states}) == 1, "trials of a stack are at the same step"
    for first in range(0, len(states), size):
        part = states[first : first + size]
        rows = [first + (i if i < len(part) else 0) for i in range(size)]
        state = jax.tree.map(
            lambda *x: np.stack(jax.device_get(x)).reshape(len(on), lanes, *x[0].shape), *[states[i] for i in rows]
        )
        keys = jnp.stack([jax.random.key(seeds[i]) for i in rows]).reshape(len(on), lanes)
        dropout = np.array([dropouts[i] for i in rows], np.float32).reshape(len(on), lanes)
        state, keys, dropout = parallel.divide((state, keys, dropout), on)
        stacks.append(Stack(state, keys, dropout, len(part)))
    return stacks


def unstack(stacks: list[Stack]) -> list[step_lib.TrainState]:
    """Return the states of the trials, in order, as host arrays."""
    states = []
    for one in stacks:
        flat = jax.tree.map(_flat, jax.device_get(one.state))
        states += [jax.tree.map(lambda x, i=i: x[i], flat) for i in range(one.num_trials)]
    return states


def set_learning_rates(stacks: list[Stack], rates: list[float], on: list[jax.Device]) -> None:
    """Set the learning rate of each trial, in order."""
    remaining = list(rates)
    for one in stacks:
        own, remaining = remaining[: one.num_trials], remaining[one.num_trials :]
        shape = one.dropout.shape
        padded = np.array(own + [own[0]] * (math.prod(shape) - len(own)), np.float32).reshape(shape)
        one.state = one.state.replace(learning_rate=parallel.divide(padded, on))


def compile_train(options: step_lib.StepOptions, on: list[jax.Device]) -> Callable:
    """Compile (state, batch, key, dropout) -> (state, metrics [D, V]), for a Stack and a batch of one device."""
    return _compile(functools.partial(step_lib.train_step, options), on, donate_argnums=0)


def compile_eval(options: step_lib.StepOptions, on: list[jax.Device]) -> Callable:
    """Compile (state of a Stack, batch of one device) -> (scores [D, V, B, K], loss of each row [D, V, B])."""
    return _compile(functools.partial(step_lib.eval_step, options), on)


def _compile(step: Callable, on: list[jax.Device], **options) -> Callable:
    """Compile a trial's step(state, batch, key=..., dropout=...) for all lanes of all devices."""

    def lanes(state, batch, **per_trial):
        batch = parallel.one_device(batch)
        if state.step.shape == (1,):  # no vmap: run the program of a single run
            state, per_trial = jax.tree.map(lambda x: x[0], (state, per_trial))
            return jax.tree.map(lambda x: x[None], step(state, batch, **per_trial))
        return jax.vmap(step, (0, None))(state, batch, **per_trial)

    # pmap and vmap map every keyword argument over its first axis.
    return jax.pmap(lanes, parallel.AXIS, in_axes=(0, None), devices=on, **options)


def train_all(train_fn: Callable, stacks: list[Stack], batch: dict, on: list[jax.Device]) -> list[jax.Array]:
    """Train every trial for one step on one batch; return the losses [D, V] of each stack."""
    batch, losses = parallel.replicate(batch, on), []
    for one in stacks:
        one.state, metrics = train_fn(one.state, batch, key=one.key, dropout=one.dropout)
        losses.append(metrics["loss"])
    return losses


def eval_all(eval_fn: Callable, stacks: list[Stack], batch: dict, on: list[jax.Device]) -> tuple:
    """Return (scores [M, 1, B, K], losses [M, 1, B]) of M trials, in order, for predictions.predict_each."""
    batch, outputs = parallel.replicate(batch, on), []
    for one in stacks:
        scores_DVBK, losses_DVB = eval_fn(one.state, batch)
        outputs.append((_flat(scores_DVBK)[: one.num_trials, None], _flat(losses_DVB)[: one.num_trials, None]))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)


def by_trial(losses: list[jax.Array], stacks: list[Stack]) -> np.ndarray:
    """Turn the losses of `train_all` into one array [M], in the order of the trials."""
    return np.concatenate([np.asarray(x).reshape(-1)[: one.num_trials] for x, one in zip(losses, stacks)])


def _flat(x_DV: jax.Array) -> jax.Array:
    return x_DV.reshape(-1, *x_DV.shape[2:])
