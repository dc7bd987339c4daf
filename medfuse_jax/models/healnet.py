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

    width: D. hidden: units of that network. dtype: of the products.
    """

    width: int
    hidden: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        for name in ("query", "key", "value", "out", "down"):
            setattr(self, name, nn.Dense(self.width, dtype=self.dtype))
        self.up = nn.Dense(self.hidden, dtype=self.dtype)
        self.latent_norm, self.network_norm = nn.LayerNorm(), nn.LayerNorm()

    def keys_and_values(self, token_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return what is read of the tokens, [B, S, D] each. Every layer reads the same: compute it once."""
        return self.key(token_BSD), self.value(token_BSD)

    def __call__(self, latent_BLD, key_BSD, value_BSD, mask_BS) -> jax.Array:
        """Return the latent vectors' change [B, L, D]. mask_BS: which tokens are there, at least one of each row."""
        query_BLD = self.query(self.latent_norm(latent_BLD))
        mean_BLD = transformer.attend(query_BLD, key_BSD, value_BSD, mask_BS, self.dtype)
        read_BLD = self.out(mean_BLD).astype(jnp.float32)
        hidden = nn.selu(self.up(self.network_norm(latent_BLD + read_BLD)))
        return read_BLD + self.down(hidden).astype(jnp.float32)


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
        self.ehr_update = Update(self.ehr_hidden, self.fusion_hidden, self.dtype)
        self.cxr_update = Update(self.ehr_hidden, self.fusion_hidden, self.dtype)
        self.norm = nn.LayerNorm()
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        tokens, images = self.encode_tokens(batch), batch.images
        latent_BLD = jnp.broadcast_to(self.latents, (batch.num_rows, *self.latents.shape))
        if tokens["ehr_tokens"] is not None:
            ehr_read = (*self.ehr_update.keys_and_values(tokens["ehr_tokens"]), tokens["ehr_mask"])
        if images is not None:
            cxr_read = self.cxr_update.keys_and_values(tokens["cxr_tokens"])
            cxr_read = (*cxr_read, jnp.ones(tokens["cxr_tokens"].shape[:2], bool))
        for _ in range(NUM_LAYERS):
            if tokens["ehr_tokens"] is not None:
                change_BLD = self.ehr_update(latent_BLD, *ehr_read)
                latent_BLD += jnp.where(batch.has_ehr_B[:, None, None], change_BLD, 0)
            if images is not None:
                change_PLD = self.cxr_update(transformer.from_rows(images, latent_BLD), *cxr_read)
                latent_BLD += transformer.to_rows(images, change_PLD)  # zeros in rows without an image
        return {"logits": self.classifier(self.norm(latent_BLD.mean(axis=1))), **tokens["features"]}
