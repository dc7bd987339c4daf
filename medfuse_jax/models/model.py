"""The parts that all methods share: sizes, encoders, and the form of a batch.

Shapes: B rows (stays), P images, T time, F EHR channel, H W C image, D LSTM width, E image feature, K label.

In an hourly task a method's rows are the prediction hours of all stays, R = B * H of them: `forward` gets the features
of each hour, and so needs no code of its own.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax import schema
from medfuse_jax.losses import Head, Term
from medfuse_jax.models import ehr_encoder, ehr_transformer, resnet
from medfuse_jax.models.precision import matmul_precision
from medfuse_jax.models.presence import Images, images_of, latest_slots, slots_by_hour
from medfuse_jax.models.series_encoder import states_before

MAX_HOURS = 2**14  # of a stay; only tells the rows of dropout apart

_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's, with zero bias


def linear(features: int) -> nn.Dense:
    """Return a linear layer in float32: heads are small, and their outputs are scores."""
    return nn.Dense(features, kernel_init=_linear_init)


class TwoLayers(nn.Module):
    """Two linear layers with a ReLU in between, which keep the width of features [..., D]. hidden: units in between."""

    hidden: int

    @nn.compact
    def __call__(self, features_BD: jax.Array) -> jax.Array:
        return nn.Dense(features_BD.shape[-1], name="down")(nn.relu(nn.Dense(self.hidden, name="up")(features_BD)))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch as `forward` gets it.

    ehr_BTF: series, or None if no row has one. ehr_features_BD: features of a frozen encoder, instead of series.
    length_B: time steps, 0 for a row without EHR. images: None if the batch has no image slot.
    dropout_rows_B: ids of the rows in the whole batch. axis_name: the devices' axis. extra: name -> values of
    further modalities. hour_step_BH: in an hourly task, the time steps before each hour; all but ehr_BTF, length_B and
    dropout_rows_B then has R rows.
    """

    ehr_BTF: jax.Array | None
    ehr_features_BD: jax.Array | None
    length_B: jax.Array
    images: Images | None
    train: bool = False
    dropout_rows_B: jax.Array | None = None
    axis_name: str | None = None
    extra: dict = dataclasses.field(default_factory=dict)
    hour_step_BH: jax.Array | None = None

    @property
    def row_id_B(self) -> jax.Array:
        """The number of each row in the whole batch: what a row draws must not depend on the device it is on."""
        return jnp.arange(len(self.length_B)) if self.dropout_rows_B is None else self.dropout_rows_B

    @property
    def num_rows(self) -> int:
        return len(self.length_B) if self.hour_step_BH is None else self.hour_step_BH.size

    @property
    def has_ehr_B(self) -> jax.Array:
        return self.length_B > 0 if self.hour_step_BH is None else self.hour_step_BH.reshape(-1) > 0

    @property
    def has_cxr_B(self) -> jax.Array:
        return jnp.zeros(self.num_rows, bool) if self.images is None else self.images.present_rows()


class Model(nn.Module):
    """Base class of all methods. A method builds its layers in `setup` and computes its outputs in `forward`.

    num_labels: K. ehr_kind: of the EHR encoder, 'lstm' or 'transformer'. cxr_kind: of the X-ray encoder, a key of
    `resnet.BLOCKS`, or 'features' for none: X-rays come as given_features precomputed numbers each. dtype: of
    the encoders' products; parameters, statistics, heads and outputs are float32. frozen_stats: batch normalisation
    uses its running statistics in training too, and does not update them. recurrence: the LSTM's kernel, one of
    `ehr_encoder.LSTM_KERNELS`. ops: the forms in which the encoders compute, see `resnet.ops_for`.
    """

    # The modalities that the method reads: the input pipeline leaves out the others.
    uses_ehr = True
    uses_cxr = True
    # Whether the fusion reads every time step of the EHR encoder, not only its features (bench.flops).
    reads_series = False
    # The modalities that a row needs for a prediction: evaluation leaves out rows without them.
    needs: ClassVar[tuple[str, ...]] = ()
    # The classifiers that are trained, and their losses (losses.objective).
    heads: ClassVar[tuple[Head, ...]] = (Head(),)
    # Its losses beside the classifiers'.
    terms: ClassVar[tuple[Term, ...]] = ()
    # Why the method cannot score every hour of a stay in one pass; '' if it can.
    not_causal: ClassVar[str] = "is not known to be causal (models/model.py)"
    # Why the method needs the layers of the LSTM; '' if any encoder of series will do.
    needs_lstm: ClassVar[str] = ""
    # Why the method needs the feature maps of a ResNet; '' if features will do.
    needs_maps: ClassVar[str] = ""
    # Whether evaluation scores every image of a dense batch, regardless of has_cxr.
    scores_every_image = False

    num_labels: int
    ehr_hidden: int = 256
    fusion_hidden: int = 512
    dropout: float = 0.3
    ehr_kind: str = "lstm"
    cxr_kind: str = "resnet34"
    given_features: int = 0
    resnet_stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    resnet_width: int = 64
    dtype: jnp.dtype = jnp.float32
    frozen_stats: bool = False
    recurrence: str = "chunks"
    ops: str = "plain"

    @classmethod
    def loss_weights(cls) -> set[str]:
        """Return the fields of config.loss that the method's training reads."""
        return ({head.weight for head in cls.heads} | {term.weight for term in cls.terms}) - {""}

    @property
    def pays_for_padding(self) -> bool:
        """Whether more padding takes more time: the LSTM stops at the batch's longest series, attention does not."""
        return self.ehr_kind == "transformer"

    def new_ehr_encoder(self) -> ehr_encoder.EhrEncoder | ehr_transformer.EhrTransformer:
        if self.ehr_kind == "transformer":
            assert not self.needs_lstm, "checked by config.validate"
            return ehr_transformer.EhrTransformer(self.ehr_hidden, self.dropout, self.dtype)
        return ehr_encoder.EhrEncoder(self.ehr_hidden, self.dropout, self.dtype, self.recurrence, self.ops)

    def new_cxr_encoder(self) -> Any:
        """Return the ResNet; None if X-rays come as features."""
        if self.cxr_kind == "features":
            assert not self.needs_maps, "checked by config.validate"
            return None
        sizes = (self.resnet_stage_sizes, self.resnet_width)
        return resnet.ResNet(*sizes, self.dtype, self.frozen_stats, self.ops, self.cxr_kind)

    @property
    def num_cxr_features(self) -> int:
        if self.cxr_kind == "features":
            return self.given_features
        return resnet.num_features(self.cxr_kind, self.resnet_stage_sizes, self.resnet_width)

    def forward(self, batch: Inputs) -> dict:
        """Return 'logits' [B, K] and the method's other outputs."""
        raise NotImplementedError

    def __call__(
        self,
        ehr=None,
        length=None,
        image=None,
        has_cxr=None,
        *,
        image_row=None,
        image_mask=None,
        image_slot=None,
        image_time_h=None,
        ehr_features=None,
        cxr_features=None,
        train: bool = False,
        dropout_rows=None,
        axis_name: str | None = None,
        extra: dict | None = None,
        hour_step=None,
        image_hour=None,
    ) -> dict:
        """Score a batch in which any row may lack its EHR or its X-ray.

        ehr: float [B, T, F], standardised, with length [B] in time steps (default T; 0: no EHR), or None.
        image: [P, H, W] or [P, H, W, C] (resnet.StemConv says which C), or None.
        Listed images: image_row int [P] is each image's row, and image_mask bool [P] is False in an empty slot; has_cxr
        is ignored. If a row may have several: image_slot int [B, M], the slots of its images in order of time, -1 for
        none, and image_time_h [P], when each was taken, in hours since the stay began.
        Dense images (image_row None): P = B, and has_cxr bool [B] says which rows have an image; images of other rows
        affect no statistic, gradient or output.
        ehr_features [B, D], cxr_features [P, E]: features of frozen encoders, or precomputed ones of X-rays, instead
        of ehr and image.
        train: use batch statistics and dropout. dropout_rows int [B], the rows' ids in the whole batch, seed its masks.
        axis_name: the devices' axis. extra: name -> values [B, ...] of further modalities, NaN in rows without any.
        hour_step int [B, H]: score every hour of an hourly task, from its number of first time steps; image_hour int
        [P]: the first hour that sees each of the listed images. All outputs then have the axes [B, H] for [B].
        Returns a dict: 'logits' [B, K]; 'ehr_features' [B, D] and 'cxr_features' [B, D or E] if the method has
        them, with zeros (or the learnt vector) in rows without the modality.
        """
        num_rows = len(next(x for x in (ehr, ehr_features, length, has_cxr, dropout_rows, image) if x is not None))
        if ehr is not None and ehr.shape[1] == 0:
            ehr = None  # a batch without EHR: nothing to encode
        if ehr is None and ehr_features is None:
            length = jnp.zeros(num_rows, jnp.int32)
        elif length is None:
            length = jnp.full(num_rows, ehr.shape[1])
        images = None
        if self.uses_cxr:
            if self.scores_every_image and not train:
                has_cxr = None
            presence = {"has_cxr": has_cxr, "image_row": image_row, "image_mask": image_mask}
            images = images_of(num_rows, image, features=cxr_features, **presence)
        if images is not None and image_slot is not None:
            images = dataclasses.replace(images, slot_BM=jnp.asarray(image_slot), time_h_P=image_time_h)
        batch = Inputs(
            ehr, ehr_features, jnp.asarray(length, jnp.int32), images, train, dropout_rows, axis_name, extra or {}
        )
        if hour_step is not None:
            assert not self.not_causal, "checked by config.validate"
            batch = _by_hour(batch, jnp.minimum(hour_step, batch.length_B[:, None]), image_row, image_mask, image_hour)
        with matmul_precision(self.dtype):
            outputs = self.forward(batch)
        if hour_step is not None:
            outputs = {name: x.reshape(*hour_step.shape, *x.shape[1:]) for name, x in outputs.items()}
        return outputs

    def encode_ehr(self, batch: Inputs) -> jax.Array:
        """Return the features of the series [B, D]; zeros in rows without one."""
        if batch.ehr_features_BD is not None:
            return self.ehr_encoder.drop(batch.ehr_features_BD, batch.train, batch.dropout_rows_B)
        if batch.ehr_BTF is None:
            return jnp.zeros((batch.num_rows, self.ehr_hidden))
        if batch.hour_step_BH is not None:
            return self._encode_hours(batch)
        return self.ehr_encoder(batch.ehr_BTF, batch.length_B, batch.train, batch.dropout_rows_B)

    def _encode_hours(self, batch: Inputs) -> jax.Array:
        """Return the EHR encoder's state at each hour [R, D], from one pass over each series."""
        hidden_BTD = self.ehr_encoder.states(batch.ehr_BTF, batch.length_B)[0]
        return self.drop_by_hour(states_before(hidden_BTD, batch.hour_step_BH), batch)

    def drop_by_hour(self, feature_BHD: jax.Array, batch: Inputs) -> jax.Array:
        """Apply dropout to the EHR features of each hour; return them by row [R, D]."""
        _, num_hours, width = feature_BHD.shape
        row_R = (batch.row_id_B[:, None] * MAX_HOURS + jnp.arange(num_hours)).reshape(-1)
        return self.ehr_encoder.drop(feature_BHD.reshape(-1, width), batch.train, row_R)

    def encode_images(self, batch: Inputs) -> jax.Array:
        """Return the features of the images [P, E]. Call this only if the batch has images."""
        images = batch.images
        if images.features_PE is not None:
            return images.features_PE
        return self.cxr_encoder(images.image_PHWC, batch.train, images.valid_P, batch.axis_name)


def _by_hour(batch: Inputs, step_BH: jax.Array, image_row, image_mask, image_hour) -> Inputs:
    """Return the batch with a row for each hour, but for what is encoded once a stay."""
    images, num_hours = batch.images, step_BH.shape[1]
    if images is not None and images.slot_BM is not None:
        images = dataclasses.replace(images, slot_BM=slots_by_hour(images.slot_BM, image_hour, num_hours))
    elif images is not None:
        slot_BH = latest_slots(image_row, image_hour, image_mask, step_BH.shape)
        images = dataclasses.replace(images, slot_B=slot_BH.reshape(-1))
    extra = {name: jnp.repeat(x, num_hours, axis=0) for name, x in batch.extra.items()}
    return dataclasses.replace(batch, images=images, extra=extra, hour_step_BH=step_BH)


class ProjectedModel(Model):
    """Base class of fusions of two feature vectors, with the image's projected to the width of the EHR's.

    frozen_encoders: no gradient reaches the encoders, and their batch statistics are not updated.
    """

    frozen_encoders: bool = False

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.projection = linear(self.ehr_hidden)
        self.setup_fusion()

    def setup_fusion(self) -> None:
        """Build the layers that the method adds."""
        raise NotImplementedError

    def encode(self, batch: Inputs) -> tuple[jax.Array, jax.Array]:
        """Return (EHR features [B, D], projected image features [B, D]); zeros in rows without the modality."""
        ehr_BD = self.encode_ehr(batch)
        if batch.images is None:
            return ehr_BD, jnp.zeros_like(ehr_BD)
        return ehr_BD, batch.images.to_rows(self.projection(self.encode_images(batch)))

    def encode_ehr(self, batch: Inputs) -> jax.Array:
        return self.freeze(super().encode_ehr(batch))

    def encode_images(self, batch: Inputs) -> jax.Array:
        # Differs from MedFuse (trainers/fusion_trainer.py): frozen encoders freeze their batch statistics too.
        train = batch.train and not self.frozen_encoders
        return self.freeze(super().encode_images(dataclasses.replace(batch, train=train)))

    def freeze(self, features):
        return jax.lax.stop_gradient(features) if self.frozen_encoders else features


def init_variables(model: Model, key: jax.Array, extra: dict | None = None) -> dict:
    """Return initial variables: 'params', and 'batch_stats' if the model reads images. Call it under jit.

    extra: values [1, ...] of the model's further modalities, whose sizes determine the shapes of their encoders.
    An `rbg` key compiles faster than a threefry key.
    """
    # lazy_init traces the forward pass without compiling it.
    return model.lazy_init(key, **_smallest_inputs(model, extra))


def variable_shapes(model: Model, extra: dict | None = None) -> dict:
    """Return the shapes and types of what `init_variables` returns, computing nothing, in half of its time."""
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    return jax.eval_shape(model.init, key, **_smallest_inputs(model, extra))


def _smallest_inputs(model: Model, extra: dict | None) -> dict:
    """Return shapes of inputs: no parameter's shape depends on the size of a batch, a series or an image."""
    ehr_BTF = jax.ShapeDtypeStruct((1, 1, len(schema.CHANNELS)), jnp.float32)
    image = {"image": jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)}
    if model.cxr_kind == "features":
        image = {"cxr_features": jax.ShapeDtypeStruct((1, model.given_features), jnp.float32)}
    return {"ehr": ehr_BTF} | image | ({"extra": extra} if extra else {})
