"""A made-up train split with phenotyping's lengths, and batches sampled from it. Nothing is read from disk.

Shapes: N stays, S steps of a plan, K label; batches as in `data.batches`.
"""

import dataclasses

import numpy as np

from medfuse_jax import schema
from medfuse_jax.bench.cases import Case
from medfuse_jax.data import batches as batches_lib
from medfuse_jax.data import hours as hours_lib
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.models import registry
from medfuse_jax.models.recurrence import chunks

# Lengths of stay: log-normal, as in the synthetic cohort (data_prep/synthetic/cohort.py), which has MIMIC-IV's shape.
MEDIAN_LOS_H, LOS_SPREAD, SHORTEST_H, LONGEST_H = 60.0, 0.9, 5.0, 27 * 24.0
_NUM_IMAGES = 64  # distinct images; their content does not change the speed


def dataset(case: Case) -> Dataset:
    """Make up a phenotyping dataset with only a train split, and phenotyping's lengths."""
    rng = np.random.default_rng(0)
    los_h = np.exp(rng.normal(np.log(MEDIAN_LOS_H), LOS_SPREAD, case.num_stays)).clip(SHORTEST_H, LONGEST_H)
    length_N = np.ceil(los_h / case.timestep_h).astype(np.int32)
    has_cxr_N = rng.permutation(case.num_stays) < round(case.cxr_share * case.num_stays)
    if case.kind != "hourly":
        return of_stays(length_N, has_cxr_N, case.method, max_buckets=case.max_buckets, rng=rng)
    data = of_stays(length_N, has_cxr_N, case.method, "decompensation", case.max_buckets, rng)
    return _with_hours(data, case.timestep_h, rng)


def _with_hours(data: Dataset, timestep_h: float, rng: np.random.Generator) -> Dataset:
    """Add a label at each whole hour after the fourth; a stay's X-ray is taken at any time of it."""
    part = data.index["train"]
    los_h_N = (part["length"] * timestep_h).astype(np.float32)
    num_hours_N = np.maximum(los_h_N.astype(int) - 4, 1)
    time_h_S = np.concatenate([np.arange(5, 5 + n, dtype=np.float32) for n in num_hours_N])
    fields = {
        "num_hours": num_hours_N,
        "label_time_h": time_h_S,
        "label": rng.integers(0, 2, (len(time_h_S), 1), np.int8),
        "num_images": part["has_cxr"].astype(int),
        "cxr_time_h": (rng.random(len(los_h_N)) * los_h_N)[part["has_cxr"]].astype(np.float32),
        "los_h": los_h_N,
    }
    hours = {"train": hours_lib.of(fields, timestep_h)}
    index = {"train": part | {"has_cxr": hours["train"].image_count_N > 0}}
    padded = hours_lib.padded(hours, {"train": part["length"]}, data.buckets)
    return dataclasses.replace(data, hours=hours, index=index, padded_hours=padded)


def of_stays(
    length_N: np.ndarray,
    has_cxr_N: np.ndarray,
    method: str,
    task: str = "pheno",
    max_buckets: int = 1,
    rng: np.random.Generator | None = None,
) -> Dataset:
    """Make up a task's train split of stays with these lengths, some of which have an X-ray."""
    rng = rng or np.random.default_rng(0)
    labels = tuple(f"label {k}" for k in range(len(schema.TASKS[task].labels)))
    index = {
        "stay_id": np.arange(len(length_N)),
        "length": length_N,
        "has_cxr": has_cxr_N,
        "label": rng.integers(0, 2, (len(length_N), len(labels)), np.int8),
    }
    model_class = registry.METHODS[method].model_class
    use_ehr = model_class.uses_ehr and not schema.TASKS[task].cxr_only
    channels = len(schema.CHANNELS)
    return Dataset(
        task=schema.TASKS[task],
        labels=labels,
        splits={"train": _Records(index, rng)},
        index={"train": index},
        manifest={},
        mean_F=np.zeros(channels, np.float32),
        std_F=np.ones(channels, np.float32),
        use_ehr=use_ehr,
        use_cxr=model_class.uses_cxr,
        buckets=plan_lib.buckets(length_N, max_buckets) if use_ehr else (0,),
        shards_digest="",
        digest="",  # there are no shards
    )


class _Records:
    """Records cut on demand from one random array and a few images."""

    def __init__(self, index: dict[str, np.ndarray], rng: np.random.Generator):
        size = schema.IMAGE_SIZE_PX
        self._index = index
        longest = max(1, int(index["length"].max()))
        self._pool = rng.standard_normal((2 * longest, len(schema.CHANNELS)), np.float32)
        self._images = rng.integers(0, 256, (_NUM_IMAGES, size, size), np.uint8)

    def __len__(self) -> int:
        return len(self._index["stay_id"])

    def __getitem__(self, i: int) -> dict:
        start = int(i) % (len(self._pool) // 2)
        ehr = self._pool[start : start + self._index["length"][i]]
        image = self._images[i % _NUM_IMAGES] if self._index["has_cxr"][i] else None
        return {"stay_id": i, "ehr": ehr, "image": image, "images": [image]}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A few batches that represent an epoch. epoch: the whole epoch's plan; plan: the sampled batches' plan."""

    data: Dataset
    epoch: plan_lib.Plan
    plan: plan_lib.Plan
    batches: list[dict]

    def counts(self) -> dict:
        """Count what one repeat processes. The recurrence runs the time steps up to each batch's longest series."""
        longest = [int(batch["length"].max()) for batch in self.batches if "length" in batch]
        return {
            "images_per_batch": self.plan.images_per_batch,
            "batches_per_repeat": len(self.plan),
            "samples_per_repeat": int(sum(batch["valid"].sum() for batch in self.batches)),
            "images_per_repeat": int(sum(batch["image_mask"].sum() for batch in self.batches if "image_mask" in batch)),
            "time_steps_per_repeat": sum(chunks.time_steps_run(n) for n in longest),
        }

    def padding(self) -> dict:
        """Return the share of padding over the epoch: in the buckets, and in the steps that the recurrence runs."""
        length_N = self.data.lengths("train")
        return {
            "steps_per_epoch": len(self.epoch),
            "padded_share_bucket": round(plan_lib.padded_share(self.epoch, length_N), 4),
            "padded_share_run": round(padded_share_run(self.epoch, length_N), 4),
        }


def sample(case: Case, data: Dataset | None = None) -> Sample:
    """Sample `case.num_batches` batches of the first epoch. data: opened shards, or None to make up a dataset."""
    data = data or dataset(case)
    epoch = train_plan(case, data)
    plan = at_quantiles(epoch, data.lengths("train"), case.num_batches)
    batches = [
        batches_lib.read(data, "train", plan_lib.deal(plan, step, case.num_devices), int(plan.padded_length_S[step]))
        for step in range(len(plan))
    ]
    return Sample(data, epoch, plan, batches)


def train_plan(case: Case, data: Dataset) -> plan_lib.Plan:
    """Return the first epoch's plan, as a run makes it."""
    return plan_lib.train_plan(
        data.lengths("train"),
        data.paired("train"),
        data.usable("train"),
        batch_size=case.batch_size,
        seed=0,
        epoch=1,
        buckets=data.buckets,
        packing=data.packing("train"),
    )


def at_quantiles(plan: plan_lib.Plan, length_N: np.ndarray, num_batches: int) -> plan_lib.Plan:
    """Return a plan of `num_batches` batches, at equal quantiles of their longest stay."""
    order = np.argsort(_lengths(plan, length_N).max(1), kind="stable")
    chosen = order[((np.arange(num_batches) + 0.5) / num_batches * len(order)).astype(int)]
    return plan_lib.Plan(plan.paired_SP[chosen], plan.unpaired_SU[chosen], plan.padded_length_S[chosen], plan.packing)


def padded_share_run(plan: plan_lib.Plan, length_N: np.ndarray) -> float:
    """Return the share of padding in the steps that the chunked recurrence runs."""
    length_SB = _lengths(plan, length_N)
    num_run = chunks.time_steps_run(length_SB.max(1)).sum() * length_SB.shape[1]
    return 1.0 - float(length_SB.sum()) / max(1, int(num_run))


def _lengths(plan: plan_lib.Plan, length_N: np.ndarray) -> np.ndarray:
    """Return the time steps of every row of every batch [S, B]; 0 for a padded row."""
    rows_SB = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    return np.where(rows_SB == plan_lib.PADDING, 0, length_N[rows_SB])
