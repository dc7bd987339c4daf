"""Batch plans: which records form which batch, as a pure function of (seed, epoch).

A plan is computed from the index alone. So the data order resumes from a step number, does not depend on the number
of readers or devices, and can be inspected without reading a record.

Shapes: N records, S steps (batches), B rows of a batch, P image slots of a batch, D devices.
"""

import dataclasses
import itertools
import math

import numpy as np

PADDING = -1  # in place of a record number: an empty row or image slot


@dataclasses.dataclass(frozen=True)
class Packing:
    """How batches are laid out where a stay may have several images.

    image_count_N: the images of each record; they lie one after another in the slots of its row's device.
    padded_images: the images of a row, by padded_length; None if a row reads one image at most. padded_hours: the hours
    of a row, by padded_length; None unless the task is hourly.
    """

    image_count_N: np.ndarray
    padded_images: dict[int, int] | None = None
    padded_hours: dict[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of one epoch.

    paired_SP: record numbers of the stays whose X-ray is used, PADDING in empty slots.
    unpaired_SU: record numbers of the stays used without an X-ray, U = B - P.
    padded_length_S: time steps to which each batch's series are padded (one of the buckets).
    packing: None if a paired stay has one image, and a device ceil(P / D) slots. Otherwise its slots of a batch are as
    many as the images of its stays, rounded up to a power of two, because each number costs a compilation.
    """

    paired_SP: np.ndarray
    unpaired_SU: np.ndarray
    padded_length_S: np.ndarray
    packing: Packing | None = None

    def __len__(self) -> int:
        return len(self.padded_length_S)

    @property
    def batch_size(self) -> int:
        return self.paired_SP.shape[1] + self.unpaired_SU.shape[1]

    @property
    def images_per_batch(self) -> int:
        return self.paired_SP.shape[1]

    def longest(self) -> int:
        """Return the number of the batch with the longest series."""
        return int(self.padded_length_S.argmax())


@dataclasses.dataclass(frozen=True)
class Alternating:
    """An epoch of batches from two datasets: those of X-rays are spread evenly among those of stays."""

    stays: Plan
    cxr: Plan

    def __len__(self) -> int:
        return len(self.stays) + len(self.cxr)

    @property
    def batch_size(self) -> int:
        return self.stays.batch_size

    def at(self, step: int) -> tuple[bool, int]:
        """Return whether the step's batch is one of X-rays, and its number in its plan."""
        cxr_before = step * len(self.cxr) // len(self)
        if (step + 1) * len(self.cxr) // len(self) > cxr_before:
            return True, cxr_before
        return False, step - cxr_before

    def longest(self) -> int:
        """Return the step with the longest series."""
        longest = self.stays.longest()
        return next(step for step in range(len(self)) if self.at(step) == (False, longest))


def alternate(stays: Plan, cxr: Plan) -> Alternating:
    """Mix batches of stays with at most as many of X-rays; if there are more of X-rays, each epoch uses other ones."""
    first = slice(len(stays))
    return Alternating(stays, Plan(cxr.paired_SP[first], cxr.unpaired_SU[first], cxr.padded_length_S[first]))


def images_per_batch(num_paired: int, num_stays: int, batch_size: int) -> int:
    """Return P, the image slots of a batch: its share of paired stays, at least one if any stay is paired."""
    if num_paired == 0:
        return 0
    if num_paired == num_stays:
        return batch_size
    return min(max(1, round(batch_size * num_paired / num_stays)), batch_size - 1)


def buckets(length_N: np.ndarray, max_buckets: int) -> tuple[int, ...]:
    """Choose at most `max_buckets` padded lengths that pad the given stays least.

    Each length costs a compilation. The choice is exact, by dynamic programming over at most 256 candidate lengths
    (quantiles, if there are more distinct ones).
    """
    candidates = np.unique(np.quantile(length_N, np.linspace(0, 1, 256), method="higher").astype(int))
    # The cost of a bucket (i, j]: stays longer than candidate i and at most as long as j, each padded to j.
    count = np.searchsorted(np.sort(length_N), candidates, side="right")
    best = count * candidates  # one bucket for all stays up to j
    choices = []
    for _ in range(min(max_buckets, len(candidates)) - 1):
        cost_ij = best[:, None] + (count[None, :] - count[:, None]) * candidates[None, :]
        cost_ij = np.where(np.tri(len(candidates), k=-1, dtype=bool).T, cost_ij, np.iinfo(np.int64).max)
        cost_ij[np.diag_indices(len(candidates))] = best  # using one bucket fewer is allowed
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
    packing: Packing | None = None,
) -> Plan:
    """Return the batches of one training epoch, all with the same number of image slots.

    length_N: time steps of each record; paired_N: whose X-ray is used; include_N: which records take part.
    num_images: P, or None for the share of paired stays. A larger P repeats no stay: the epoch has more batches, with
    fewer EHR-only stays each. It is ignored if all stays or none are paired.
    ehr_only_ratio: fraction of the EHR-only stays, drawn anew each epoch without replacement (the paper's OPTIMAL: 0.2
    for phenotyping, 0.1 for mortality). ehr_only_N: which stays these are; default: all that are not paired (a method
    that reads no image sees paired stays too).
    window: how many batches' stays are sorted by length together, to reduce padding.

    Every drawn stay is in exactly one batch. Slots left over are padding, spread evenly.
    """
    rng = np.random.default_rng([seed, epoch])
    paired = rng.permutation(np.flatnonzero(include_N & paired_N))
    unpaired = rng.permutation(np.flatnonzero(include_N & ~paired_N))
    ehr_only = unpaired if ehr_only_N is None else unpaired[ehr_only_N[unpaired]]
    unpaired = unpaired[~np.isin(unpaired, ehr_only[round(ehr_only_ratio * len(ehr_only)) :])]
    if num_images is None or not len(paired) or not len(unpaired):
        num_images = images_per_batch(len(paired), len(paired) + len(unpaired), batch_size)
    num_batches = max(
        math.ceil(len(paired) / num_images) if num_images else 0,
        math.ceil(len(unpaired) / (batch_size - num_images)) if batch_size > num_images else 0,
    )
    assert num_images or not len(paired), "paired stays need image slots"
    assert batch_size > num_images or not len(unpaired), "EHR-only stays need rows"
    paired_SP = _spread(paired, num_batches, num_images)
    unpaired_SU = _spread(unpaired, num_batches, batch_size - num_images)
    for first in range(0, num_batches, window):
        block = slice(first, first + window)
        paired_SP[block] = _sorted_by_length(paired_SP[block], length_N)
        unpaired_SU[block] = _sorted_by_length(unpaired_SU[block], length_N)
    order = rng.permutation(num_batches)
    return _with_padded_lengths(paired_SP[order], unpaired_SU[order], length_N, buckets, packing)


def eval_plans(
    length_N: np.ndarray,
    paired_N: np.ndarray,
    include_N: np.ndarray,
    *,
    batch_size: int,
    buckets: tuple[int, ...],
    packing: Packing | None = None,
) -> list[Plan]:
    """Return plans that score every included record exactly once: one of stays with an X-ray, one of stays without.

    Thus a batch either has an image in every row or does not run the image encoder at all.
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
        parts = (rows_SB, none_S0) if images else (none_S0, rows_SB)
        plans.append(_with_padded_lengths(*parts, length_N, buckets, packing))
    return plans


def deal(plan: Plan, step: int, num_devices: int) -> dict[str, np.ndarray]:
    """Lay one batch out over D devices, B / D rows each: {record, row_id, image_row, image_mask}, as in `batches`.

    The image fields are left out if the plan has no image slots. Paired stays are dealt to the devices in turn, so that
    none has more than ceil(P / D) images. image_row counts rows within the device, and is 0 in an empty slot.
    With plan.packing, a batch also has image_of [D, P], the image's number among those of its stay; image_slot
    [D, B, M], the slots of each row's images, -1 without; and hour [D, H], the numbers of a row's hours.
    """
    assert plan.batch_size % num_devices == 0, "checked by config.validate"
    num_rows = plan.batch_size // num_devices
    num_slots = math.ceil(plan.images_per_batch / num_devices)
    count_P = (plan.paired_SP[step] != PADDING).astype(int)
    packing, padded_length = plan.packing, int(plan.padded_length_S[step])
    if packing:
        count_P = np.where(count_P, packing.image_count_N[plan.paired_SP[step]], 0)
        most = max(int(count_P[device::num_devices].sum()) for device in range(num_devices))
        num_slots = num_slots and 1 << (max(most, num_slots) - 1).bit_length()
    record_DB = np.full((num_devices, num_rows), PADDING, np.int32)
    row_id_DB = np.zeros_like(record_DB)  # in the plan, so that augmentation and dropout do not depend on D
    image_row_DP = np.zeros((num_devices, num_slots), np.int32)
    image_mask_DP = np.zeros((num_devices, num_slots), bool)
    image_of_DP = np.zeros((num_devices, num_slots), np.int32)
    most_images = packing.padded_images[padded_length] if packing and packing.padded_images else 1
    image_slot_DBM = np.full((num_devices, num_rows, most_images), PADDING, np.int32)
    used_D = np.zeros(num_devices, int)
    for i, record in enumerate(plan.paired_SP[step]):
        device, slot = i % num_devices, i // num_devices
        slot = int(image_mask_DP[device].sum()) if packing else slot
        slots = slice(slot, slot + count_P[i])
        record_DB[device, used_D[device]], row_id_DB[device, used_D[device]] = record, i
        image_row_DP[device, slots], image_mask_DP[device, slots] = used_D[device], True
        image_of_DP[device, slots] = np.arange(count_P[i])
        if packing and packing.padded_images:
            image_slot_DBM[device, used_D[device], : count_P[i]] = slot + np.arange(count_P[i])
        used_D[device] += 1
    free_DB = np.arange(num_rows)[None] >= used_D[:, None]
    record_DB[free_DB] = plan.unpaired_SU[step]
    row_id_DB[free_DB] = np.arange(plan.images_per_batch, plan.batch_size)
    rows = {"record": record_DB, "row_id": row_id_DB}
    if num_slots:
        rows |= {"image_row": image_row_DP, "image_mask": image_mask_DP}
        rows |= {"image_of": image_of_DP} if packing else {}
        rows |= {"image_slot": image_slot_DBM} if packing and packing.padded_images else {}
    if packing and packing.padded_hours:
        hour_H = np.arange(packing.padded_hours[padded_length], dtype=np.int32)
        rows["hour"] = np.tile(hour_H, (num_devices, 1))
    return rows


def padded_share(plan: Plan, length_N: np.ndarray) -> float:
    """Return the fraction of the computed time steps that is padding."""
    rows_SB = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    real = np.where(rows_SB == PADDING, 0, length_N[rows_SB]).sum()
    return 1.0 - float(real) / max(1, int((plan.padded_length_S * rows_SB.shape[1]).sum()))


def _spread(records: np.ndarray, num_batches: int, slots: int) -> np.ndarray:
    """Return record numbers [num_batches, slots], with the empty slots spread evenly over the batches."""
    table = np.full((num_batches, slots), PADDING)
    ends = np.linspace(0, len(records), num_batches + 1).round().astype(int)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        table[i, : end - start] = records[start:end]
    return table


def _sorted_by_length(table: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """Sort the records by length over the whole block; empty slots stay where they are."""
    out = table.copy()
    filled = table != PADDING
    records = table[filled]
    out[filled] = records[np.argsort(length_N[records], kind="stable")]
    return out


def _with_padded_lengths(
    paired_SP: np.ndarray,
    unpaired_SU: np.ndarray,
    length_N: np.ndarray,
    buckets: tuple[int, ...],
    packing: Packing | None,
) -> Plan:
    rows_SB = np.concatenate([paired_SP, unpaired_SU], 1)
    longest_S = np.where(rows_SB == PADDING, 0, length_N[rows_SB]).max(1, initial=0)
    edges = np.asarray(buckets)
    assert longest_S.max(initial=0) <= edges[-1], "the last bucket holds the longest stay"
    return Plan(paired_SP, unpaired_SU, edges[np.searchsorted(edges, longest_S)], packing)
