"""The multimodal transfer module (Vaezi Joze et al. 2020, arXiv 1911.08670): two encoders gate each other.

Shapes: B rows, P images, H W pixels, C image channels, T time, D LSTM width, E image feature, Z squeezed, K label.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.losses import Head, Term, output
from medfuse_jax.models import resnet
from medfuse_jax.models.model import Inputs, Model, linear
from medfuse_jax.models.presence import Images
from medfuse_jax.models.recurrence import scan

ALIGN_TEMPERATURE = 0.2


class Mmtm(nn.Module):
    """Gates for an X-ray's channels and a stay's hidden units, each computed from both modalities.

    If one modality is missing, the other stays unchanged. Differs from MedFuse (models/fusion_mmtm.py): the mean over
    time excludes the padding. Differs from the MMTM paper: gates are sigmoid(x), as released, not 2 * sigmoid(x).
    """

    ratio: int = 4

    @nn.compact
    def __call__(
        self, x_PHWC: jax.Array, hidden_BTD: jax.Array, length_B: jax.Array, images: Images
    ) -> tuple[jax.Array, jax.Array]:
        """Return the gated feature maps of the image and the gated hidden states."""
        channels, width = x_PHWC.shape[-1], hidden_BTD.shape[-1]
        image_PC = resnet.pooled(x_PHWC)
        stay_PD = images.from_rows(scan.mean_over_time(hidden_BTD, length_B))
        num_squeezed = 2 * (channels + width) // self.ratio
        squeezed_PZ = nn.relu(nn.Dense(num_squeezed, name="squeeze")(jnp.concatenate([image_PC, stay_PD], axis=-1)))
        image_gate_PC = nn.sigmoid(nn.Dense(channels, name="image_gate")(squeezed_PZ))
        stay_gate_PD = nn.sigmoid(nn.Dense(width, name="ehr_gate")(squeezed_PZ))

        has_stay_P1 = images.from_rows((length_B > 0)[:, None])
        image_gate_PC = jnp.where(has_stay_P1, image_gate_PC, 1)
        stay_gate_BD = jnp.where(images.present_rows()[:, None], images.to_rows(stay_gate_PD), 1)
        return x_PHWC * image_gate_PC[:, None, None].astype(x_PHWC.dtype), hidden_BTD * stay_gate_BD[:, None]


def alignment_loss(cxr_BE: jax.Array, ehr_BE: jax.Array) -> jax.Array:
    """Return KL(X-ray || EHR) [B] of the feature vectors' softmax distributions at temperature 0.2.

    The X-ray's distribution is the target and gets no gradient, as in the released code.
    """
    log_cxr_BE = jax.lax.stop_gradient(jax.nn.log_softmax(cxr_BE / ALIGN_TEMPERATURE))
    log_ehr_BE = jax.nn.log_softmax(ehr_BE / ALIGN_TEMPERATURE)
    return jnp.sum(jnp.exp(log_cxr_BE) * (log_cxr_BE - log_ehr_BE), axis=-1)


class MmtmModel(Model):
    """Encoders that gate each other after one ResNet stage and one LSTM layer, and three classifiers.

    stage: the ResNet stage, 1..4. 'logits' are the joint classifier's. Further outputs: 'cxr_only_logits',
    'ehr_only_logits' [B, K]; 'cxr_only', 'ehr_only' and 'late_average' [B, K], probabilities, the last averaged over
    the modalities that a row has; 'align_loss_rows' [B], 0 for rows that lack one modality, and 'align_loss', their
    mean over the rows of this device that have both.
    """

    not_causal = "gates every time step by the mean over the whole series"
    needs_maps = "gates the feature maps of a ResNet"
    needs_lstm = "gates the hidden states between the LSTM's two layers"
    # Differs from MedFuse (trainers/mmtm_trainer.py): one update with the summed losses instead of three updates in
    # turn. There, the EHR loss updates only the image encoder, because its optimiser is given no other parameters.
    heads = (
        Head(),
        Head("ehr_only_logits", needs=("ehr",), weight="ehr_only"),
        Head("cxr_only_logits", needs=("cxr",), weight="cxr_only"),
    )
    terms = (Term(output("align_loss_rows"), "align", needs=("ehr", "cxr")),)

    stage: int = 4

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.mmtm = Mmtm()
        self.projection = linear(self.num_cxr_features)
        self.ehr_classifier = linear(self.num_labels)
        self.cxr_classifier = linear(self.num_labels)
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        ehr_BD, cxr_BE = self.encode(batch)
        projected_BE = self.projection(ehr_BD)
        joint_B2E = jnp.concatenate([projected_BE, cxr_BE], axis=-1)
        outputs = {"logits": self.classifier(joint_B2E), "ehr_features": ehr_BD, "cxr_features": cxr_BE}
        outputs |= self.single_heads(ehr_BD, cxr_BE, batch.has_ehr_B, batch.has_cxr_B)
        return outputs | self.alignment(cxr_BE, projected_BE, batch.has_ehr_B & batch.has_cxr_B)

    def encode(self, batch: Inputs) -> tuple[jax.Array, jax.Array]:
        """Return (EHR features [B, D], image features [B, E]) after the exchange."""
        images = batch.images
        if images is None:
            return self.encode_ehr(batch), jnp.zeros((batch.num_rows, self.num_cxr_features))
        norm_args = (batch.train, images.valid_P, batch.axis_name)
        x_PHWC = self.cxr_encoder.until(self.stage, images.image_PHWC, *norm_args)
        ehr_BD = jnp.zeros((batch.num_rows, self.ehr_hidden))
        if batch.ehr_BTF is not None:
            hidden_BTD = self.ehr_encoder.first_layer(batch.ehr_BTF, batch.length_B)
            x_PHWC, hidden_BTD = self.mmtm(x_PHWC, hidden_BTD, batch.length_B, images)
            ehr_BD = self.ehr_encoder.last_state(hidden_BTD, batch.length_B, batch.train, batch.dropout_rows_B)
        for i in range(self.stage + 1, len(self.resnet_stage_sizes) + 1):
            x_PHWC = self.cxr_encoder.stage(i, x_PHWC, *norm_args)
        return ehr_BD, images.to_rows(resnet.pooled(x_PHWC))

    def single_heads(self, ehr_BD, cxr_BE, has_ehr_B, has_cxr_B) -> dict:
        ehr_logits_BK, cxr_logits_BK = self.ehr_classifier(ehr_BD), self.cxr_classifier(cxr_BE)
        ehr_only_BK, cxr_only_BK = nn.sigmoid(ehr_logits_BK), nn.sigmoid(cxr_logits_BK)
        ehr_weight_B1, cxr_weight_B1 = has_ehr_B[:, None].astype(jnp.float32), has_cxr_B[:, None].astype(jnp.float32)
        total_BK = ehr_weight_B1 * ehr_only_BK + cxr_weight_B1 * cxr_only_BK
        return {
            "ehr_only_logits": ehr_logits_BK,
            "cxr_only_logits": cxr_logits_BK,
            "ehr_only": ehr_only_BK,
            "cxr_only": cxr_only_BK,
            "late_average": total_BK / jnp.maximum(ehr_weight_B1 + cxr_weight_B1, 1),
        }

    def alignment(self, cxr_BE, projected_BE, has_both_B) -> dict:
        loss_B = jnp.where(has_both_B, alignment_loss(cxr_BE, projected_BE), 0)
        return {"align_loss_rows": loss_B, "align_loss": jnp.sum(loss_B) / jnp.maximum(jnp.sum(has_both_B), 1)}
