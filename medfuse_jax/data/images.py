"""Which X-rays of each stay are read, where a stay may have several; in order of time.

Shapes: N records, J X-rays that are read, of all records together; of a batch: D devices, P images.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class StayImages:
    """The X-rays of a split.

    image_first_N, image_count_N: each record's X-rays, as places in the J. image_of_J: its number among the record's
    images; image_time_h_J: hours from the beginning of the stay to the X-ray.
    """

    image_first_N: np.ndarray
    image_count_N: np.ndarray
    image_of_J: np.ndarray
    image_time_h_J: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns that `look_up` reads."""
        time_h_J = np.append(self.image_time_h_J, 0).astype(np.float32)  # never empty
        return {"images_first": self.image_first_N, "images_time_h": time_h_J}

    def of_record(self, i: int, images: np.ndarray) -> list[np.ndarray]:
        """Return those of a record's images that are read."""
        first = self.image_first_N[i]
        return [images[number] for number in self.image_of_J[first : first + self.image_count_N[i]]]


def of(fields: dict[str, np.ndarray]) -> StayImages:
    """Return all X-rays of a split from what `records.image_times` reads."""
    count_N = fields["num_images"]
    first_N = (np.cumsum(count_N) - count_N).astype(np.int32)
    number_J = np.arange(int(count_N.sum())) - np.repeat(first_N, count_N)
    return StayImages(first_N, count_N, number_J, fields["cxr_time_h"])


def look_up(columns: dict, rows: dict, record, xp) -> dict:
    """Return what the columns hold of a batch's images, each [D, P] and 0 in empty slots: image_hour (data/hours.py) in
    an hourly task, and image_time_h where all of a row's images are read together.

    columns: of `StayImages.columns`. rows: from `plan.deal`. record [D, B]. xp: numpy or jax.numpy; in a jitted step of
    one device there is no axis D.
    """
    first = xp.take_along_axis(columns["images_first"][record], rows["image_row"], axis=-1)
    place = xp.where(rows["image_mask"], first + rows["image_of"], 0)
    found = {"image_hour": "images_hour"} if "images_hour" in columns else {}
    if "image_slot" in rows:
        found["image_time_h"] = "images_time_h"
    return {name: xp.where(rows["image_mask"], columns[column][place], 0) for name, column in found.items()}
