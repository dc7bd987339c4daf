"""One task's dataset on disk: TFDS files in ArrayRecord format, an index a split, a manifest.

Record order is the order given here, which is the index's.
"""

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from medfuse_jax import files, records, tasks

# One record a group, so that reading one does not unpack its neighbours. Uncompressed: records read twice
# as fast as with zstd (3.7 against 1.8 k/s through TFDS, two cores) for a third more space.
ARRAY_RECORD_OPTIONS = "group_size:1,uncompressed"


class _Writer(tfds.core.ExampleWriter):
    """Writes ArrayRecord files with our options, and the same bytes in every process.

    TFDS serialises the map of a tf.Example in an order that changes from process to process.
    """

    def write(self, path, examples):
        writer = array_record_module.ArrayRecordWriter(str(path), ARRAY_RECORD_OPTIONS)
        example = tf_example_pb2.Example()
        for _, serialized in examples:
            example.ParseFromString(serialized)
            writer.write(example.SerializeToString(deterministic=True))
        writer.close()


class _Records(tfds.core.GeneratorBasedBuilder):
    """Writes given records; a subclass a task, because TFDS names files by the class."""

    VERSION = tfds.core.Version(records.FORMAT_VERSION)
    pkg_dir_path = Path(__file__).parent

    def __init__(self, records_of: dict[str, Callable[[], Iterator[dict]]], task: tasks.Task, **kwargs):
        self._records_of = records_of
        self._task = task
        super().__init__(**kwargs)

    def _info(self):
        features = records.features(len(self._task.labels), self._task.per_step)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _example_writer(self):
        return _Writer(self.info.file_format)

    def _split_generators(self, dl_manager):
        return {split: enumerate(make()) for split, make in self._records_of.items()}

    def _generate_examples(self):
        raise AssertionError("the generators are given to _split_generators")


class Pheno(_Records):
    """Phenotyping."""


class Mortality(_Records):
    """In-hospital mortality."""


class Radiology(_Records):
    """Films and their CheXpert labels."""


class Decompensation(_Records):
    """Death within 24 h, at every hour."""


class LengthOfStay(_Records):
    """Remaining length of stay, at every hour."""


BUILDERS = {
    "pheno": Pheno,
    "mortality": Mortality,
    "radiology": Radiology,
    "decompensation": Decompensation,
    "length_of_stay": LengthOfStay,
}


def write(folder: Path, task: tasks.Task, index: dict[str, dict], records_of: dict, manifest: dict) -> None:
    """Writes a whole dataset to `folder`, which is empty.

    index: split -> the fields of records.INDEX_FIELDS.
    records_of: split -> a function that yields its records in the index's order.
    """
    filled = {split: make for split, make in records_of.items() if len(index[split]["stay_id"])}
    scratch = folder / "tfds"
    with _quiet_tfds():
        builder = BUILDERS[task.name](filled, task, data_dir=scratch, file_format="array_record")
        builder.download_and_prepare()
    for split in filled:
        assert builder.info.splits[split].num_examples == len(index[split]["stay_id"]), split
    for file in Path(builder.data_dir).iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(scratch)
    for split, fields in index.items():
        np.savez(folder / f"index_{split}.npz", **{name: fields[name] for name in records.INDEX_FIELDS})
    manifest |= {"files": {file.name: files.sha256(file) for file in sorted(folder.iterdir())}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


@contextlib.contextmanager
def _quiet_tfds():
    """Keeps TFDS from printing: the build has its own bar."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tfds.enable_progress_bar()


def train_statistics(arrays: Iterator[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and deviation of the 76 channels over every time step of `arrays`.

    0 and 1 for the channels that are not continuous, and where there is no step; a channel that never
    moves has deviation 1, so that it can be divided by.
    """
    channels = list(tasks.CONTINUOUS_CHANNELS)
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
    all_mean, all_std = np.zeros(len(tasks.CHANNELS)), np.ones(len(tasks.CHANNELS))
    all_mean[channels], all_std[channels] = mean, np.where(std > 1e-8, std, 1.0)
    return all_mean.tolist(), all_std.tolist()
