"""ShaSpec: features that both modalities share, and features specific to each (Wang et al. 2023, arXiv 2307.14126).

Shapes: B rows, D feature width, M modalities: EHR, X-ray.
"""

import jax
import jax.numpy as jnp
import optax

from medfuse_jax.losses import Term, output
from medfuse_jax.models.model import Inputs, ProjectedModel, TwoLayers, linear

_EHR, _CXR = range(2)


class ShaSpec(ProjectedModel):
    """One shared encoder for both modalities, one specific encoder for each, and a residual fusion of their outputs.

    A modality's feature is projection([shared, specific]) + shared; the classifier reads both modalities' features. For
    a missing modality, it is the mean of the shared features of those that are there: with two, the other's. Losses
    beside the main one: the mean absolute difference of the shared features of rows with both (weight
    config.loss.distance), and the cross-entropy of a classifier that tells the modality from the specific features
    (config.loss.domain), a mean over the rows that have the modality.

    Ours: the shared encoder reads the LSTM's and the projected ResNet's features, because one encoder cannot read both
    series and pixels. The encoders have config.model.fusion_hidden units between their two layers.
    """

    terms = (
        Term(output("distance_rows"), "distance", needs=("ehr", "cxr")),
        Term(output("ehr_domain_rows"), "domain", needs=("ehr",)),
        Term(output("cxr_domain_rows"), "domain", needs=("cxr",)),
    )
    not_causal = "has losses between features, and hourly tasks have that of the classifier alone"

    def setup_fusion(self):
        self.shared = TwoLayers(self.fusion_hidden)
        self.ehr_specific, self.cxr_specific = TwoLayers(self.fusion_hidden), TwoLayers(self.fusion_hidden)
        self.residual = linear(self.ehr_hidden)
        self.domain_classifier = linear(2)
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        ehr_BD, cxr_BD = self.encode(batch)
        ehr_shared_BD, cxr_shared_BD = self.shared(ehr_BD), self.shared(cxr_BD)
        ehr_specific_BD, cxr_specific_BD = self.ehr_specific(ehr_BD), self.cxr_specific(cxr_BD)
        has_ehr_B1, has_cxr_B1 = batch.has_ehr_B[:, None], batch.has_cxr_B[:, None]
        ehr_fused_BD = jnp.where(has_ehr_B1, self._fuse(ehr_shared_BD, ehr_specific_BD), cxr_shared_BD)
        cxr_fused_BD = jnp.where(has_cxr_B1, self._fuse(cxr_shared_BD, cxr_specific_BD), ehr_shared_BD)
        return {
            "logits": self.classifier(jnp.concatenate([ehr_fused_BD, cxr_fused_BD], axis=-1)),
            "distance_rows": jnp.abs(ehr_shared_BD - cxr_shared_BD).mean(axis=-1),
            "ehr_domain_rows": self._domain_loss(ehr_specific_BD, _EHR),
            "cxr_domain_rows": self._domain_loss(cxr_specific_BD, _CXR),
            "ehr_features": ehr_BD,
            "cxr_features": cxr_BD,
        }

    def _fuse(self, shared_BD: jax.Array, specific_BD: jax.Array) -> jax.Array:
        return self.residual(jnp.concatenate([shared_BD, specific_BD], axis=-1)) + shared_BD

    def _domain_loss(self, specific_BD: jax.Array, modality: int) -> jax.Array:
        label_B = jnp.full(len(specific_BD), modality)
        return optax.softmax_cross_entropy_with_integer_labels(self.domain_classifier(specific_BD), label_B)
