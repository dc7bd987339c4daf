"""Running the steps on all local devices: under pmap (the default), or jit with shardings.

Both take the batches of `input_pipeline`, with a leading device axis D, and keep parameters
replicated without one. Both give the same numbers.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medfuse_jax import step as step_lib
from medfuse_jax.data import device_store

_AXIS = "device"


def devices(num_devices: int | None = None) -> list[jax.Device]:
    return jax.local_devices()[:num_devices]


def _axis(on: list[jax.Device]) -> str | None:
    """The devices' axis; None of one device alone, whose sums are whole: XLA would copy all gradients to say so."""
    return _AXIS if len(on) > 1 else None


def compile_train(options: step_lib.StepOptions, mode: str, on: list[jax.Device]) -> Callable:
    """(state, batch, key) -> (state, metrics). The old state's memory is reused: do not read it again."""
    if mode == "pmap":
        step = functools.partial(step_lib.train_step, options, axis=_axis(on))
        return jax.pmap(step, _AXIS, in_axes=(None, 0, None), out_axes=None, devices=on, donate_argnums=0)
    step = functools.partial(step_lib.train_step, options)
    return jax.jit(lambda state, batch, key: step(state, merge(batch), key), donate_argnums=0)


def compile_resident(options: step_lib.StepOptions, mode: str, on: list[jax.Device], in_loop: bool) -> Callable:
    """(state, held, rows, key, start, stop, num_steps) -> (state, losses [S]), gathering its batches on the device.

    held, rows: of `resident`, rows with the leading axes [D, S]. Trains on the batches start to stop - 1 of the S, in
    one loop (whose bounds are no constants: one program serves any part of an epoch), or, where not in_loop, on the
    one batch there is. num_steps: the length all series are padded to, a constant. The old state's memory is reused.
    """
    is_pmap = mode == "pmap"
    axis = _axis(on) if is_pmap else None

    def run(state, held, rows, key, start, stop, num_steps):
        def step(s, carry):
            state, loss_S = carry
            # Of all devices in turn under jit, of this one under pmap: there the leading axis is gone.
            of_step = (
                {name: x[s] for name, x in rows.items()} if is_pmap else merge({n: x[:, s] for n, x in rows.items()})
            )
            batch = device_store.gather(held, of_step, num_steps)
            state, metrics = step_lib.train_step(options, state, batch, key, axis)
            return state, loss_S.at[s].set(metrics["loss"])

        none_S = jnp.zeros(rows["valid"].shape[-2], jnp.float32)
        return jax.lax.fori_loop(start, stop, step, (state, none_S)) if in_loop else step(0, (state, none_S))

    if is_pmap:
        in_axes = (None, None, 0, None, None, None)
        return jax.pmap(
            run, _AXIS, in_axes=in_axes, out_axes=None, devices=on, static_broadcasted_argnums=6, donate_argnums=0
        )
    return jax.jit(run, static_argnums=6, donate_argnums=0)


def compile_eval(
    options: step_lib.StepOptions, mode: str, on: list[jax.Device], eval_step: Callable = step_lib.eval_step
) -> Callable:
    """(state, batch) -> (scores [D, B, K], loss of each row [D, B]), or what another `eval_step` gives, by rows."""
    step = functools.partial(eval_step, options)
    if mode == "pmap":
        return jax.pmap(step, _AXIS, in_axes=(None, 0), devices=on)

    def over_merged(state, batch):
        outputs = step(state, merge(batch))
        return jax.tree.map(lambda x: x.reshape(*batch["valid"].shape, *x.shape[1:]), outputs)

    return jax.jit(over_merged)


def merge(batch: dict) -> dict:
    """Folds the device axis of a batch into its rows: [D, B, ...] -> [D * B, ...]."""
    num_devices, rows = batch["valid"].shape
    merged = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
    if "image_row" in batch:  # it counts rows within the device
        first_D1 = rows * jnp.arange(num_devices)[:, None]
        merged["image_row"] = (batch["image_row"] + first_D1).reshape(-1)
    return merged


def replicate(tree, on: list[jax.Device]):
    """Puts a copy of every leaf on every device."""
    return jax.device_put(tree, NamedSharding(_mesh(on), PartitionSpec()))


def divide(tree, on: list[jax.Device]):
    """Puts a part of every leaf's leading axis on every device."""
    return jax.device_put(tree, NamedSharding(_mesh(on), PartitionSpec(_AXIS)))


def prefetch(batches: Iterable[dict], on: list[jax.Device], depth: int = 2) -> Iterator[dict]:
    """Sends `depth` batches to the devices ahead of use, each device its own part."""
    waiting = deque()
    for batch in batches:
        waiting.append(divide(batch, on))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _mesh(on: list[jax.Device]) -> Mesh:
    return Mesh(np.asarray(on), (_AXIS,))
