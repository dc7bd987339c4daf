"""The optimiser."""

import functools

import jax
import optax
from jax.experimental.layout import Layout, with_layout_constraint


@functools.lru_cache  # equal options must be equal objects, to share compiled steps
def adam(beta2: float) -> optax.GradientTransformation:
    """Return Adam's update without the learning rate, which is an argument of the step: one program serves every rate.

    Epsilon is torch's.
    """
    return optax.scale_by_adam(b1=0.9, b2=beta2, eps=1e-8)


def descend(params, direction, learning_rate: jax.Array):
    """Return params - learning_rate * direction."""
    return jax.tree.map(lambda p, d: p - learning_rate * d.astype(p.dtype), params, direction)


def laid_out_as_weights(grads):
    """Lay out every gradient as its weight is stored: row by row.

    Otherwise XLA would update in the layout of a convolution's gradient, and copy the weight and both of Adam's moments
    into that layout and back.
    """
    return jax.tree.map(lambda g: with_layout_constraint(g, Layout(tuple(range(g.ndim)))), grads)
