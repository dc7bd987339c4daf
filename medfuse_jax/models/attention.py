"""MedFuse with attention over time steps and over modality tokens; its attention weights can be inspected.

Shapes: B rows, T time, H hours, M modality, L tokens that share a place, D token width, A key width, N fused width, K
label.

Both poolings are weighted means, and no other path bypasses the weights: they alone decide how much each time step or
token contributes to the result.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import fusion
from medfuse_jax.models.medfuse import TokenModel
from medfuse_jax.models.model import Inputs
from medfuse_jax.models.presence import at_slots, last_places
from medfuse_jax.models.recurrence import cell
from medfuse_jax.models.series_encoder import states_before
from medfuse_jax.models.transformer import masked_softmax

EARLIER = "earlier_cxr"  # all X-rays of a stay but the last

_HOURS_AT_ONCE = 8  # whose scores over a series are in memory together
# Scores start at zero, so that at first all time steps, and all tokens, have equal weight.
_equal = nn.initializers.zeros_init()
# One kernel per modality: the first axis is a batch axis, not an input axis.
_by_modality = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)


class TimeAttention(nn.Module):
    """Pooling over time by additive attention (Bahdanau et al. 2015), with the last hidden state as the query."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_BTD: jax.Array, last: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (pooled [B, D], weights [B, T]) for the last states [B, D] of series of length [B]; zeros for 0.

        last [B, H, D] and length [B, H]: the same at each of H hours, over the time steps before it.
        """
        width, num_steps = last.shape[-1], hidden_BTD.shape[1]
        longest_B = length if length.ndim == 1 else length.max(axis=1)
        clean_BTD = jnp.where(cell.valid_time_steps(longest_B, num_steps)[..., None], hidden_BTD, 0)
        key_BTA = nn.Dense(width, dtype=self.dtype, name="key")(clean_BTD).astype(jnp.float32)
        query = nn.Dense(width, use_bias=False, dtype=self.dtype, name="query")(last).astype(jnp.float32)
        score_A1 = nn.Dense(1, use_bias=False, kernel_init=_equal, name="score")

        def pool(score_BT, length_B):
            weight_BT = masked_softmax(score_BT, cell.valid_time_steps(length_B, num_steps))
            return jnp.einsum("bt,btd->bd", weight_BT, clean_BTD), weight_BT

        if length.ndim == 1:
            return pool(score_A1(jnp.tanh(key_BTA + query[:, None]))[..., 0], length)
        kernel_A = score_A1.variables["params"]["kernel"][:, 0]

        @jax.checkpoint  # else the scores of all hours over all time steps were kept for the gradient
        def pool_at(of_hour):
            query_BA, length_B = of_hour
            return pool(jnp.tanh(key_BTA + query_BA[:, None]) @ kernel_A, length_B)

        hours = (query.swapaxes(0, 1), length.swapaxes(0, 1))
        pooled_HBD, weight_HBT = jax.lax.map(pool_at, hours, batch_size=_HOURS_AT_ONCE)
        return pooled_HBD.swapaxes(0, 1), weight_HBT.swapaxes(0, 1)


class AttentionFusion(nn.Module):
    """A weighted mean of the tokens' values; the query is the mean key of the tokens that are present.

    Each position has its own key and value weights. A missing modality therefore keeps its position and is masked. The
    last `num_alike` tokens share one position.
    """

    width: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, token_BMD: jax.Array, mask_BM: jax.Array, num_alike: int = 1) -> tuple[jax.Array, jax.Array]:
        """Return (fused [B, N], weights [B, M]) of tokens [B, M, D] with mask bool [B, M]; zeros if all are missing."""
        clean_BMD = jnp.where(mask_BM[..., None], token_BMD, 0)
        key_BMA = self._project("key", clean_BMD, token_BMD.shape[-1], num_alike)
        value_BMN = nn.relu(self._project("value", clean_BMD, self.width, num_alike))
        num_B1 = jnp.maximum(jnp.sum(mask_BM, axis=1, keepdims=True), 1)
        query_BA = jnp.sum(jnp.where(mask_BM[..., None], key_BMA, 0), axis=1) / num_B1
        score_A1 = nn.Dense(1, use_bias=False, kernel_init=_equal, name="score")
        weight_BM = masked_softmax(score_A1(jnp.tanh(key_BMA + query_BA[:, None]))[..., 0], mask_BM)
        return jnp.einsum("bm,bmn->bn", weight_BM, value_BMN), weight_BM

    def _project(self, name: str, token_BMD: jax.Array, width: int, num_alike: int) -> jax.Array:
        num_tokens, token_width = token_BMD.shape[1:]
        num_places = num_tokens - num_alike + 1
        kernel_MDN = self.param(f"{name}_kernel", _by_modality, (num_places, token_width, width))
        bias_MN = self.param(f"{name}_bias", nn.initializers.zeros_init(), (num_places, width))
        token_BMD, kernel_MDN = token_BMD.astype(self.dtype), kernel_MDN.astype(self.dtype)
        if num_alike == 1:
            # On a CPU, XLA cannot return a batched bfloat16 product as float32: cast it afterwards.
            return jnp.einsum("bmd,mdn->bmn", token_BMD, kernel_MDN).astype(jnp.float32) + bias_MN
        own = num_places - 1
        own_BMN = jnp.einsum("bmd,mdn->bmn", token_BMD[:, :own], kernel_MDN[:own]).astype(jnp.float32) + bias_MN[:own]
        alike_BLN = jnp.einsum("bld,dn->bln", token_BMD[:, own:], kernel_MDN[own]).astype(jnp.float32) + bias_MN[own]
        return jnp.concatenate([own_BMN, alike_BLN], axis=1)


class MedFuseAttention(TokenModel):
    """MedFuse with attention instead of both last states (suggested as future work by Hayat et al. 2022, section 6).

    The weights are in the collection 'intermediates': time_weights [B, T] (not of hours) and modality_weights [B, M], M
    in the order of `token_names`.
    all_images: whether each X-ray of a stay is a token. The last one has the place that it has alone; those before it
    share another, so that a change between them can be told.
    """

    reads_series = True
    not_causal = ""

    all_images: bool = False

    @property
    def token_names(self) -> tuple[str, ...]:
        earlier = (EARLIER,) if self.all_images else ()
        return (*(modality.name for modality in self.modalities), "ehr", "cxr", *earlier)

    def setup_fusion(self):
        super().setup_fusion()
        # Kept outside the encoder, so that an LSTM that was trained alone can initialise the encoder.
        self.time_attention = TimeAttention(self.dtype)
        self.modality_attention = AttentionFusion(self.fusion_hidden, self.dtype)

    def encode_ehr(self, batch: Inputs) -> jax.Array:
        if batch.ehr_BTF is None:
            return super().encode_ehr(batch)
        # `freeze` covers only the encoder: the attention over its states belongs to the fusion.
        hidden_BTD, last_BD = self.freeze(self.ehr_encoder.states(batch.ehr_BTF, batch.length_B))
        if batch.hour_step_BH is not None:
            state_BHD = states_before(hidden_BTD, batch.hour_step_BH)
            return self.drop_by_hour(self.time_attention(hidden_BTD, state_BHD, batch.hour_step_BH)[0], batch)
        pooled_BD, weight_BT = self.time_attention(hidden_BTD, last_BD, batch.length_B)
        self.sow("intermediates", "time_weights", weight_BT, reduce_fn=_latest, init_fn=tuple)
        return self.ehr_encoder.drop(pooled_BD, batch.train, batch.dropout_rows_B)

    def forward(self, batch: Inputs) -> dict:
        earlier: list = []
        if self.all_images:
            ehr_BD = self.encode_ehr(batch)
            token_PD, slot_BL = self.image_tokens(batch)
            cxr_BD, last_B = self.last(token_PD, slot_BL), last_places(slot_BL)
            earlier = [(at_slots(token_PD, x_B), (x_B >= 0) & (m < last_B)) for m, x_B in enumerate(slot_BL.T)]
        else:
            ehr_BD, cxr_BD = self.encode(batch)
        tokens = [*self.extra_tokens(batch.extra), (ehr_BD, batch.has_ehr_B), (cxr_BD, batch.has_cxr_B), *earlier]
        fused_BN, weight_BM = self.modality_attention(*fusion.stack_tokens(tokens), max(len(earlier), 1))
        if earlier:
            num_own = len(tokens) - len(earlier)
            weight_BM = jnp.append(weight_BM[:, :num_own], weight_BM[:, num_own:].sum(1, keepdims=True), axis=1)
        self.sow("intermediates", "modality_weights", weight_BM, reduce_fn=_latest, init_fn=tuple)
        return {"logits": self.classifier(fused_BN), "ehr_features": ehr_BD, "cxr_features": cxr_BD}


def _latest(_, value):
    return value
