"""Reading, decoding and collating real shards, as a run's stream does: rows/s of this machine. No device is used.

Without --data_dir, shards of the made-up stays are written first, into a temporary folder. Their train split is small
enough to stay in the file cache, so the disk's speed is not measured.
"""

import importlib.util
import tempfile
from pathlib import Path

import numpy as np

from medfuse_jax import records, schema
from medfuse_jax.bench import clock, cohort, isolated
from medfuse_jax.bench.cases import Case
from medfuse_jax.data import batches as batches_lib
from medfuse_jax.data.dataset import Dataset

_NEEDS = ("grain", "array_record", "tensorflow_datasets", "google.protobuf")
_MAX_STAYS = 4_096


def measure(case: Case, data: Dataset | None = None, say=lambda text: None) -> list[dict]:
    """Return one record, of a pass over the first epoch. data: opened shards, or None to write some."""
    if missing := [name for name in _NEEDS if not _is_installed(name)]:
        return [{"outcome": isolated.LEFT_OUT, "reason": f"{', '.join(missing)} is not installed"}]
    if data is not None:
        return _read(case, data, say)
    with tempfile.TemporaryDirectory() as folder:
        say("writing shards")
        write(Path(folder), case)
        from medfuse_jax.data import dataset

        return _read(case, dataset.open_dataset(folder, "pheno", max_buckets=case.max_buckets), say)


def _read(case: Case, data: Dataset, say) -> list[dict]:
    plan = cohort.train_plan(case, data)

    def run() -> None:
        for _ in batches_lib.batches(data, "train", plan):
            pass

    row = clock.records(clock.interleave({clock.OURS: run}, case.warm_up, case.repeats, say))[clock.OURS]
    rows, images = (
        int((n >= 0).sum()) for n in (np.concatenate([plan.paired_SP, plan.unpaired_SU], 1), plan.paired_SP)
    )
    row |= {"rows_per_s": round(rows / row["seconds"], 1), "images_read_per_s": round(images / row["seconds"], 1)}
    return [row]


def write(folder: Path, case: Case) -> None:
    """Write shards of the case's made-up stays, at most `_MAX_STAYS`; the other splits have one record."""
    from data_prep.write import shards

    case_data = cohort.dataset(case)
    made, part = case_data.splits["train"], case_data.index["train"]
    number = min(len(made), _MAX_STAYS)
    size = schema.IMAGE_SIZE_PX
    texts = dict.fromkeys(schema.STATIC_TEXTS, "")

    def generate(count: int):
        for i in range(count):
            record = made[i]
            image = np.zeros((0, size, size), np.uint8) if record["image"] is None else record["image"][None]
            yield {
                "stay_id": i,
                "subject_id": i,
                "ehr": record["ehr"],
                "label": part["label"][i],
                "has_cxr": bool(part["has_cxr"][i]),
                "dicom_id": str(i),
                "image": image,
                "age": 60.0,
                **texts,
            }

    counts = {split: number if split == "train" else 1 for split in schema.SPLITS}
    index = {}
    for split, count in counts.items():
        index[split] = {name: part[name][:count] for name in ("stay_id", "length", "has_cxr", "label")}
        index[split] |= {"subject_id": np.arange(count), "age": np.full(count, 60.0, np.float32)}
        index[split] |= {name: np.full(count, "") for name in texts}
    channels = len(schema.CHANNELS)
    manifest = {
        "format_version": records.FORMAT_VERSION,
        "task": "pheno",
        "channels": list(schema.CHANNELS),
        "labels": list(schema.TASKS["pheno"].labels),
        "train_mean": [0.0] * channels,
        "train_std": [1.0] * channels,
    }
    task_folder = folder / "pheno"
    task_folder.mkdir()
    records_of = {split: (lambda count=count: generate(count)) for split, count in counts.items()}
    shards.write(task_folder, schema.TASKS["pheno"], index, records_of, manifest)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False
