"""How batches reach the training step, by config.placement: streamed from the shards, or gathered on the device.

A feed is a function (state, plan, start, stops, key) that trains on the plan's batches from number `start` on and
yields (state, losses of the steps since the last yield, on the device). It yields after every step or, if an epoch is
one call, at each of `stops`: the ascending step numbers at which the caller wants the state.
Both placements give the same numbers, up to rounding.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import parallel
from medfuse_jax import step as step_lib
from medfuse_jax.data import batches, device_store
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.runtime.errors import UserError

Feed = Callable[[step_lib.TrainState, plan_lib.Plan | plan_lib.Alternating, int, list[int], jax.Array], Iterator]


def open_feed(
    dataset: Dataset,
    include_N: np.ndarray,
    options: step_lib.StepOptions,
    on: list[jax.Device],
    *,
    mode: str,
    placement: str,
    one_call: bool | None = None,
) -> Feed:
    """Return the feed of the included training records. mode: config.parallel; placement: config.placement.

    one_call: whether one call runs all steps up to the next stop; by default only on accelerators. On a CPU each step
    is a call, because XLA's CPU runs the gradients of convolutions inside a loop far more slowly (docs/performance.md).
    """
    if placement == "stream":
        return functools.partial(_stream, dataset, on, parallel.compile_train(options, mode, on))
    check_placement(dataset, include_N, on, placement)
    if one_call is None:
        one_call = on[0].platform != "cpu"
    held = parallel.replicate(device_store.load(dataset, "train", include_N), on)
    train_fn = compile_on_device(options, mode, on, in_loop=one_call)
    return functools.partial(_calls if one_call else _steps, on, train_fn, held)


def check_placement(dataset: Dataset, include_N: np.ndarray, on: list[jax.Device], placement: str) -> None:
    """Raise UserError if the records cannot be placed as config.placement says, without reading any."""
    if placement == "stream":
        return
    if dataset.cxr_dataset:
        raise UserError(
            "config.placement is 'device', and this method alternates between two datasets: use 'stream'",
            field="config.placement",
        )
    device_store.check_fits(dataset, "train", include_N, on)


def compile_on_device(options: step_lib.StepOptions, mode: str, on: list[jax.Device], in_loop: bool) -> Callable:
    """Compile (state, held, rows, key, start, stop, padded_length) -> (state, losses [S]), gathering on the device.

    held, rows: from `device_store`, rows with leading axes [D, S]. With in_loop, train on batches start to stop - 1 of
    the S in one loop; its bounds are traced, so one program serves any part of an epoch. Otherwise train on the only
    batch. padded_length: a constant. The old state's memory is reused.
    """
    axis = parallel.axis_of(on)

    def run(state, held, rows, key, start, stop, padded_length):
        def step(s, carry):
            state, loss_S = carry
            batch = device_store.gather(held, {name: x[s] for name, x in rows.items()}, padded_length)
            state, metrics = step_lib.train_step(options, state, batch, key, axis)
            return state, loss_S.at[s].set(metrics["loss"])

        carry = (state, jnp.zeros(rows["record"].shape[0], jnp.float32))
        return jax.lax.fori_loop(start, stop, step, carry) if in_loop else step(0, carry)

    in_axes = (None, None, 0, None, None, None, None)
    return parallel.over_devices(run, mode, on, in_axes=in_axes, out_axes=None, static_argnums=(6,), donate_argnums=0)


def _stream(dataset, on, train_fn, state, plan, start, stops, key):
    read = batches.batches(dataset, "train", plan, num_devices=len(on), start=start, part=parallel.own_part(on))
    for step, batch in enumerate(parallel.prefetch(read, on), start):
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = train_fn(state, batch, key)
        yield state, metrics["loss"]


def _steps(on, train_fn, held, state, plan, start, stops, key):
    for step in range(start, len(plan)):
        rows = _deal(plan, range(step, step + 1), on)
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, loss_S = train_fn(state, held, rows, key, 0, 1, int(plan.padded_length_S[step]))
        yield state, loss_S


def _calls(on, train_fn, held, state, plan, start, stops, key):
    rows = _deal(plan, range(len(plan)), on)
    for stop in stops:
        # One padded length for all steps: a longer one costs memory, hardly time (models/recurrence/chunks.py).
        with jax.profiler.StepTraceAnnotation("train", step_num=start + 1):
            state, loss_S = train_fn(state, held, rows, key, start, stop, int(plan.padded_length_S.max()))
        yield state, loss_S[start:stop]
        start = stop


def _deal(plan, steps: range, on: list[jax.Device]) -> dict:
    rows = device_store.deal(plan, steps, len(on))
    return parallel.divide({name: x[parallel.own_part(on)] for name, x in rows.items()}, on)
