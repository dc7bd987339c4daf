"""Which X-ray belongs to which row of the batch.

Shapes: B rows, P X-rays, H W pixels, C channels, E any feature.

Only X-rays that are there go through the image encoder: P images, not B. Differs from MedFuse
(datasets/fusion.py), which makes a zero image for every stay without an X-ray.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Images:
    """The X-rays of a batch of `num_rows` rows; images of X-rays that do not count are zeros.

    valid_P: False for a slot without an X-ray. row_P: the row each X-ray belongs to, num_rows in
    an empty slot; None in the dense form, where X-ray b belongs to row b and P = B.
    """

    image_PHWC: jax.Array
    valid_P: jax.Array
    row_P: jax.Array | None
    num_rows: int

    def to_rows(self, x_PE: jax.Array) -> jax.Array:
        """X-ray values to their rows [B, E]; rows without an X-ray get zeros."""
        if self.row_P is None:
            return jnp.where(self.valid_P[:, None], x_PE, 0)
        return jnp.zeros((self.num_rows, *x_PE.shape[1:]), x_PE.dtype).at[self.row_P].set(x_PE, mode="drop")

    def from_rows(self, x_BE: jax.Array) -> jax.Array:
        """Row values to their X-rays [P, E]; an empty slot gets zeros."""
        if self.row_P is None:
            return jnp.where(self.valid_P[:, None], x_BE, jnp.zeros_like(x_BE))
        return jnp.asarray(x_BE).at[self.row_P].get(mode="fill", fill_value=0)

    def present_rows(self) -> jax.Array:
        """bool [B]: which rows have an X-ray."""
        if self.row_P is None:
            return self.valid_P
        return jnp.zeros(self.num_rows, bool).at[self.row_P].set(True, mode="drop")


def images_of(image, num_rows: int, has_cxr=None, image_row=None, image_mask=None) -> Images | None:
    """The X-rays of a batch, or None where it has no X-ray slots at all (then no X-ray code is traced).

    image: [P, H, W] or [P, H, W, C]. Dense form (image_row None): P = B, has_cxr bool [B] says
    which X-rays count (default: all). Listed form: image_row int [P], image_mask bool [P], False
    for an empty slot; has_cxr is not read.
    """
    if image is None or image.shape[0] == 0:
        return None
    image_PHWC = image if image.ndim == 4 else image[..., None]
    num_images = image_PHWC.shape[0]
    if image_row is None:
        assert num_images == num_rows, f"{num_images} X-rays for {num_rows} rows, and no image_row"
        valid_P = jnp.ones(num_rows, bool) if has_cxr is None else jnp.asarray(has_cxr, bool)
        row_P = None
    else:
        image_row = jnp.asarray(image_row)
        valid_P = image_row < num_rows
        if image_mask is not None:
            valid_P &= jnp.asarray(image_mask, bool)
        row_P = jnp.where(valid_P, image_row, num_rows)
    # A NaN in an empty slot would reach the kernels' gradients as NaN * 0: clear it before any product.
    image_PHWC = jnp.where(valid_P[:, None, None, None], image_PHWC, 0)
    return Images(image_PHWC, valid_P, row_P, num_rows)
