"""The optimiser."""

import functools

import jax
import optax


@functools.lru_cache  # so that equal options are equal: steps compiled for one serve the other
def adam(beta2: float) -> optax.GradientTransformation:
    """Adam's direction, without the learning rate: that is a traced argument of the step.

    So one executable serves every rate of a sweep. epsilon as in torch.
    """
    return optax.scale_by_adam(b1=0.9, b2=beta2, eps=1e-8)


def descend(params, direction, learning_rate: jax.Array):
    """params - learning_rate * direction, leaf by leaf."""
    return jax.tree.map(lambda p, d: p - learning_rate * d.astype(p.dtype), params, direction)
