"""MeTra: a transformer over the tokens of a stay's series and of its X-ray (Khader et al. 2023, Sci. Rep. 13:10666).

Shapes: B rows, S tokens of a row, D token width.
"""

import flax.linen as nn
import jax.numpy as jnp

from medfuse_jax.models import transformer
from medfuse_jax.models.model import Inputs, linear
from medfuse_jax.models.sequence import SequenceModel

NUM_LAYERS = 2


class MeTra(SequenceModel):
    """Encoders of both modalities give tokens; a transformer over all of them ends in a class token, which is scored.

    As in the paper, each modality has an encoder of its own before the transformer that fuses them. Ours are those of
    all methods, to compare fusions alone: the LSTM's state at each time step for the paper's transformer over the
    series, and the cells of the ResNet's last feature map for its ViT's patches. The paper trains on stays with both
    modalities and tests lower numbers of clinical values; here the tokens of a missing modality are masked. Two layers
    of the EHR encoder's width, with config.model.fusion_hidden units in between, are our choice.
    """

    not_causal = "attends over a whole series at once"

    def setup_fusion(self):
        super().setup_fusion()
        self.class_token = self.param("class_token", nn.initializers.normal(0.02), (self.ehr_hidden,))
        self.layers = [transformer.Layer(self.fusion_hidden, self.dtype) for _ in range(NUM_LAYERS)]
        self.norm = nn.LayerNorm()
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        tokens = self.encode_tokens(batch)
        row_BSD = jnp.broadcast_to(self.class_token, (batch.num_rows, 1, self.ehr_hidden))
        mask_BS = jnp.ones((batch.num_rows, 1), bool)
        if tokens["ehr_tokens"] is not None:
            row_BSD = jnp.concatenate([row_BSD, tokens["ehr_tokens"]], axis=1)
            mask_BS = jnp.concatenate([mask_BS, tokens["ehr_mask"]], axis=1)
        image_PND = tokens["cxr_tokens"]
        for layer in self.layers:
            is_last = layer is self.layers[-1]  # of which only the class token is read
            row_BSD, image_PND = layer(row_BSD, mask_BS, image_PND, batch.images, is_last)
        return {"logits": self.classifier(self.norm(row_BSD[:, 0])), **tokens["features"]}
