"""The dynamic affine feature map transform (Pölsterl et al. 2021, arXiv 2107.05990): the X-ray rescales the EHR.

Shapes: B rows, P images, C image channels, T time, D LSTM width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import resnet
from medfuse_jax.models.model import Inputs, Model, linear
from medfuse_jax.models.presence import Images
from medfuse_jax.models.recurrence import scan

BOTTLENECK_RATIO = 7
_BOTTLENECK_EXTRA = 16  # released: int((16 + channels) / 7)


class Daft(nn.Module):
    """hidden * scale + shift, with scale and shift computed from the pooled image and the mean hidden state.

    A row without an X-ray stays unchanged. Differs from MedFuse (models/fusion_daft.py): the mean over time excludes
    the padding.
    """

    @nn.compact
    def __call__(self, image_PC: jax.Array, hidden_BTD: jax.Array, length_B: jax.Array, images: Images) -> jax.Array:
        """Return the rescaled hidden states [B, T, D]."""
        stay_PD = images.from_rows(scan.mean_over_time(hidden_BTD, length_B))
        bottleneck = int((_BOTTLENECK_EXTRA + image_PC.shape[-1]) / BOTTLENECK_RATIO)
        squeeze = nn.Dense(bottleneck, use_bias=False, name="squeeze")
        excite = nn.Dense(2 * hidden_BTD.shape[-1], use_bias=False, name="excite")
        affine_PA = excite(nn.relu(squeeze(jnp.concatenate([image_PC, stay_PD], axis=-1))))
        scale_BD, shift_BD = jnp.split(images.to_rows(affine_PA), 2, axis=-1)
        has_cxr_B1 = images.present_rows()[:, None]
        scale_BD = jnp.where(has_cxr_B1, scale_BD, 1)  # the shift of a row without an X-ray is 0 already
        return hidden_BTD * scale_BD[:, None] + shift_BD[:, None]


class DaftModel(Model):
    """The EHR model, with its first layer's hidden states rescaled by the image's features after one ResNet stage.

    stage: the ResNet stage, 1..4. Later stages are not part of the model, since nothing would read them.
    """

    needs = ("ehr",)  # an X-ray alone has nothing to rescale
    not_causal = "rescales every time step by the mean over the whole series"
    needs_maps = "reads the feature maps after a stage of a ResNet"
    needs_lstm = "rescales the hidden states between the LSTM's two layers"

    stage: int = 4

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.daft = Daft()
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        images = batch.images
        if images is None or batch.ehr_BTF is None:  # nothing to rescale by, or nothing to rescale
            ehr_BD = self.encode_ehr(batch)
        else:
            x_PHWC = self.cxr_encoder.until(self.stage, images.image_PHWC, batch.train, images.valid_P, batch.axis_name)
            hidden_BTD = self.ehr_encoder.first_layer(batch.ehr_BTF, batch.length_B)
            hidden_BTD = self.daft(resnet.pooled(x_PHWC), hidden_BTD, batch.length_B, images)
            ehr_BD = self.ehr_encoder.last_state(hidden_BTD, batch.length_B, batch.train, batch.dropout_rows_B)
        return {"logits": self.classifier(ehr_BD), "ehr_features": ehr_BD}
