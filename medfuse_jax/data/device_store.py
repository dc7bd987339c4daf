"""Hold a split in the accelerators' memory, and gather batches there.

Shapes: N records, S time steps of all series together, J images, D devices, I images on a device; a batch's as in
`batches`.

Every device holds `shared`:

    ehr          float32 [S, 76]        the series one after another, without padding
    first        int32   [N]            where a record's series begins
    length       int32   [N]
    label        int8    [N, K]
    image_number int32   [N]            the number of a record's first image, 0 if it has none
    extra_NAME   float32 [N, ...]       a further modality's values
    hour_NAME                           an hourly task's labels and hours instead of `label` (hours.Hours.columns)
    images_NAME                         the times of X-rays where a stay may have several (images.StayImages.columns)

The images are divided over each `num_parts` neighbouring devices, which send each other what their batches need:

    image        uint8   [D, I, 256, 256]   image j is number j // num_parts of device j % num_parts among them;
                                            or cxr_features float32 [D, I, E], as in `batches`

What the method or the run does not use is left out.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import schema
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import Dataset

# The fraction of a device's memory that records may take; the rest is for the model, gradients and activations.
MAX_FRACTION = {"auto": 0.5, "device": 0.75}
_CPU_BYTES = 2e9  # of memory for 'auto' where no device says what it has, shared by the devices of a process


def num_bytes(dataset: Dataset, split: str, include_N: np.ndarray, num_parts: int = 1) -> int:
    """Return the memory that the included records take on each device, without reading any."""
    spec = _layout(dataset, split, include_N, num_parts)
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spec.values())


def memory(on: list[jax.Device], placement: str) -> float:
    """Return the least bytes that one of this process's devices has. placement: 'auto' or 'device'."""
    unknown = _CPU_BYTES / jax.local_device_count() if placement == "auto" else np.inf
    return min((d.memory_stats() or {}).get("bytes_limit", unknown) for d in on)


def load(
    dataset: Dataset,
    split: str,
    include_N: np.ndarray,
    num_parts: int = 1,
    parts: Sequence[int] = (0,),
    readers: int = 1,
) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """Read the included records by threads; return `shared`, and part -> images [I, ...] of the wanted parts."""
    layout = _layout(dataset, split, include_N, num_parts)
    image_shape, image_type = layout.pop(dataset.image_field[0], ((), np.uint8))
    shared = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
    images = {part: np.zeros(image_shape, image_type) for part in parts if image_shape}
    num_images_N = np.where(include_N, dataset.num_images(split), 0)
    has_cxr_N = num_images_N > 0
    for name, values in dataset.columns(split).items():
        shared[name][:] = values
    if "ehr" in shared:
        shared["length"][~include_N] = 0
        shared["first"][1:] = np.cumsum(shared["length"])[:-1]
    wanted_N = include_N if "ehr" in shared else np.zeros_like(include_N)
    if images:
        first_N = np.cumsum(num_images_N) - num_images_N
        shared["image_number"][has_cxr_N] = first_N[has_cxr_N]
        numbers_of = (range(first, first + n) for first, n in zip(first_N.tolist(), num_images_N.tolist()))
        has_cxr_N = np.array([any(j % num_parts in images for j in numbers) for numbers in numbers_of], bool)
        wanted_N = wanted_N | has_cxr_N

    def read(numbers: np.ndarray) -> None:
        for i in numbers.tolist():
            record: dict = {}
            if dataset.reads_records:
                with batches.arrives(dataset, split):
                    record = dataset.splits[split][i]
                batches.check(record, dataset.index[split], i, split)
            if "ehr" in shared:
                first = shared["first"][i]
                shared["ehr"][first : first + len(record["ehr"])] = record["ehr"]
            if has_cxr_N[i]:
                for j, image in enumerate(dataset.images(split, i, record), int(shared["image_number"][i])):
                    if j % num_parts in images:
                        images[j % num_parts][j // num_parts] = image

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, np.array_split(np.flatnonzero(wanted_N), readers)))
    return shared, images


def shapes(dataset: Dataset, split: str, include_N: np.ndarray, num_parts: int, num_devices: int) -> tuple[dict, dict]:
    """Return the shapes and types of what all devices hold, `shared` and {'image'}, without reading any record."""
    shared = {n: jax.ShapeDtypeStruct(*spec) for n, spec in _layout(dataset, split, include_N, num_parts).items()}
    name = dataset.image_field[0]
    image = shared.pop(name, None)
    return shared, {name: jax.ShapeDtypeStruct((num_devices, *image.shape), image.dtype)} if image else {}


def _layout(dataset: Dataset, split: str, include_N: np.ndarray, num_parts: int) -> dict[str, tuple[tuple, type]]:
    """Return the shape and type of each array of a device; an empty one has one element, so that it can be indexed."""
    types = {"label": np.int8, "length": np.int32}
    columns = dataset.columns(split)
    types |= {name: x.dtype.type for name, x in columns.items() if name.startswith(batches.OF_SEVERAL)}
    layout = {name: (x.shape, types.get(name, np.float32)) for name, x in columns.items()}
    if dataset.use_ehr:
        num_time_steps = int(dataset.index[split]["length"][include_N].sum())
        layout["first"] = ((len(include_N),), np.int32)
        layout["ehr"] = ((max(num_time_steps, 1), len(schema.CHANNELS)), np.float32)
    if num_images := int(dataset.num_images(split)[include_N].sum()):
        name, shape, dtype = dataset.image_field
        layout["image_number"] = ((len(include_N),), np.int32)
        layout[name] = ((-(-num_images // num_parts), *shape), dtype)
    return layout


def deal(plan: plan_lib.Plan, steps: range, num_devices: int) -> dict[str, np.ndarray]:
    """Return what the devices are sent for the batches of `steps`: each `plan.deal`, stacked to axes [D, S]."""
    dealt = [plan_lib.deal(plan, step, num_devices) for step in steps]
    return {name: np.stack([rows[name] for rows in dealt], axis=1) for name in dealt[0]}


def gather(shared: dict, divided: dict, rows: dict, padded_length: int, num_parts: int = 1, axis: str = "") -> dict:
    """Gather the batch of one step's rows, as `batches.read` does, in a jitted step of one device.

    divided: {'image' or 'cxr_features': this device's} or {}. axis: of the devices, which exchange images if
    num_parts > 1.
    """
    by_name = ("extra_", *batches.OF_SEVERAL)
    columns = {n: x for n, x in shared.items() if n in ("label", "length") or n.startswith(by_name)}
    batch = batches.assemble(columns, rows, jnp)
    record_B = jnp.maximum(rows["record"], 0)
    if "ehr" in shared:
        place_BT = shared["first"][record_B][:, None] + jnp.arange(padded_length)
        inside_BT1 = (jnp.arange(padded_length) < batch["length"][:, None])[..., None]
        ehr_BTF = shared["ehr"][jnp.minimum(place_BT, len(shared["ehr"]) - 1)]
        batch["ehr"] = jnp.where(inside_BT1, ehr_BTF, 0)
    if "image_row" in rows:
        number_P = shared["image_number"][record_B[rows["image_row"]]]
        if "image_of" in rows:
            number_P = jnp.where(rows["image_mask"], number_P + rows["image_of"], 0)
        for name, image_I in divided.items():
            image_P = _look_up(image_I, number_P, num_parts, axis)
            mask_P = rows["image_mask"].reshape(-1, *[1] * (image_P.ndim - 1))
            batch[name] = jnp.where(mask_P, image_P, 0)
    return batch


def _look_up(image_I: jax.Array, number_P: jax.Array, num_parts: int, axis: str) -> jax.Array:
    """Return the images [P, ...] of these numbers, which `num_parts` neighbouring devices hold together."""
    if num_parts == 1:
        return image_I[number_P]
    groups = np.arange(jax.lax.axis_size(axis)).reshape(-1, num_parts).tolist()
    wanted_DP = jax.lax.all_gather(number_P, axis, axis_index_groups=groups)
    # For an image that another device holds, any of ours is sent, and not read.
    sent_DP = image_I[wanted_DP // num_parts]
    got_DP = jax.lax.all_to_all(sent_DP, axis, split_axis=0, concat_axis=0, axis_index_groups=groups)
    return got_DP[number_P % num_parts, jnp.arange(len(number_P))]
