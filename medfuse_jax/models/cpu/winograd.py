"""The 3x3 convolution by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, CVPR 2016), for a CPU.

A tile of 2x2 outputs needs 16 products per pair of channels, whereas the plain sum needs 36. Each of the 16 is one
matrix product over all tiles, which XLA runs fast on a CPU. The transforms only add and halve, so the result is as
exact as the plain convolution's.

Shapes: P X-rays, H W pixels, N tiles of all X-rays, C channels in, D channels out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Each part of the batch runs through all transforms before the next, so that intermediates stay in the CPU's cache.
_PIXELS_PER_PART = 2 * 56 * 56

_FILTER_1D = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_FILTER = np.kron(_FILTER_1D, _FILTER_1D)  # [16, 9]: the kernel's transform, over rows and columns


@jax.jit  # traced once for all layers of one shape
def convolve(x_PHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve at stride 1 with a kernel [3, 3, C, D], padded by one pixel on every side: [P, H, W, D]."""
    filters_16CD = (_FILTER @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:])

    def part(x_PHWC):
        products = [tile_NC @ filter_CD for tile_NC, filter_CD in zip(_inputs(x_PHWC), filters_16CD, strict=True)]
        return _outputs(products, x_PHWC.shape)

    outputs = jax.lax.map(part, _parts(x_PHWC))
    return outputs.reshape(-1, *outputs.shape[2:])[: len(x_PHWC)]


@jax.jit
def kernel_gradient(x_PHWC: jax.Array, d_output_PHWD: jax.Array) -> jax.Array:
    """Return the gradient [3, 3, C, D] of `convolve`'s kernel."""
    x_PHWC = _after(x_PHWC, d_output_PHWD)

    def add_part(d_filters, images):
        pairs = zip(_inputs(images[0]), _outputs_transposed(images[1]), strict=True)
        return [d_CD + tile_NC.T @ d_ND for d_CD, (tile_NC, d_ND) in zip(d_filters, pairs, strict=True)], None

    num_in, num_out = x_PHWC.shape[-1], d_output_PHWD.shape[-1]
    zeros = [jnp.zeros((num_in, num_out), jnp.float32)] * 16
    d_filters, _ = jax.lax.scan(add_part, zeros, (_parts(x_PHWC), _parts(d_output_PHWD)))
    return (_FILTER.T @ jnp.stack(d_filters).reshape(16, -1)).reshape(3, 3, num_in, num_out)


def _after(x_PHWC: jax.Array, d_output_PHWD: jax.Array) -> jax.Array:
    """Return the X-rays, made to depend on the output's gradient.

    Otherwise XLA shares the tiles of the forward pass and keeps them until the backward pass, at four times the X-rays'
    memory. (An optimization_barrier does not help: XLA drops it before it schedules.) If the gradient's first element
    is not finite, neither is the kernel's whole gradient.
    """
    return x_PHWC + 0 * d_output_PHWD[0, 0, 0, 0]


def _parts(x_PHWC: jax.Array) -> jax.Array:
    """Split the X-rays into parts of about _PIXELS_PER_PART pixels, at most twice as many; zeros pad the last part."""
    num_images, height, width, _ = x_PHWC.shape
    images_per_part = max(1, _PIXELS_PER_PART // (height * width))
    few, many = max(1, num_images // images_per_part), -(-num_images // images_per_part)
    num_parts = min(few, many, key=lambda n: -num_images % n)  # whichever needs less padding
    size = -(-num_images // num_parts)
    x_PHWC = jnp.pad(x_PHWC, ((0, num_parts * size - num_images), (0, 0), (0, 0), (0, 0)))
    return x_PHWC.reshape(num_parts, size, *x_PHWC.shape[1:])


def _inputs(x_PHWC: jax.Array) -> list[jax.Array]:
    """Return the 16 transformed inputs [N, C] of the tiles, each from 4x4 pixels around its 2x2 outputs."""
    _, height, width, num_channels = x_PHWC.shape
    pads = ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0))
    # The barrier keeps XLA from recomputing the padded X-rays in each of the 16 fusions.
    x_PHWC = jax.lax.optimization_barrier(jnp.pad(x_PHWC, pads))
    tiles = [cell for row in _inputs_1d(x_PHWC, axis=1) for cell in _inputs_1d(row, axis=2)]
    return [tile.reshape(-1, num_channels) for tile in tiles]


def _inputs_1d(x: jax.Array, axis: int) -> list[jax.Array]:
    end = x.shape[axis] - 3  # just past the last tile's first pixel
    p0, p1, p2, p3 = (jax.lax.slice_in_dim(x, k, k + end, 2, axis) for k in range(4))
    return [p0 - p2, p1 + p2, p2 - p1, p1 - p3]


def _outputs(products: list[jax.Array], shape: tuple) -> jax.Array:
    """Turn the 16 products [N, D] into output pixels [P, H, W, D]. shape: the input's."""
    num_images, height, width, _ = shape
    h, w = -(-height // 2), -(-width // 2)
    products = [product.reshape(num_images, h, w, -1) for product in products]
    rows = [_outputs_1d(products[4 * i : 4 * i + 4]) for i in range(4)]
    pixels = _over_columns(_outputs_1d, rows)  # [row even or odd][column even or odd]
    x_PhHwWD = jnp.stack([jnp.stack(row, axis=3) for row in pixels], axis=2)
    return x_PhHwWD.reshape(num_images, 2 * h, 2 * w, -1)[:, :height, :width]


def _outputs_1d(m: list[jax.Array]) -> list[jax.Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _outputs_transposed(d_PHWD: jax.Array) -> list[jax.Array]:
    """Return the gradients of the 16 products [N, D]."""
    _, height, width, num_channels = d_PHWD.shape
    d_PHWD = jax.lax.optimization_barrier(jnp.pad(d_PHWD, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))))
    rows = [_outputs_1d_transposed([d_PHWD[:, i::2, j::2] for j in range(2)]) for i in range(2)]
    return [cell.reshape(-1, num_channels) for row in _over_columns(_outputs_1d_transposed, rows) for cell in row]


def _outputs_1d_transposed(d: list[jax.Array]) -> list[jax.Array]:
    return [d[0], d[0] + d[1], d[0] - d[1], -d[1]]


def _over_columns(transform: Callable, rows: list) -> list:
    """Apply a 1D transform to each column of a table of arrays."""
    return list(zip(*(transform(column) for column in zip(*rows, strict=True)), strict=True))
