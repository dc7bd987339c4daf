"""MedFuse: an LSTM over the modality tokens that a stay has.

Shapes: B rows, D LSTM width, N fused width.
"""

import jax
import jax.numpy as jnp

from medfuse_jax.data.modalities.loading import Modality
from medfuse_jax.models import fusion
from medfuse_jax.models.model import Inputs, ProjectedModel, linear


class TokenModel(ProjectedModel):
    """Base class of fusions of tokens, one per modality, any of which may be missing.

    modalities: those beside EHR and X-ray. Their tokens come first, since they are known before the stay begins.
    """

    modalities: tuple[Modality, ...] = ()

    def setup_fusion(self):
        for modality in self.modalities:
            setattr(self, f"{modality.name}_encoder", modality.encoder(self.ehr_hidden))
        self.classifier = linear(self.num_labels)

    def extra_tokens(self, extra: dict) -> list[tuple[jax.Array, jax.Array]]:
        """Return [(token [B, D], present bool [B]), ...] of the further modalities."""
        assert {m.name for m in self.modalities} == set(extra), "each modality has its values"
        tokens = []
        for name in (modality.name for modality in self.modalities):
            values_B = jnp.asarray(extra[name])
            absent_B = jnp.isnan(values_B).any(axis=tuple(range(1, values_B.ndim)), keepdims=True)
            present_B = ~absent_B.reshape(-1)
            # An absent row is encoded too, and its token is masked. It gets another row's values, which are valid
            # inputs. NaN, or zeros in a norm, would make the encoder's gradient NaN despite the mask: NaN * 0 is NaN.
            filler = jnp.where(present_B.any(), jax.lax.stop_gradient(values_B[jnp.argmax(present_B)]), 1.0)
            tokens.append((getattr(self, f"{name}_encoder")(jnp.where(absent_B, filler, values_B)), present_B))
        return tokens


class MedFuse(TokenModel):
    """An LSTM over the tokens that a stay has: EHR, then X-ray (Hayat et al. 2022, section 3)."""

    not_causal = ""

    def setup_fusion(self):
        super().setup_fusion()
        self.fusion_lstm = fusion.LstmFusion(self.fusion_hidden, self.dtype)

    def forward(self, batch: Inputs) -> dict:
        ehr_BD, cxr_BD = self.encode(batch)
        tokens = [*self.extra_tokens(batch.extra), (ehr_BD, batch.has_ehr_B)]
        if batch.images is not None:
            tokens.append((cxr_BD, batch.has_cxr_B))
        fused_BN = self.fusion_lstm(*fusion.stack_tokens(tokens))
        return {"logits": self.classifier(fused_BN), "ehr_features": ehr_BD, "cxr_features": cxr_BD}
