"""The dynamic affine feature map transform (Pölsterl et al. 2021, arXiv 2107.05990): the X-ray rescales the stay.

Shapes: B rows, P X-rays, C X-ray channels, T time, D LSTM width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import ehr_encoder
from medfuse_jax.models.presence import Images

BOTTLENECK_RATIO = 7
_BOTTLENECK_EXTRA = 16  # released: int((16 + channels) / 7)


class Daft(nn.Module):
    """hidden * scale + shift, both from the pooled X-ray and the mean hidden state.

    A stay without an X-ray passes as it is. Differs from MedFuse (models/fusion_daft.py): the mean is
    over the valid steps, not over the padding too.
    """

    @nn.compact
    def __call__(self, image_PC: jax.Array, hidden_BTD: jax.Array, length_B: jax.Array, images: Images) -> jax.Array:
        """Hidden states [B, T, D] -> the same, rescaled."""
        stay_PD = images.from_rows(ehr_encoder.mean_over_steps(hidden_BTD, length_B))
        bottleneck = int((_BOTTLENECK_EXTRA + image_PC.shape[-1]) / BOTTLENECK_RATIO)
        squeeze = nn.Dense(bottleneck, use_bias=False, name="squeeze")
        excite = nn.Dense(2 * hidden_BTD.shape[-1], use_bias=False, name="excite")
        affine_PA = excite(nn.relu(squeeze(jnp.concatenate([image_PC, stay_PD], axis=-1))))
        scale_BD, shift_BD = jnp.split(images.to_rows(affine_PA), 2, axis=-1)
        has_cxr_B1 = images.present_rows()[:, None]
        scale_BD = jnp.where(has_cxr_B1, scale_BD, 1)  # the shift of a row without an X-ray is 0 already
        return hidden_BTD * scale_BD[:, None] + shift_BD[:, None]
