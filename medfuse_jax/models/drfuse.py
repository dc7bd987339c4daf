"""DrFuse: shared and distinct features of each modality, weighted per label (Yao et al. 2024, arXiv 2403.06197).

Shapes: B rows, D feature width, K label, R representations: distinct EHR, shared, distinct X-ray.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from medfuse_jax.losses import Head, Term, output
from medfuse_jax.models.model import Inputs, ProjectedModel, TwoLayers, linear
from medfuse_jax.models.transformer import masked_softmax

RANKING_MARGIN = 0.1
_PAIRS = ((0, 1), (0, 2), (1, 2))  # of representations
_EPSILON = 1e-6


def log_odds_of_mean(a_BD: jax.Array, b_BD: jax.Array) -> jax.Array:
    """Return the log-odds of the mean of two probabilities, given as log-odds: the paper's logit pooling."""
    log_yes = jnp.logaddexp(nn.log_sigmoid(a_BD), nn.log_sigmoid(b_BD))
    return log_yes - jnp.logaddexp(nn.log_sigmoid(-a_BD), nn.log_sigmoid(-b_BD))


def divergence(a_BD: jax.Array, b_BD: jax.Array) -> jax.Array:
    """Return the Jensen-Shannon divergence of two Bernoulli variables, given as log-odds, averaged over D [B]."""
    mean_BD = log_odds_of_mean(a_BD, b_BD)

    def from_mean(x_BD):
        yes_BD = nn.sigmoid(x_BD) * (nn.log_sigmoid(x_BD) - nn.log_sigmoid(mean_BD))
        return yes_BD + nn.sigmoid(-x_BD) * (nn.log_sigmoid(-x_BD) - nn.log_sigmoid(-mean_BD))

    return jnp.mean(from_mean(a_BD) + from_mean(b_BD), axis=-1) / 2


def cosine(a_BD: jax.Array, b_BD: jax.Array) -> jax.Array:
    """Return the absolute cosine of the angle between two features [B]."""
    size_B = jnp.sqrt(jnp.sum(a_BD**2, axis=-1) * jnp.sum(b_BD**2, axis=-1) + _EPSILON**2)
    return jnp.abs(jnp.sum(a_BD * b_BD, axis=-1)) / size_B


def ranking_loss(outputs: dict, label_BK: jax.Array) -> jax.Array:
    """Return each row's margin loss on the order of its attention [B], averaged over labels and pairs.

    Of two representations, the one whose own classifier has the lower loss on a label should get more attention there,
    by a margin. No gradient reaches those classifiers from here.
    """
    logits = (outputs[name] for name in ("ehr_only_logits", "shared_only_logits", "cxr_only_logits"))
    bce_BKR = jnp.stack([optax.sigmoid_binary_cross_entropy(x_BK, label_BK) for x_BK in logits], axis=-1)
    attention_BKR, loss_B = outputs["attention"], 0.0
    for a, b in _PAIRS:
        order_BK = jnp.sign(jax.lax.stop_gradient(bce_BKR[..., b] - bce_BKR[..., a]))
        lead_BK = order_BK * (attention_BKR[..., a] - attention_BKR[..., b])
        loss_B += jnp.where(order_BK == 0, 0, nn.relu(RANKING_MARGIN - lead_BK)).mean(axis=-1)
    return loss_B / len(_PAIRS)


class DrFuse(ProjectedModel):
    """Disentangled features of both modalities, with attention over them by one query per label.

    Shared features are log-odds of probabilities. A row with both modalities gets the log-odds of their mean
    probability. A row that lacks one gets the other's shared features, and its attention masks the missing distinct
    features. Losses beside the main one: a classifier on each representation; the divergence between the shared
    features, in rows with both; the cosine between shared and distinct features; and the order of the attention.

    Differs from the paper: both branches of a modality read the output of its encoder (there, they split off inside
    the encoder), and each label's query is a learnt vector. Our choices: all losses have weight 1 by default, and the
    ranking margin is 0.1.

    Further outputs: 'ehr_only_logits', 'shared_only_logits', 'cxr_only_logits' [B, K], 'attention' [B, K, R].
    """

    heads = (
        Head(),
        Head("ehr_only_logits", needs=("ehr",), weight="ehr_only"),
        Head("cxr_only_logits", needs=("cxr",), weight="cxr_only"),
        Head("shared_only_logits", weight="shared_only"),
    )
    terms = (
        Term(output("divergence_rows"), "divergence", needs=("ehr", "cxr")),
        Term(output("ehr_cosine_rows"), "orthogonal", needs=("ehr",)),
        Term(output("cxr_cosine_rows"), "orthogonal", needs=("cxr",)),
        Term(ranking_loss, "ranking", needs=("ehr", "cxr")),
    )
    not_causal = "trains several classifiers, and hourly tasks train one"

    def setup_fusion(self):
        for name in ("ehr_shared", "ehr_distinct", "cxr_shared", "cxr_distinct"):
            setattr(self, name, TwoLayers(self.fusion_hidden))
        self.query = self.param("query", nn.initializers.normal(0.02), (self.num_labels, self.ehr_hidden))
        self.key, self.value = linear(self.ehr_hidden), linear(self.ehr_hidden)
        # One linear classifier per label, because attention gives each label its own features.
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.num_labels, self.ehr_hidden))
        self.bias = self.param("bias", nn.initializers.zeros_init(), (self.num_labels,))
        self.ehr_classifier = linear(self.num_labels)
        self.shared_classifier = linear(self.num_labels)
        self.cxr_classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        ehr_BD, cxr_BD = self.encode(batch)
        has_ehr_B, has_cxr_B = batch.has_ehr_B, batch.has_cxr_B
        ehr_shared_BD, cxr_shared_BD = self.ehr_shared(ehr_BD), self.cxr_shared(cxr_BD)
        ehr_distinct_BD, cxr_distinct_BD = self.ehr_distinct(ehr_BD), self.cxr_distinct(cxr_BD)
        only_BD = jnp.where(has_ehr_B[:, None], ehr_shared_BD, cxr_shared_BD)
        has_both_B1 = (has_ehr_B & has_cxr_B)[:, None]
        shared_BD = jnp.where(has_both_B1, log_odds_of_mean(ehr_shared_BD, cxr_shared_BD), only_BD)

        token_BRD = jnp.stack([ehr_distinct_BD, shared_BD, cxr_distinct_BD], axis=1)
        mask_BR = jnp.stack([has_ehr_B, has_ehr_B | has_cxr_B, has_cxr_B], axis=1)
        score_BKR = jnp.einsum("kd,brd->bkr", self.query, self.key(token_BRD)) / self.ehr_hidden**0.5
        attention_BKR = masked_softmax(score_BKR, mask_BR[:, None])
        fused_BKD = jnp.einsum("bkr,brd->bkd", attention_BKR, self.value(token_BRD))
        return {
            "logits": jnp.einsum("bkd,kd->bk", fused_BKD, self.kernel) + self.bias,
            "ehr_only_logits": self.ehr_classifier(ehr_distinct_BD),
            "shared_only_logits": self.shared_classifier(shared_BD),
            "cxr_only_logits": self.cxr_classifier(cxr_distinct_BD),
            "attention": attention_BKR,
            "divergence_rows": divergence(ehr_shared_BD, cxr_shared_BD),
            "ehr_cosine_rows": cosine(ehr_shared_BD, ehr_distinct_BD),
            "cxr_cosine_rows": cosine(cxr_shared_BD, cxr_distinct_BD),
            "ehr_features": ehr_BD,
            "cxr_features": cxr_BD,
        }
