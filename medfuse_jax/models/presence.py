"""Which image belongs to which row of a batch, and which rows have an image.

Shapes: B rows, P images, M images of a row at most, H W pixels, C channels, E features of an image.

The encoder processes only the images that exist: P of them, not B. Differs from MedFuse (datasets/fusion.py), which
computes a zero image for every stay without an X-ray.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a batch of `num_rows` rows, or their features, computed earlier by a frozen encoder.

    Exactly one of image_PHWC and features_PE is given. valid_P: False in an empty slot, whose pixels or features are
    zeros. row_P: each image's row, num_rows in an empty slot; None in the dense form, where image b belongs to row b.
    slot_B: in an hourly task, whose rows are hours: the slot of the latest image by then, or -1.
    slot_BM: the slots of each row's images in order of time, or -1, where a row may have several. time_h_P: when each
    was taken, in hours since the stay began.
    """

    image_PHWC: jax.Array | None
    features_PE: jax.Array | None
    valid_P: jax.Array
    row_P: jax.Array | None
    num_rows: int
    slot_B: jax.Array | None = None
    slot_BM: jax.Array | None = None
    time_h_P: jax.Array | None = None

    def to_rows(self, x_PE: jax.Array) -> jax.Array:
        """Scatter values of images to their rows [B, E]; rows without an image get zeros."""
        if self.slot_B is not None:
            return at_slots(x_PE, self.slot_B)
        if self.row_P is None:
            return jnp.where(self.valid_P[:, None], x_PE, 0)
        return jnp.zeros((self.num_rows, *x_PE.shape[1:]), x_PE.dtype).at[self.row_P].set(x_PE, mode="drop")

    def slots(self) -> jax.Array:
        """Return the slots of each row's images in order of time [B, M], -1 for none."""
        if self.slot_BM is not None:
            return self.slot_BM
        if self.slot_B is not None:
            return self.slot_B[:, None]
        if self.row_P is None:
            return jnp.where(self.valid_P, jnp.arange(self.num_rows), -1)[:, None]
        slot_P = jnp.arange(len(self.row_P))
        return jnp.full(self.num_rows, -1).at[self.row_P].set(slot_P, mode="drop")[:, None]

    def from_rows(self, x_BE: jax.Array) -> jax.Array:
        """Gather values of rows for their images [P, E]; empty slots get zeros."""
        if self.row_P is None:
            return jnp.where(self.valid_P[:, None], x_BE, jnp.zeros_like(x_BE))
        return jnp.asarray(x_BE).at[self.row_P].get(mode="fill", fill_value=0)

    def present_rows(self) -> jax.Array:
        """Return bool [B]: which rows have an image."""
        if self.slot_BM is not None:
            return (self.slot_BM >= 0).any(axis=1)
        if self.slot_B is not None:
            return self.slot_B >= 0
        if self.row_P is None:
            return self.valid_P
        return rows_with_image(self.row_P, self.valid_P, self.num_rows)


def at_slots(x_PE: jax.Array, slot: jax.Array) -> jax.Array:
    """Gather values of images by their slots, of any shape [..., E]; zeros where a slot is -1."""
    return jnp.where(slot[..., None] >= 0, x_PE[jnp.maximum(slot, 0)], 0)


def last_places(slot_BM: jax.Array) -> jax.Array:
    """Return the place m of each row's last image, -1 without one."""
    return jnp.where(slot_BM >= 0, jnp.arange(slot_BM.shape[1]), -1).max(axis=1)


def rows_with_image(image_row_P: jax.Array, image_mask_P: jax.Array, num_rows: int) -> jax.Array:
    """Return bool [B]: the rows that filled slots belong to."""
    row_P = jnp.where(image_mask_P, image_row_P, num_rows)
    return jnp.zeros(num_rows, bool).at[row_P].set(True, mode="drop")


def latest_slots(
    image_row_P: jax.Array, image_hour_P: jax.Array, image_mask_P: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """Return the slot of the latest image at each hour of each row, int [B, H], -1 without one. shape: (B, H).

    image_hour_P: the first hour of its row that sees an image. A row's images are in slots in order of time.
    """
    row_P = jnp.where(image_mask_P, image_row_P, shape[0])
    slot_BH = jnp.full(shape, -1).at[row_P, image_hour_P].set(jnp.arange(len(row_P)), mode="drop")
    return jax.lax.cummax(slot_BH, axis=1)


def slots_by_hour(slot_BM: jax.Array, image_hour_P: jax.Array, num_hours: int) -> jax.Array:
    """Return the slots of the images that each hour of each row sees, int [B * H, M], -1 for none.

    image_hour_P: the first hour of its row that sees an image.
    """
    hour_BM = jnp.where(slot_BM >= 0, jnp.asarray(image_hour_P)[jnp.maximum(slot_BM, 0)], num_hours)
    is_seen_BHM = hour_BM[:, None] <= jnp.arange(num_hours)[:, None]
    return jnp.where(is_seen_BHM, slot_BM[:, None], -1).reshape(-1, slot_BM.shape[1])


def images_of(
    num_rows: int, image=None, *, features=None, has_cxr=None, image_row=None, image_mask=None
) -> Images | None:
    """Return the images of a batch, or None if it has no slot at all, so that no image encoder is traced.

    image: [P, H, W] or [P, H, W, C]. features: [P, E], instead of image.
    Listed form: image_row int [P] names each image's row, and image_mask bool [P] is False in an empty slot (default:
    all filled). Dense form (image_row None): P = B, and has_cxr bool [B] says which rows have an image (default:
    all).
    """
    given = image if features is None else features
    if given is None or given.shape[0] == 0:
        return None
    num_images = given.shape[0]
    if image_row is None:
        assert num_images == num_rows, f"{num_images} images for {num_rows} rows, and no image_row"
        valid_P = jnp.ones(num_rows, bool) if has_cxr is None else jnp.asarray(has_cxr, bool)
        row_P = None
    else:
        valid_P = jnp.ones(num_images, bool) if image_mask is None else jnp.asarray(image_mask, bool)
        row_P = jnp.where(valid_P, jnp.asarray(image_row), num_rows)
    if features is not None:
        return Images(None, jnp.where(valid_P[:, None], features, 0), valid_P, row_P, num_rows)
    # A NaN in an empty slot would make the kernels' gradients NaN (NaN * 0): clear it before any product.
    image_PHWC = image if image.ndim == 4 else image[..., None]
    image_PHWC = jnp.where(valid_P[:, None, None, None], image_PHWC, 0)
    return Images(image_PHWC, None, valid_P, row_P, num_rows)
