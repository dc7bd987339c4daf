"""The record format: what a shard holds, how it is described and read.

On disk, one folder per task, written by `data_prep` and renamed into place when complete:

    <data_dir>/<task>/dataset_info.json, features.json   (TFDS)
    <data_dir>/<task>/<task>-<split>.array_record-*      one record per stay or X-ray
    <data_dir>/<task>/index_<split>.npz                  length, pairing, ids, static facts and labels, in record order,
                                                         and the names of all X-rays
    <data_dir>/<task>/hours_<split>.npz                  labels and times of all prediction hours, for an hourly task
    <data_dir>/<task>/images_<split>.npz                 times of all X-rays, if the records hold all of a stay's
    <data_dir>/<task>/manifest.json                      source, profile, counts, train statistics, hashes

Batch plans are made from the index alone, without reading a record.

A task with labels at many times of a stay (schema.Task.hourly) also has one record per stay. Its `label` is [H, K]: one
row for each of H prediction times, which `label_time_h` [H] gives in hours since the stay began. To predict at
label_time_h[i], a model may read only what was known by then: the first floor(label_time_h[i] / timestep_h) time steps
of `ehr`, and those of the stay's P X-rays with cxr_time_h <= label_time_h[i]. The index's `label` is 1 if the label is
1 at any prediction time.

Records of phenotyping and mortality hold each stay's last X-ray or, built with --images=all (manifest['images']), all
of its X-rays in order of time, with `cxr_time_h` [P] as above.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medfuse_jax import schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError, check_choice

FORMAT_VERSION = "1.3.0"
MANIFEST_FIELDS = ("channels", "labels", "train_mean", "train_std", "files")
MISSING = "is missing"
_REBUILD = "run data_prep.build again"
_hashes: dict[str, dict] = {}  # path -> files.remembered_sha256, of this process and of earlier ones
ALL_IMAGES = "all"  # manifest['images']; datasets of each stay's last X-ray have no such field
INDEX_FIELDS = ("stay_id", "subject_id", "length", "has_cxr", "age", *schema.STATIC_TEXTS, "label")
HOURS_FIELDS = ("label_time_h", "label", "cxr_time_h", "los_h")  # of a record, in hours_<split>.npz


def layout(num_labels: int, hourly: bool = False, all_images: bool = False) -> dict[str, tuple[type, tuple | None]]:
    """Return the type and shape of each field of a record with `num_labels` labels: () for a number, None for text.

    all_images: whether the records of a task that is not hourly hold all X-rays of a stay; those of an hourly task do.
    A first axis of -1 may have any length. A missing X-ray is an image of shape [0, 256, 256]; an X-ray without a stay
    has ehr [0, 76] and stay_id -1.
    """
    size = schema.IMAGE_SIZE_PX
    fields = {
        "stay_id": (np.int64, ()),
        "subject_id": (np.int64, ()),
        "ehr": (np.float32, (-1, len(schema.CHANNELS))),  # not standardised
        "label": (np.int8, (num_labels,)),
        "has_cxr": (np.bool_, ()),
        "dicom_id": (str, None),
        "image": (np.uint8, (-1, size, size)),
        "age": (np.float32, ()),  # years
        **dict.fromkeys(schema.STATIC_TEXTS, (str, None)),
    }
    if hourly:
        fields |= {
            "label": (np.int8, (-1, num_labels)),
            "label_time_h": (np.float32, (-1,)),
            "cxr_time_h": (np.float32, (-1,)),
            "los_h": (np.float32, ()),  # length_of_stay predicts los_h - label_time_h; never an input
        }
    elif all_images:
        fields["cxr_time_h"] = (np.float32, (-1,))
    return fields


def features(num_labels: int, hourly: bool = False, all_images: bool = False):
    """Return `layout` as TFDS features: TFDS describes the datasets, and can read them. `decode` is faster."""
    import tensorflow_datasets as tfds

    def feature(dtype, shape):
        if shape is None:
            return tfds.features.Text()
        if not shape:
            return dtype
        shape = tuple(None if n == -1 else n for n in shape)
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)

    fields = layout(num_labels, hourly, all_images)
    return tfds.features.FeaturesDict({name: feature(*of) for name, of in fields.items()})


def parser() -> Callable[[bytes], Any]:
    """Return the function that parses a serialized `tf.train.Example` into its fields; it raises ValueError.

    Get it once, before threads use it: threads that import TFDS at the same time wait for each other for ever.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    from_string = tf_example_pb2.Example.FromString

    def parse(example: bytes):
        try:
            return from_string(example).features.feature
        except DecodeError as error:
            raise ValueError(str(error) or "not an Example") from None

    return parse


def decode(stored: Any, fields: dict[str, tuple[type, tuple | None]]) -> dict:
    """Return the fields (see `layout`) of a parsed record; raise ValueError if it lacks one.

    Arrays are read-only views of the record's bytes.
    """
    try:
        return {name: _value(stored[name], *of) for name, of in fields.items()}
    except IndexError:
        raise ValueError("it lacks a field") from None


def _value(stored, dtype: type, shape: tuple | None):
    if shape is None:
        return stored.bytes_list.value[0].decode()
    if shape:
        return np.frombuffer(stored.bytes_list.value[0], dtype).reshape(shape)
    numbers = stored.float_list if dtype is np.float32 else stored.int64_list
    return dtype(numbers.value[0])


def task_dir(data_dir: str | Path, task: str) -> Path:
    """Return the folder of one task's dataset; raise UserError if there is none."""
    check_choice("task", task, schema.TASKS)
    folder = Path(data_dir) / task
    if folder.is_dir():
        return folder
    if not Path(data_dir).is_dir():
        how = f"build it with `python -m data_prep.build --out={data_dir} ...`"
        raise UserError(f"no data folder {data_dir}: {how}", field="config.data.dir", path=data_dir)
    present = sorted(p.name for p in Path(data_dir).iterdir() if p.is_dir() and p.name in schema.TASKS)
    how = f"build it with `python -m data_prep.build --tasks={task} ...`"
    if schema.TASKS[task].cxr_only:
        how += " and --mimic_cxr=DIR; without X-rays, only --config.method=uni_ehr can be trained"
    raise UserError(
        f"{data_dir} holds no dataset for the task {task!r} (it holds: {', '.join(present) or 'none'}); {how}",
        field="config.task",
        path=data_dir,
        value=task,
    )


def manifest(data_dir: str | Path, task: str) -> dict:
    """Return the description of a dataset: 'channels', 'labels', 'train_mean', 'train_std' and more.

    'train_mean' and 'train_std' are lists of 76 numbers, over all time steps of the train split; 0 and 1 for channels
    that are not continuous.
    """
    path = task_dir(data_dir, task) / "manifest.json"
    content = files.read_json(path, _REBUILD)
    problem = ""
    if content.get("format_version") != FORMAT_VERSION:
        problem = f"has format {content.get('format_version')}, but this version reads {FORMAT_VERSION}"
    elif content.get("task") != task:
        problem = f"describes the task {content.get('task')!r}, not {task!r}, so the folder was renamed"
    elif missing := [field for field in MANIFEST_FIELDS if field not in content]:
        problem = f"lacks {', '.join(missing)}"
    elif content.get("sha256") != seal(content):
        problem = "was changed after the build"
    if problem:
        raise UserError(f"{path} {problem}: {_REBUILD}", path=path)
    return content


def seal(content: dict) -> str:
    """Return the SHA-256 of a manifest's other fields. The manifest stores it, so that a changed mean is noticed."""
    return files.seal(content, "sha256")


def wrong_lengths(folder: Path, content: dict) -> Iterator[tuple[str, str]]:
    """Yield (name, problem) for each file that is missing or whose length differs from the manifest."""
    for name, num_bytes in content.get("file_bytes", {}).items():
        path = folder / name
        if not path.is_file():
            yield name, MISSING
        elif path.stat().st_size != num_bytes:
            yield name, f"has {path.stat().st_size:,} bytes, not {num_bytes:,}"


def check_files(folder: Path, content: dict) -> None:
    """Raise UserError if a file of the dataset is missing or is not the one that the manifest lists.

    A shard may hold gigabytes, so the user's cache folder keeps its hash: it is hashed again only if it changed.
    """
    if wrong := next(wrong_lengths(folder, content), None):
        name, problem = wrong
        raise UserError(f"{folder / name} {problem}: {_REBUILD}", path=folder / name)
    cache = None
    with contextlib.suppress(UserError):  # no cache folder, or no file in it yet
        cache = files.cache_dir() / "hashes.json"
        _hashes.update(files.read_json(cache, ""))
    for name, sha256 in content["files"].items():
        path = folder / name
        try:
            entry = files.remembered_sha256(path, _hashes)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}): {_REBUILD}", path=path) from None
        if entry["sha256"] != sha256:
            raise UserError(f"{path} does not match its manifest: {_REBUILD}", path=path)
        if _hashes.get(str(path.resolve())) != entry:
            _hashes[str(path.resolve())] = entry
            with contextlib.suppress(OSError):  # then they are hashed again in the next process
                if cache:
                    files.write_json(cache, files.sealed(_hashes))


def index(data_dir: str | Path, task: str, split: str) -> dict[str, np.ndarray]:
    """Return the index of one split, each field in record order.

    stay_id int64 [N], subject_id int64 [N], length int32 [N] (time steps), has_cxr bool [N], age float32 [N] (years,
    NaN if unknown), gender, admission_type and first_careunit str [N] ('' if unknown), label int8 [N, K], race str [N]
    (schema.RACES, or '' where the tables or the shards have none).
    """
    check_choice("split", split, schema.SPLITS)
    content = manifest(data_dir, task)
    path = task_dir(data_dir, task) / f"index_{split}.npz"
    _check_content(path, content)
    with np.load(path) as stored:
        read = {field: stored[field] for field in INDEX_FIELDS}
        return read | {schema.RACE: stored[schema.RACE] if schema.RACE in stored else np.full(len(read["stay_id"]), "")}


def dicom_ids(data_dir: str | Path, task: str, split: str) -> dict[str, np.ndarray]:
    """Return the names of all X-rays of a split, one record's after another's, in order of time.

    num_images int [N]; dicom_id str [J]. Raise UserError for a dataset of an earlier version, whose index has no names.
    """
    path = task_dir(data_dir, task) / f"index_{split}.npz"
    _check_content(path, manifest(data_dir, task))
    with np.load(path) as stored:
        if "dicom_id" not in stored:
            raise UserError(f"{path} is of an earlier version, which has no names of X-rays: {_REBUILD}", path=path)
        return {"num_images": stored["num_images"], "dicom_id": np.char.decode(stored["dicom_id"], "utf-8")}


def hours(data_dir: str | Path, task: str, split: str) -> dict[str, np.ndarray]:
    """Return the prediction hours of an hourly task's split, one record's after another's.

    num_hours, num_images int [N]; label_time_h float32 [S] and label int8 [S, K], of S hours of all records; cxr_time_h
    float32 [J], of all X-rays; los_h float32 [N].
    """
    path = task_dir(data_dir, task) / f"hours_{split}.npz"
    _check_content(path, manifest(data_dir, task))
    with np.load(path) as stored:
        return dict(stored)


def image_times(data_dir: str | Path, task: str, split: str) -> dict[str, np.ndarray]:
    """Return the times of all X-rays of a split whose records hold all of a stay's, one record's after another's.

    num_images int [N]; cxr_time_h float32 [J].
    """
    path = task_dir(data_dir, task) / f"images_{split}.npz"
    _check_content(path, manifest(data_dir, task))
    with np.load(path) as stored:
        return dict(stored)


def join_hours(rows: list[dict], num_labels: int) -> dict[str, np.ndarray]:
    """Return what `hours` reads, from the HOURS_FIELDS of each record."""
    return {
        "num_hours": np.array([len(row["label_time_h"]) for row in rows], np.int32),
        "label_time_h": _joined(rows, "label_time_h", (), np.float32),
        "label": _joined(rows, "label", (num_labels,), np.int8),
        **join_image_times(rows),
        "los_h": np.array([row["los_h"] for row in rows], np.float32),
    }


def join_image_times(rows: list[dict]) -> dict[str, np.ndarray]:
    """Return what `image_times` reads, from the cxr_time_h of each record."""
    num_images = np.array([len(row["cxr_time_h"]) for row in rows], np.int32)
    return {"num_images": num_images, "cxr_time_h": _joined(rows, "cxr_time_h", (), np.float32)}


def join_names(names: list[list[str]]) -> dict[str, np.ndarray]:
    """Return what `dicom_ids` reads, from the names of each record's X-rays; as bytes, a quarter of the size."""
    flat = [name.encode() for of_record in names for name in of_record]
    num_images = np.array([len(of_record) for of_record in names], np.int32)
    return {"num_images": num_images, "dicom_id": np.array(flat, np.bytes_)}


def _joined(rows: list[dict], name: str, shape: tuple, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros((0, *shape), dtype), *(np.asarray(row[name], dtype) for row in rows)])


def _check_content(path: Path, content: dict) -> None:
    """Raise UserError if a file of the dataset is not the one that the manifest lists. Reads all of it."""
    try:
        if files.sha256(path) != content["files"].get(path.name):
            raise UserError(f"{path} does not match its manifest: {_REBUILD}", path=path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {_REBUILD}", path=path) from None


def digest(data_dir: str | Path, task: str) -> str:
    """Return a hash of the dataset's content: builds with the same digest hold the same bytes."""
    return hashlib.sha256(json.dumps(manifest(data_dir, task)["files"], sort_keys=True).encode()).hexdigest()


def train_statistics(arrays: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of each of the 76 channels, over all time steps of `arrays`.

    A channel that is not continuous gets mean 0 and deviation 1. A constant channel gets deviation 1, because callers
    divide by it.
    """
    channels = list(schema.CONTINUOUS_CHANNELS)
    count, mean, squares = 0, np.zeros(len(channels)), np.zeros(len(channels))
    for ehr_TF in arrays:
        values = ehr_TF[:, channels].astype(np.float64)
        if not len(values):
            continue
        # Merge means and sums of squares (Chan et al. 1979): stable for any number of time steps.
        added, delta = len(values), values.mean(0) - mean
        squares += ((values - values.mean(0)) ** 2).sum(0) + delta**2 * count * added / (count + added)
        mean += delta * added / (count + added)
        count += added
    std = np.sqrt(squares / max(count, 1))
    all_mean, all_std = np.zeros(len(schema.CHANNELS)), np.ones(len(schema.CHANNELS))
    all_mean[channels], all_std[channels] = mean, np.where(std > 1e-8, std, 1.0)
    return all_mean.tolist(), all_std.tolist()


class Split(Sequence):
    """The records of one split, read on demand: len(), [i], iteration. Threads may share it."""

    def __init__(
        self, source: Sequence[bytes], fields: dict[str, tuple[type, tuple | None]], name: str, images: str = "last"
    ):
        """images: 'last', 'all', or 'hourly': all, none of which may stand for the stay."""
        self._source, self._fields, self._name, self._images = source, fields, name, images
        self._parse = parser()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self._name} has {len(self)} records; {i} is out of range")
        try:
            record = decode(self._parse(self._source[i % len(self)]), self._fields)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"record {i} of {self._name} is damaged ({error}): {_REBUILD}", value=i) from None
        if "image" not in self._fields:
            return record
        images = record["image"]
        record["image"] = images[-1] if len(images) and self._images != "hourly" else None
        return record if self._images == "last" else record | {"images": images}


def open_split(data_dir: str | Path, task: str, split: str, only: tuple[str, ...] = ()) -> Split:
    """Open one split for random access. only: decode these fields of `layout`, which is faster than all.

    Each record is a dict with at least stay_id int, ehr float32 [T, 76] (not standardised), label int8 [K], has_cxr
    bool, dicom_id str ('' without an X-ray), image uint8 [256, 256] or None.
    If it holds all X-rays of a stay: images uint8 [P, 256, 256] in order of time, cxr_time_h float32 [P], dicom_id the
    P names separated by spaces; image is the last. For an hourly task also: label int8 [H, K], label_time_h float32
    [H], los_h float; image is None.
    """
    from array_record.python import array_record_data_source

    check_choice("split", split, schema.SPLITS)
    folder, content = task_dir(data_dir, task), manifest(data_dir, task)
    for name in ("dataset_info.json", "features.json"):
        _check_content(folder / name, content)
    shards = sorted(name for name in content["files"] if name.startswith(f"{task}-{split}.array_record-"))
    try:
        source = array_record_data_source.ArrayRecordDataSource([folder / name for name in shards]) if shards else ()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be opened ({error}): {_REBUILD}", path=folder) from None
    hourly, all_images = schema.TASKS[task].hourly, content.get("images") == ALL_IMAGES
    fields = layout(len(content["labels"]), hourly, all_images)
    images = "hourly" if hourly else "all" if all_images else "last"
    return Split(source, {name: fields[name] for name in only or fields}, f"{folder} {split}", images)
