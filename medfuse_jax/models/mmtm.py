"""The multimodal transfer module (Vaezi Joze et al. 2020, arXiv 1911.08670): two encoders gate each other.

Shapes: B rows, P films, H W pixels, C film channels, T time, D LSTM width, Z squeezed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import ehr_encoder, resnet
from medfuse_jax.models.presence import Films

ALIGN_TEMPERATURE = 0.2


class Mmtm(nn.Module):
    """Gates a film's channels and a stay's hidden units, both from both.

    Where one of the two is missing the other passes as it is. Differs from MedFuse
    (models/fusion_mmtm.py): the stay is averaged over its valid steps, not over the padding too;
    and from the paper: gates are sigmoid(x), as released, not 2 * sigmoid(x).
    """

    ratio: int = 4

    @nn.compact
    def __call__(
        self, x_PHWC: jax.Array, hidden_BTD: jax.Array, length_B: jax.Array, films: Films
    ) -> tuple[jax.Array, jax.Array]:
        """(film maps, hidden states) -> the same two, gated."""
        channels, width = x_PHWC.shape[-1], hidden_BTD.shape[-1]
        film_PC = resnet.pooled(x_PHWC)
        stay_PD = films.from_rows(ehr_encoder.mean_over_steps(hidden_BTD, length_B))
        num_squeezed = 2 * (channels + width) // self.ratio
        squeezed_PZ = nn.relu(nn.Dense(num_squeezed, name="squeeze")(jnp.concatenate([film_PC, stay_PD], axis=-1)))
        film_gate_PC = nn.sigmoid(nn.Dense(channels, name="film_gate")(squeezed_PZ))
        stay_gate_PD = nn.sigmoid(nn.Dense(width, name="ehr_gate")(squeezed_PZ))

        has_stay_P1 = films.from_rows((length_B > 0)[:, None])
        film_gate_PC = jnp.where(has_stay_P1, film_gate_PC, 1)
        stay_gate_BD = jnp.where(films.present_rows()[:, None], films.to_rows(stay_gate_PD), 1)
        return x_PHWC * film_gate_PC[:, None, None].astype(x_PHWC.dtype), hidden_BTD * stay_gate_BD[:, None]


def alignment_loss(cxr_BE: jax.Array, ehr_BE: jax.Array) -> jax.Array:
    """KL(film || stay) of two feature vectors taken as distributions, temperature 0.2: [B].

    The film's is the target, as released: no gradient reaches it.
    """
    log_cxr_BE = jax.lax.stop_gradient(jax.nn.log_softmax(cxr_BE / ALIGN_TEMPERATURE))
    log_ehr_BE = jax.nn.log_softmax(ehr_BE / ALIGN_TEMPERATURE)
    return jnp.sum(jnp.exp(log_cxr_BE) * (log_cxr_BE - log_ehr_BE), axis=-1)
