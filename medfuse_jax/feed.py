"""How batches reach the training step, by config.placement: streamed from the shards, or gathered on the device.

A feed is a function (state, plan, start, stops, key) that trains on the plan's batches from number `start` on. It
yields (state, losses of the steps since it last did, on the device): after every step, or, where a whole epoch is
one call, at each of `stops`, the ascending numbers of steps done at which the caller wants the state.
Both placements give the same numbers.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from medfuse_jax import parallel
from medfuse_jax import step as step_lib
from medfuse_jax.data import batches, device_store
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.runtime.errors import UserError

Feed = Callable[[step_lib.TrainState, plan_lib.Plan, int, list[int], jax.Array], Iterator]


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
    """The feed of the train split's included records. mode: config.parallel; placement: config.placement.

    one_call: an epoch, or what `stops` leave of it, in one call; by default on accelerators. On a CPU every step is
    a call: the gradients of convolutions inside a loop are 20 to 68 times slower there.
    """
    if placement == "stream":
        return functools.partial(_stream, dataset, on, parallel.compile_train(options, mode, on))
    check_placement(dataset, include_N, on, placement)
    if one_call is None:
        one_call = on[0].platform != "cpu"
    held = parallel.replicate(device_store.load(dataset, "train", include_N), on)
    train_fn = parallel.compile_resident(options, mode, on, in_loop=one_call)
    return functools.partial(_calls if one_call else _steps, on, train_fn, held)


def check_placement(dataset: Dataset, include_N: np.ndarray, on: list[jax.Device], placement: str) -> None:
    """Raises UserError where the records cannot lie on the devices as config.placement wants; reads none."""
    if placement == "stream":
        return
    if dataset.cxr_dataset:
        raise UserError(
            "config.placement is 'device', and the method trains on two datasets in turn: take config.placement=stream"
        )
    device_store.check_fits(dataset, "train", include_N, on)


def _stream(dataset, on, train_fn, state, plan, start, stops, key):
    read = batches.batches(dataset, "train", plan, num_devices=len(on), start=start)
    for step, batch in enumerate(parallel.prefetch(read, on), start):
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = train_fn(state, batch, key)
        yield state, metrics["loss"]


def _steps(on, train_fn, held, state, plan, start, stops, key):
    for step in range(start, len(plan)):
        rows = parallel.divide(device_store.deal(plan, range(step, step + 1), len(on)), on)
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, loss_S = train_fn(state, held, rows, key, 0, 1, int(plan.padded_length_S[step]))
        yield state, loss_S


def _calls(on, train_fn, held, state, plan, start, stops, key):
    rows = parallel.divide(device_store.deal(plan, range(len(plan)), len(on)), on)
    for stop in stops:
        # One length for all steps: a longer bucket costs memory, hardly time (models/chunked_lstm.py).
        with jax.profiler.StepTraceAnnotation("train", step_num=start + 1):
            state, loss_S = train_fn(state, held, rows, key, start, stop, int(plan.padded_length_S.max()))
        yield state, loss_S[start:stop]
        start = stop
