"""The two baselines that read a single modality."""

import jax.numpy as jnp

from medfuse_jax.models.model import Inputs, Model, linear


class UniEhr(Model):
    """The EHR encoder and a linear layer."""

    uses_cxr = False
    needs = ("ehr",)
    not_causal = ""

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        ehr_BD = self.encode_ehr(batch)
        return {"logits": self.classifier(ehr_BD), "ehr_features": ehr_BD}


class UniCxr(Model):
    """The image encoder and a linear layer. The logits of a row without an X-ray mean nothing."""

    uses_ehr = False
    needs = ("cxr",)
    scores_every_image = True
    not_causal = "has nothing to read before the stay's first X-ray"

    def setup(self):
        self.cxr_encoder = self.new_cxr_encoder()
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        if batch.images is None:
            cxr_BE = jnp.zeros((batch.num_rows, self.num_cxr_features))
        else:
            cxr_BE = batch.images.to_rows(self.encode_images(batch))
        return {"logits": self.classifier(cxr_BE), "cxr_features": cxr_BE}
