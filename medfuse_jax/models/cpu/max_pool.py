"""ResNet's max pool, 3x3 with stride 2 and torch's padding, with a gradient that is cheap on a CPU.

Shapes: P X-rays, H W pixels, C channels, h w pixels after the pool.

The gradient of XLA's own pool is a select-and-scatter, which runs through the windows one by one. Here the
forward pass keeps which of the nine pixels won, and the gradient is nine comparisons over whole arrays.
"""

import jax
import jax.numpy as jnp

_MIDDLE = 1  # of the three rows or columns of a window


@jax.custom_vjp
def max_pool(x_PHWC: jax.Array) -> jax.Array:
    """The maximum of each 3x3 window, every second pixel, padded by one with -inf: [P, ceil(H/2), ceil(W/2), C].

    Where pixels of a window tie, the first one, row by row, takes the gradient, as in XLA's and torch's.
    """
    return _forward(x_PHWC)[0]


def _forward(x_PHWC):
    _, height, width, _ = x_PHWC.shape
    h, w = -(-height // 2), -(-width // 2)
    padding = ((0, 0), (1, 2 * h - height), (1, 2 * w - width), (0, 0))
    padded_PHWC = jnp.pad(x_PHWC, padding, constant_values=-jnp.inf)
    best_PhwC = padded_PHWC[:, : 2 * h - 1 : 2, : 2 * w - 1 : 2]
    winner_PhwC = jnp.zeros(best_PhwC.shape, jnp.uint8)
    for k in range(1, 9):
        row, column = divmod(k, 3)
        pixel_PhwC = padded_PHWC[:, row : row + 2 * h - 1 : 2, column : column + 2 * w - 1 : 2]
        winner_PhwC = jnp.where(pixel_PhwC > best_PhwC, jnp.uint8(k), winner_PhwC)
        best_PhwC = jnp.maximum(best_PhwC, pixel_PhwC)
    return best_PhwC, (winner_PhwC, x_PHWC[:0, :, :, :0])  # the last carries H and W


def _backward(saved, d_PhwC):
    winner_PhwC, like_HW = saved
    num_images, h, w, channels = d_PhwC.shape

    def share(row: int, column: int) -> jax.Array:
        """What a window gives to its pixel (row, column), laid where the next window's first row or column lies."""
        given = jnp.where(winner_PhwC == 3 * row + column, d_PhwC, 0)
        # The first row and column of a window are the last ones of the window before.
        if row == 0:
            given = jnp.pad(given[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        if column == 0:
            given = jnp.pad(given[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
        return given

    # An even pixel is the middle of one window; an odd one the last of a window and the first of the next.
    around = ((_MIDDLE,), (2, 0))
    parts = [[sum(share(r, c) for r in rows for c in columns) for columns in around] for rows in around]
    d_PhHwWC = jnp.stack([jnp.stack(columns, axis=3) for columns in parts], axis=2)
    d_PHWC = d_PhHwWC.reshape(num_images, 2 * h, 2 * w, channels)
    return (d_PHWC[:, : like_HW.shape[1], : like_HW.shape[2]],)


max_pool.defvjp(_forward, _backward)
