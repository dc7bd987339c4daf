"""The prediction hours of an hourly task: which labels, time steps and X-rays belong to each.

Shapes: N records, S hours of all records together, J X-rays that an hour sees, K labels; of a batch: D devices, B rows,
H hours of a row, P images.

At an hour a model may read the whole time steps before it, and the latest X-ray taken by then, or all of them. An X-ray
is never read if no hour sees it: it was taken after the last hour or, where only the latest is read, another followed
before the next hour.
"""

import dataclasses

import numpy as np

from medfuse_jax.data.images import StayImages

_EPSILON_H = 1e-4  # of a time in float32
_LONGEST_H = 2**14  # above the hours of any stay; a power of two, so that sums with it are exact


@dataclasses.dataclass(frozen=True)
class Hours(StayImages):
    """The prediction hours of a split, and its X-rays that an hour sees.

    first_N, count_N: each record's hours, as places in the S. label_SK int8; time_h_S float32; steps_S: the whole time
    steps before the hour; remaining_h_S: from the hour to the end of the stay; has_cxr_S: whether it sees an X-ray.
    image_hour_J: the record's first hour that sees the X-ray.
    """

    first_N: np.ndarray
    count_N: np.ndarray
    label_SK: np.ndarray
    time_h_S: np.ndarray
    steps_S: np.ndarray
    remaining_h_S: np.ndarray
    has_cxr_S: np.ndarray
    image_hour_J: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns that `look_up` reads, here and in `images`."""
        return super().columns() | {
            "hour_first": self.first_N,
            "hour_count": self.count_N,
            "hour_label": self.label_SK,
            "hour_step": self.steps_S,
            "images_hour": np.append(self.image_hour_J, 0).astype(np.int32),  # never empty
        }

    def rows(self, include_N: np.ndarray) -> np.ndarray:
        """Return the places [R] of the included records' hours, in order."""
        return np.flatnonzero(np.repeat(include_N, self.count_N))


def of(fields: dict[str, np.ndarray], timestep_h: float, all_images: bool = False) -> Hours:
    """Return the hours of a split from what `records.hours` reads.

    all_images: whether an hour reads all X-rays taken by then, not the latest alone.
    """
    count_N, num_images_N, time_h_S = fields["num_hours"], fields["num_images"], fields["label_time_h"]
    record_S, record_J = (np.repeat(np.arange(len(n)), n) for n in (count_N, num_images_N))
    # The first hour at or after each X-ray, among the hours of all records in one ascending sequence.
    at_S, at_J = (
        record * float(_LONGEST_H) + time_h
        for record, time_h in ((record_S, time_h_S), (record_J, fields["cxr_time_h"]))
    )
    place_J = np.searchsorted(at_S, at_J, side="left")
    first_N = np.cumsum(count_N) - count_N
    is_seen_J = place_J < (first_N + count_N)[record_J]
    if not all_images:
        is_seen_J[:-1] &= (place_J[1:] != place_J[:-1]) | (record_J[1:] != record_J[:-1])
    hour_J = place_J - first_N[record_J]
    image_count_N = np.bincount(record_J[is_seen_J], minlength=len(count_N))
    since_N = np.full(len(count_N), _LONGEST_H)  # the first hour of the record that sees any X-ray
    np.minimum.at(since_N, record_J[is_seen_J], hour_J[is_seen_J])
    since_S = since_N[record_S]
    return Hours(
        first_N=first_N.astype(np.int32),
        count_N=count_N.astype(np.int32),
        label_SK=fields["label"],
        time_h_S=time_h_S,
        steps_S=np.floor(time_h_S / timestep_h + _EPSILON_H).astype(np.int32),
        remaining_h_S=np.maximum(fields["los_h"][record_S] - time_h_S, 0),
        has_cxr_S=np.arange(len(time_h_S)) - first_N[record_S] >= since_S,
        image_first_N=(np.cumsum(image_count_N) - image_count_N).astype(np.int32),
        image_count_N=image_count_N,
        image_time_h_J=fields["cxr_time_h"][is_seen_J],
        image_of_J=(np.arange(len(record_J)) - (np.cumsum(num_images_N) - num_images_N)[record_J])[is_seen_J],
        image_hour_J=hour_J[is_seen_J].astype(np.int32),
    )


def padded(hours: dict[str, Hours], length_of: dict[str, np.ndarray], buckets: tuple[int, ...]) -> dict[int, int]:
    """Return the hours H to which batches are padded, by the time steps to which their series are."""
    count_N = np.concatenate([hours[split].count_N for split in hours])
    length_N = np.concatenate([length_of[split] for split in hours])
    return {bucket: int(count_N[length_N <= bucket].max(initial=1)) for bucket in buckets}


def look_up(columns: dict, rows: dict, valid, record, xp) -> dict:
    """Return a batch's hours: label float32 [D, B, H, K], hour_step int32 and hour_mask bool [D, B, H].

    columns: of `Hours.columns`. rows: from `plan.deal`. valid, record [D, B]. xp: numpy or jax.numpy; in a jitted step
    of one device there is no axis D.
    """
    hour = rows["hour"][..., None, :]
    mask = hour < xp.where(valid, columns["hour_count"][record], 0)[..., None]
    place = xp.where(mask, columns["hour_first"][record][..., None] + hour, 0)
    return {
        "hour_mask": mask,
        "hour_step": xp.where(mask, columns["hour_step"][place], 0).astype(xp.int32),
        "label": xp.where(mask[..., None], columns["hour_label"][place], 0).astype(xp.float32),
    }
