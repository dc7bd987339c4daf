"""The convolution of the film encoder, which under vmap over kernels stays one convolution a kernel.

Shapes: P films, H W pixels, C channels.

vmap would make it one convolution in groups (and its gradients grouped in the batch), for which the
libraries have no fast code: on CPU 3.5 times slower than one after another (docs/notes.md). So the trials
of a sweep share the rest of their step, and each has its own convolutions.
"""

import functools

import jax
import jax.numpy as jnp

# On a CPU the gradient of a kernel takes up to three times as long for many large films at once as for one after
# another (docs/notes.md): it is a convolution whose window is all of them.
_PIXELS_A_PART = 56 * 56
_MOST_PARTS = 16  # each is compiled

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x_PHWC: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A square convolution, kernel [k, k, in, out], padded alike on every side. Reverse-mode gradients only."""
    return _apart(functools.partial(_conv, stride, padding))(x_PHWC, kernel)


def _conv(stride: int, padding: int, x_PHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_PHWC, kernel, (stride, stride), ((padding, padding), (padding, padding)), dimension_numbers=_DIMENSIONS
    )


def _forward(x_PHWC, kernel, stride, padding):
    return conv(x_PHWC, kernel, stride, padding), (x_PHWC, kernel)


def _backward(stride, padding, saved, d_output_PHWC):
    whole = functools.partial(_gradients, stride, padding)
    by_parts = functools.partial(_gradients_by_parts, stride, padding)
    gradients = functools.partial(jax.lax.platform_dependent, cpu=by_parts, default=whole)
    return _apart(gradients)(*saved, d_output_PHWC)


def _gradients(stride, padding, x_PHWC, kernel, d_output_PHWC):
    return jax.vjp(functools.partial(_conv, stride, padding), x_PHWC, kernel)[1](d_output_PHWC)


def _gradients_by_parts(stride, padding, x_PHWC, kernel, d_output_PHWC):
    """The same, the kernel's gradient as the sum of those of few films each."""
    _, d_x = jax.vjp(lambda x_PHWC: _conv(stride, padding, x_PHWC, kernel), x_PHWC)
    num_films, height, width, _ = d_output_PHWC.shape
    films_a_part = max(1, _PIXELS_A_PART // (height * width), -(-num_films // _MOST_PARTS))
    d_kernel = 0
    for first in range(0, num_films, films_a_part):
        part = slice(first, first + films_a_part)
        _, d_k = jax.vjp(functools.partial(_conv, stride, padding, x_PHWC[part]), kernel)
        d_kernel += d_k(d_output_PHWC[part])[0]
    return d_x(d_output_PHWC)[0], d_kernel


def _apart(fn):
    """`fn`, of which a vmap becomes one call after another, in one program."""
    fn_apart = jax.custom_batching.custom_vmap(fn)

    @fn_apart.def_vmap
    def rule(axis_size, in_batched, *args):
        each = [fn(*(x[i] if b else x for x, b in zip(args, in_batched))) for i in range(axis_size)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each), jax.tree.map(lambda _: True, each[0])

    return fn_apart


conv.defvjp(_forward, _backward)
