"""Fusions that read every time step of a stay and every cell of its X-ray's last feature map.

Shapes: B rows, P images, N tokens of an image, T time, D token width.
"""

import flax.linen as nn
import jax.numpy as jnp

from medfuse_jax.models.model import Inputs, ProjectedModel
from medfuse_jax.models.recurrence import cell
from medfuse_jax.models.transformer import grid_positions, positions


class SequenceModel(ProjectedModel):
    """Base class of these fusions."""

    needs_maps = "reads every cell of a ResNet's feature maps"
    reads_series = True
    pays_for_padding = True

    def setup_fusion(self):
        self.ehr_norm = nn.LayerNorm()
        self.cxr_norm = nn.LayerNorm()

    def encode_tokens(self, batch: Inputs) -> dict:
        """Return a dict of the tokens and features of a batch.

        ehr_tokens [B, T, D], or None if no row has EHR, and ehr_mask [B, T]; cxr_tokens [P, N, D], or None if the batch
        has no image. features: {'ehr_features', 'cxr_features': [B, D]}, zeros in rows without the modality.
        """
        ehr_BTD, ehr_BD, mask_BT = self._encode_series(batch)
        cxr_PND, cxr_BD = self._encode_cells(batch)
        features = {"ehr_features": ehr_BD, "cxr_features": cxr_BD}
        return {"ehr_tokens": ehr_BTD, "ehr_mask": mask_BT, "cxr_tokens": cxr_PND, "features": features}

    def _encode_series(self, batch: Inputs) -> tuple:
        if batch.ehr_BTF is None:
            return None, jnp.zeros((batch.num_rows, self.ehr_hidden)), jnp.zeros((batch.num_rows, 0), bool)
        hidden_BTD, last_BD = self.freeze(self.ehr_encoder.states(batch.ehr_BTF, batch.length_B))
        hidden_BTD = self.ehr_encoder.drop(hidden_BTD, batch.train, batch.dropout_rows_B)
        num_time_steps = hidden_BTD.shape[1]
        token_BTD = self.ehr_norm(hidden_BTD) + positions(num_time_steps, self.ehr_hidden)
        return token_BTD, last_BD, cell.valid_time_steps(batch.length_B, num_time_steps)

    def _encode_cells(self, batch: Inputs) -> tuple:
        images = batch.images
        if images is None:
            return None, jnp.zeros((batch.num_rows, self.ehr_hidden))
        # As in ProjectedModel.encode_images: frozen encoders freeze their batch statistics too.
        train = batch.train and not self.frozen_encoders
        last_stage = len(self.resnet_stage_sizes)
        map_PHWE = self.freeze(
            self.cxr_encoder.until(last_stage, images.image_PHWC, train, images.valid_P, batch.axis_name)
        )
        height, width = map_PHWE.shape[1:3]
        cell_PND = self.projection(map_PHWE.astype(jnp.float32).reshape(len(map_PHWE), height * width, -1))
        token_PND = self.cxr_norm(cell_PND) + grid_positions(height, width, self.ehr_hidden)
        return token_PND, images.to_rows(cell_PND.mean(axis=1))
