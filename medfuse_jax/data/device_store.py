"""A split that lies in the accelerator's memory as a whole, and the batches that are gathered there.

Shapes: N records, S time steps of all series together, M X-rays held; a batch's as in `input_pipeline`.

    ehr     float32 [S, 76]        the series one after the other, without padding
    first   int32   [N]            where a record's series begins
    length  int32   [N]
    label   int8    [N, K]
    X-ray    int32   [N]            the number of a record's X-ray, 0 where it has none
    image   uint8   [M, 256, 256]
    extra_NAME float32 [N, ...]    a further modality's values

What a method or a run does not use is not held. Every device holds all of it: each epoch deals its records anew.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import schema
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.runtime.errors import UserError

# What may be held of a device's memory: the rest is for the model, its gradients and what a step keeps.
_MOST_OF_MEMORY = 0.75


def num_bytes(dataset: batches.Dataset, split: str, include_N: np.ndarray) -> int:
    """What the included records take on each device; no record is read."""
    spec = _layout(dataset, split, include_N)
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spec.values())


def check_fits(dataset: batches.Dataset, split: str, include_N: np.ndarray, on: list[jax.Device]) -> None:
    """Raises UserError where a device has not the memory. One that does not say what it has (a CPU) is not asked."""
    needed = num_bytes(dataset, split, include_N)
    there = min((device.memory_stats() or {}).get("bytes_limit", 2 * needed) for device in on)
    if needed > _MOST_OF_MEMORY * there:
        raise UserError(
            f"config.placement is 'device', and the {split} split of {dataset.task.name} takes {needed / 1e9:.1f} GB "
            f"on each device, which has {there / 1e9:.1f} GB ({_MOST_OF_MEMORY:.0%} may be used): "
            "take config.placement=stream, or config.data.train_stays=paired"
        )


def load(dataset: batches.Dataset, split: str, include_N: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the included records of a split, by threads, into the arrays at the top of the module."""
    held = {name: np.zeros(shape, dtype) for name, (shape, dtype) in _layout(dataset, split, include_N).items()}
    part = dataset.index[split]
    has_cxr_N = include_N & dataset.paired(split)
    held["label"][:] = part["label"]
    held |= {f"extra_{name}": by_split[split] for name, by_split in dataset.extra.items()}
    if "ehr" in held:
        held["length"][:] = np.where(include_N, part["length"], 0)
        held["first"][1:] = np.cumsum(held["length"])[:-1]
    if "image" in held:
        held["cxr"][has_cxr_N] = np.arange(has_cxr_N.sum())

    def read(numbers: np.ndarray) -> None:
        for i in numbers.tolist():
            record = dataset.splits[split][i]
            batches.check_against_index(record, part, i, split)
            if "ehr" in held:
                first = held["first"][i]
                held["ehr"][first : first + len(record["ehr"])] = record["ehr"]
            if has_cxr_N[i]:
                held["image"][held["cxr"][i]] = record["image"]

    num_threads = batches.READ_OPTIONS["num_threads"]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, np.array_split(np.flatnonzero(include_N), num_threads)))
    return held


def _layout(dataset: batches.Dataset, split: str, include_N: np.ndarray) -> dict[str, tuple[tuple, type]]:
    """Shape and type of each array. One that nothing stands in has one element, so that it can be indexed."""
    part, num_records = dataset.index[split], len(include_N)
    layout = {"label": (part["label"].shape, np.int8)}
    layout |= {f"extra_{name}": (by_split[split].shape, np.float32) for name, by_split in dataset.extra.items()}
    if dataset.use_ehr:
        num_steps = int(part["length"][include_N].sum())
        layout |= {"first": ((num_records,), np.int32), "length": ((num_records,), np.int32)}
        layout["ehr"] = ((max(num_steps, 1), len(schema.CHANNELS)), np.float32)
    if num_images := int((include_N & dataset.paired(split)).sum()):
        size = schema.IMAGE_SIZE_PX
        layout |= {"cxr": ((num_records,), np.int32), "image": ((num_images, size, size), np.uint8)}
    return layout


def deal(plan: plan_lib.Plan, steps: range, num_devices: int) -> dict[str, np.ndarray]:
    """Which records stand where in the batches of `steps`: all that is sent of them, with leading axes [D, S].

    record, row_id int32 [D, S, B], valid bool [D, S, B], image_row int32 [D, S, P], as in `input_pipeline`.
    """
    dealt = [plan_lib.deal(plan, step, num_devices) for step in steps]
    record_DSB = np.stack([rows_DB for rows_DB, _ in dealt], axis=1).astype(np.int32)
    row_id_DB = np.arange(record_DSB[:, 0].size, dtype=np.int32).reshape(num_devices, -1)
    rows = {
        "record": record_DSB,
        "row_id": np.broadcast_to(row_id_DB[:, None], record_DSB.shape),
        "valid": record_DSB != plan_lib.PADDING,
    }
    if plan.images_per_batch:
        rows["image_row"] = np.stack([image_row_DP for _, image_row_DP in dealt], axis=1).astype(np.int32)
    return rows


def gather(held: dict, rows: dict, num_steps: int) -> dict:
    """The batch of one `deal`ing of rows (no leading axes), as `input_pipeline` lays it out, series to `num_steps`."""
    record_B, valid_B = jnp.maximum(rows["record"], 0), rows["valid"]
    batch = rows | {"label": jnp.where(valid_B[:, None], held["label"][record_B], 0).astype(jnp.float32)}
    for name in (name for name in held if name.startswith("extra_")):
        batch[name] = jnp.where(valid_B.reshape(-1, *[1] * (held[name].ndim - 1)), held[name][record_B], jnp.nan)
    if "ehr" in held:
        length_B = jnp.where(valid_B, held["length"][record_B], 0)
        step_BT = held["first"][record_B][:, None] + jnp.arange(num_steps)
        inside_BT1 = (jnp.arange(num_steps) < length_B[:, None])[..., None]
        ehr_BTF = held["ehr"][jnp.minimum(step_BT, len(held["ehr"]) - 1)]
        batch |= {"length": length_B, "ehr": jnp.where(inside_BT1, ehr_BTF, 0)}
    if "image_row" in rows:
        num_rows = len(record_B)
        image_P = held["cxr"][record_B[jnp.minimum(rows["image_row"], num_rows - 1)]]
        there_P = rows["image_row"] < num_rows
        batch["image"] = jnp.where(there_P[:, None, None], held["image"][image_P], 0)
    return batch
