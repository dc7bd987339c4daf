"""The convolution of the X-ray encoder: on a CPU in the ways that XLA runs fast there, and apart under a vmap.

Shapes: P X-rays, H W pixels, C channels.

vmap over kernels would make it one convolution in groups (and its gradients grouped in the batch), for which the
libraries have no fast code: on CPU 3.5 times slower than one after another (docs/notes.md). So the trials
of a sweep share the rest of their step, and each has its own convolutions.
"""

import functools

import jax
import jax.numpy as jnp

from medfuse_jax.models.cpu import winograd

# Where an X-ray has few pixels (and, in a ResNet, many channels), a product of explicit columns is faster than a
# convolution, for whose gradients XLA transposes the whole kernel. Winograd's goes first: it takes the last stage of a
# ResNet where there are enough X-rays.
_FEW_PIXELS = 7 * 7
# Below so many channels Winograd's transforms would cost more than its products save: chosen by the number of additions
# and products, not measured. A ResNet-34 has 64 and more.
_WINOGRAD_CHANNELS = 32
# The gradient of a kernel takes up to three times as long for many large X-rays at once as for one after another: it is
# a convolution whose window is all of them.
_PIXELS_A_PART = 56 * 56
_MOST_PARTS = 16  # each is compiled

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x_PHWC: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A square convolution, kernel [k, k, in, out], padded alike on every side. Reverse-mode gradients only."""
    return _by_platform(_on_cpu, _plain, stride, padding)(x_PHWC, kernel)


def _forward(x_PHWC, kernel, stride, padding):
    return conv(x_PHWC, kernel, stride, padding), (x_PHWC, kernel)


def _backward(stride, padding, saved, d_output_PHWC):
    return _by_platform(_gradients_on_cpu, _gradients, stride, padding)(*saved, d_output_PHWC)


def _by_platform(on_cpu, elsewhere, stride, padding):
    ways = {"cpu": functools.partial(on_cpu, stride, padding), "default": functools.partial(elsewhere, stride, padding)}
    return _apart(functools.partial(jax.lax.platform_dependent, **ways))


def _plain(stride: int, padding: int, x_PHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as XLA has it."""
    pads = ((padding, padding), (padding, padding))
    return jax.lax.conv_general_dilated(x_PHWC, kernel, (stride, stride), pads, dimension_numbers=_DIMENSIONS)


def _gradients(stride, padding, x_PHWC, kernel, d_output_PHWC, fn=_plain):
    return jax.vjp(functools.partial(fn, stride, padding), x_PHWC, kernel)[1](d_output_PHWC)


def _on_cpu(stride, padding, x_PHWC, kernel):
    if _suits_winograd(stride, padding, x_PHWC, kernel):
        return winograd.convolve(x_PHWC, kernel)
    if _num_pixels(stride, padding, x_PHWC, kernel) <= _FEW_PIXELS:
        return _product(stride, padding, x_PHWC, kernel)
    return _plain(stride, padding, x_PHWC, kernel)


def _gradients_on_cpu(stride, padding, x_PHWC, kernel, d_output_PHWC):
    if _suits_winograd(stride, padding, x_PHWC, kernel):
        d_x_PHWC = winograd.convolve(d_output_PHWC, kernel[::-1, ::-1].swapaxes(2, 3))
        return d_x_PHWC, winograd.kernel_gradient(x_PHWC, d_output_PHWC)
    if _num_pixels(stride, padding, x_PHWC, kernel) <= _FEW_PIXELS:
        return _gradients(stride, padding, x_PHWC, kernel, d_output_PHWC, fn=_product)
    d_x_PHWC = jax.vjp(lambda x_PHWC: _plain(stride, padding, x_PHWC, kernel), x_PHWC)[1](d_output_PHWC)[0]
    return d_x_PHWC, _kernel_gradient_by_parts(stride, padding, x_PHWC, kernel, d_output_PHWC)


def _suits_winograd(stride, padding, x_PHWC, kernel) -> bool:
    of_three = kernel.shape[:2] == (3, 3) and (stride, padding) == (1, 1)
    exact = x_PHWC.dtype == jnp.float32  # half precision would lose in the transforms what it saves
    num_pixels, num_channels = x_PHWC.size // x_PHWC.shape[-1], kernel.shape[2:]  # the pixels of all X-rays
    images_cost_most = num_pixels >= max(num_channels)  # and not the kernel's own transform
    return of_three and exact and images_cost_most and min(num_channels) >= _WINOGRAD_CHANNELS


def _num_pixels(stride, padding, x_PHWC, kernel) -> int:
    """Of one X-ray's output."""
    height, width = ((size + 2 * padding - kernel.shape[0]) // stride + 1 for size in x_PHWC.shape[1:3])
    return height * width


def _product(stride: int, padding: int, x_PHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as one matrix product: the pixels below each of the kernel's, side by side."""
    size_px, _, _, num_out = kernel.shape
    padded_PHWC = jnp.pad(x_PHWC, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = (size - size_px + 1 for size in padded_PHWC.shape[1:3])
    below = [
        padded_PHWC[:, i : i + height : stride, j : j + width : stride] for i in range(size_px) for j in range(size_px)
    ]
    return jnp.concatenate(below, axis=-1) @ kernel.reshape(-1, num_out)


def _kernel_gradient_by_parts(stride, padding, x_PHWC, kernel, d_output_PHWC):
    """The kernel's gradient as the sum of those of few X-rays each."""
    num_images, height, width, _ = d_output_PHWC.shape
    images_a_part = max(1, _PIXELS_A_PART // (height * width), -(-num_images // _MOST_PARTS))
    d_kernel = jnp.zeros_like(kernel)
    for first in range(0, num_images, images_a_part):
        part = slice(first, first + images_a_part)
        _, d_k = jax.vjp(functools.partial(_plain, stride, padding, x_PHWC[part]), kernel)
        d_kernel += d_k(d_output_PHWC[part])[0]
    return d_kernel


def _apart(fn):
    """`fn`, of which a vmap becomes one call after another, in one program."""
    fn_apart = jax.custom_batching.custom_vmap(fn)

    @fn_apart.def_vmap
    def rule(axis_size, in_batched, *args):
        each = [fn(*(x[i] if b else x for x, b in zip(args, in_batched))) for i in range(axis_size)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each), jax.tree.map(lambda _: True, each[0])

    return fn_apart


conv.defvjp(_forward, _backward)
