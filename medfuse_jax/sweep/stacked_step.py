"""Training of many trials in one step: states with a trial axis, one batch for all, no sums across trials.

Shapes: D sets of devices, G devices in each, V lanes (trials that a set computes together in one call), M trials, B
rows on a device, K labels.

Trials are divided over sets of one device each by pmap, and the lanes of a device are one vmap of the train step. With
one lane, the program is that of a single run, called once per trial. Sets of several devices, over which batches are
divided, are a mesh of D x G for shard_map.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medfuse_jax import parallel
from medfuse_jax import step as step_lib

_TRIAL = "trial"
OUT_OF_MEMORY = (jax.errors.JaxRuntimeError, MemoryError)  # on a device, on the host


@dataclasses.dataclass
class Stack:
    """D x V trials: trial i is lane i % V of set i // V. Lanes past num_trials repeat the first trial.

    state: leaves [D, V, ...]; key, dropout: [D, V]. All trials are at the same step.
    """

    state: step_lib.TrainState
    key: jax.Array
    dropout: jax.Array
    num_trials: int


Devices = list[list[jax.Device]]  # D sets of G


def sets(devices: list[jax.Device], num_trials: int, sizes: tuple[int, ...]) -> Devices:
    """Divide the devices evenly into at least `num_trials` sets, as large as divides all `sizes` of batches."""
    fitting = [g for g in range(1, len(devices) // num_trials + 1) if not any(n % g for n in (len(devices), *sizes))]
    each = max(fitting, default=1)
    return [devices[i : i + each] for i in range(0, len(devices), each)]


def _place(tree, on: Devices, *axes: str):
    return jax.device_put(tree, NamedSharding(_mesh(on), PartitionSpec(*axes)))


def _mesh(on: Devices) -> Mesh:
    """Return a mesh of the sets; with one device each, it has pmap's single axis."""
    return Mesh(np.asarray(on), (_TRIAL, parallel.AXIS)) if len(on[0]) > 1 else parallel.mesh([d for (d,) in on])


def stack(
    states: list[step_lib.TrainState], seeds: list[int], dropouts: list[float], lanes: int, on: Devices
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
        state, keys, dropout = _place((state, keys, dropout), on, _mesh(on).axis_names[0])
        stacks.append(Stack(state, keys, dropout, len(part)))
    return stacks


def unstack(stacks: list[Stack]) -> list[step_lib.TrainState]:
    """Return the states of the trials, in order, as host arrays."""
    states = []
    for one in stacks:
        flat = jax.tree.map(_flat, jax.device_get(one.state))
        states += [jax.tree.map(lambda x, i=i: x[i], flat) for i in range(one.num_trials)]
    return states


def set_learning_rates(stacks: list[Stack], rates: list[float], on: Devices) -> None:
    """Set the learning rate of each trial, in order."""
    remaining = list(rates)
    for one in stacks:
        own, remaining = remaining[: one.num_trials], remaining[one.num_trials :]
        shape = one.dropout.shape
        padded = np.array(own + [own[0]] * (math.prod(shape) - len(own)), np.float32).reshape(shape)
        one.state = one.state.replace(learning_rate=_place(padded, on, _mesh(on).axis_names[0]))


def compile_train(options: step_lib.StepOptions, on: Devices) -> Callable:
    """Compile (state, batch, key, dropout) -> (state, metrics [D, V]), for a Stack and a batch of G devices."""
    step = functools.partial(step_lib.train_step, options, axis=parallel.axis_of(on[0]))
    return _compile(step, on, PartitionSpec(_TRIAL), donate_argnums=0)


def compile_eval(options: step_lib.StepOptions, on: Devices) -> Callable:
    """Compile (state of a Stack, batch of G devices) -> (scores [D, V, G, B, K], loss of each row [D, V, G, B])."""

    def step(state, batch):
        return jax.tree.map(lambda x: x[None], step_lib.eval_step(options, state, batch))

    return _compile(step, on, PartitionSpec(_TRIAL, None, parallel.AXIS))


def _compile(step: Callable, on: Devices, out_spec: PartitionSpec, **options) -> Callable:
    """Compile a trial's step(state, batch, key=..., dropout=...) for all lanes of all sets. out_spec: over a mesh."""

    def lanes(state, batch, **per_trial):
        batch = parallel.one_device(batch)
        if state.step.shape == (1,):  # no vmap: run the program of a single run
            state, per_trial = jax.tree.map(lambda x: x[0], (state, per_trial))
            return jax.tree.map(lambda x: x[None], step(state, batch, **per_trial))
        return jax.vmap(step, (0, None))(state, batch, **per_trial)

    # pmap and vmap map every keyword argument over its first axis.
    if len(on[0]) == 1:
        return jax.pmap(lanes, parallel.AXIS, in_axes=(0, None), devices=[d for (d,) in on], **options)

    def of_one_set(state, batch, per_trial):
        state, per_trial = parallel.one_device((state, per_trial))
        return jax.tree.map(lambda x: x[None], lanes(state, batch, **per_trial))

    def over_mesh(state, batch, **per_trial):
        specs = (PartitionSpec(_TRIAL), PartitionSpec(parallel.AXIS), PartitionSpec(_TRIAL))
        # Without check_vma=False, the gradients would be summed twice: by the step, and by shard_map.
        mapped = jax.shard_map(of_one_set, mesh=_mesh(on), in_specs=specs, out_specs=out_spec, check_vma=False)
        return mapped(state, batch, per_trial)

    return jax.jit(over_mesh, **options)


def train_all(train_fn: Callable, stacks: list[Stack], batch: dict, on: Devices) -> list[jax.Array]:
    """Train every trial for one step on one batch; return the losses [D, V] of each stack."""
    batch, losses = _send(batch, on), []
    for one in stacks:
        one.state, metrics = train_fn(one.state, batch, key=one.key, dropout=one.dropout)
        losses.append(metrics["loss"])
    return losses


def step_s(train_fn: Callable, stacks: list[Stack], batch: dict, on: Devices) -> float:
    """Return the seconds of a step of all trials, the median of five. The updates are discarded."""
    jax.block_until_ready(train_all(train_fn, stacks, batch, on))  # compile first
    taken_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        jax.block_until_ready(train_all(train_fn, stacks, batch, on))
        taken_s.append(time.perf_counter() - start_s)
    return float(np.median(taken_s))


def eval_all(eval_fn: Callable, stacks: list[Stack], batch: dict, on: Devices) -> tuple:
    """Return (scores [M, G, B, K], losses [M, G, B]) of M trials, in order, for predictions.predict_each."""
    batch, outputs = _send(batch, on), []
    for one in stacks:
        scores_DVGBK, losses_DVGB = eval_fn(one.state, batch)
        outputs.append((_flat(scores_DVGBK)[: one.num_trials], _flat(losses_DVGB)[: one.num_trials]))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)


def _send(batch: dict, on: Devices) -> dict:
    """Send a batch, whose leading axis is that of a set's devices, to every set."""
    return _place(batch, on, *([parallel.AXIS] if len(on[0]) > 1 else []))


def by_trial(losses: list[jax.Array], stacks: list[Stack]) -> np.ndarray:
    """Turn the losses of `train_all` into one array [M], in the order of the trials."""
    return np.concatenate([np.asarray(x).reshape(-1)[: one.num_trials] for x, one in zip(losses, stacks)])


def _flat(x_DV: jax.Array) -> jax.Array:
    return x_DV.reshape(-1, *x_DV.shape[2:])
