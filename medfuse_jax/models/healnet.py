"""HEALNet: an array of latent vectors that reads each modality in turn (Hemker et al. 2024, arXiv 2311.09115).

Shapes: B rows, P images, L latent vectors, S tokens, D token width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import transformer
from medfuse_jax.models.model import Inputs, linear
from medfuse_jax.models.sequence import SequenceModel

NUM_LATENTS = 16
NUM_LAYERS = 3


class Update(nn.Module):
    """What a modality adds to the latent vectors: cross-attention to its tokens, then a self-normalising network.

    hidden: units of that network. dtype: of the products.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latent_BLD: jax.Array, token_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
        """Return the latent vectors' change [B, L, D]. mask_BS: which tokens are there, at least one of each row."""
        width = latent_BLD.shape[-1]
        query_BLD = nn.Dense(width, dtype=self.dtype, name="query")(nn.LayerNorm(name="latent_norm")(latent_BLD))
        key_BSD = nn.Dense(width, dtype=self.dtype, name="key")(token_BSD)
        value_BSD = nn.Dense(width, dtype=self.dtype, name="value")(token_BSD)
        mean_BLD = transformer.attend(query_BLD, key_BSD, value_BSD, mask_BS, self.dtype)
        read_BLD = nn.Dense(width, dtype=self.dtype, name="out")(mean_BLD).astype(jnp.float32)
        norm_BLD = nn.LayerNorm(name="network_norm")(latent_BLD + read_BLD)
        hidden = nn.selu(nn.Dense(self.hidden, dtype=self.dtype, name="up")(norm_BLD))
        return read_BLD + nn.Dense(width, dtype=self.dtype, name="down")(hidden).astype(jnp.float32)


class HealNet(SequenceModel):
    """Latent vectors, the same for all rows at first, which cross-attention updates by EHR and X-ray in turn.

    As in the paper, both updates are repeated with the same weights, a missing modality's are skipped, and the mean of
    the latent vectors is scored. Ours: the tokens are those of the encoders that all our methods have, the LSTM's state
    at each time step and the cells of the ResNet's last feature map, where the paper's are raw values and features of
    patches. The sizes are ours: 16 vectors of the EHR encoder's width and three layers.
    """

    not_causal = "attends over a whole series at once"

    def setup_fusion(self):
        super().setup_fusion()
        self.latents = self.param("latents", nn.initializers.normal(0.02), (NUM_LATENTS, self.ehr_hidden))
        self.ehr_update = Update(self.fusion_hidden, self.dtype)
        self.cxr_update = Update(self.fusion_hidden, self.dtype)
        self.norm = nn.LayerNorm()
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        tokens, images = self.encode_tokens(batch), batch.images
        latent_BLD = jnp.broadcast_to(self.latents, (batch.num_rows, *self.latents.shape))
        for _ in range(NUM_LAYERS):
            if tokens["ehr_tokens"] is not None:
                change_BLD = self.ehr_update(latent_BLD, tokens["ehr_tokens"], tokens["ehr_mask"])
                latent_BLD += jnp.where(batch.has_ehr_B[:, None, None], change_BLD, 0)
            if images is not None:
                token_PND = tokens["cxr_tokens"]
                mask_PN = jnp.ones(token_PND.shape[:2], bool)
                change_PLD = self.cxr_update(transformer.from_rows(images, latent_BLD), token_PND, mask_PN)
                latent_BLD += transformer.to_rows(images, change_PLD)  # zeros in rows without an image
        return {"logits": self.classifier(self.norm(latent_BLD.mean(axis=1))), **tokens["features"]}
