"""A made-up split with phenotyping's lengths, as the input pipeline takes it; nothing is read from a disk.

Shapes: N stays, T time, K label; batches as in `input_pipeline`.
"""

import numpy as np

from medfuse_jax import schema
from medfuse_jax.bench.cases import Case
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.models import registry

# Lengths of stay: log-normal, as in the synthetic cohort (data_prep/synthetic/cohort.py), which has MIMIC-IV's shape.
MEDIAN_LOS_H, LOS_SPREAD, SHORTEST_H, LONGEST_H = 60.0, 0.9, 5.0, 27 * 24.0
_NUM_IMAGES = 64  # distinct images; what they show is of no matter to speed


def dataset(case: Case) -> batches.Dataset:
    """The split 'train' of a made-up phenotyping dataset."""
    rng = np.random.default_rng(0)
    los_h = np.exp(rng.normal(np.log(MEDIAN_LOS_H), LOS_SPREAD, case.num_stays)).clip(SHORTEST_H, LONGEST_H)
    length_N = np.ceil(los_h / case.timestep_h).astype(np.int32)
    labels = tuple(f"label {k}" for k in range(25))  # as many as the phenotypes
    index = {
        "stay_id": np.arange(case.num_stays),
        "length": length_N,
        "has_cxr": rng.permutation(case.num_stays) < round(case.cxr_share * case.num_stays),
        "label": rng.integers(0, 2, (case.num_stays, len(labels)), np.int8),
    }
    method, _ = registry.METHODS[case.method]
    channels = len(schema.CHANNELS)
    return batches.Dataset(
        task=schema.TASKS["pheno"],
        labels=labels,
        splits={"train": _Records(index, rng)},
        index={"train": index},
        manifest={},
        mean_F=np.zeros(channels, np.float32),
        std_F=np.ones(channels, np.float32),
        use_ehr=method.uses_ehr,
        use_cxr=method.uses_cxr,
        buckets=plan_lib.buckets(length_N, case.max_buckets) if method.uses_ehr else (0,),
        digest="",  # there are no shards
    )


class _Records:
    """Records made on demand, out of one pool of numbers and few images."""

    def __init__(self, index: dict[str, np.ndarray], rng: np.random.Generator):
        size = schema.IMAGE_SIZE_PX
        self._index = index
        self._pool = rng.standard_normal((2 * int(index["length"].max()), len(schema.CHANNELS)), np.float32)
        self._images = rng.integers(0, 256, (_NUM_IMAGES, size, size), np.uint8)

    def __len__(self) -> int:
        return len(self._index["stay_id"])

    def __getitem__(self, i: int) -> dict:
        start = int(i) % (len(self._pool) // 2)
        ehr = self._pool[start : start + self._index["length"][i]]
        image = self._images[i % _NUM_IMAGES] if self._index["has_cxr"][i] else None
        return {"stay_id": i, "ehr": ehr, "image": image}


def train_plan(case: Case, data: batches.Dataset) -> plan_lib.Plan:
    """The first epoch's plan, as a run makes it."""
    return plan_lib.train_plan(
        data.lengths("train"),
        data.paired("train"),
        data.usable("train"),
        batch_size=case.batch_size,
        seed=0,
        epoch=1,
        buckets=data.buckets,
    )


def sample(plan: plan_lib.Plan, length_N: np.ndarray, num_batches: int) -> plan_lib.Plan:
    """Few batches that stand for the epoch: those at equal quantiles of the batches' longest stay."""
    rows_SB = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    longest_S = np.where(rows_SB == plan_lib.PADDING, 0, length_N[rows_SB]).max(1)
    order = np.argsort(longest_S, kind="stable")
    chosen = order[((np.arange(num_batches) + 0.5) / num_batches * len(order)).astype(int)]
    return plan_lib.Plan(plan.paired_SP[chosen], plan.unpaired_SU[chosen], plan.padded_length_S[chosen])


def collate_all(data: batches.Dataset, plan: plan_lib.Plan, num_devices: int) -> list[dict]:
    """The batches of a plan as the input pipeline lays them out."""
    dealt = (plan_lib.deal(plan, step, num_devices) for step in range(len(plan)))
    return [
        batches.collate(data, "train", rows_DB, image_row_DP, int(num_steps))
        for (rows_DB, image_row_DP), num_steps in zip(dealt, plan.padded_length_S)
    ]


def padded_share_run(plan: plan_lib.Plan, length_N: np.ndarray, chunk_steps: int) -> float:
    """The part of the steps that the chunked recurrence computes and no stay has."""
    rows_SB = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    length_SB = np.where(rows_SB == plan_lib.PADDING, 0, length_N[rows_SB])
    run_S = -(-length_SB.max(1) // chunk_steps) * chunk_steps
    return 1.0 - float(length_SB.sum()) / max(1, int(run_S.sum() * rows_SB.shape[1]))
