"""Hold a whole split in the accelerator's memory, and gather batches there.

Shapes: N records, S time steps of all series together, M images held, D devices; a batch's as in `batches`.

    ehr         float32 [S, 76]        the series one after another, without padding
    first       int32   [N]            where a record's series begins
    length      int32   [N]
    label       int8    [N, K]
    image_place int32   [N]            where a record's image is, 0 if it has none
    image       uint8   [M, 256, 256]
    extra_NAME  float32 [N, ...]       a further modality's values

What the method or the run does not use is left out. Every device holds all records, because each epoch deals them anew.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import schema
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.runtime.errors import UserError

# The fraction of a device's memory that records may take; the rest is for the model, gradients and activations.
_MAX_FRACTION = 0.75


def num_bytes(dataset: Dataset, split: str, include_N: np.ndarray) -> int:
    """Return the memory that the included records take on each device, without reading any."""
    spec = _layout(dataset, split, include_N)
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spec.values())


def check_fits(dataset: Dataset, split: str, include_N: np.ndarray, on: list[jax.Device]) -> None:
    """Raise UserError if the split exceeds device memory; skipped where no limit is reported (a CPU)."""
    needed = num_bytes(dataset, split, include_N)
    available = min((device.memory_stats() or {}).get("bytes_limit", 2 * needed) for device in on)
    if needed > _MAX_FRACTION * available:
        raise UserError(
            f"config.placement is 'device', and the {split} split of {dataset.task.name} takes {needed / 1e9:.1f} GB "
            f"on each device, which has {available / 1e9:.1f} GB ({_MAX_FRACTION:.0%} may be used): "
            "use config.placement=stream, or config.data.train_stays=paired",
            field="config.placement",
            value="device",
        )


def load(dataset: Dataset, split: str, include_N: np.ndarray) -> dict[str, np.ndarray]:
    """Read the included records of a split, by threads, into the arrays described at the top of the module."""
    held = {name: np.zeros(shape, dtype) for name, (shape, dtype) in _layout(dataset, split, include_N).items()}
    part = dataset.index[split]
    has_cxr_N = include_N & dataset.paired(split)
    for name, values in dataset.columns(split).items():
        held[name][:] = values
    if "ehr" in held:
        held["length"][~include_N] = 0
        held["first"][1:] = np.cumsum(held["length"])[:-1]
    if "image" in held:
        held["image_place"][has_cxr_N] = np.arange(has_cxr_N.sum())

    def read(numbers: np.ndarray) -> None:
        for i in numbers.tolist():
            record = dataset.splits[split][i]
            batches.check_against_index(record, part, i, split)
            if "ehr" in held:
                first = held["first"][i]
                held["ehr"][first : first + len(record["ehr"])] = record["ehr"]
            if has_cxr_N[i]:
                held["image"][held["image_place"][i]] = record["image"]

    num_threads = batches.READ_OPTIONS["num_threads"]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, np.array_split(np.flatnonzero(include_N), num_threads)))
    return held


def shapes(dataset: Dataset, split: str, include_N: np.ndarray) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and types of what `load` returns, without reading any record."""
    return {n: jax.ShapeDtypeStruct(*spec) for n, spec in _layout(dataset, split, include_N).items()}


def _layout(dataset: Dataset, split: str, include_N: np.ndarray) -> dict[str, tuple[tuple, type]]:
    """Return the shape and type of each array; an empty one has one element, so that it can be indexed."""
    types = {"label": np.int8, "length": np.int32}
    layout = {name: (x.shape, types.get(name, np.float32)) for name, x in dataset.columns(split).items()}
    if dataset.use_ehr:
        num_time_steps = int(dataset.index[split]["length"][include_N].sum())
        layout["first"] = ((len(include_N),), np.int32)
        layout["ehr"] = ((max(num_time_steps, 1), len(schema.CHANNELS)), np.float32)
    if num_images := int((include_N & dataset.paired(split)).sum()):
        size = schema.IMAGE_SIZE_PX
        layout["image_place"] = ((len(include_N),), np.int32)
        layout["image"] = ((num_images, size, size), np.uint8)
    return layout


def deal(plan: plan_lib.Plan, steps: range, num_devices: int) -> dict[str, np.ndarray]:
    """Return what the devices are sent for the batches of `steps`: each `plan.deal`, stacked to axes [D, S]."""
    dealt = [plan_lib.deal(plan, step, num_devices) for step in steps]
    return {name: np.stack([rows[name] for rows in dealt], axis=1) for name in dealt[0]}


def gather(held: dict, rows: dict, padded_length: int) -> dict:
    """Gather the batch of one step's rows (without leading axes), as `batches.read` does, in a jitted step."""
    columns = {n: x for n, x in held.items() if n in ("label", "length") or n.startswith("extra_")}
    batch = batches.assemble(columns, rows, jnp)
    record_B = jnp.maximum(rows["record"], 0)
    if "ehr" in held:
        place_BT = held["first"][record_B][:, None] + jnp.arange(padded_length)
        inside_BT1 = (jnp.arange(padded_length) < batch["length"][:, None])[..., None]
        ehr_BTF = held["ehr"][jnp.minimum(place_BT, len(held["ehr"]) - 1)]
        batch["ehr"] = jnp.where(inside_BT1, ehr_BTF, 0)
    if "image_row" in rows:
        place_P = held["image_place"][record_B[rows["image_row"]]]
        batch["image"] = jnp.where(rows["image_mask"][:, None, None], held["image"][place_P], 0)
    return batch
