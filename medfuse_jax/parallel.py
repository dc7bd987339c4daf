"""Run the steps on all local devices: under pmap (the default), or under jit with shardings.

Both take the batches of data/batches.py, with a leading device axis D, and keep parameters replicated without one.
Both give the same numbers, up to rounding.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medfuse_jax import step as step_lib

AXIS = "device"


def devices(num_devices: int | None = None) -> list[jax.Device]:
    return jax.local_devices()[:num_devices]


def axis_of(on: list[jax.Device]) -> str | None:
    """Return the name of the device axis, or None for one device, where a psum would make XLA copy every gradient."""
    return AXIS if len(on) > 1 else None


def compile_train(options: step_lib.StepOptions, mode: str, on: list[jax.Device]) -> jax.stages.Wrapped:
    """Compile (state, batch, key) -> (state, metrics). The old state's memory is reused: do not read it again."""
    if mode == "pmap":
        step = functools.partial(step_lib.train_step, options, axis=axis_of(on))
        return jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=None, devices=on, donate_argnums=0)
    step = functools.partial(step_lib.train_step, options)
    return jax.jit(lambda state, batch, key: step(state, merge(batch), key), donate_argnums=0)


def compile_eval(
    options: step_lib.StepOptions, mode: str, on: list[jax.Device], eval_step: Callable = step_lib.eval_step
) -> Callable:
    """Compile (state, batch) -> what `eval_step` returns, by default (scores [D, B, K], loss of each row [D, B])."""
    return _compile_eval(options, mode, tuple(on), eval_step)


@functools.lru_cache(maxsize=4)  # evaluation after training reuses the programs compiled for validation
def _compile_eval(options: step_lib.StepOptions, mode: str, on: tuple[jax.Device, ...], eval_step: Callable):
    step = functools.partial(eval_step, options)
    if mode == "pmap":
        return jax.pmap(step, AXIS, in_axes=(None, 0), devices=on)

    def over_merged(state, batch):
        outputs = step(state, merge(batch))
        return jax.tree.map(lambda x: x.reshape(*batch["valid"].shape, *x.shape[1:]), outputs)

    return jax.jit(over_merged)


def merge(batch: dict) -> dict:
    """Fold the device axis of a batch into its rows: [D, B, ...] -> [D * B, ...]."""
    num_devices, rows = batch["row_id"].shape
    merged = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
    if "image_row" in batch:  # a row number within the device
        first_D1 = rows * jnp.arange(num_devices)[:, None]
        merged["image_row"] = (batch["image_row"] + first_D1).reshape(-1)
    return merged


def replicate(tree, on: list[jax.Device]):
    """Put a copy of every leaf on every device."""
    return jax.device_put(tree, NamedSharding(_mesh(on), PartitionSpec()))


def divide(tree, on: list[jax.Device]):
    """Divide every leaf's leading axis over the devices."""
    return jax.device_put(tree, NamedSharding(_mesh(on), PartitionSpec(AXIS)))


def prefetch(batches: Iterable[dict], on: list[jax.Device], depth: int = 2) -> Iterator[dict]:
    """Send `depth` batches to the devices ahead of use, each device its own part."""
    waiting = deque()
    for batch in batches:
        waiting.append(divide(batch, on))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _mesh(on: list[jax.Device]) -> Mesh:
    return Mesh(np.asarray(on), (AXIS,))
