"""The convolution of the film encoder, which under vmap over kernels stays one convolution a kernel.

Shapes: P films, H W pixels, C channels.

vmap would make it one convolution in groups (and its gradients grouped in the batch), for which the
libraries have no fast code: on CPU 3.5 times slower than one after another (docs/notes.md). So the trials
of a sweep share the rest of their step, and each has its own convolutions.
"""

import functools

import jax
import jax.numpy as jnp

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
    def gradients(x_PHWC, kernel, d_output_PHWC):
        return jax.vjp(functools.partial(_conv, stride, padding), x_PHWC, kernel)[1](d_output_PHWC)

    return _apart(gradients)(*saved, d_output_PHWC)


def _apart(fn):
    """`fn`, of which a vmap becomes one call after another, in one program."""
    fn_apart = jax.custom_batching.custom_vmap(fn)

    @fn_apart.def_vmap
    def rule(axis_size, in_batched, *args):
        each = [fn(*(x[i] if b else x for x, b in zip(args, in_batched))) for i in range(axis_size)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each), jax.tree.map(lambda _: True, each[0])

    return fn_apart


conv.defvjp(_forward, _backward)
