"""How batches reach the training step, by config.placement: streamed from the shards, or gathered on the device.

A feed is a function (state, plan, start, stops, key) that trains on the plan's batches from number `start` on and
yields (state, losses of the steps since the last yield, on the device). It yields after every step or, if an epoch is
one call, at each of `stops`: the ascending step numbers at which the caller wants the state.
Both placements give the same numbers, up to rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import parallel
from medfuse_jax import step as step_lib
from medfuse_jax.data import batches, device_store
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.runtime import hosts
from medfuse_jax.runtime.errors import UserError

Feed = Callable[[step_lib.TrainState, plan_lib.Plan | plan_lib.Alternating, int, list[int], jax.Array], Iterator]
_SPLITS = ("train", "val")  # read in every epoch


@dataclasses.dataclass(frozen=True)
class Held:
    """A split in the memory of devices (see `device_store`). gather_fn: what `compile_gather` returns."""

    shared: dict
    divided: dict
    num_parts: int
    on: list[jax.Device]
    gather_fn: Callable

    def batches(self, plan: plan_lib.Plan, start: int = 0) -> Iterator[dict]:
        """Yield the plan's batches from step `start` on, on the devices."""
        for step in range(start, len(plan)):
            rows = _deal(plan, range(step, step + 1), self.on)
            yield self.gather_fn(self.shared, self.divided, rows, int(plan.padded_length_S[step]))


def place(run, splits: tuple[str, ...] = _SPLITS):
    """Return the run (run.Run) with these splits in its devices' memory, if config.placement says so and they fit.

    Raise UserError if config.placement is 'device' and they do not fit. Of several processes, each reads the images
    that its devices hold.
    """
    num_parts = choose_parts(run, splits)
    hosts.check_same("placements of the records (by the memory of their devices)", str(num_parts))
    if not num_parts:
        return run
    own = parallel.own_part(run.devices)
    parts = sorted({i % num_parts for i in range(len(run.devices))[own]})
    gather_fn, held = compile_gather(run.config.parallel, run.devices, num_parts), {}
    readers = batches.num_readers(run.config.data.readers)
    for split in splits:
        shared, images = device_store.load(run.dataset, split, run.selects(split), num_parts, parts, readers)
        shared = parallel.replicate(shared, run.devices)
        name = run.dataset.image_field[0]
        divided = {name: parallel.place_parts(images, num_parts, run.devices)} if images else {}
        held[split] = Held(shared, divided, num_parts, run.devices, gather_fn)
    return dataclasses.replace(run, held=held)


def choose_parts(run, splits: tuple[str, ...] = _SPLITS, device_bytes: float | None = None) -> int:
    """Return how many devices hold the images together, as few as their memory allows; 0 if batches are streamed.

    Reads no record. With config.placement=auto, what a host reads must fit in its memory too. device_bytes: the memory
    of a device that cannot be asked, on another host. Raise UserError if config.placement is 'device' and the splits
    do not fit.
    """
    placement = run.config.placement
    if placement == "stream" or (placement == "auto" and run.dataset.cxr_dataset):
        return 0
    if run.dataset.cxr_dataset:
        what = "config.placement is 'device', and this method alternates between two datasets: use 'stream'"
        raise UserError(what, field="config.placement")
    own = run.devices[parallel.own_part(run.devices)]
    host_bytes = np.inf if device_bytes or placement == "device" else hosts.memory_bytes()
    device_bytes = device_bytes or device_store.memory(own, placement)
    fraction = device_store.MAX_FRACTION[placement]
    for num_parts in (n for n in range(1, len(run.devices) + 1) if len(run.devices) % n == 0):
        needed = sum(device_store.num_bytes(run.dataset, s, run.selects(s), num_parts) for s in splits)
        if needed <= fraction * device_bytes and needed * min(num_parts, len(own)) <= fraction * host_bytes:
            return num_parts
    if placement == "auto":
        return 0
    raise UserError(
        f"config.placement is 'device', and the {' and '.join(splits)} splits of {run.dataset.task.name} take "
        f"{needed / 1e9:.1f} GB on each device, divided over all, which has {device_bytes / 1e9:.1f} GB "
        f"({fraction:.0%} may be used): use config.placement=auto, or config.data.train_stays=paired",
        field="config.placement",
        value="device",
    )


def open_feed(run, one_call: bool | None = None) -> Feed:
    """Return the feed of a run's (run.Run) training records, from where they are: `place` it first.

    one_call: whether one call runs all steps up to the next stop, where the records are held; by default only on
    accelerators. On a CPU each step is a call, because XLA's CPU runs the gradients of convolutions inside a loop far
    more slowly (docs/performance.md); so where a stay may have several images, because batches differ in them, and
    for a method that pays for padding, because all steps of a call are padded alike.
    """
    if one_call is None:
        one_call = run.devices[0].platform != "cpu"
    is_alike = not run.dataset.several and not run.options.model.pays_for_padding
    if one_call and is_alike and (held := run.held.get("train")):
        return functools.partial(_calls, _compiled(compile_epoch, run, held.num_parts), held)
    return functools.partial(_steps, _compiled(parallel.compile_train, run), run)


def _compiled(compile_fn: Callable, run, *more) -> Callable:
    return _compiled_once(compile_fn, run.options, run.config.parallel, tuple(run.devices), *more)


@functools.lru_cache(maxsize=2)  # runs that differ in their seed or learning rate share a program, and trace it once
def _compiled_once(compile_fn: Callable, options: step_lib.StepOptions, mode: str, on: tuple, *more) -> Callable:
    return compile_fn(options, mode, list(on), *more)


def compile_gather(mode: str, on: list[jax.Device], num_parts: int) -> Callable:
    """Compile (shared, divided, rows, padded_length) -> a batch. rows: [D, 1]. mode: config.parallel."""

    def run(shared, divided, rows, padded_length):
        rows = {name: x[0] for name, x in rows.items()}
        return device_store.gather(shared, divided, rows, padded_length, num_parts, parallel.AXIS)

    return parallel.over_devices(run, mode, on, in_axes=(None, 0, 0, None), out_axes=0, static_argnums=(3,))


def compile_epoch(options: step_lib.StepOptions, mode: str, on: list[jax.Device], num_parts: int) -> Callable:
    """Compile (state, shared, divided, rows, key, start, stop, padded_length) -> (state, losses [S]).

    shared, divided, rows: from `device_store`, rows with leading axes [D, S]. Trains on batches start to stop - 1 of
    the S in one loop; its bounds are traced, so one program serves any part of an epoch. padded_length: a constant. The
    old state's memory is reused.
    """
    axis = parallel.axis_of(on)

    def run(state, shared, divided, rows, key, start, stop, padded_length):
        def step(s, carry):
            state, loss_S = carry
            row = {name: x[s] for name, x in rows.items()}
            batch = device_store.gather(shared, divided, row, padded_length, num_parts, parallel.AXIS)
            state, metrics = step_lib.train_step(options, state, batch, key, axis)
            return state, loss_S.at[s].set(metrics["loss"])

        return jax.lax.fori_loop(start, stop, step, (state, jnp.zeros(rows["record"].shape[0], jnp.float32)))

    in_axes = (None, None, 0, 0, None, None, None, None)
    return parallel.over_devices(run, mode, on, in_axes=in_axes, out_axes=None, static_argnums=(7,), donate_argnums=0)


def _steps(train_fn, run, state, plan, start, stops, key):
    for step, batch in enumerate(run.batches("train", plan, start), start):
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = train_fn(state, batch, key)
        yield state, metrics["loss"]


def _calls(train_fn, held, state, plan, start, stops, key):
    rows = _deal(plan, range(len(plan)), held.on)
    for stop in stops:
        # One padded length for all steps: a longer one costs memory, hardly time (models/recurrence/chunks.py).
        with jax.profiler.StepTraceAnnotation("train", step_num=start + 1):
            longest = int(plan.padded_length_S.max())
            state, loss_S = train_fn(state, held.shared, held.divided, rows, key, start, stop, longest)
        yield state, loss_S[start:stop]
        start = stop


def _deal(plan, steps: range, on: list[jax.Device]) -> dict:
    rows = device_store.deal(plan, steps, len(on))
    return parallel.divide({name: x[parallel.own_part(on)] for name, x in rows.items()}, on)
