"""Attention over a stay's time steps and over modality tokens, with weights that can be read.

Shapes: B rows, T time, M modality, D token width, A key width, N fused width.

In both, what is pooled is a weighted mean, and the weights are all that decides how much of each step or token
is in it: there is no second path around them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import ehr_encoder

# Scores start as zeros: every step, and every token, counts the same at first.
_equal = nn.initializers.zeros_init()
# One kernel a modality: the first axis is no input.
_by_modality = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)


def masked_softmax(score_BM: jax.Array, mask_BM: jax.Array) -> jax.Array:
    """Weights that sum to 1 over what the mask lets in; 0 elsewhere, and everywhere where it lets nothing in."""
    highest_B1 = jnp.max(jnp.where(mask_BM, score_BM, -jnp.inf), axis=1, keepdims=True, initial=-1e30)
    exp_BM = jnp.where(mask_BM, jnp.exp(jnp.where(mask_BM, score_BM - jax.lax.stop_gradient(highest_B1), 0)), 0)
    return exp_BM / jnp.maximum(jnp.sum(exp_BM, axis=1, keepdims=True), 1)  # the highest alone adds 1


class TimeAttention(nn.Module):
    """Pools hidden states over time: additive attention (Bahdanau et al. 2015), the last state as the query.

    So what is asked of each step depends on how the stay went on.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, last_BD: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(states [B, T, D], last [B, D]) -> (pooled [B, D], weights [B, T]), zeros for a length of 0."""
        width = last_BD.shape[-1]
        mask_BT = ehr_encoder.valid_steps(length_B, hidden_BTD.shape[1])
        clean_BTD = jnp.where(mask_BT[..., None], hidden_BTD, 0)
        key_BTA = nn.Dense(width, dtype=self.dtype, name="key")(clean_BTD).astype(jnp.float32)
        query_BA = nn.Dense(width, use_bias=False, dtype=self.dtype, name="query")(last_BD).astype(jnp.float32)
        score_A1 = nn.Dense(1, use_bias=False, kernel_init=_equal, name="score")
        weight_BT = masked_softmax(score_A1(jnp.tanh(key_BTA + query_BA[:, None]))[..., 0], mask_BT)
        return jnp.einsum("bt,btd->bd", weight_BT, clean_BTD), weight_BT


class AttentionFusion(nn.Module):
    """A weighted mean of what each modality says; the query is the mean key of the tokens there are.

    Keys and values have weights of their own for each modality: its place in the sequence tells which it is,
    so a missing one keeps its place and is masked.
    """

    width: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_BMD: jax.Array, mask_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, M, D], mask bool [B, M] -> (fused [B, N], weights [B, M]); zeros where all are missing."""
        clean_BMD = jnp.where(mask_BM[..., None], token_BMD, 0)
        key_BMA = self._project("key", clean_BMD, token_BMD.shape[-1])
        value_BMN = nn.relu(self._project("value", clean_BMD, self.width))
        num_B1 = jnp.maximum(jnp.sum(mask_BM, axis=1, keepdims=True), 1)
        query_BA = jnp.sum(jnp.where(mask_BM[..., None], key_BMA, 0), axis=1) / num_B1
        score_A1 = nn.Dense(1, use_bias=False, kernel_init=_equal, name="score")
        weight_BM = masked_softmax(score_A1(jnp.tanh(key_BMA + query_BA[:, None]))[..., 0], mask_BM)
        return jnp.einsum("bm,bmn->bn", weight_BM, value_BMN), weight_BM

    def _project(self, name: str, token_BMD: jax.Array, width: int) -> jax.Array:
        num_modalities, token_width = token_BMD.shape[1:]
        kernel_MDN = self.param(f"{name}_kernel", _by_modality, (num_modalities, token_width, width))
        bias_MN = self.param(f"{name}_bias", nn.initializers.zeros_init(), (num_modalities, width))
        # No float32 result is asked of a bfloat16 product: XLA's CPU has none where one axis is a batch of products.
        product_BMN = jnp.einsum("bmd,mdn->bmn", token_BMD.astype(self.dtype), kernel_MDN.astype(self.dtype))
        return product_BMN.astype(jnp.float32) + bias_MN
