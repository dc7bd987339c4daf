"""The early and joint fusion baselines: a linear layer over both feature vectors, concatenated."""

import flax.linen as nn
import jax.numpy as jnp

from medfuse_jax.models.model import Inputs, ProjectedModel, linear


class Concat(ProjectedModel):
    """A linear classifier over both feature vectors, concatenated.

    missing: what replaces the features of a missing X-ray: 'zeros', or 'learnt', a vector that starts as zeros. The
    features of missing EHR are zeros.
    """

    not_causal = ""

    missing: str = "zeros"

    def setup_fusion(self):
        self.classifier = linear(self.num_labels)
        if self.missing == "learnt":
            self.missing_token = self.param("missing_token", nn.initializers.zeros_init(), (self.ehr_hidden,))

    def forward(self, batch: Inputs) -> dict:
        ehr_BD, cxr_BD = self.encode(batch)
        if self.missing == "learnt":
            cxr_BD = jnp.where(batch.has_cxr_B[:, None], cxr_BD, self.missing_token)
        logits_BK = self.classifier(jnp.concatenate([ehr_BD, cxr_BD], axis=-1))
        return {"logits": logits_BK, "ehr_features": ehr_BD, "cxr_features": cxr_BD}
