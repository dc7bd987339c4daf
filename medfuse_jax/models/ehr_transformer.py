"""The EHR encoder as a transformer (config.model.ehr_encoder=transformer), instead of LSTM layers.

Shapes: B batch, T time, F input channel, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence import cell
from medfuse_jax.models.series_encoder import SeriesEncoder, states_before
from medfuse_jax.models.transformer import Layer, positions

NUM_LAYERS = 2  # as many as the LSTM has
HIDDEN_RATIO = 4  # units of the feed-forward part for each of D (Vaswani et al. 2017)


class EhrTransformer(SeriesEncoder):
    """Two causal pre-norm layers over a stay's time steps; the last time step's state is its feature vector.

    A time step reads itself and those before it, so that one pass gives the state at every hour. The sizes are ours:
    all follow from `width`. Dropout is applied to the features alone, as for the LSTM.
    """

    def setup(self):
        self.input = nn.Dense(self.width, dtype=self.dtype)
        self.layers = [Layer(HIDDEN_RATIO * self.width, self.dtype, causal=True) for _ in range(NUM_LAYERS)]
        self.norm = nn.LayerNorm()

    def states(self, ehr_BTF: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        num_rows, num_time_steps, _ = ehr_BTF.shape
        if num_time_steps == 0:
            return jnp.zeros((num_rows, 0, self.width)), jnp.zeros((num_rows, self.width))
        length_B = jnp.minimum(length_B, num_time_steps)
        valid_BT = cell.valid_time_steps(length_B, num_time_steps)
        valid_BT1 = valid_BT[..., None]
        # A NaN in the padding would make the kernels' gradients NaN (NaN * 0): clear it before any product.
        token_BTD = self.input(jnp.where(valid_BT1, ehr_BTF, 0)).astype(jnp.float32)
        token_BTD += positions(num_time_steps, self.width)
        for layer in self.layers:
            token_BTD, _ = layer(token_BTD, valid_BT, None, None)
        hidden_BTD = jnp.where(valid_BT1, self.norm(token_BTD), 0)
        return hidden_BTD, states_before(hidden_BTD, length_B[:, None])[:, 0]
