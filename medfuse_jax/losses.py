"""Losses. Shapes: B rows of the batch, K labels."""

import jax
import jax.numpy as jnp
import optax


def mean_bce(logits_BK: jax.Array, label_BK: jax.Array, valid_B: jax.Array, num_valid: jax.Array) -> jax.Array:
    """Binary cross-entropy, summed over the valid rows and divided by num_valid * K.

    num_valid is the number of valid rows of the whole batch, over all devices: so the
    devices' losses, and their gradients, add up to those of the batch on one device.
    """
    loss_BK = optax.sigmoid_binary_cross_entropy(logits_BK, label_BK)
    total = jnp.sum(jnp.where(valid_B[:, None], loss_BK, 0.0))
    return total / (jnp.maximum(num_valid, 1) * label_BK.shape[1])
