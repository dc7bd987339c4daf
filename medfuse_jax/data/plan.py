"""Batch plans: which records make up which batch, as a pure function of (seed, epoch).

A plan is computed from the index alone. So the order of the data resumes from a step
number, is the same however many readers or devices there are, and can be looked at
without reading a record.

Shapes: N records, S steps (batches), B rows a batch, P X-rays a batch, D devices.
"""

import dataclasses
import itertools
import math

import numpy as np

PADDING = -1  # a row, or an X-ray slot, with no record


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of one epoch.

    paired_SP: record numbers of the stays whose X-ray is used, PADDING in empty slots.
    unpaired_SU: record numbers of the stays used without an X-ray, U = B - P.
    padded_length_S: time steps to which each batch's series are padded (one of the buckets).
    """

    paired_SP: np.ndarray
    unpaired_SU: np.ndarray
    padded_length_S: np.ndarray

    def __len__(self) -> int:
        return len(self.padded_length_S)

    @property
    def batch_size(self) -> int:
        return self.paired_SP.shape[1] + self.unpaired_SU.shape[1]

    @property
    def images_per_batch(self) -> int:
        return self.paired_SP.shape[1]

    def longest(self) -> int:
        """The step whose series are padded to the most time steps."""
        return int(self.padded_length_S.argmax())


@dataclasses.dataclass(frozen=True)
class Turns:
    """An epoch of batches from two datasets, stays' and X-rays' in turn, spread evenly over it."""

    stays: Plan
    images: Plan

    def __len__(self) -> int:
        return len(self.stays) + len(self.images)

    @property
    def batch_size(self) -> int:
        return self.stays.batch_size

    def at(self, step: int) -> tuple[str, int]:
        """('stays' or 'images', the number of that plan's batch)."""
        before = step * len(self.images) // len(self)
        if (step + 1) * len(self.images) // len(self) > before:
            return "images", before
        return "stays", step - before

    def longest(self) -> int:
        """The step of stays whose series are padded to the most time steps."""
        longest = self.stays.longest()
        return next(step for step in range(len(self)) if self.at(step) == ("stays", longest))


def take_turns(stays: Plan, images: Plan) -> Turns:
    """A batch of X-rays after each of stays; of a longer plan of X-rays as many, another part each epoch."""
    first = slice(len(stays))
    return Turns(stays, Plan(images.paired_SP[first], images.unpaired_SU[first], images.padded_length_S[first]))


def images_per_batch(num_paired: int, num_stays: int, batch_size: int) -> int:
    """The number P of X-ray slots a batch gets: its share of paired stays, at least one if there is any."""
    if num_paired == 0:
        return 0
    if num_paired == num_stays:
        return batch_size
    return min(max(1, round(batch_size * num_paired / num_stays)), batch_size - 1)


def buckets(length_N: np.ndarray, max_buckets: int) -> tuple[int, ...]:
    """At most `max_buckets` padded lengths that waste the fewest steps over the given stays.

    Each distinct one costs a compilation. Exact by dynamic programming over at most 256
    candidate lengths (quantiles, where there are more distinct ones).
    """
    candidates = np.unique(np.quantile(length_N, np.linspace(0, 1, 256), method="higher").astype(int))
    # cost of a bucket (i, j]: the stays longer than candidate i and at most j, each padded to j
    count = np.searchsorted(np.sort(length_N), candidates, side="right")
    best = count * candidates  # one bucket for all up to j
    choices = []
    for _ in range(min(max_buckets, len(candidates)) - 1):
        cost_ij = best[:, None] + (count[None, :] - count[:, None]) * candidates[None, :]
        cost_ij = np.where(np.tri(len(candidates), k=-1, dtype=bool).T, cost_ij, np.iinfo(np.int64).max)
        cost_ij[np.diag_indices(len(candidates))] = best  # one bucket fewer is allowed
        choices.append(cost_ij.argmin(0))
        best = cost_ij.min(0)
    chosen, j = {int(candidates[-1])}, len(candidates) - 1
    for choice in reversed(choices):
        j = choice[j]
        chosen.add(int(candidates[j]))
    return tuple(sorted(chosen))


def train_plan(
    length_N: np.ndarray,
    paired_N: np.ndarray,
    include_N: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    buckets: tuple[int, ...],
    num_images: int | None = None,
    ehr_only_ratio: float = 1.0,
    ehr_only_N: np.ndarray | None = None,
    window: int = 128,
) -> Plan:
    """The batches of one training epoch: every batch with the same number of X-ray slots.

    length_N: time steps of each record; paired_N: which records' X-rays are used;
    include_N: which records take part at all.
    num_images: P, or None for the share of paired stays. A P above that share repeats
    no stay: it makes more batches with fewer EHR-only stays each. Where all stays are paired,
    or none is, there is nothing to choose.
    ehr_only_ratio: the part of the EHR-only stays to take, drawn anew each epoch
    without replacement (the paper's OPTIMAL: 0.2 phenotyping, 0.1 mortality). ehr_only_N: which those are,
    where a method that reads no X-ray has stays with one too; by default all that are not paired.
    window: batches among which stays are sorted by length, so that little is padded.

    Every drawn stay is in exactly one batch. Slots left over are padding, spread evenly.
    """
    rng = np.random.default_rng([seed, epoch])
    paired = rng.permutation(np.flatnonzero(include_N & paired_N))
    unpaired = rng.permutation(np.flatnonzero(include_N & ~paired_N))
    ehr_only = unpaired if ehr_only_N is None else unpaired[ehr_only_N[unpaired]]
    unpaired = unpaired[~np.isin(unpaired, ehr_only[round(ehr_only_ratio * len(ehr_only)) :])]
    if num_images is None or not len(paired) or not len(unpaired):
        num_images = images_per_batch(len(paired), len(paired) + len(unpaired), batch_size)
    num_steps = max(
        math.ceil(len(paired) / num_images) if num_images else 0,
        math.ceil(len(unpaired) / (batch_size - num_images)) if batch_size > num_images else 0,
    )
    assert num_images or not len(paired), "paired stays need X-ray slots"
    assert batch_size > num_images or not len(unpaired), "EHR-only stays need rows"
    paired_SP = _spread(paired, num_steps, num_images)
    unpaired_SU = _spread(unpaired, num_steps, batch_size - num_images)
    for first in range(0, num_steps, window):
        block = slice(first, first + window)
        paired_SP[block] = _sorted_by_length(paired_SP[block], length_N)
        unpaired_SU[block] = _sorted_by_length(unpaired_SU[block], length_N)
    order = rng.permutation(num_steps)
    return _with_steps(paired_SP[order], unpaired_SU[order], length_N, buckets)


def eval_plans(
    length_N: np.ndarray,
    paired_N: np.ndarray,
    include_N: np.ndarray,
    *,
    batch_size: int,
    buckets: tuple[int, ...],
) -> list[Plan]:
    """Plans that score every included record exactly once: one of stays with an X-ray, one of stays without.

    Two plans, so that a batch either has an X-ray in every row or runs no X-ray code at all.
    """
    plans = []
    for records, images in (
        (np.flatnonzero(include_N & paired_N), True),
        (np.flatnonzero(include_N & ~paired_N), False),
    ):
        if not len(records):
            continue
        records = records[np.argsort(length_N[records], kind="stable")]
        rows_SB = np.full(math.ceil(len(records) / batch_size) * batch_size, PADDING)
        rows_SB[: len(records)] = records
        rows_SB = rows_SB.reshape(-1, batch_size)
        none_S0 = rows_SB[:, :0]
        plans.append(_with_steps(*((rows_SB, none_S0) if images else (none_S0, rows_SB)), length_N, buckets))
    return plans


def deal(plan: Plan, step: int, num_devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays one batch out over devices: (rows_DB record numbers, image_row_DP rows with an X-ray).

    Each device gets batch_size / D rows; paired stays are dealt in turn so that no device
    has more than ceil(P / D) X-rays. image_row_DP names the row, within the device's own
    rows, that each X-ray slot belongs to; a slot without an X-ray names the row after the last.
    """
    assert plan.batch_size % num_devices == 0, "checked by config.validate"
    rows_per_device = plan.batch_size // num_devices
    image_slots = math.ceil(plan.images_per_batch / num_devices)
    rows_DB = np.full((num_devices, rows_per_device), PADDING)
    image_row_DP = np.full((num_devices, image_slots), rows_per_device)
    used_D = np.zeros(num_devices, int)
    for slot, record in enumerate(plan.paired_SP[step]):
        device = slot % num_devices
        rows_DB[device, used_D[device]] = record
        if record != PADDING:
            image_row_DP[device, slot // num_devices] = used_D[device]
        used_D[device] += 1
    free = np.arange(rows_per_device)[None] >= used_D[:, None]
    rows_DB[free] = plan.unpaired_SU[step]
    return rows_DB, image_row_DP


def padded_share(plan: Plan, length_N: np.ndarray) -> float:
    """The part of the padded time steps that belongs to no stay's series."""
    rows_SB = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    real = np.where(rows_SB == PADDING, 0, length_N[rows_SB]).sum()
    return 1.0 - float(real) / max(1, int((plan.padded_length_S * rows_SB.shape[1]).sum()))


def _spread(records: np.ndarray, num_steps: int, slots: int) -> np.ndarray:
    """[num_steps, slots] record numbers, the empty slots spread evenly over the batches."""
    table = np.full((num_steps, slots), PADDING)
    ends = np.linspace(0, len(records), num_steps + 1).round().astype(int)
    for step, (start, end) in enumerate(itertools.pairwise(ends)):
        table[step, : end - start] = records[start:end]
    return table


def _sorted_by_length(table: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """The same records in the same filled slots, sorted by length over the whole block."""
    out = table.copy()
    filled = table != PADDING
    records = table[filled]
    out[filled] = records[np.argsort(length_N[records], kind="stable")]
    return out


def _with_steps(paired_SP: np.ndarray, unpaired_SU: np.ndarray, length_N: np.ndarray, buckets: tuple[int, ...]) -> Plan:
    rows_SB = np.concatenate([paired_SP, unpaired_SU], 1)
    longest_S = np.where(rows_SB == PADDING, 0, length_N[rows_SB]).max(1, initial=0)
    edges = np.asarray(buckets)
    assert longest_S.max(initial=0) <= edges[-1], "the last bucket holds the longest stay"
    return Plan(paired_SP, unpaired_SU, edges[np.searchsorted(edges, longest_S)])
