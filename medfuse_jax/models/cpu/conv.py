"""The X-ray encoder's convolution in the forms that XLA runs fast on a CPU (`ResNet.ops='cpu'`).

Shapes: P X-rays, H W pixels, C channels.

Under a vmap over kernels (a sweep's trials), the convolutions run one after another: a grouped convolution is slower on
a CPU.
"""

import functools

import jax
import jax.numpy as jnp

from medfuse_jax.models.cpu import winograd

# Below this size XLA's own convolution is used, because it compiles fastest: one library call instead of some 100
# kernels.
_MIN_FLOP = 100e6
# For few output pixels per X-ray (and, in a ResNet, many channels) one product of explicit columns is fastest, since
# XLA transposes the whole kernel for a convolution's gradients. Winograd takes precedence if the batch is large enough.
_FEW_PIXELS = 7 * 7
# With fewer channels, Winograd's transforms cost more than they save.
_WINOGRAD_CHANNELS = 32
# XLA computes the kernel's gradient as one convolution whose window covers all X-rays. For many large X-rays that is
# slower than a sum over parts of the batch.
_PIXELS_PER_PART = 56 * 56
_MAX_PARTS = 16  # each part is compiled


def _sequential_under_vmap(fn):
    """Wrap `fn` so that vmap unrolls it into sequential calls."""
    sequential = jax.custom_batching.custom_vmap(fn)

    @sequential.def_vmap
    def rule(axis_size, in_batched, *args):
        outputs = [fn(*(x[i] if b else x for x, b in zip(args, in_batched))) for i in range(axis_size)]
        return jax.tree.map(lambda *x: jnp.stack(x), *outputs), jax.tree.map(lambda _: True, outputs[0])

    return sequential


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x_PHWC: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolve with a square kernel [k, k, in, out] and equal padding on every side. Reverse-mode gradients only."""
    return _sequential_under_vmap(functools.partial(_forward, stride, padding))(x_PHWC, kernel)


def _save(x_PHWC, kernel, stride, padding):
    return conv(x_PHWC, kernel, stride, padding), (x_PHWC, kernel)


def _backward(stride, padding, saved, d_output_PHWC):
    return _sequential_under_vmap(functools.partial(_gradients, stride, padding))(*saved, d_output_PHWC)


conv.defvjp(_save, _backward)


def _forward(stride, padding, x_PHWC, kernel):
    if _is_small(stride, padding, x_PHWC, kernel):
        return _xla_conv(stride, padding, x_PHWC, kernel)
    if _suits_winograd(stride, padding, x_PHWC, kernel):
        return winograd.convolve(x_PHWC, kernel)
    if _num_pixels(stride, padding, x_PHWC, kernel) <= _FEW_PIXELS:
        return _columns_product(stride, padding, x_PHWC, kernel)
    return _xla_conv(stride, padding, x_PHWC, kernel)


def _gradients(stride, padding, x_PHWC, kernel, d_output_PHWC):
    if _is_small(stride, padding, x_PHWC, kernel):
        return jax.vjp(functools.partial(_xla_conv, stride, padding), x_PHWC, kernel)[1](d_output_PHWC)
    if _suits_winograd(stride, padding, x_PHWC, kernel):
        d_x_PHWC = winograd.convolve(d_output_PHWC, kernel[::-1, ::-1].swapaxes(2, 3))
        return d_x_PHWC, winograd.kernel_gradient(x_PHWC, d_output_PHWC)
    if _num_pixels(stride, padding, x_PHWC, kernel) <= _FEW_PIXELS:
        return jax.vjp(functools.partial(_columns_product, stride, padding), x_PHWC, kernel)[1](d_output_PHWC)
    d_x_PHWC = jax.vjp(lambda x_PHWC: _xla_conv(stride, padding, x_PHWC, kernel), x_PHWC)[1](d_output_PHWC)[0]
    return d_x_PHWC, _kernel_gradient_in_parts(stride, padding, x_PHWC, kernel, d_output_PHWC)


def _is_small(stride, padding, x_PHWC, kernel) -> bool:
    return 2 * len(x_PHWC) * _num_pixels(stride, padding, x_PHWC, kernel) * kernel.size < _MIN_FLOP


def _suits_winograd(stride, padding, x_PHWC, kernel) -> bool:
    is_3x3 = kernel.shape[:2] == (3, 3) and (stride, padding) == (1, 1)
    is_float32 = x_PHWC.dtype == jnp.float32  # in half precision, the transforms lose accuracy
    num_pixels, num_channels = x_PHWC.size // x_PHWC.shape[-1], kernel.shape[2:]  # pixels of all X-rays
    kernel_is_cheap = num_pixels >= max(num_channels)  # transforming it costs less than it saves
    return is_3x3 and is_float32 and kernel_is_cheap and min(num_channels) >= _WINOGRAD_CHANNELS


def _num_pixels(stride, padding, x_PHWC, kernel) -> int:
    """Return the number of output pixels of one X-ray."""
    height, width = ((size + 2 * padding - kernel.shape[0]) // stride + 1 for size in x_PHWC.shape[1:3])
    return height * width


def _xla_conv(stride: int, padding: int, x_PHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    pads = ((padding, padding), (padding, padding))
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x_PHWC, kernel, (stride, stride), pads, dimension_numbers=dimensions)


def _columns_product(stride: int, padding: int, x_PHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve by one matrix product (im2col)."""
    size_px, _, _, num_out = kernel.shape
    padded_PHWC = jnp.pad(x_PHWC, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = (size - size_px + 1 for size in padded_PHWC.shape[1:3])
    columns = [
        padded_PHWC[:, i : i + height : stride, j : j + width : stride] for i in range(size_px) for j in range(size_px)
    ]
    return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, num_out)


def _kernel_gradient_in_parts(stride, padding, x_PHWC, kernel, d_output_PHWC):
    """Sum the kernel's gradient over parts of the batch."""
    num_images, height, width, _ = d_output_PHWC.shape
    images_per_part = max(1, _PIXELS_PER_PART // (height * width), -(-num_images // _MAX_PARTS))
    d_kernel = jnp.zeros_like(kernel)
    for first in range(0, num_images, images_per_part):
        part = slice(first, first + images_per_part)
        _, backward = jax.vjp(functools.partial(_xla_conv, stride, padding, x_PHWC[part]), kernel)
        d_kernel += backward(d_output_PHWC[part])[0]
    return d_kernel
