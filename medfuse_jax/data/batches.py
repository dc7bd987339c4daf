"""From shards to batches: records are read by threads, in the order of a plan.

A batch is a dict of arrays, each with a leading device axis D:

    ehr        float32 [D, B, T, 76]  as recorded (not standardised), zero beyond `length`
    length     int32   [D, B]
    label      float32 [D, B, K]
    valid      bool    [D, B]         False: a padded row, no stay
    row_id     int32   [D, B]         the row's number in the whole batch, whatever D is
    record     int32   [D, B]         the record's number in its split, -1 in a padded row
    image      uint8   [D, P, 256, 256]
    image_row   int32   [D, P]         the row an X-ray belongs to; B: an empty X-ray slot
    extra_NAME float32 [D, B, ...]    a further modality's values; NaN throughout in a row without

`ehr`/`length` are left out for X-ray-only tasks, `image`/`image_row` where there are no X-ray slots.
In a batch of `Dataset.images` the labels are named `cxr_label`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medfuse_jax import records, schema
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.modalities import loading
from medfuse_jax.runtime.errors import UserError

# Two threads and a buffer of 16 beat grain's defaults and worker processes on two cores.
READ_OPTIONS = {"num_threads": 2, "prefetch_buffer_size": 16}


CXR_LABEL = "cxr_label"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One task's shards, opened: what a run needs to know of them before it reads a record.

    use_ehr, use_cxr: whether the method reads that modality; what it does not read is
    neither decoded into a batch nor sent to the device.
    needs: the modalities, 'ehr' and 'cxr', without which it has no prediction.
    buckets: padded lengths shared by all splits.
    extra: name -> split -> values [N, ...] of the further modalities (modalities/loading.py).
    digest: of the content of the shards and of `extra`, and of other statistics than the train split's.
    label_field: what the labels are called in a batch.
    X-rays: the X-rays with labels of their own that take turns with the stays in training, or None.
    """

    task: schema.Task
    labels: tuple[str, ...]
    splits: dict[str, records.Split]
    index: dict[str, dict[str, np.ndarray]]
    manifest: dict
    mean_F: np.ndarray
    std_F: np.ndarray
    use_ehr: bool
    use_cxr: bool
    buckets: tuple[int, ...]
    digest: str
    needs: tuple[str, ...] = ()
    label_field: str = "label"
    images: "Dataset | None" = None
    extra: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def paired(self, split: str) -> np.ndarray:
        """Which records of `split` come with an X-ray that the method uses, bool [N]."""
        return self.index[split]["has_cxr"] & self.use_cxr

    def usable(self, split: str) -> np.ndarray:
        """Which records the method can score: those with something it reads and all it needs; bool [N]."""
        has_N = {"ehr": self.lengths(split) > 0, "cxr": self.paired(split)}
        usable_N = has_N["ehr"] | has_N["cxr"]
        for modality in self.needs:
            usable_N = usable_N & has_N[modality]
        return usable_N

    def lengths(self, split: str) -> np.ndarray:
        """Time steps of each record that the method reads, int [N]."""
        length_N = self.index[split]["length"]
        return length_N if self.use_ehr else np.zeros_like(length_N)


def open_dataset(
    data_dir: str | Path,
    task: str,
    *,
    use_ehr: bool = True,
    use_cxr: bool = True,
    needs: tuple[str, ...] = (),
    statistics: str = "train",
    max_buckets: int = 4,
    modalities: tuple[loading.Modality, ...] = (),
) -> Dataset:
    """Opens a task's shards; UserError if they are not there, damaged or of no use to the method.

    statistics: 'train' (the train split's mean and deviation, from the manifest), or the path
    of a JSON file {"mean": [76], "std": [76]}.
    """
    manifest = records.manifest(data_dir, task)
    # Now, not when the test split is read after days of training.
    records.check_lengths(records.task_dir(data_dir, task), manifest)
    index = {split: records.index(data_dir, task, split) for split in schema.SPLITS}
    if not len(index["train"]["stay_id"]):
        raise UserError(f"{records.task_dir(data_dir, task)} has no train records: nothing to learn from")
    use_ehr = use_ehr and not schema.TASKS[task].cxr_only
    if not use_ehr and not any(part["has_cxr"].any() for part in index.values()):
        raise UserError(
            f"{records.task_dir(data_dir, task)} holds no X-rays, and the method reads nothing else: "
            "build with --mimic_cxr, or choose a method that reads EHR"
        )
    splits = {split: records.open_split(data_dir, task, split) for split in schema.SPLITS}
    for split, part in splits.items():
        if len(part) != len(index[split]["stay_id"]):
            raise UserError(
                f"{records.task_dir(data_dir, task)} holds {len(part)} {split} records, its index "
                f"{len(index[split]['stay_id'])}: the folder mixes two builds; build it again"
            )
    mean_F, std_F = _statistics(manifest, statistics)
    length_N = np.concatenate([index[s]["length"] for s in schema.SPLITS])
    extra = {modality.name: loading.tables(modality, index) for modality in modalities}
    return Dataset(
        task=schema.TASKS[task],
        labels=tuple(manifest["labels"]),
        splits=splits,
        digest=loading.digest(_with_statistics(records.digest(data_dir, task), manifest, mean_F, std_F), extra),
        index=index,
        manifest=manifest,
        mean_F=mean_F,
        std_F=std_F,
        use_ehr=use_ehr,
        use_cxr=use_cxr,
        buckets=plan_lib.buckets(length_N, max_buckets) if use_ehr else (0,),
        needs=needs,
        extra=extra,
    )


def with_cxr_dataset(dataset: Dataset, data_dir: str | Path, cxr_task: str) -> Dataset:
    """The same dataset beside the X-rays of an X-ray-only task; UserError where that is not built."""
    images = open_dataset(data_dir, cxr_task, use_ehr=False)
    return dataclasses.replace(dataset, images=dataclasses.replace(images, label_field=CXR_LABEL))


def batches(
    dataset: Dataset, split: str, plan: plan_lib.Plan | plan_lib.Turns, *, num_devices: int = 1, start: int = 0
) -> Iterator:
    """The plan's batches from step `start` on, read ahead by threads."""
    import grain.python as grain  # late: batches can be laid out without it, as the benchmark does

    if start >= len(plan):
        return iter(())
    if isinstance(plan, plan_lib.Turns):
        source = _InTurn(dataset, split, plan, num_devices)
    else:
        source = _Batches(dataset, split, plan, num_devices)
    return iter(grain.MapDataset.source(source)[start:].to_iter_dataset(grain.ReadOptions(**READ_OPTIONS)))


class _Batches:
    """A random-access source whose i-th element is the plan's i-th batch."""

    def __init__(self, dataset: Dataset, split: str, plan: plan_lib.Plan, num_devices: int):
        self._dataset, self._split, self._plan, self._num_devices = dataset, split, plan, num_devices

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rows_DB, image_row_DP = plan_lib.deal(self._plan, step, self._num_devices)
        return collate(self._dataset, self._split, rows_DB, image_row_DP, int(self._plan.padded_length_S[step]))


class _InTurn:
    """A random-access source of the batches of stays and of X-rays, in the order of `Turns`."""

    def __init__(self, dataset: Dataset, split: str, turns: plan_lib.Turns, num_devices: int):
        self._turns = turns
        self._sources = {
            "stays": _Batches(dataset, split, turns.stays, num_devices),
            "images": _Batches(dataset.images, split, turns.images, num_devices),
        }

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        name, i = self._turns.at(step)
        return self._sources[name][i]


def collate(
    dataset: Dataset, split: str, rows_DB: np.ndarray, image_row_DP: np.ndarray, num_steps: int
) -> dict[str, np.ndarray]:
    """Reads the records of one batch and lays them out (see the top of the module)."""
    part = dataset.index[split]
    valid_DB = rows_DB != plan_lib.PADDING
    safe_DB = np.where(valid_DB, rows_DB, 0)
    batch = {
        dataset.label_field: (part["label"][safe_DB] * valid_DB[..., None]).astype(np.float32),
        "valid": valid_DB,
        "row_id": np.arange(rows_DB.size, dtype=np.int32).reshape(rows_DB.shape),
        "record": rows_DB.astype(np.int32),
    }
    for name, by_split in dataset.extra.items():
        batch[f"extra_{name}"] = by_split[split][safe_DB]
        batch[f"extra_{name}"][~valid_DB] = np.nan
    devices, rows = rows_DB.shape
    if dataset.use_ehr:
        batch["length"] = np.where(valid_DB, part["length"][safe_DB], 0).astype(np.int32)
        batch["ehr"] = np.zeros((devices, rows, num_steps, len(schema.CHANNELS)), np.float32)
    if image_row_DP.shape[1]:
        size = schema.IMAGE_SIZE_PX
        batch["image_row"] = image_row_DP.astype(np.int32)
        batch["image"] = np.zeros((*image_row_DP.shape, size, size), np.uint8)
    wants_image = np.zeros((devices, rows), bool)
    for device, slot in np.argwhere(image_row_DP < rows):
        wants_image[device, image_row_DP[device, slot]] = True
    for device, row in np.argwhere(valid_DB if dataset.use_ehr else wants_image):
        record = dataset.splits[split][rows_DB[device, row]]
        check_against_index(record, part, rows_DB[device, row], split)
        if dataset.use_ehr:
            batch["ehr"][device, row, : len(record["ehr"])] = record["ehr"]
        if wants_image[device, row]:
            slot = int(np.flatnonzero(image_row_DP[device] == row)[0])
            batch["image"][device, slot] = record["image"]
    return batch


def check_against_index(record: dict, part: dict[str, np.ndarray], i: int, split: str) -> None:
    """Raises UserError where a record is not the one that its split's index (`part`) says."""
    if record["stay_id"] != part["stay_id"][i] or len(record["ehr"]) != part["length"][i]:
        raise UserError(
            f"record {i} of the {split} split is stay {record['stay_id']} with {len(record['ehr'])} steps, its index "
            f"says stay {part['stay_id'][i]} with {part['length'][i]}: the folder was built anew while "
            "it was read, or mixes two builds"
        )


def _statistics(manifest: dict, statistics: str) -> tuple[np.ndarray, np.ndarray]:
    if statistics == "train":
        mean, std, where = manifest["train_mean"], manifest["train_std"], "manifest.json"
    else:
        where = f"config.data.statistics={statistics}"
        try:
            content = json.loads(Path(statistics).read_text())
            mean, std = content["mean"], content["std"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: not 'train', nor a JSON file with 'mean' and 'std' ({error!r})") from None
    channels = len(schema.CHANNELS)
    try:
        mean_F, std_F = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        fits = mean_F.shape == std_F.shape == (channels,) and np.isfinite([mean_F, std_F]).all() and (std_F > 0).all()
    except (ValueError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{where}: mean and std must be {channels} finite numbers each, every std above 0")
    return mean_F, std_F


def _with_statistics(digest: str, manifest: dict, mean_F: np.ndarray, std_F: np.ndarray) -> str:
    """The shards' digest; one of the statistics too where they are not the train split's, which come of the shards."""
    if np.array_equal([mean_F, std_F], _statistics(manifest, "train")):
        return digest
    return hashlib.sha256(digest.encode() + mean_F.tobytes() + std_F.tobytes()).hexdigest()
