"""Reading, decoding and collating real shards, as a run's stream does: rows/s of this machine. No device is used.

Without --data_dir, those of a synthetic cohort, which is built on first use. Its train split is small enough to stay in
the file cache, so the disk's speed is not measured.

`rows_per_s` is by the clock, `rows_per_cpu_s` by the processor time of all threads, which other programs hardly change.
"""

import importlib.util
import time

import numpy as np

from medfuse_jax.bench import clock, cohort, isolated
from medfuse_jax.bench.cases import Case
from medfuse_jax.data import batches as batches_lib
from medfuse_jax.data import dataset
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.models import registry

_NEEDS = ("grain", "array_record", "tensorflow_datasets", "google.protobuf", "polars", "ml_collections")
_NUM_STAYS = 1500  # as the demo's


def measure(case: Case, data: Dataset | None = None, say=lambda text: None) -> list[dict]:
    """Return one record, of a pass over the first epoch. data: opened shards, or None to write some."""
    if missing := [name for name in _NEEDS if not _is_installed(name)]:
        return [{"outcome": isolated.LEFT_OUT, "reason": f"{', '.join(missing)} is not installed"}]
    if data is not None:
        return _read(case, data, say)
    from medfuse_jax.data import synthetic  # late: it needs packages that a benchmark's machine may lack

    say("building the synthetic cohort")
    model_class = registry.METHODS[case.method].model_class
    task = "pheno" if model_class.uses_ehr else "radiology"
    folder = synthetic.build(_NUM_STAYS, case.cxr_share, [task])
    reads = {"use_ehr": model_class.uses_ehr, "use_cxr": model_class.uses_cxr}
    return _read(case, dataset.open_dataset(folder, task, max_buckets=case.max_buckets, **reads), say)


def _read(case: Case, data: Dataset, say) -> list[dict]:
    plan, cpu_s = cohort.train_plan(case, data), []

    def run() -> None:
        start_s = time.process_time()
        for _ in batches_lib.batches(data, "train", plan):
            pass
        cpu_s.append(time.process_time() - start_s)

    row = clock.records(clock.interleave({clock.OURS: run}, case.warm_up, case.repeats, say))[clock.OURS]
    rows, images = (
        int((n >= 0).sum()) for n in (np.concatenate([plan.paired_SP, plan.unpaired_SU], 1), plan.paired_SP)
    )
    row |= {"rows_per_s": round(rows / row["seconds"], 1), "images_read_per_s": round(images / row["seconds"], 1)}
    row["rows_per_cpu_s"] = round(rows / float(np.median(cpu_s[case.warm_up :])), 1)
    return [row | {"readers": batches_lib.num_readers(0)}]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False
