"""Read batches from the shards, with threads, in the order of a plan.

A batch is a dict of arrays, each with a leading device axis D:

    ehr        float32 [D, B, T, 76]  as recorded (not standardised), zero beyond `length`
    length     int32   [D, B]
    label      float32 [D, B, K]      `cxr_label` in a batch of Dataset.cxr_dataset
    valid      bool    [D, B]         False: a padded row, no record
    row_id     int32   [D, B]         the row's number in the whole batch, whatever D is
    record     int32   [D, B]         the record's number in its split, -1 in a padded row
    image      uint8   [D, P, 256, 256]; or cxr_features float32 [D, P, E], precomputed features of X-rays
    image_row  int32   [D, P]         the row that an image belongs to
    image_mask bool    [D, P]         False: an empty image slot
    extra_NAME float32 [D, B, ...]    a further modality's values, NaN in rows without it

and, where a stay may have several images, image_of [D, P], an image's number among those of its row; with
config.data.images=all also image_time_h [D, P] (data/images.py) and image_slot [D, B, M], the slots of each row's
images; in an hourly task label [D, B, H, K], hour_step, hour_mask [D, B, H] (data/hours.py) and image_hour.

`ehr` and `length` are left out if the method or task has no EHR, the image fields if the plan has no image slots.
"""

import collections
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from medfuse_jax import schema
from medfuse_jax.data import hours, images
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.runtime import cores, watchdog
from medfuse_jax.runtime.errors import UserError

READ_LIMIT_S = 300.0  # for a batch, or a record that is read for the devices' memory
OF_SEVERAL = ("hour_", "images_")  # columns that hours.look_up and images.look_up read, not one value a record
_AHEAD = 16  # batches; a longer queue is not faster
_MOST_READERS = 8  # unless config.data.readers says otherwise: threads of one process share Python's lock


def num_readers(wanted: int) -> int:
    """Return the number of threads that read: config.data.readers or, if it is 0, a core each, at most 8."""
    return wanted or min(cores.usable(), _MOST_READERS)


def batches(
    dataset: Dataset,
    split: str,
    plan: plan_lib.Plan | plan_lib.Alternating,
    *,
    num_devices: int = 1,
    start: int = 0,
    part: slice = slice(None),
    readers: int = 0,
) -> Iterator:
    """Return the plan's batches from step `start` on, read ahead by threads.

    part: read only these devices' part of each batch. readers: config.data.readers. A batch that does not arrive ends
    the command.
    """
    if start >= len(plan):
        return iter(())
    source, num_threads = _Source(dataset, split, plan, num_devices, part), num_readers(readers)
    try:
        import grain.python as grain
    except ModuleNotFoundError:  # on the machine of a benchmark
        return _arriving(_by_threads(source, start, num_threads), dataset, split)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=_AHEAD)
    return _arriving(iter(grain.MapDataset.source(source)[start:].to_iter_dataset(options)), dataset, split)


def _arriving(batches: Iterator[dict], dataset: Dataset, split: str) -> Iterator[dict]:
    while True:
        with arrives(dataset, split):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def arrives(dataset: Dataset, split: str) -> contextlib.AbstractContextManager:
    """End the command if what the block reads does not arrive in time."""
    what = f"no batch of the {split} split of {dataset.task.name} has arrived for {READ_LIMIT_S:.0f} s"
    return watchdog.within(READ_LIMIT_S, f"{what}: check the disk or network that holds config.data.dir, and rerun")


def _by_threads(source: "_Source", start: int, num_threads: int) -> Iterator[dict]:
    ahead: collections.deque = collections.deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for step in range(start, len(source)):
            ahead.append(pool.submit(source.__getitem__, step))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Source:
    """A random-access source whose i-th element is the plan's i-th batch."""

    def __init__(
        self, dataset: Dataset, split: str, plan: plan_lib.Plan | plan_lib.Alternating, num_devices: int, part: slice
    ):
        self._dataset, self._split, self._plan, self._num_devices, self._part = dataset, split, plan, num_devices, part

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        dataset, plan = self._dataset, self._plan
        if isinstance(plan, plan_lib.Alternating):
            is_cxr, step = plan.at(step)
            dataset, plan = (dataset.cxr_dataset, plan.cxr) if is_cxr else (dataset, plan.stays)
        rows = {name: x[self._part] for name, x in plan_lib.deal(plan, step, self._num_devices).items()}
        return read(dataset, self._split, rows, int(plan.padded_length_S[step]))


def assemble(columns: dict, rows: dict, xp=np) -> dict:
    """Look up what the index holds for a batch: everything but series and pixels.

    columns: from `Dataset.columns`, values [N, ...]. rows: from `plan.deal`. xp: numpy, or jax.numpy in a jitted step.
    """
    valid = rows["record"] != plan_lib.PADDING
    record = xp.where(valid, rows["record"], 0)
    batch = {name: x for name, x in rows.items() if name != "hour"} | {"valid": valid}
    if "hour" in rows:
        batch |= hours.look_up(columns, rows, valid, record, xp)
    if "image_of" in rows:
        batch |= images.look_up(columns, rows, record, xp)
    for name, values in columns.items():
        if name.startswith(OF_SEVERAL):
            continue
        found = values[record]
        mask = valid.reshape(*valid.shape, *[1] * (found.ndim - valid.ndim))
        found = xp.where(mask, found, xp.nan if name.startswith("extra_") else 0)
        batch[name] = found.astype(xp.int32 if name == "length" else xp.float32)
    return batch


def read(dataset: Dataset, split: str, rows: dict, padded_length: int) -> dict[str, np.ndarray]:
    """Assemble the batch of `rows` (from `plan.deal`) and read its series and images."""
    batch = assemble(dataset.columns(split), rows)
    part, record_DB, wanted_DB = dataset.index[split], rows["record"], batch["valid"]
    if dataset.use_ehr:
        batch["ehr"] = np.zeros((*record_DB.shape, padded_length, len(schema.CHANNELS)), np.float32)
    slots_of: dict[tuple[int, int], list[int]] = {}
    if "image_row" in rows:
        image_name, shape, dtype = dataset.image_field
        batch[image_name] = np.zeros((*rows["image_row"].shape, *shape), dtype)
        if dataset.cxr_features:
            batch[image_name] = dataset.cxr_features[split].of_batch(record_DB, rows)
        for d, p in np.argwhere(rows["image_mask"] & (not dataset.cxr_features)).tolist():
            slots_of.setdefault((d, int(rows["image_row"][d, p])), []).append(p)
    if not dataset.use_ehr:
        wanted_DB = np.zeros_like(wanted_DB)
        for place in slots_of:
            wanted_DB[place] = True
    for device, row in np.argwhere(wanted_DB).tolist():
        record = dataset.splits[split][record_DB[device, row]]
        check(record, part, record_DB[device, row], split)
        if dataset.use_ehr:
            batch["ehr"][device, row, : len(record["ehr"])] = record["ehr"]
        if slots := slots_of.get((device, row)):
            batch["image"][device, slots] = dataset.images(split, record_DB[device, row], record)
    return batch


def check(record: dict, part: dict[str, np.ndarray], i: int, split: str) -> None:
    """Raise UserError if a record is not the one that its split's index (`part`) lists, or has values not finite."""
    if record["stay_id"] != part["stay_id"][i] or len(record["ehr"]) != part["length"][i]:
        raise UserError(
            f"record {i} of the {split} split is of another stay or length than its index says: the folder was rebuilt "
            "while it was read, or mixes two builds",
            row=int(i) + 1,
        )
    finite_TF = np.isfinite(record["ehr"])
    if not finite_TF.all():
        t, channel = np.argwhere(~finite_TF)[0].tolist()
        raise UserError(
            f"record {i} of the {split} split has the value {record['ehr'][t, channel]} in channel "
            f"{schema.CHANNELS[channel]!r}, time step {t}: build the data again",
            field=schema.CHANNELS[channel],
            row=int(i) + 1,
        )
