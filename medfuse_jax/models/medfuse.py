"""MedFuse: an LSTM over the modality tokens that a stay has.

Shapes: B rows, P images, M images of a row at most, D LSTM width, N fused width.
"""

import jax
import jax.numpy as jnp

from medfuse_jax.data.modalities.loading import Modality
from medfuse_jax.models import fusion
from medfuse_jax.models.model import Inputs, ProjectedModel, linear
from medfuse_jax.models.presence import at_slots, last_places


class TokenModel(ProjectedModel):
    """Base class of fusions of tokens, one per modality, any of which may be missing.

    modalities: those beside EHR and X-ray. Their tokens come first, since they are known before the stay begins.
    """

    modalities: tuple[Modality, ...] = ()

    def setup_fusion(self):
        for modality in self.modalities:
            setattr(self, f"{modality.name}_encoder", modality.encoder(self.ehr_hidden))
        if self.reads_all_images:
            self.image_time = fusion.TimeEmbedding(self.ehr_hidden)
        self.classifier = linear(self.num_labels)

    @property
    def reads_all_images(self) -> bool:
        """Whether each image of a row is a token of its own: the field `all_images`, which not all methods have."""
        return getattr(self, "all_images", False)

    def image_tokens(self, batch: Inputs) -> tuple[jax.Array, jax.Array]:
        """Return (each image's token [P, D], slots of each row's images in order of time [B, M], -1 for none)."""
        images = batch.images
        if images is None:
            return jnp.zeros((1, self.ehr_hidden)), jnp.full((batch.num_rows, 1), -1)
        token_PD = self.projection(self.encode_images(batch))
        time_h_P = jnp.zeros(len(token_PD)) if images.time_h_P is None else images.time_h_P
        return token_PD + self.image_time(time_h_P), images.slots()

    @staticmethod
    def last(token_PD: jax.Array, slot_BM: jax.Array) -> jax.Array:
        """Return the token of each row's last image [B, D]; zeros without one."""
        last_B1 = last_places(slot_BM)[:, None]
        slot_B1 = jnp.where(last_B1 >= 0, jnp.take_along_axis(slot_BM, jnp.maximum(last_B1, 0), axis=1), -1)
        return at_slots(token_PD, slot_B1[:, 0])

    def extra_tokens(self, extra: dict) -> list[tuple[jax.Array, jax.Array]]:
        """Return [(token [B, D], present bool [B]), ...] of the further modalities."""
        assert {m.name for m in self.modalities} == set(extra), "each modality has its values"
        tokens = []
        for modality in self.modalities:
            values_B = jnp.asarray(extra[modality.name])
            absent_B = jnp.isnan(values_B).any(axis=tuple(range(1, values_B.ndim)), keepdims=True)
            present_B = ~absent_B.reshape(-1)
            # Absent rows are encoded too, and their tokens masked. They get the values of a present row, which the
            # encoder can take. NaN, or zeros in a norm, would make its gradient NaN despite the mask: NaN * 0 is NaN.
            filler = jnp.where(present_B.any(), jax.lax.stop_gradient(values_B[jnp.argmax(present_B)]), 1.0)
            encode = getattr(self, f"{modality.name}_encoder")
            tokens.append((encode(jnp.where(absent_B, filler, values_B)), present_B))
        return tokens


class MedFuse(TokenModel):
    """An LSTM over the tokens that a stay has: EHR, then X-ray (Hayat et al. 2022, section 3).

    all_images: whether each X-ray of a stay is a token, in order of time; the paper's MedFuse reads the last alone.
    """

    not_causal = ""

    all_images: bool = False

    def setup_fusion(self):
        super().setup_fusion()
        self.fusion_lstm = fusion.LstmFusion(self.fusion_hidden, self.dtype)

    def forward(self, batch: Inputs) -> dict:
        if self.all_images and batch.images is not None:
            ehr_BD = self.encode_ehr(batch)
            token_PD, slot_BM = self.image_tokens(batch)
            of_images = [(at_slots(token_PD, slot_B), slot_B >= 0) for slot_B in slot_BM.T]
            cxr_BD = self.last(token_PD, slot_BM)
        else:
            ehr_BD, cxr_BD = self.encode(batch)
            of_images = [] if batch.images is None else [(cxr_BD, batch.has_cxr_B)]
        tokens = [*self.extra_tokens(batch.extra), (ehr_BD, batch.has_ehr_B), *of_images]
        fused_BN = self.fusion_lstm(*fusion.stack_tokens(tokens))
        return {"logits": self.classifier(fused_BN), "ehr_features": ehr_BD, "cxr_features": cxr_BD}
