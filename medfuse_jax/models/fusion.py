"""LSTM fusion: a short sequence of modality tokens, any of which may be missing.

Shapes: B batch, M modality, D token width, N fused width, P images, F frequencies.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax.models.recurrence.scan import masked_lstm
from medfuse_jax.models.recurrence.weights import LstmWeights

_PERIODS_H = 4.0 * 2 ** np.arange(10)  # 4 h to 85 days


def stack_tokens(tokens: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Stack [(token [B, D], present bool [B]), ...], in fusion order, into (tokens [B, M, D], mask [B, M])."""
    token_BMD = jnp.stack([token_BD for token_BD, _ in tokens], axis=1)
    mask_BM = jnp.stack([present_B for _, present_B in tokens], axis=1)
    return token_BMD, mask_BM


class TimeEmbedding(nn.Module):
    """What is added to the token of an image, by the time at which it was taken: nothing at first, then what is learnt.

    A linear map of sines and cosines of the time, as for positions in Vaswani et al. 2017, with periods in hours.
    """

    width: int

    @nn.compact
    def __call__(self, time_h_P: jax.Array) -> jax.Array:
        """Return [P, D] of times in hours."""
        angle_PF = time_h_P[:, None] * (2 * np.pi / _PERIODS_H)
        wave_P2F = jnp.concatenate([jnp.sin(angle_PF), jnp.cos(angle_PF)], axis=1)
        zeros = nn.initializers.zeros_init()
        return nn.Dense(self.width, use_bias=False, kernel_init=zeros, name="waves")(wave_P2F)


class LstmFusion(nn.Module):
    """An LSTM over the modality tokens; its last state is the fused vector.

    A missing token leaves the state unchanged, as if it were not in the sequence.
    """

    width: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_BMD: jax.Array, mask_BM: jax.Array) -> jax.Array:
        """Fuse tokens [B, M, D], with mask bool [B, M], into [B, N], float32; zeros for a row without tokens."""
        # torch's initial values, as in the released fusion layer.
        weights = LstmWeights(self.width, torch_default=True, name="cell")(token_BMD.shape[-1])
        return masked_lstm(weights, token_BMD, mask_BM, self.dtype)[1]
