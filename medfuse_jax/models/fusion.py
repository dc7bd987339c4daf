"""Fusion of what there is: a short sequence of modality tokens, any of which may be missing.

Shapes: B batch, M modality, D token width, N fused width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import ehr_encoder


def stack_tokens(tokens: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """[(token [B, D], present bool [B]), ...] in fusion order -> (tokens [B, M, D], mask [B, M])."""
    token_BMD = jnp.stack([token_BD for token_BD, _ in tokens], axis=1)
    mask_BM = jnp.stack([present_B for _, present_B in tokens], axis=1)
    return token_BMD, mask_BM


class LstmFusion(nn.Module):
    """An LSTM over the modality tokens; its last state is the fused vector.

    A missing token leaves the state as it was: the same numbers as a sequence without it.
    """

    width: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_BMD: jax.Array, mask_BM: jax.Array) -> jax.Array:
        """Tokens [B, M, D], mask bool [B, M] -> [B, N], float32; zeros where every token is missing."""
        # As a bare cell the weights get torch's initial values, like those of the released fusion layer.
        weights = ehr_encoder.LstmWeights(self.width, torch_default=True, name="cell")(token_BMD.shape[-1])
        return ehr_encoder.masked_lstm(weights, token_BMD, mask_BM, self.dtype)[1]
