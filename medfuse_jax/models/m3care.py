"""M3Care: a missing modality is filled in from similar patients (Zhang et al. 2022, arXiv 2210.17292).

Shapes: B rows, J rows of the bank, D feature width, M modalities: EHR, X-ray.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import transformer
from medfuse_jax.models.model import Inputs, ProjectedModel, TwoLayers, linear

BANK_ROWS = 256
_ROUNDING = 1e-5  # so that equal similarities are not below their mean


class Bank(nn.Module):
    """The features of the latest training rows that have both modalities, newest first.

    They are among the batch statistics, so that checkpoints hold them and scores depend on no other row of a batch.
    """

    @nn.compact
    def __call__(self, ehr_BD, cxr_BD, has_both_B, batch: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return (EHR features [J, D], X-ray features [J, D], which rows are filled [J]); then store those of training.

        The rows given are not among those returned. Every device stores the rows of all devices, in the order of the
        whole batch.
        """
        shapes = {"ehr": (BANK_ROWS, ehr_BD.shape[-1]), "cxr": (BANK_ROWS, cxr_BD.shape[-1]), "filled": (BANK_ROWS,)}
        stored = {name: self.variable("batch_stats", name, jnp.zeros, shape) for name, shape in shapes.items()}
        before = {name: variable.value for name, variable in stored.items()}
        if batch.train and not self.is_initializing():
            new = {"ehr": ehr_BD, "cxr": cxr_BD, "filled": jnp.ones(batch.num_rows)}
            new, has_both_B, row_id_B = jax.lax.stop_gradient((new, has_both_B, batch.row_id_B))
            if batch.axis_name is not None:
                gathered = jax.lax.all_gather((new, has_both_B, row_id_B), batch.axis_name, tiled=True)
                new, has_both_B, row_id_B = gathered
            for name, variable in stored.items():
                variable.value = _pushed(before[name], new[name], has_both_B, row_id_B)
        return before["ehr"], before["cxr"], before["filled"] > 0


def _pushed(bank_J: jax.Array, new_B: jax.Array, is_new_B: jax.Array, row_id_B: jax.Array) -> jax.Array:
    """Return the bank's values [J, ...] with the new ones in front, in the order of their ids; the last ones drop out.

    is_new_B: which of new_B to add.
    """
    place_B = jnp.sum(is_new_B & (row_id_B < row_id_B[:, None]), axis=1)
    place_B = jnp.where(is_new_B, place_B, len(bank_J))
    old_J = jnp.arange(len(bank_J)) - jnp.sum(is_new_B)
    shifted_J = bank_J[jnp.maximum(old_J, 0)]
    return shifted_J.at[place_B].set(new_B, mode="drop")


class Kernel(nn.Module):
    """The similarity of features by a deep kernel: [(1 - floor) k(f(x), f(y)) + floor] k(x, y).

    f and floor are learnt; k is Gaussian, in units of the mean squared distance of a row to the bank.
    """

    hidden: int

    @nn.compact
    def __call__(self, x_BD: jax.Array, bank_JD: jax.Array, filled_J: jax.Array) -> jax.Array:
        """Return the similarities [B, J], between 0 and 1. Those to rows that are not filled mean nothing."""
        f = TwoLayers(self.hidden, name="map")
        floor = nn.sigmoid(self.param("floor", nn.initializers.zeros_init(), ()))
        learnt_BJ = _gaussian(f(x_BD), f(bank_JD), filled_J)
        return ((1 - floor) * learnt_BJ + floor) * _gaussian(x_BD, bank_JD, filled_J)


def neighbour_weights(similarity_BJ: jax.Array, filled_J: jax.Array) -> jax.Array:
    """Return weights [B, J] that sum to 1 over the rows of the bank of at least mean similarity; all 0 without any.

    Similarities of 0, those of a row without a modality, count as none.
    """
    mean_B1 = _mean(similarity_BJ, filled_J) * (1 - _ROUNDING)
    kept_BJ = jnp.where(filled_J & (similarity_BJ >= mean_B1), similarity_BJ, 0)
    return kept_BJ / jnp.maximum(kept_BJ.sum(axis=1, keepdims=True), 1e-12)


class Neighbours(nn.Module):
    """Joins a row's own feature with the weighted mean of its neighbours'."""

    @nn.compact
    def __call__(self, own_BD: jax.Array, has_own_B: jax.Array, weight_BJ: jax.Array, bank_JD: jax.Array) -> jax.Array:
        """Return features [B, D]: the neighbours' in rows that lack their own, the own in rows without a neighbour."""
        mean_BD = nn.relu(nn.Dense(own_BD.shape[-1], name="graph")(weight_BJ @ bank_JD))
        own_B1 = jnp.where(has_own_B[:, None], nn.sigmoid(nn.Dense(1, name="own_weight")(own_BD)), 0)
        has_neighbour_B1 = (weight_BJ > 0).any(axis=1, keepdims=True)
        mean_B1 = jnp.where(has_neighbour_B1, nn.sigmoid(nn.Dense(1, name="mean_weight")(mean_BD)), 0)
        return (own_B1 * own_BD + mean_B1 * mean_BD) / jnp.maximum(own_B1 + mean_B1, 1e-12)


def _gaussian(x_BD: jax.Array, y_JD: jax.Array, filled_J: jax.Array) -> jax.Array:
    distance_BJ = jnp.mean((x_BD[:, None] - y_JD) ** 2, axis=-1)
    scale_B1 = _mean(distance_BJ, filled_J)
    return jnp.exp(-distance_BJ / jnp.maximum(scale_B1, 1e-12))


def _mean(x_BJ: jax.Array, mask_J: jax.Array) -> jax.Array:
    """Return the mean over unmasked positions [B, 1]; 0 if there is none."""
    return jnp.sum(jnp.where(mask_J, x_BJ, 0), axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask_J), 1)


class M3Care(ProjectedModel):
    """Each modality's feature is joined with, or if it is missing replaced by, a mean over similar patients.

    The similarity of two patients is the mean of a deep kernel's over the modalities that the row has; patients below
    the row's mean similarity are left out, and a linear layer follows the weighted mean, as in a graph convolution. A
    present modality and its neighbours' mean are added with learnt weights, and a transformer layer over the modalities
    follows. The kernels learn from the labels' loss, which is what guides them.

    Ours: the paper's similar patients are the other rows of a batch, so that a score would depend on how the stays of
    an evaluation are batched, and with one X-ray in five rows a batch of 16 has few neighbours with one. They are the
    latest 256 training rows with both modalities, the same in training and evaluation, as their features were then; no
    gradient reaches them. Before any is stored, a missing modality is masked. The threshold is the mean instead of a
    learnt number, and the loss by which the paper stabilises the kernels is left out.
    """

    not_causal = "fills in what is missing from whole stays, not from their first hours"

    def setup_fusion(self):
        self.bank = Bank()
        for name in ("ehr", "cxr"):
            setattr(self, f"{name}_kernel", Kernel(self.fusion_hidden))
            setattr(self, f"{name}_neighbours", Neighbours())
        self.modality = self.param("modality", nn.initializers.normal(0.02), (2, self.ehr_hidden))
        self.layer = transformer.Layer(self.fusion_hidden, self.dtype)
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        # The bank and the kernels get the EHR features without dropout.
        whole_BD = self.encode_ehr(dataclasses.replace(batch, train=False))
        ehr_BD, cxr_BD = self.ehr_encoder.drop(whole_BD, batch.train, batch.dropout_rows_B), jnp.zeros_like(whole_BD)
        if batch.images is not None:
            cxr_BD = batch.images.to_rows(self.projection(self.encode_images(batch)))
        has_BM = jnp.stack([batch.has_ehr_B, batch.has_cxr_B], axis=1)
        bank_ehr_JD, bank_cxr_JD, filled_J = self.bank(whole_BD, cxr_BD, has_BM.all(axis=1), batch)

        each_BMJ = (self.ehr_kernel(whole_BD, bank_ehr_JD, filled_J), self.cxr_kernel(cxr_BD, bank_cxr_JD, filled_J))
        total_BJ = jnp.sum(jnp.where(has_BM[..., None], jnp.stack(each_BMJ, axis=1), 0), axis=1)
        weight_BJ = neighbour_weights(total_BJ / jnp.maximum(has_BM.sum(axis=1, keepdims=True), 1), filled_J)
        joined_ehr_BD = self.ehr_neighbours(ehr_BD, batch.has_ehr_B, weight_BJ, bank_ehr_JD)
        joined_cxr_BD = self.cxr_neighbours(cxr_BD, batch.has_cxr_B, weight_BJ, bank_cxr_JD)

        token_BMD = jnp.stack([joined_ehr_BD, joined_cxr_BD], axis=1) + self.modality
        mask_BM = has_BM | (weight_BJ > 0).any(axis=1, keepdims=True)
        token_BMD, _ = self.layer(token_BMD, mask_BM, None, None)
        token_BMD = jnp.where(mask_BM[..., None], token_BMD, 0)
        logits_BK = self.classifier(token_BMD.reshape(batch.num_rows, -1))
        return {"logits": logits_BK, "ehr_features": ehr_BD, "cxr_features": cxr_BD}
