"""The programs that `bench.compiled` compiles: the training step and its parts, as a run on some devices makes them.

The devices may be those of a machine that is not there (`compilers.open_target`): only shapes are needed.
Shapes: N records, D devices; batches as in `data.batches`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from medfuse_jax import config as config_lib
from medfuse_jax import feed, parallel, schema
from medfuse_jax import run as run_lib
from medfuse_jax.bench import cohort, flops, parts
from medfuse_jax.data import batches, device_store
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.runtime.errors import UserError

RESNET_34 = (3, 4, 6, 3)
_NUM_RADIOLOGY_CXR = 325_188  # the released split's training X-rays (docs/performance.md)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a step is compiled for. rows, images: of a batch, over all devices.

    device_bytes: the memory of a device that cannot be asked.
    """

    method: str = "medfuse"
    rows: int = 16
    images: int = 3
    time_steps: int = 64
    dtype: str = "bfloat16"
    resnet_stage_sizes: tuple[int, ...] = RESNET_34
    device_bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile and the shapes of its arguments.

    run: whose state it takes. batch: shapes, with the device axis. flops: counts the operations on each device, which
    takes a while; None if they are not counted.
    """

    jitted: "jax.stages.Wrapped | Step"
    args: tuple
    run: run_lib.Run
    batch: dict
    flops: Callable[[], float] | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted step on some devices; traced for arguments on other ones, it is that of a run on those.

    Those are one of its devices, or devices of another topology: jax makes new objects for each topology it opens, and
    a step that is divided over devices names them.
    """

    jitted: jax.stages.Wrapped
    on: tuple[jax.Device, ...]
    make: Callable[[list[jax.Device]], Program]

    def trace(self, *args) -> jax.stages.Traced:
        sharding = next((x.sharding for x in jax.tree.leaves(args) if x.sharding is not None), None)
        if sharding is None or sharding.device_set == set(self.on):
            return self.jitted.trace(*args)
        named = isinstance(sharding, NamedSharding)
        program = self.make(list(sharding.mesh.devices.flat if named else sharding.device_set))
        return program.jitted.trace(*program.args)

    def lower(self, *args) -> jax.stages.Lowered:
        return self.trace(*args).lower()


def step(on: list[jax.Device], sizes: Sizes) -> Program:
    """Return the training step over some devices."""
    run = _run(on, sizes, np.arange(sizes.rows) < sizes.images)
    batch = _batch(run)
    step_fn = parallel.compile_train(run.options, run.config.parallel, on)
    replicated, divided = _shardings(on)
    args = (*_placed((run.abstract_state(), batch), replicated, divided), _placed_on(_key(), replicated))
    jitted = Step(_with_trace(step_fn), tuple(on), lambda others: step(others, sizes))
    return Program(jitted, args, run, batch, lambda: _step_flops(run, batch))


def lstm(on: list[jax.Device], sizes: Sizes) -> Program:
    """Return the EHR encoder, forward and backward, on one device."""
    program = _part("ehr_encoder", on, sizes)
    return dataclasses.replace(program, flops=lambda: flops.lstm_flops(sizes.rows * sizes.time_steps))


def augment(on: list[jax.Device], sizes: Sizes) -> Program:
    """Return the augmentation of a batch's X-rays, on one device."""
    return _part("augment", on, sizes)


def _part(name: str, on: list[jax.Device], sizes: Sizes) -> Program:
    run = _run(on, sizes, np.arange(sizes.rows) < sizes.images)
    batch = _batch(run)
    args = (run.abstract_state(), {field: _shape(x.shape[1:], x.dtype) for field, x in batch.items()})
    jitted = jax.jit(parts.part_fns(run.options)[name])
    return Program(jitted, _placed_on(args, _shardings(on)[0]), run, batch)


def held(on: list[jax.Device], sizes: Sizes) -> Program:
    """Return radiology's pre-training with its X-rays held on the devices, an epoch in one call.

    The X-rays are divided over as few devices as config.placement=auto would choose.
    """
    run = _run(on, sizes, np.ones(_NUM_RADIOLOGY_CXR, bool))
    plan = _plan(run)
    num_parts = feed.choose_parts(run, ("train",), sizes.device_bytes)
    if not num_parts:
        raise UserError("the X-rays of radiology do not fit in the memory of these devices: use more", field="--target")
    shared, images = device_store.shapes(run.dataset, "train", run.selects("train"), num_parts, len(on))
    rows = _shapes(device_store.deal(plan, range(len(plan)), len(on)))
    epoch_fn = feed.compile_epoch(run.options, run.config.parallel, on, num_parts)
    replicated, divided = _shardings(on)
    held = (run.abstract_state(), shared, images, rows)
    numbers = (_key(), _shape((), jnp.int32), _shape((), jnp.int32))
    args = (*_placed(held, replicated, replicated, divided, divided), *_placed_on(numbers, replicated), 0)
    batch = _batch(_run(on, sizes, np.ones(sizes.rows, bool)))
    jitted = _with_trace(epoch_fn, static_argnums=7)
    return Program(jitted, args, run, batch, lambda: _step_flops(run, batch))


def _run(on: list[jax.Device], sizes: Sizes, has_cxr_N: np.ndarray) -> run_lib.Run:
    """Return a run with the default config on made-up stays, of which the given ones have an X-ray."""
    task = "radiology" if sizes.method == "uni_cxr" else "pheno"
    config = config_lib.default()
    config.method, config.task, config.precision = sizes.method, task, sizes.dtype
    config.batch_size = config.eval.batch_size = sizes.rows
    config.images_per_batch = sizes.images
    config.model.resnet_stage_sizes = sizes.resnet_stage_sizes
    config_lib.validate(config)
    config_lib.check_devices(config, len(on))
    if sizes.time_steps < 1:
        raise UserError(f"--time_steps={sizes.time_steps} must be at least 1", field="--time_steps")
    steps = 0 if schema.TASKS[task].cxr_only else sizes.time_steps
    dataset = cohort.of_stays(np.full(len(has_cxr_N), steps, np.int32), has_cxr_N, sizes.method, task)
    if not dataset.usable("train").any():
        raise UserError(f"--images=0 leaves {sizes.method} nothing to read", field="--images", value=0)
    return run_lib.Run(config, dataset, run_lib.step_options(config, dataset, (), on), on)


def _plan(run: run_lib.Run) -> plan_lib.Plan:
    plan = run.train_plan(epoch=1)
    assert isinstance(plan, plan_lib.Plan), "made-up stays have no second dataset"
    return plan


def _batch(run: run_lib.Run) -> dict:
    """Return the shapes of the run's first batch, with its device axis."""
    plan = _plan(run)
    rows = plan_lib.deal(plan, 0, len(run.devices))
    return _shapes(batches.read(run.dataset, "train", rows, int(plan.padded_length_S[0])))


def _step_flops(run: run_lib.Run, batch: dict) -> float:
    """Return the operations of a step on each device (see `flops.step_flops`), the LSTM's over all time steps."""
    one_device = {name: _shape(x.shape[1:], x.dtype) for name, x in batch.items()}
    steps = math.prod(one_device["ehr"].shape[:2]) if "ehr" in batch else 0
    return flops.step_flops(run.options, run.abstract_state(), one_device) + flops.lstm_flops(steps)


def _with_trace(step_fn: Callable, **static) -> jax.stages.Wrapped:
    """Return a jitted function that can be traced; `pmap` gives one that cannot."""
    return step_fn if hasattr(step_fn, "trace") else jax.jit(step_fn, donate_argnums=0, **static)


def _shardings(on: list[jax.Device]) -> tuple[NamedSharding, NamedSharding]:
    """Return how arrays lie that every device has whole, and those divided by their leading axis."""
    mesh = parallel.mesh(on)
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(parallel.AXIS))


def _placed(trees: tuple, *shardings: NamedSharding) -> tuple:
    return tuple(_placed_on(tree, sharding) for tree, sharding in zip(trees, shardings, strict=True))


def _placed_on(tree, sharding: NamedSharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _shapes(tree):
    return jax.tree.map(lambda x: _shape(x.shape, x.dtype), tree)


_shape = jax.ShapeDtypeStruct


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
