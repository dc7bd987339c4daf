"""Write a task's dataset: ArrayRecord files that TFDS can read, one index per split and a manifest.

Records are written one at a time, in the index's order, and the metadata for TFDS follows at the end. TFDS's own writer
is not used: it holds a whole split in memory, and needs TensorFlow for more than 1 GB.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer

from medfuse_jax import records, schema
from medfuse_jax.runtime import files

# One record per group, so that reading one does not decode its neighbours. Uncompressed records are read twice as
# fast as zstd ones, and take a third more space.
ARRAY_RECORD_OPTIONS = "group_size:1,uncompressed"
SHARD_BYTES = 256 << 20  # a shard is closed once it holds this much


def write(folder: Path, task: schema.Task, index: dict[str, dict], records_of: dict, manifest: dict) -> None:
    """Write a dataset to `folder`, which must be empty.

    index: split -> the fields of records.INDEX_FIELDS. records_of: split -> a function that yields its records in the
    index's order. manifest['images']: see records.ALL_IMAGES.
    """
    all_images = manifest.get("images") == records.ALL_IMAGES
    features = records.features(len(task.labels), task.hourly, all_images)
    times = records.HOURS_FIELDS if task.hourly else ("cxr_time_h",) if all_images else ()
    filled = [split for split in records_of if len(index[split]["stay_id"])]
    times_of: dict[str, list[dict]] = {split: [] for split in records_of}
    names_of: dict[str, list[list[str]]] = {split: [] for split in records_of}  # of the X-rays of each record

    def rows(split: str) -> Iterator[dict]:
        for row in records_of[split]():
            names_of[split].append(row["dicom_id"].split())
            if times:
                times_of[split].append({name: row[name] for name in times})
            yield row

    splits = [_write_split(folder, task.name, split, features, rows(split)) for split in filled]
    for split, info in zip(filled, splits):
        assert info.num_examples == len(index[split]["stay_id"]), split
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=splits,
        version=records.FORMAT_VERSION,
        disable_shuffling=True,
        check_data=False,  # the check needs TensorFlow
    )
    for split, fields in index.items():
        race = {schema.RACE: fields[schema.RACE]} if schema.RACE in fields else {}
        stored = {name: fields[name] for name in records.INDEX_FIELDS} | race | records.join_names(names_of[split])
        np.savez(folder / f"index_{split}.npz", **stored)
        if task.hourly:
            np.savez(folder / f"hours_{split}.npz", **records.join_hours(times_of[split], len(task.labels)))
        elif all_images:
            np.savez(folder / f"images_{split}.npz", **records.join_image_times(times_of[split]))
    manifest |= {"files": {file.name: files.sha256(file) for file in sorted(folder.iterdir())}}
    manifest |= {"file_bytes": {name: (folder / name).stat().st_size for name in manifest["files"]}}
    manifest |= {"sha256": records.seal(json.loads(json.dumps(manifest)))}
    files.write_json(folder / "manifest.json", manifest, sort_keys=False)


def _write_split(folder: Path, name: str, split: str, features, rows: Iterator[dict]) -> tfds.core.SplitInfo:
    """Write a split's records in order; return its SplitInfo, with the number of records in each shard."""
    lengths, unfinished, num_bytes = [], [], 0
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    # As TFDS serializes a record, but with map entries in a fixed order: every process writes the same bytes.
    serialized = (
        serializer.get_tf_example(features.encode_example(row)).SerializeToString(deterministic=True) for row in rows
    )
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
    for shard, path in enumerate(unfinished):  # renamed last: the name contains the number of shards
        path.rename(template.sharded_filepath(shard_index=shard, num_shards=len(lengths)))
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
