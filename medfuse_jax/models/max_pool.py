"""ResNet's max pool, 3x3 with stride 2 and torch's padding, with a written-out gradient.

Shapes: P X-rays, H W pixels, C channels, h w pixels after the pool.

The gradient of XLA's own pool is a select-and-scatter. A TPU fuses it; a CPU visits the windows one by one,
and a GPU computes the pool again in float32 with indices. Here the forward pass saves which of the nine pixels was the
largest, and the gradient is nine comparisons over whole arrays.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

NONE = 9  # a winner that is no pixel
_MIDDLE = 1  # of a window's three rows or columns


def plain(x_PHWC: jax.Array) -> jax.Array:
    """Return the same as `max_pool`, with XLA's own gradient."""
    return nn.max_pool(x_PHWC, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@jax.custom_vjp
def max_pool(x_PHWC: jax.Array) -> jax.Array:
    """Return the maximum of each 3x3 window, padded by one with -inf: [P, ceil(H/2), ceil(W/2), C].

    Of tied pixels, the first in row-major order gets the gradient, as in XLA and torch.
    """
    return largest(x_PHWC)[0]


def largest(x_PHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each window's maximum and which of its pixels that is, uint8, 0 to 8."""
    _, height, width, _ = x_PHWC.shape
    h, w = -(-height // 2), -(-width // 2)
    padding = ((0, 0), (1, 2 * h - height), (1, 2 * w - width), (0, 0))
    padded = jnp.pad(x_PHWC, padding, constant_values=-jnp.inf)

    def pixel(k: int) -> jax.Array:
        row, column = divmod(k, 3)
        return padded[:, row : row + 2 * h - 1 : 2, column : column + 2 * w - 1 : 2]

    max_PhwC = pixel(0)
    winner_PhwC = jnp.zeros(max_PhwC.shape, jnp.uint8)
    for k in range(1, 9):
        x_PhwC = pixel(k)
        winner_PhwC = jnp.where(x_PhwC > max_PhwC, jnp.uint8(k), winner_PhwC)
        max_PhwC = jnp.maximum(max_PhwC, x_PhwC)
    return max_PhwC, winner_PhwC


def _forward(x_PHWC):
    max_PhwC, winner_PhwC = largest(x_PHWC)
    return max_PhwC, (winner_PhwC, x_PHWC[:0, :, :, :0])  # an empty array, which only carries H and W


def _backward(saved, d_PhwC):
    winner_PhwC, shape_HW = saved
    return (gradient(winner_PhwC, d_PhwC, *shape_HW.shape[1:3]),)


def gradient(winner_PhwC: jax.Array, d_PhwC: jax.Array, height: int, width: int) -> jax.Array:
    """Return the gradient [P, height, width, C]. A window whose winner is `NONE` passes none on."""
    num_images, h, w, channels = d_PhwC.shape

    def gradient_of(row: int, column: int) -> jax.Array:
        """Return each window's gradient for its pixel (row, column), shifted to that pixel's position."""
        d_pixel = jnp.where(winner_PhwC == 3 * row + column, d_PhwC, 0)
        # A window's first row and column are the last ones of the previous window.
        if row == 0:
            d_pixel = jnp.pad(d_pixel[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        if column == 0:
            d_pixel = jnp.pad(d_pixel[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
        return d_pixel

    # An even pixel is the middle of one window; an odd one is the last of a window and the first of the next.
    choices = ((_MIDDLE,), (2, 0))
    parts = [[sum(gradient_of(r, c) for r in rows for c in columns) for columns in choices] for rows in choices]
    d_PhHwWC = jnp.stack([jnp.stack(columns, axis=3) for columns in parts], axis=2)
    d_PHWC = d_PhHwWC.reshape(num_images, 2 * h, 2 * w, channels)
    return d_PHWC[:, :height, :width]


max_pool.defvjp(_forward, _backward)
