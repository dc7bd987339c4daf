"""One task's shards, opened: what a run needs to know before it reads a record.

Shapes: N records, F EHR channels.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medfuse_jax import records, schema
from medfuse_jax.data import cxr_features as features_lib
from medfuse_jax.data import folds
from medfuse_jax.data import hours as hours_lib
from medfuse_jax.data import images as images_lib
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data import shards as shards_lib
from medfuse_jax.data.modalities import loading
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

_READ = ("stay_id", "ehr", "image")  # of a record; the index has the rest
_READ_BESIDE_FEATURES = ("stay_id", "ehr")
CXR_LABEL = "cxr_label"  # the field of a batch for the labels of X-rays without a stay


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One task's shards and what the method reads of them.

    use_ehr, use_cxr: whether the method reads that modality; otherwise it is not decoded, batched or sent.
    splits: the records by split, with stay_id, ehr and image alone.
    needs: the modalities ('ehr', 'cxr') without which a record has no prediction.
    buckets: padded lengths, shared by all splits.
    all_images: whether all X-rays of a stay are read together (config.data.images). stay_images: these, by split,
    unless the task is hourly.
    hours: the prediction hours by split, and padded_hours (`hours.padded`), of an hourly task.
    extra: name -> split -> values [N, ...] of further modalities (modalities/loading.py).
    cxr_features: precomputed features of the X-rays, by split, instead of their pixels, and what they were
    standardised by; or {} and None.
    digest: hash of the shards, of the fold, of `extra` and `cxr_features`, and of the statistics unless they are the
    train split's.
    shards_digest: hash of the shards alone.
    label_field: the labels' name in a batch.
    cxr_dataset: X-rays with labels of their own, in batches that alternate with the stays' in training; or None.
    """

    task: schema.Task
    labels: tuple[str, ...]
    splits: Mapping[str, Sequence]
    index: dict[str, dict[str, np.ndarray]]
    manifest: dict
    mean_F: np.ndarray
    std_F: np.ndarray
    use_ehr: bool
    use_cxr: bool
    buckets: tuple[int, ...]
    digest: str
    shards_digest: str
    needs: tuple[str, ...] = ()
    label_field: str = "label"
    cxr_dataset: "Dataset | None" = None
    extra: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    hours: dict[str, hours_lib.Hours] = dataclasses.field(default_factory=dict)
    padded_hours: dict[int, int] = dataclasses.field(default_factory=dict)
    all_images: bool = False
    stay_images: dict[str, images_lib.StayImages] = dataclasses.field(default_factory=dict)
    cxr_features: dict[str, features_lib.CxrFeatures] = dataclasses.field(default_factory=dict)
    cxr_statistics: features_lib.Statistics | None = None

    @property
    def mean_hours(self) -> float:
        """The mean number of prediction hours of the training stays that have any; 1 unless the task is hourly."""
        if not self.hours:
            return 1.0
        count_N = self.hours["train"].count_N
        return float(count_N.sum() / max((count_N > 0).sum(), 1))

    def paired(self, split: str) -> np.ndarray:
        """Return bool [N]: the records with an X-ray that the method reads."""
        return self.index[split]["has_cxr"] & self.use_cxr

    def usable(self, split: str) -> np.ndarray:
        """Return bool [N]: the records that the method can score: with something it reads, and all that it needs."""
        has_N = {"ehr": self.lengths(split) > 0, "cxr": self.paired(split)}
        usable_N = has_N["ehr"] | has_N["cxr"]
        for modality in self.needs:
            usable_N = usable_N & has_N[modality]
        return usable_N

    def lengths(self, split: str) -> np.ndarray:
        """Return int [N]: the time steps of each record that the method reads."""
        length_N = self.index[split]["length"]
        return length_N if self.use_ehr else np.zeros_like(length_N)

    def columns(self, split: str) -> dict[str, np.ndarray]:
        """Return the fields of a batch that need no record to be read, each [N, ...] (see `batches.assemble`)."""
        part = self.index[split]
        length = {"length": part["length"]} if self.use_ehr else {}
        extra = {f"extra_{name}": by_split[split] for name, by_split in self.extra.items()}
        several = self.several[split].columns() if self.several else {}
        label = {} if self.hours else {self.label_field: part["label"]}
        return label | several | length | extra

    @property
    def several(self) -> Mapping[str, images_lib.StayImages]:
        """The X-rays that are read, by split, if a stay may have several; else {}."""
        return self.hours or self.stay_images

    def num_images(self, split: str) -> np.ndarray:
        """Return int [N]: the images of each record that the method reads."""
        paired_N = self.paired(split)
        return np.where(paired_N, self.several[split].image_count_N, 0) if self.several else paired_N.astype(int)

    @property
    def reads_records(self) -> bool:
        """Whether a batch takes anything from its records."""
        return self.use_ehr or not self.cxr_features

    @property
    def image_field(self) -> tuple[str, tuple[int, ...], type]:
        """The name in a batch of what is read of an image, its shape and type."""
        if self.cxr_features:
            return "cxr_features", next(iter(self.cxr_features.values())).feature_JE.shape[1:], np.float32
        return "image", (schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX), np.uint8

    def images(self, split: str, i: int, record: dict) -> list[np.ndarray]:
        """Return the pixels, or the features, of the `num_images` images of record i, in order of time."""
        if self.cxr_features:
            return self.cxr_features[split].of_record(i)
        return self.several[split].of_record(i, record["images"]) if self.several else [record["image"]]

    def packing(self, split: str) -> plan_lib.Packing | None:
        """Return what a plan needs to know where a stay may have several images, or hours."""
        if not self.several:
            return None
        count_N, length_N, padded = self.num_images(split), self.lengths(split), None
        if self.all_images:
            padded = {bucket: int(count_N[length_N <= bucket].max(initial=1)) for bucket in self.buckets}
        return plan_lib.Packing(count_N, padded, self.padded_hours or None)

    def labels_of(self, split: str, include_N: np.ndarray) -> np.ndarray:
        """Return the labels [R, K] of the included records, one row each, or one an hour in an hourly task."""
        if not self.hours:
            return self.index[split]["label"][include_N]
        return self.hours[split].label_SK[self.hours[split].rows(include_N)]


def open_dataset(
    data_dir: str | Path,
    task: str,
    *,
    use_ehr: bool = True,
    use_cxr: bool = True,
    needs: tuple[str, ...] = (),
    statistics: str | tuple[np.ndarray, np.ndarray] = "train",
    max_buckets: int = 4,
    modalities: tuple[loading.Modality, ...] = (),
    images: str = "last",
    to_train: bool = True,
    fold: folds.Fold | None = None,
    features: features_lib.Table | None = None,
) -> Dataset:
    """Open a task's shards; raise UserError if they are missing, damaged or of no use to the method.

    images: config.data.images. to_train: whether there must be train records. fold: the fold to divide the records
    into; None for their own splits. features: of the X-rays, to be read instead of them.

    statistics: 'train' (mean and standard deviation of the train split, from the manifest), or the path of a JSON file
    {"mean": [76], "std": [76]}.
    """
    shards = shards_lib.Shards(data_dir, task, fold)
    # Check all files now, because the test split is read only after days of training.
    records.check_files(shards.folder, shards.manifest)
    use_ehr = use_ehr and not schema.TASKS[task].cxr_only
    _check_of_use(shards, use_ehr, to_train)
    manifest, index = shards.manifest, {split: dict(part) for split, part in shards.index.items()}
    hours, stay_images = {}, {}
    if schema.TASKS[task].hourly:
        options = (manifest["timestep_h"], images == records.ALL_IMAGES)
        hours = {split: hours_lib.of(of, *options) for split, of in shards.parts(records.hours).items()}
        for split, of in hours.items():  # an X-ray that no hour sees is none
            index[split]["has_cxr"] = of.image_count_N > 0
    elif images == records.ALL_IMAGES:
        stay_images = {split: images_lib.of(of) for split, of in shards.all_images().items()}
    if use_ehr and statistics == "train":
        manifest = manifest | dict(zip(("train_mean", "train_std"), shards.train_statistics()))
    mean_F, std_F = _statistics(manifest, statistics)
    extra = {modality.name: loading.tables(modality, index) for modality in modalities}
    digest = loading.digest(_with_statistics(shards.digest_of_fold, manifest, mean_F, std_F), extra)
    cxr_features: dict[str, features_lib.CxrFeatures] = {}
    cxr_statistics = None
    if use_cxr and features:
        names = shards.parts(records.dicom_ids)
        of_read = features_lib.of_splits(features, names, hours or stay_images, str(shards.folder))
        cxr_features, cxr_statistics, of_features = of_read
        digest = hashlib.sha256(f"{digest} {of_features}".encode()).hexdigest()
    length_of = {split: part["length"] for split, part in index.items()}
    buckets = plan_lib.buckets(np.concatenate([*length_of.values()]), max_buckets) if use_ehr else (0,)
    return Dataset(
        task=schema.TASKS[task],
        labels=tuple(manifest["labels"]),
        splits=shards.open(_READ_BESIDE_FEATURES if cxr_features else _READ),
        shards_digest=shards.digest,
        digest=digest,
        index=index,
        manifest=manifest,
        mean_F=mean_F,
        std_F=std_F,
        use_ehr=use_ehr,
        use_cxr=use_cxr,
        buckets=buckets,
        needs=needs,
        extra=extra,
        hours=hours,
        all_images=images == records.ALL_IMAGES,
        stay_images=stay_images,
        cxr_features=cxr_features,
        cxr_statistics=cxr_statistics,
        padded_hours=hours_lib.padded(hours, length_of, buckets) if hours else {},
    )


def _check_of_use(shards: shards_lib.Shards, use_ehr: bool, to_train: bool) -> None:
    """Raise UserError if there is nothing to learn from, or nothing that the method reads."""
    if to_train and not len(shards.index["train"]["stay_id"]):
        raise UserError(f"{shards.folder} has no train records: nothing to learn from", path=shards.folder)
    if not use_ehr and not any(part["has_cxr"].any() for part in shards.index.values()):
        raise UserError(
            f"{shards.folder} has no X-rays, and the method reads nothing else: build with --mimic_cxr, or choose a "
            "method that reads EHR",
            path=shards.folder,
        )


def with_cxr_dataset(
    dataset: Dataset,
    data_dir: str | Path,
    cxr_task: str,
    fold: folds.Fold | None = None,
    features: features_lib.Table | None = None,
) -> Dataset:
    """Add the X-rays of an X-ray-only task to a dataset; raise UserError if that task is not built.

    features: of its X-rays, standardised as the dataset's are.
    """
    if features:
        features = dataclasses.replace(features, statistics=dataset.cxr_statistics)
    cxr_dataset = open_dataset(data_dir, cxr_task, use_ehr=False, fold=fold, features=features)
    return dataclasses.replace(dataset, cxr_dataset=dataclasses.replace(cxr_dataset, label_field=CXR_LABEL))


def _statistics(manifest: dict, statistics: str | tuple) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(statistics, tuple):
        return statistics
    if statistics == "train":
        mean, std, where = manifest["train_mean"], manifest["train_std"], "manifest.json"
    else:
        where = f"config.data.statistics={statistics}"
        content = files.read_json(
            Path(statistics), "config.data.statistics must be 'train', or a JSON file with 'mean' and 'std'"
        )
        mean, std = content.get("mean"), content.get("std")
    channels = len(schema.CHANNELS)
    try:
        mean_F, std_F = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        fits = mean_F.shape == std_F.shape == (channels,) and np.isfinite([mean_F, std_F]).all() and (std_F > 0).all()
    except (ValueError, TypeError):
        fits = False
    if not fits:
        message = f"{where}: mean and std must be {channels} finite numbers each, every std above 0"
        raise UserError(message, field="config.data.statistics")
    return mean_F, std_F


def _with_statistics(digest: str, manifest: dict, mean_F: np.ndarray, std_F: np.ndarray) -> str:
    """Return the shards' digest, extended by the statistics unless they are the train split's."""
    if np.array_equal([mean_F, std_F], _statistics(manifest, "train")):
        return digest
    return hashlib.sha256(digest.encode() + mean_F.tobytes() + std_F.tobytes()).hexdigest()
