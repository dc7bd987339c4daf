"""The methods of the paper by name: one model each, all with the same call.

Shapes: B rows (stays), P films, T time, F EHR channel, H W C image, D LSTM width,
E film features, M modality, K label.
"""

import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax import tasks
from medfuse_jax.errors import UserError, check_choice
from medfuse_jax.models import daft, fusion, lstm, mmtm, resnet
from medfuse_jax.models.films import Films, films_of

_linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's, with zero bias


def linear(features: int) -> nn.Dense:
    """A linear layer in float32: the heads are small, and their outputs are scores."""
    return nn.Dense(features, kernel_init=_linear_init)


class Model(nn.Module):
    """What all methods share: sizes, encoders, and the form of a batch.

    num_labels: K. dtype: of the encoders' products; parameters, statistics, heads and outputs
    are float32. frozen_stats: batch normalisation uses and keeps its running statistics in training.
    """

    # Which modalities a method reads: the input pipeline leaves out what it does not.
    uses_ehr = True
    uses_film = True

    num_labels: int
    ehr_hidden: int = 256
    fusion_hidden: int = 512
    dropout: float = 0.3
    resnet_stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    resnet_width: int = 64
    dtype: jnp.dtype = jnp.float32
    frozen_stats: bool = False

    def new_ehr_encoder(self) -> lstm.EhrEncoder:
        return lstm.EhrEncoder(self.ehr_hidden, self.dropout, self.dtype)

    def new_cxr_encoder(self) -> resnet.ResNet:
        return resnet.ResNet(self.resnet_stage_sizes, self.resnet_width, self.dtype, self.frozen_stats)

    @property
    def num_film_features(self) -> int:
        return self.resnet_width * 2 ** (len(self.resnet_stage_sizes) - 1)

    def __call__(
        self,
        ehr=None,
        length=None,
        image=None,
        has_cxr=None,
        *,
        film_row=None,
        film_mask=None,
        train: bool = False,
        dropout_rows=None,
        axis_name: str | None = None,
    ) -> dict:
        """Scores a batch in which each row may lack its stay or its film.

        ehr: float [B, T, F], standardised, with length int [B] (default T; 0: no stay), or None.
        image: [P, H, W] or [P, H, W, C] (see resnet.StemConv for C), or None.
        Films listed: film_row int [P] is each film's row, film_mask bool [P] False (film_row
        then B) an empty slot, and has_cxr is derived. Films dense (film_row None): P = B and
        has_cxr bool [B] says which count; the others are computed, but reach no statistic,
        no gradient and no number. train: batch statistics and dropout, whose masks depend on
        dropout_rows int [B], the rows' ids in the whole batch; axis_name: the devices' axis.
        Returns a dict: 'logits' [B, K], and 'ehr_features' [B, D], 'cxr_features' [B, D or E]
        (zeros for a row without, or the learnt vector) where the method has them.
        """
        num_rows = _num_rows(ehr, length, has_cxr, dropout_rows, image)
        if ehr is not None and ehr.shape[1] == 0:
            ehr = None  # films without stays: no step to compute
        if length is None:
            length = jnp.full(num_rows, 0 if ehr is None else ehr.shape[1])
        if ehr is None:
            length = jnp.zeros_like(length)
        films = self.find_films(image, num_rows, has_cxr, film_row, film_mask, train)
        return self.forward(ehr, jnp.asarray(length), films, train, dropout_rows, axis_name)

    def find_films(self, image, num_rows, has_cxr, film_row, film_mask, train) -> Films | None:
        return films_of(image, num_rows, has_cxr, film_row, film_mask)

    def encode_ehr(self, ehr_BTF, length_B, train: bool, dropout_rows_B) -> jax.Array:
        """Features of the stays [B, D]; zeros for a row without, all zeros for a batch without."""
        if ehr_BTF is None:
            return jnp.zeros((len(length_B), self.ehr_hidden))
        return self.ehr_encoder(ehr_BTF, length_B, train, dropout_rows_B)


def _num_rows(*fields) -> int:
    """B: the first given field's; an image alone is dense."""
    return next(len(field) for field in fields if field is not None)


class UniEhr(Model):
    """The EHR encoder and a linear layer; films are not read."""

    uses_film = False

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.classifier = linear(self.num_labels)

    def find_films(self, *batch) -> None:
        return None

    def forward(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD = self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B)
        return {"logits": self.classifier(ehr_BD), "ehr_features": ehr_BD}


class UniCxr(Model):
    """The film encoder and a linear layer; the stay is not read.

    A row without a film has no prediction: its logits mean nothing. Dense and not in training,
    every image given is scored, whatever has_cxr says.
    """

    uses_ehr = False

    def setup(self):
        self.cxr_encoder = self.new_cxr_encoder()
        self.classifier = linear(self.num_labels)

    def find_films(self, image, num_rows, has_cxr, film_row, film_mask, train):
        return films_of(image, num_rows, has_cxr if train else None, film_row, film_mask)

    def forward(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name) -> dict:
        if films is None:
            cxr_BE = jnp.zeros((len(length_B), self.num_film_features))
        else:
            cxr_BE = films.to_rows(self.cxr_encoder(films.image_PHWC, train, films.valid_P, axis_name))
        return {"logits": self.classifier(cxr_BE), "cxr_features": cxr_BE}


class ProjectedModel(Model):
    """Both encoders, and the film's features projected to the width of the stay's.

    frozen_encoders: no gradient reaches the encoders, and batch statistics are frozen too.
    """

    frozen_encoders: bool = False

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.projection = linear(self.ehr_hidden)
        self.setup_head()

    def encode(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name):
        """(stays' features [B, D], films' features [B, D], has_cxr bool [B])."""
        freeze = jax.lax.stop_gradient if self.frozen_encoders else lambda features: features
        ehr_BD = freeze(self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B))
        if films is None:
            return ehr_BD, jnp.zeros_like(ehr_BD), jnp.zeros(len(length_B), bool)
        # Differs from MedFuse (trainers/fusion_trainer.py): frozen encoders keep their batch statistics too.
        batch_stats = train and not self.frozen_encoders
        film_PE = freeze(self.cxr_encoder(films.image_PHWC, batch_stats, films.valid_P, axis_name))
        return ehr_BD, films.to_rows(self.projection(film_PE)), films.present_rows()


class MedFuse(ProjectedModel):
    """An LSTM over the tokens there are: the stay's, then the film's (Hayat et al. 2022, 3)."""

    def setup_head(self):
        self.fusion_lstm = fusion.LstmFusion(self.fusion_hidden, self.dtype)
        self.classifier = linear(self.num_labels)

    def forward(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD, cxr_BD, has_cxr_B = self.encode(ehr_BTF, length_B, films, train, dropout_rows_B, axis_name)
        tokens = [(ehr_BD, length_B > 0)]
        if films is not None:
            tokens.append((cxr_BD, has_cxr_B))
        fused_BN = self.fusion_lstm(*fusion.stack_tokens(tokens))
        return {"logits": self.classifier(fused_BN), "ehr_features": ehr_BD, "cxr_features": cxr_BD}


class Concat(ProjectedModel):
    """A linear layer over both feature vectors side by side: the early and joint fusion baselines.

    missing: what stands for a missing film: 'zeros', or 'learnt', a vector that starts as zeros.
    A missing stay is zeros.
    """

    missing: str = "zeros"

    def setup_head(self):
        self.classifier = linear(self.num_labels)
        if self.missing == "learnt":
            self.missing_token = self.param("missing_token", nn.initializers.zeros_init(), (self.ehr_hidden,))

    def forward(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD, cxr_BD, has_cxr_B = self.encode(ehr_BTF, length_B, films, train, dropout_rows_B, axis_name)
        if self.missing == "learnt":
            cxr_BD = jnp.where(has_cxr_B[:, None], cxr_BD, self.missing_token)
        logits_BK = self.classifier(jnp.concatenate([ehr_BD, cxr_BD], axis=-1))
        return {"logits": logits_BK, "ehr_features": ehr_BD, "cxr_features": cxr_BD}


class MmtmModel(Model):
    """Encoders that gate each other after one ResNet stage and one LSTM layer, and three heads.

    stage: the ResNet stage, 1..4. Beside 'logits', those of the joint head: 'cxr_only_logits',
    'ehr_only_logits' [B, K]; 'cxr_only', 'ehr_only', 'late_average' [B, K], probabilities, the
    last of the modalities a row has; 'align_loss_rows' [B], 0 for a row that lacks one, and
    'align_loss', their mean over the rows that have both (of this device).
    """

    stage: int = 4

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.mmtm = mmtm.Mmtm()
        self.projection = linear(self.num_film_features)
        self.ehr_classifier = linear(self.num_labels)
        self.cxr_classifier = linear(self.num_labels)
        self.classifier = linear(self.num_labels)

    def forward(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD, cxr_BE = self.encode(ehr_BTF, length_B, films, train, dropout_rows_B, axis_name)
        has_cxr_B = jnp.zeros(len(length_B), bool) if films is None else films.present_rows()
        projected_BE = self.projection(ehr_BD)
        joint_B2E = jnp.concatenate([projected_BE, cxr_BE], axis=-1)
        outputs = {"logits": self.classifier(joint_B2E), "ehr_features": ehr_BD, "cxr_features": cxr_BE}
        outputs |= self.single_heads(ehr_BD, cxr_BE, length_B > 0, has_cxr_B)
        return outputs | self.alignment(cxr_BE, projected_BE, (length_B > 0) & has_cxr_B)

    def encode(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name):
        """(stays' features [B, D], films' features [B, E]), after the exchange."""
        if films is None:
            return self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B), jnp.zeros(
                (len(length_B), self.num_film_features)
            )
        stage_args = (train, films.valid_P, axis_name)
        x_PHWC = self.cxr_encoder.until(self.stage, films.image_PHWC, *stage_args)
        ehr_BD = jnp.zeros((len(length_B), self.ehr_hidden))
        if ehr_BTF is not None:
            hidden_BTD = self.ehr_encoder.first_layer(ehr_BTF, length_B)
            x_PHWC, hidden_BTD = self.mmtm(x_PHWC, hidden_BTD, length_B, films)
            ehr_BD = self.ehr_encoder.last_state(hidden_BTD, length_B, train, dropout_rows_B)
        for i in range(self.stage + 1, len(self.resnet_stage_sizes) + 1):
            x_PHWC = self.cxr_encoder.stage(i, x_PHWC, *stage_args)
        return ehr_BD, films.to_rows(resnet.pooled(x_PHWC))

    def single_heads(self, ehr_BD, cxr_BE, has_ehr_B, has_cxr_B) -> dict:
        ehr_logits_BK, cxr_logits_BK = self.ehr_classifier(ehr_BD), self.cxr_classifier(cxr_BE)
        ehr_only_BK, cxr_only_BK = nn.sigmoid(ehr_logits_BK), nn.sigmoid(cxr_logits_BK)
        ehr_weight_B1, cxr_weight_B1 = has_ehr_B[:, None].astype(jnp.float32), has_cxr_B[:, None].astype(jnp.float32)
        total_BK = ehr_weight_B1 * ehr_only_BK + cxr_weight_B1 * cxr_only_BK
        return {
            "ehr_only_logits": ehr_logits_BK,
            "cxr_only_logits": cxr_logits_BK,
            "ehr_only": ehr_only_BK,
            "cxr_only": cxr_only_BK,
            "late_average": total_BK / jnp.maximum(ehr_weight_B1 + cxr_weight_B1, 1),
        }

    def alignment(self, cxr_BE, projected_BE, has_both_B) -> dict:
        loss_B = jnp.where(has_both_B, mmtm.alignment_loss(cxr_BE, projected_BE), 0)
        return {"align_loss_rows": loss_B, "align_loss": jnp.sum(loss_B) / jnp.maximum(jnp.sum(has_both_B), 1)}


class DaftModel(Model):
    """The EHR model, its first layer's hidden states rescaled by the film (after one ResNet stage).

    stage: the ResNet stage, 1..4; the later ones are not part of the model, as nothing reads them.
    """

    stage: int = 4

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.daft = daft.Daft()
        self.classifier = linear(self.num_labels)

    def forward(self, ehr_BTF, length_B, films, train, dropout_rows_B, axis_name) -> dict:
        if films is None or ehr_BTF is None:  # nothing to rescale with, or nothing to rescale
            ehr_BD = self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B)
        else:
            x_PHWC = self.cxr_encoder.until(self.stage, films.image_PHWC, train, films.valid_P, axis_name)
            hidden_BTD = self.ehr_encoder.first_layer(ehr_BTF, length_B)
            hidden_BTD = self.daft(resnet.pooled(x_PHWC), hidden_BTD, length_B, films)
            ehr_BD = self.ehr_encoder.last_state(hidden_BTD, length_B, train, dropout_rows_B)
        return {"logits": self.classifier(ehr_BD), "ehr_features": ehr_BD}


# method name -> (module, fields that make the method)
METHODS: dict[str, tuple[Callable[..., Model], dict]] = {
    "uni_ehr": (UniEhr, {}),
    "uni_cxr": (UniCxr, {}),
    "early": (Concat, {"frozen_encoders": True}),
    "joint": (Concat, {}),
    "joint_zeros": (Concat, {}),  # the same model: what differs is which stays it is trained on
    "joint_learnable": (Concat, {"missing": "learnt"}),
    "medfuse": (MedFuse, {}),
    "mmtm3": (MmtmModel, {"stage": 3}),
    "mmtm4": (MmtmModel, {"stage": 4}),
    "daft3": (DaftModel, {"stage": 3}),
    "daft4": (DaftModel, {"stage": 4}),
}


def build(method: str, num_labels: int, **options) -> Model:
    """The model of a method, with `num_labels` labels; options are fields of `Model`.

    UserError for an unknown method or an option it has not.
    """
    check_choice("method", method, METHODS)
    module, fields = METHODS[method]
    allowed = [name for name in inspect.signature(module).parameters if name not in ("parent", "name")]
    for option in options:
        check_choice(f"option of method {method}", option, allowed)
    if num_labels < 1:
        raise UserError(f"num_labels is {num_labels}; a model has at least one label")
    return module(num_labels=num_labels, **{**fields, **options})


def init(model: Model, key: jax.Array) -> dict:
    """Initial variables: {'params': ..., 'batch_stats': ... where there are films}.

    A key of the `rbg` kind compiles three times faster than a threefry one, whose code is long.
    """

    def initialise(key):
        # No size of the batch, the stay or the film shapes a parameter: the smallest will do. Lazy:
        # the forward pass is traced only, and never compiled.
        ehr_BTF = jax.ShapeDtypeStruct((1, 1, len(tasks.CHANNELS)), jnp.float32)
        image_PHW = jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)
        return model.lazy_init(key, ehr_BTF, image=image_PHW)

    return jax.jit(initialise)(key)
