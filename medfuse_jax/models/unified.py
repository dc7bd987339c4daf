"""Unified: a classifier for each set of modalities (Hayat et al. 2021, arXiv 2111.02710)."""

import jax.numpy as jnp

from medfuse_jax import schema
from medfuse_jax.losses import Head
from medfuse_jax.models.model import Inputs, ProjectedModel, linear


class Unified(ProjectedModel):
    """A joint classifier for rows with an X-ray, and an EHR classifier for rows without one.

    The X-ray classifier has its own labels ('cxr_only_logits' [B, num_cxr_labels]). Batches of X-rays with those labels
    train it; they alternate with the stays' batches (plan.Alternating). The paper does not say how to score an X-ray
    without EHR: here the joint classifier scores it, with zeros for the EHR features.
    """

    heads = (
        Head("joint_logits", needs=("cxr",)),
        Head("ehr_only_logits", needs=("ehr",), weight="ehr_only"),
        Head("cxr_only_logits", needs=("cxr",), weight="cxr_only", label="cxr_label"),
    )

    not_causal = "trains its X-ray classifier on batches of X-rays, which have no hours"

    num_cxr_labels: int = len(schema.RADIOLOGY_LABELS)

    def setup_fusion(self):
        self.classifier = linear(self.num_labels)
        self.ehr_classifier = linear(self.num_labels)
        self.cxr_classifier = linear(self.num_cxr_labels)

    def forward(self, batch: Inputs) -> dict:
        ehr_BD = self.encode_ehr(batch)
        cxr_BE, cxr_BD = jnp.zeros((batch.num_rows, self.num_cxr_features)), jnp.zeros_like(ehr_BD)
        if batch.images is not None:
            cxr_PE = self.encode_images(batch)
            cxr_BE, cxr_BD = batch.images.to_rows(cxr_PE), batch.images.to_rows(self.projection(cxr_PE))
        joint_BK = self.classifier(jnp.concatenate([ehr_BD, cxr_BD], axis=-1))
        ehr_only_BK = self.ehr_classifier(ehr_BD)
        return {
            "logits": jnp.where(batch.has_cxr_B[:, None], joint_BK, ehr_only_BK),
            "joint_logits": joint_BK,
            "ehr_only_logits": ehr_only_BK,
            "cxr_only_logits": self.cxr_classifier(cxr_BE),
            "ehr_features": ehr_BD,
            "cxr_features": cxr_BD,
        }
