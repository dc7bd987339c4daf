"""What all methods share: sizes, encoders, and the form of a batch.

Shapes: B rows (stays), P X-rays, T time, F EHR channel, H W C image, D LSTM width,
E X-ray features, K label.
"""

import contextlib
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.losses import Head
from medfuse_jax.models import ehr_encoder, resnet
from medfuse_jax.models.presence import Images, images_of

_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's, with zero bias


def linear(features: int) -> nn.Dense:
    """A linear layer in float32: the heads are small, and their outputs are scores."""
    return nn.Dense(features, kernel_init=_linear_init)


def products(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Within, products of float32 are float32's own where that is `dtype`: accelerators round them to fewer bits."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()


class Model(nn.Module):
    """What all methods share: sizes, encoders, and the form of a batch.

    num_labels: K. dtype: of the encoders' products; parameters, statistics, heads and outputs
    are float32. frozen_stats: batch normalisation uses and keeps its running statistics in training.
    recurrence: of `lstm.FORMS`, how the EHR encoder's is computed.
    """

    # Which modalities a method reads: the input pipeline leaves out what it does not.
    uses_ehr = True
    uses_cxr = True
    # Without these a row has no prediction: evaluation leaves it out.
    needs: ClassVar[tuple[str, ...]] = ()
    # The classifiers that are trained (step.train_step).
    heads: ClassVar[tuple[Head, ...]] = (Head(),)

    num_labels: int
    ehr_hidden: int = 256
    fusion_hidden: int = 512
    dropout: float = 0.3
    resnet_stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    resnet_width: int = 64
    dtype: jnp.dtype = jnp.float32
    frozen_stats: bool = False
    recurrence: str = "chunks"

    @classmethod
    def loss_weights(cls) -> set[str]:
        """The fields of `losses.Weights` that the method's training reads."""
        return {head.weight for head in cls.heads} - {""}

    def new_ehr_encoder(self) -> ehr_encoder.EhrEncoder:
        return ehr_encoder.EhrEncoder(self.ehr_hidden, self.dropout, self.dtype, self.recurrence)

    def new_cxr_encoder(self) -> resnet.ResNet:
        return resnet.ResNet(self.resnet_stage_sizes, self.resnet_width, self.dtype, self.frozen_stats)

    @property
    def num_cxr_features(self) -> int:
        return self.resnet_width * 2 ** (len(self.resnet_stage_sizes) - 1)

    def __call__(
        self,
        ehr=None,
        length=None,
        image=None,
        has_cxr=None,
        *,
        image_row=None,
        image_mask=None,
        train: bool = False,
        dropout_rows=None,
        axis_name: str | None = None,
        extra: dict | None = None,
    ) -> dict:
        """Scores a batch in which each row may lack its stay or its X-ray.

        ehr: float [B, T, F], standardised, with length [B] in whole steps (default T; 0: no stay), or None.
        image: [P, H, W] or [P, H, W, C] (see resnet.StemConv for C), or None.
        X-rays listed: image_row int [P] is each X-ray's row, image_mask bool [P] False (image_row
        then B) an empty slot, and has_cxr is derived. X-rays dense (image_row None): P = B and
        has_cxr bool [B] says which count; the others are computed, but reach no statistic,
        no gradient and no number. train: batch statistics and dropout, whose masks depend on
        dropout_rows int [B], the rows' ids in the whole batch; axis_name: the devices' axis.
        extra: name -> values [B, ...] of a method's further modalities, NaN throughout where missing.
        Returns a dict: 'logits' [B, K], and 'ehr_features' [B, D], 'cxr_features' [B, D or E]
        (zeros for a row without, or the learnt vector) where the method has them.
        """
        num_rows = _num_rows(ehr, length, has_cxr, dropout_rows, image)
        if ehr is not None and ehr.shape[1] == 0:
            ehr = None  # X-rays without stays: no step to compute
        if length is None:
            length = jnp.full(num_rows, 0 if ehr is None else ehr.shape[1])
        length = jnp.asarray(length, jnp.int32)
        if ehr is None:
            length = jnp.zeros_like(length)
        images = self.find_images(image, num_rows, has_cxr, image_row, image_mask, train)
        further = {"extra": extra} if extra else {}  # the methods that have none do not know the word
        with products(self.dtype):
            return self.forward(ehr, length, images, train, dropout_rows, axis_name, **further)

    def find_images(self, image, num_rows, has_cxr, image_row, image_mask, train) -> Images | None:
        return images_of(image, num_rows, has_cxr, image_row, image_mask)

    def encode_ehr(self, ehr_BTF, length_B, train: bool, dropout_rows_B) -> jax.Array:
        """Features of the stays [B, D]; zeros for a row without, all zeros for a batch without."""
        if ehr_BTF is None:
            return jnp.zeros((len(length_B), self.ehr_hidden))
        if ehr_BTF.ndim == 2:  # [B, D]: a frozen encoder's features, computed before
            return self.ehr_encoder.drop(ehr_BTF, train, dropout_rows_B)
        return self.ehr_encoder(ehr_BTF, length_B, train, dropout_rows_B)


def _num_rows(*fields) -> int:
    """B: the first given field's; an image alone is dense."""
    return next(len(field) for field in fields if field is not None)
