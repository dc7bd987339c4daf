"""One task's dataset on disk: ArrayRecord files that TFDS reads, an index a split, a manifest.

Record order is the order given here, which is the index's. Written directly, one record after another, and
described to TFDS afterwards: TFDS' own writer keeps a split in memory, and above 1 GB needs TensorFlow.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from medfuse_jax import records, schema
from medfuse_jax.runtime import files

# One record a group, so that reading one does not unpack its neighbours. Uncompressed: records read twice
# as fast as with zstd (3.7 against 1.8 k/s through TFDS, two cores) for a third more space.
ARRAY_RECORD_OPTIONS = "group_size:1,uncompressed"
SHARD_BYTES = 256 << 20  # a file is closed once it holds as much


def write(folder: Path, task: schema.Task, index: dict[str, dict], records_of: dict, manifest: dict) -> None:
    """Writes a whole dataset to `folder`, which is empty.

    index: split -> the fields of records.INDEX_FIELDS.
    records_of: split -> a function that yields its records in the index's order.
    """
    features = records.features(len(task.labels), task.per_step)
    filled = [split for split in records_of if len(index[split]["stay_id"])]
    splits = [_write_split(folder, task.name, split, features, records_of[split]()) for split in filled]
    for split, info in zip(filled, splits):
        assert info.num_examples == len(index[split]["stay_id"]), split
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=splits,
        version=records.FORMAT_VERSION,
        disable_shuffling=True,
        check_data=False,  # it would read an example with TensorFlow
    )
    for split, fields in index.items():
        np.savez(folder / f"index_{split}.npz", **{name: fields[name] for name in records.INDEX_FIELDS})
    manifest |= {"files": {file.name: files.sha256(file) for file in sorted(folder.iterdir())}}
    manifest |= {"file_bytes": {name: (folder / name).stat().st_size for name in manifest["files"]}}
    manifest |= {"sha256": records.seal(json.loads(json.dumps(manifest)))}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _write_split(folder: Path, name: str, split: str, features, made: Iterator[dict]) -> tfds.core.SplitInfo:
    """Writes a split's records in their order, and says how many are in each file."""
    lengths, unfinished, num_bytes = [], [], 0
    serialized = (_serialize(features, record) for record in made)
    for first in serialized:
        unfinished.append(folder / f"{split}.{len(lengths)}.partial")
        writer = array_record_module.ArrayRecordWriter(str(unfinished[-1]), ARRAY_RECORD_OPTIONS)
        size = length = 0
        for record in itertools.chain([first], serialized):
            writer.write(record)
            size, length = size + len(record), length + 1
            if size >= SHARD_BYTES:
                break
        writer.close()
        lengths.append(length)
        num_bytes += size
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
    )
    for shard, path in enumerate(unfinished):  # how many there are is part of the name
        path.rename(template.sharded_filepath(shard_index=shard, num_shards=len(lengths)))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)


def _serialize(features, record: dict) -> bytes:
    """A record as TFDS stores it, the same bytes in every process: the order of a protobuf's map is not."""
    example = tf_example_pb2.Example()
    example.ParseFromString(features.serialize_example(record))
    return example.SerializeToString(deterministic=True)


def train_statistics(arrays: Iterator[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the 76 channels over every time step of `arrays`.

    0 and 1 for the channels that are not continuous, and where there is no step; a channel that never
    moves has deviation 1, so that it can be divided by.
    """
    channels = list(schema.CONTINUOUS_CHANNELS)
    count, mean, squares = 0, np.zeros(len(channels)), np.zeros(len(channels))
    for ehr_TF in arrays:
        values = ehr_TF[:, channels].astype(np.float64)
        if not len(values):
            continue
        # Chan et al. 1979: merge means and sums of squares, exact enough for any number of steps.
        added, delta = len(values), values.mean(0) - mean
        squares += ((values - values.mean(0)) ** 2).sum(0) + delta**2 * count * added / (count + added)
        mean += delta * added / (count + added)
        count += added
    std = np.sqrt(squares / max(count, 1))
    all_mean, all_std = np.zeros(len(schema.CHANNELS)), np.ones(len(schema.CHANNELS))
    all_mean[channels], all_std[channels] = mean, np.where(std > 1e-8, std, 1.0)
    return all_mean.tolist(), all_std.tolist()
