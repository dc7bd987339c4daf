"""The weights of one LSTM layer and their initial values.

Shapes: D LSTM width, F input channel, G = 4 D gates in the order i, f, g, o.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence.cell import NUM_GATES
from medfuse_jax.models.weight import weight


class LstmWeights(nn.Module):
    """The float32 weights of one LSTM layer, in the form that `ehr_encoder.lstm` and `scan.masked_lstm` take.

    torch_default: use torch's initial values, instead of Glorot for the input kernel, orthogonal matrices for the
    recurrent kernel and zeros for the bias.
    """

    width: int
    torch_default: bool = False

    @nn.compact
    def __call__(self, num_inputs: int) -> dict:
        if self.torch_default:
            input_init = recurrent_init = bias_init = uniform_by_width
        else:
            input_init, recurrent_init = nn.initializers.glorot_uniform(), orthogonal_per_gate
            bias_init = nn.initializers.zeros_init()
        num_gates = NUM_GATES * self.width
        return {
            "input_kernel": weight(self, "input_kernel", input_init, (num_inputs, num_gates)),
            "recurrent_kernel": weight(self, "recurrent_kernel", recurrent_init, (self.width, num_gates)),
            # torch has two biases, but only their sum matters
            "bias": weight(self, "bias", bias_init, (num_gates,)),
        }


def orthogonal_per_gate(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Return a recurrent kernel [D, 4 D] made of four random orthogonal matrices.

    Differs from MedFuse (models/ehr_models.py), where the four matrices together have orthonormal columns, so that each
    gate's matrix has half the gain.
    """
    width = shape[0]
    gaussian_4DD = jax.random.normal(key, (NUM_GATES, width, width))
    return jnp.concatenate(list(_nearest_orthogonal(gaussian_4DD)), axis=1).astype(dtype)


def _nearest_orthogonal(x_4DD: jax.Array) -> jax.Array:
    """Return each matrix's orthogonal polar factor (uniformly distributed for Gaussian input), by Newton-Schulz.

    Newton-Schulz needs only matrix products. A QR is a LAPACK call, and several at once can deadlock XLA on two cores.
    Each of the 80 steps multiplies a small singular value by 1.5, until it is near one.
    """

    def closer(_, x_4DD):
        gram_4DD = jnp.matmul(x_4DD.mT, x_4DD, precision="highest")
        return 1.5 * x_4DD - 0.5 * jnp.matmul(x_4DD, gram_4DD, precision="highest")

    norm_411 = jnp.sqrt(jnp.sum(x_4DD**2, axis=(1, 2), keepdims=True))  # bounds the largest singular value
    return jax.lax.fori_loop(0, 80, closer, x_4DD / norm_411)


def uniform_by_width(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Draw torch's default for every LSTM weight: uniform within 1 / sqrt(D). shape: [..., 4 D]."""
    limit = (shape[-1] // NUM_GATES) ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)
