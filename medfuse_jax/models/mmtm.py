"""The multimodal transfer module (Vaezi Joze et al. 2020, arXiv 1911.08670): two encoders gate each other.

Shapes: B rows, P X-rays, H W pixels, C X-ray channels, T time, D LSTM width, Z squeezed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import ehr_encoder, resnet
from medfuse_jax.models.presence import Images

ALIGN_TEMPERATURE = 0.2


class Mmtm(nn.Module):
    """Gates an X-ray's channels and a stay's hidden units, both from both.

    Where one of the two is missing the other passes as it is. Differs from MedFuse
    (models/fusion_mmtm.py): the stay is averaged over its valid steps, not over the padding too;
    and from the paper: gates are sigmoid(x), as released, not 2 * sigmoid(x).
    """

    ratio: int = 4

    @nn.compact
    def __call__(
        self, x_PHWC: jax.Array, hidden_BTD: jax.Array, length_B: jax.Array, images: Images
    ) -> tuple[jax.Array, jax.Array]:
        """(X-ray maps, hidden states) -> the same two, gated."""
        channels, width = x_PHWC.shape[-1], hidden_BTD.shape[-1]
        image_PC = resnet.pooled(x_PHWC)
        stay_PD = images.from_rows(ehr_encoder.mean_over_steps(hidden_BTD, length_B))
        num_squeezed = 2 * (channels + width) // self.ratio
        squeezed_PZ = nn.relu(nn.Dense(num_squeezed, name="squeeze")(jnp.concatenate([image_PC, stay_PD], axis=-1)))
        image_gate_PC = nn.sigmoid(nn.Dense(channels, name="image_gate")(squeezed_PZ))
        stay_gate_PD = nn.sigmoid(nn.Dense(width, name="ehr_gate")(squeezed_PZ))

        has_stay_P1 = images.from_rows((length_B > 0)[:, None])
        image_gate_PC = jnp.where(has_stay_P1, image_gate_PC, 1)
        stay_gate_BD = jnp.where(images.present_rows()[:, None], images.to_rows(stay_gate_PD), 1)
        return x_PHWC * image_gate_PC[:, None, None].astype(x_PHWC.dtype), hidden_BTD * stay_gate_BD[:, None]


def alignment_loss(cxr_BE: jax.Array, ehr_BE: jax.Array) -> jax.Array:
    """KL(X-ray || stay) of two feature vectors taken as distributions, temperature 0.2: [B].

    The X-ray's is the target, as released: no gradient reaches it.
    """
    log_cxr_BE = jax.lax.stop_gradient(jax.nn.log_softmax(cxr_BE / ALIGN_TEMPERATURE))
    log_ehr_BE = jax.nn.log_softmax(ehr_BE / ALIGN_TEMPERATURE)
    return jnp.sum(jnp.exp(log_cxr_BE) * (log_cxr_BE - log_ehr_BE), axis=-1)
