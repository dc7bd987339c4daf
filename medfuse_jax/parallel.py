"""Run the steps over devices: by pmap (the default on one host), or by jit and shard_map over a mesh.

Both take the batches of data/batches.py, with a leading device axis D, and keep parameters replicated without one. The
step is the same, so both give the same numbers.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medfuse_jax import step as step_lib
from medfuse_jax.runtime import hosts

AXIS = "device"


def devices(num_devices: int | None = None) -> list[jax.Device]:
    """Return the devices of a run: this process's, or those of all processes that train it together."""
    return (jax.devices() if hosts.spans() else jax.local_devices())[:num_devices]


def own_part(on: Sequence[jax.Device]) -> slice:
    """Return which of the devices are this process's; they are neighbours."""
    if not hosts.spans():
        return slice(None)
    own = [i for i, device in enumerate(on) if device.process_index == jax.process_index()]
    return slice(own[0], own[-1] + 1)


def axis_of(on: list[jax.Device]) -> str | None:
    """Return the name of the device axis, or None for one device, where a psum would make XLA copy every gradient."""
    return AXIS if len(on) > 1 else None


def compile_train(options: step_lib.StepOptions, mode: str, on: list[jax.Device]) -> jax.stages.Wrapped:
    """Compile (state, batch, key) -> (state, metrics). The old state's memory is reused: do not read it again."""
    step = functools.partial(step_lib.train_step, options, axis=axis_of(on))
    return over_devices(step, mode, on, in_axes=(None, 0, None), out_axes=None, donate_argnums=0)


def compile_eval(
    options: step_lib.StepOptions, mode: str, on: list[jax.Device], eval_step: Callable = step_lib.eval_step
) -> Callable:
    """Compile (state, batch) -> what `eval_step` returns, by default (scores [D, B, K], loss of each row [D, B])."""
    return _compile_eval(options, mode, tuple(on), eval_step)


@functools.lru_cache(maxsize=4)  # evaluation after training reuses the programs compiled for validation
def _compile_eval(options: step_lib.StepOptions, mode: str, on: tuple[jax.Device, ...], eval_step: Callable):
    return over_devices(functools.partial(eval_step, options), mode, on, in_axes=(None, 0), out_axes=0)


def over_devices(
    fn: Callable,
    mode: str,
    on: Sequence[jax.Device],
    *,
    in_axes: tuple[int | None, ...],
    out_axes: int | None,
    static_argnums: tuple[int, ...] = (),
    donate_argnums: int | tuple[int, ...] = (),
) -> jax.stages.Wrapped:
    """Compile a function of one device's part of its arguments for all devices; mode: config.parallel.

    Devices of several processes are always a mesh.

    in_axes, out_axes: 0 for leaves that are divided over the devices by their leading axis, which `fn` does not see;
    None for leaves that every device has whole. A sum over `AXIS` in `fn` is over all devices.
    """
    on_one_host = len({device.process_index for device in on}) == 1
    if mode == "pmap" and on_one_host:
        static = {"static_broadcasted_argnums": static_argnums, "donate_argnums": donate_argnums}
        return jax.pmap(fn, AXIS, in_axes=in_axes, out_axes=out_axes, devices=list(on), **static)

    def over_mesh(*args):
        dynamic = [i for i in range(len(args)) if i not in static_argnums]

        def part(*parts):
            given = dict(zip(dynamic, parts))
            own = [one_device(given[i]) if in_axes[i] == 0 else given.get(i, args[i]) for i in range(len(args))]
            return jax.tree.map(lambda x: x if out_axes is None else x[None], fn(*own))

        specs = tuple(_spec(in_axes[i]) for i in dynamic)
        # Without check_vma=False, the gradients would be summed twice: by the step, and by shard_map.
        mapped = jax.shard_map(part, mesh=mesh(on), in_specs=specs, out_specs=_spec(out_axes), check_vma=False)
        return mapped(*(args[i] for i in dynamic))

    return jax.jit(over_mesh, static_argnums=static_argnums, donate_argnums=donate_argnums)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec(AXIS) if axis == 0 else PartitionSpec()


def one_device(tree):
    """Return one device's part, such as a batch, without its device axis."""
    return jax.tree.map(lambda x: x[0], tree)


def replicate(tree, on: list[jax.Device]):
    """Put a copy of every leaf on every device. Of several processes, each has the whole tree."""
    return _place(tree, NamedSharding(mesh(on), PartitionSpec()), 1)


def divide(tree, on: list[jax.Device]):
    """Divide every leaf's leading axis over the devices. Of several processes, each has its own devices' part."""
    return _place(tree, NamedSharding(mesh(on), PartitionSpec(AXIS)), jax.process_count())


def _place(tree, sharding: NamedSharding, num_parts: int):
    if not hosts.spans():
        return jax.device_put(tree, sharding)

    def place(x):
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        shape = (x.shape[0] * num_parts, *x.shape[1:]) if num_parts > 1 else x.shape
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, tree)


def place_parts(parts: dict[int, np.ndarray], num_parts: int, on: list[jax.Device]) -> jax.Array:
    """Put part i % num_parts on the i-th device. Of several processes, each has its own devices' parts."""
    shape = (len(on), *next(iter(parts.values())).shape)
    sharding = NamedSharding(mesh(on), PartitionSpec(AXIS))
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[(index[0].start or 0) % num_parts][None])


def prefetch(batches: Iterable[dict], on: list[jax.Device], depth: int = 2) -> Iterator[dict]:
    """Send `depth` batches to the devices ahead of use, each device its own part."""
    waiting = deque()
    for batch in batches:
        waiting.append(divide(batch, on))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def mesh(on: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(on), (AXIS,))
