"""The methods of the paper by name: one model each, all with the same call.

Shapes: B rows (stays), P X-rays, T time, F EHR channel, H W C image, D LSTM width,
E X-ray features, M modality, K label.
"""

import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax import schema
from medfuse_jax.data.modalities.loading import Modality
from medfuse_jax.losses import Head
from medfuse_jax.models import attention, daft, fusion, mmtm, resnet
from medfuse_jax.models.model import Model, linear
from medfuse_jax.models.presence import images_of
from medfuse_jax.runtime.errors import UserError, check_choice


class UniEhr(Model):
    """The EHR encoder and a linear layer; X-rays are not read."""

    uses_cxr = False
    needs = ("ehr",)

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.classifier = linear(self.num_labels)

    def find_images(self, *batch) -> None:
        return None

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD = self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B)
        return {"logits": self.classifier(ehr_BD), "ehr_features": ehr_BD}


class UniCxr(Model):
    """The X-ray encoder and a linear layer; the stay is not read.

    A row without an X-ray has no prediction: its logits mean nothing. Dense and not in training,
    every image given is scored, whatever has_cxr says.
    """

    uses_ehr = False
    needs = ("cxr",)

    def setup(self):
        self.cxr_encoder = self.new_cxr_encoder()
        self.classifier = linear(self.num_labels)

    def find_images(self, image, num_rows, has_cxr, image_row, image_mask, train):
        return images_of(image, num_rows, has_cxr if train else None, image_row, image_mask)

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name) -> dict:
        if images is None:
            cxr_BE = jnp.zeros((len(length_B), self.num_cxr_features))
        else:
            cxr_BE = images.to_rows(self.cxr_encoder(images.image_PHWC, train, images.valid_P, axis_name))
        return {"logits": self.classifier(cxr_BE), "cxr_features": cxr_BE}


class ProjectedModel(Model):
    """Both encoders, and the X-ray's features projected to the width of the stay's.

    frozen_encoders: no gradient reaches the encoders, and batch statistics are frozen too.
    """

    frozen_encoders: bool = False

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.projection = linear(self.ehr_hidden)
        self.setup_head()

    def encode(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name):
        """(stays' features [B, D], X-rays' features [B, D], has_cxr bool [B])."""
        ehr_BD, cxr_PE = self.encode_both(ehr_BTF, length_B, images, train, dropout_rows_B, axis_name)
        if images is None:
            return ehr_BD, jnp.zeros_like(ehr_BD), jnp.zeros(len(length_B), bool)
        return ehr_BD, images.to_rows(self.projection(cxr_PE)), images.present_rows()

    def encode_both(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name):
        """(stays' features [B, D], X-rays' own features [P, E], None where the batch has no X-rays)."""
        ehr_BD = self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B)
        if images is None:
            return ehr_BD, None
        if images.image_PHWC.shape[1:3] == (1, 1):  # [P, 1, 1, E]: a frozen encoder's features, computed before
            return ehr_BD, images.image_PHWC[:, 0, 0]
        # Differs from MedFuse (trainers/fusion_trainer.py): frozen encoders keep their batch statistics too.
        batch_stats = train and not self.frozen_encoders
        return ehr_BD, self.freeze(self.cxr_encoder(images.image_PHWC, batch_stats, images.valid_P, axis_name))

    def encode_ehr(self, ehr_BTF, length_B, train, dropout_rows_B) -> jax.Array:
        return self.freeze(super().encode_ehr(ehr_BTF, length_B, train, dropout_rows_B))

    def freeze(self, features):
        return jax.lax.stop_gradient(features) if self.frozen_encoders else features


class MedFuse(ProjectedModel):
    """An LSTM over the tokens there are: the stay's, then the X-ray's (Hayat et al. 2022, 3).

    modalities: further ones, whose tokens come first: such facts are known before the stay is.
    """

    modalities: tuple[Modality, ...] = ()

    def setup_head(self):
        self.fusion_lstm = fusion.LstmFusion(self.fusion_hidden, self.dtype)
        self.classifier = linear(self.num_labels)
        self.setup_modalities()

    def setup_modalities(self):
        for modality in self.modalities:
            setattr(self, f"{modality.name}_encoder", modality.encoder(self.ehr_hidden))

    def extra_tokens(self, extra: dict | None) -> list[tuple[jax.Array, jax.Array]]:
        """[(token [B, D], present bool [B]), ...] of the further modalities."""
        assert {m.name for m in self.modalities} == set(extra or {}), "each modality has its values"
        tokens = []
        for name in (modality.name for modality in self.modalities):
            values_B = jnp.asarray(extra[name])
            absent_B = jnp.isnan(values_B).any(axis=tuple(range(1, values_B.ndim)), keepdims=True)
            present_B = ~absent_B.reshape(-1)
            # An absent row is encoded too, and its token then masked. What stands in its place is a value that the
            # encoder is made for: at NaN, or at zeros for a norm, its own gradient is NaN, and so is NaN * 0.
            filler = jnp.where(present_B.any(), jax.lax.stop_gradient(values_B[jnp.argmax(present_B)]), 1.0)
            tokens.append((getattr(self, f"{name}_encoder")(jnp.where(absent_B, filler, values_B)), present_B))
        return tokens

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name, extra=None) -> dict:
        ehr_BD, cxr_BD, has_cxr_B = self.encode(ehr_BTF, length_B, images, train, dropout_rows_B, axis_name)
        tokens = [*self.extra_tokens(extra), (ehr_BD, length_B > 0)]
        if images is not None:
            tokens.append((cxr_BD, has_cxr_B))
        fused_BN = self.fusion_lstm(*fusion.stack_tokens(tokens))
        return {"logits": self.classifier(fused_BN), "ehr_features": ehr_BD, "cxr_features": cxr_BD}


class MedFuseAttention(MedFuse):
    """MedFuse with attention in place of both last states: over the stay's hours, and over the tokens.

    What the paper leaves to future work (Hayat et al. 2022, 6). Its weights are in the collection
    'intermediates': time_weights [B, T] and modality_weights [B, M], M in the order of `token_names`.
    """

    @property
    def token_names(self) -> tuple[str, ...]:
        return (*(modality.name for modality in self.modalities), "ehr", "cxr")

    def setup_head(self):
        # Beside the encoder, not in it: so an LSTM that was trained alone can be its start.
        self.time_attention = attention.TimeAttention(self.dtype)
        self.modality_attention = attention.AttentionFusion(self.fusion_hidden, self.dtype)
        self.classifier = linear(self.num_labels)
        self.setup_modalities()

    def encode_ehr(self, ehr_BTF, length_B, train, dropout_rows_B) -> jax.Array:
        if ehr_BTF is None:
            return super().encode_ehr(ehr_BTF, length_B, train, dropout_rows_B)
        # Frozen encoders end here: the attention over their hours is the fusion's.
        hidden_BTD, last_BD = self.freeze(self.ehr_encoder.states(ehr_BTF, length_B))
        pooled_BD, weight_BT = self.time_attention(hidden_BTD, last_BD, length_B)
        self.sow("intermediates", "time_weights", weight_BT, reduce_fn=_newest, init_fn=tuple)
        return self.ehr_encoder.drop(pooled_BD, train, dropout_rows_B)

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name, extra=None) -> dict:
        ehr_BD, cxr_BD, has_cxr_B = self.encode(ehr_BTF, length_B, images, train, dropout_rows_B, axis_name)
        tokens = [*self.extra_tokens(extra), (ehr_BD, length_B > 0), (cxr_BD, has_cxr_B)]
        fused_BN, weight_BM = self.modality_attention(*fusion.stack_tokens(tokens))
        self.sow("intermediates", "modality_weights", weight_BM, reduce_fn=_newest, init_fn=tuple)
        return {"logits": self.classifier(fused_BN), "ehr_features": ehr_BD, "cxr_features": cxr_BD}


def _newest(_, value):
    return value


class Concat(ProjectedModel):
    """A linear layer over both feature vectors side by side: the early and joint fusion baselines.

    missing: what stands for a missing X-ray: 'zeros', or 'learnt', a vector that starts as zeros.
    A missing stay is zeros.
    """

    missing: str = "zeros"

    def setup_head(self):
        self.classifier = linear(self.num_labels)
        if self.missing == "learnt":
            self.missing_token = self.param("missing_token", nn.initializers.zeros_init(), (self.ehr_hidden,))

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD, cxr_BD, has_cxr_B = self.encode(ehr_BTF, length_B, images, train, dropout_rows_B, axis_name)
        if self.missing == "learnt":
            cxr_BD = jnp.where(has_cxr_B[:, None], cxr_BD, self.missing_token)
        logits_BK = self.classifier(jnp.concatenate([ehr_BD, cxr_BD], axis=-1))
        return {"logits": logits_BK, "ehr_features": ehr_BD, "cxr_features": cxr_BD}


class Unified(ProjectedModel):
    """A classifier for each set of modalities (Hayat et al. 2021, arXiv 2111.02710).

    The X-ray's own classifier is of other labels than the task's ('cxr_only_logits'
    [B, num_cxr_labels]): it is trained by batches of X-rays with those labels, which take turns
    with the stays' (plan.Turns). 'logits' are the joint classifier's ('joint_logits') for a row
    with an X-ray, the stay's ('ehr_only_logits') for one without. An X-ray without a stay, of which
    the paper says nothing, has the joint classifier's, with zeros for the stay.
    """

    heads = (
        Head("joint_logits", needs=("cxr",)),
        Head("ehr_only_logits", needs=("ehr",), weight="ehr_only"),
        Head("cxr_only_logits", needs=("cxr",), weight="cxr_only", label="cxr_label"),
    )

    num_cxr_labels: int = len(schema.RADIOLOGY_LABELS)

    def setup_head(self):
        self.classifier = linear(self.num_labels)
        self.ehr_classifier = linear(self.num_labels)
        self.cxr_classifier = linear(self.num_cxr_labels)

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD, cxr_PE = self.encode_both(ehr_BTF, length_B, images, train, dropout_rows_B, axis_name)
        cxr_BE, cxr_BD = jnp.zeros((len(length_B), self.num_cxr_features)), jnp.zeros_like(ehr_BD)
        has_cxr_B = jnp.zeros(len(length_B), bool)
        if images is not None:
            cxr_BE, cxr_BD = images.to_rows(cxr_PE), images.to_rows(self.projection(cxr_PE))
            has_cxr_B = images.present_rows()
        joint_BK = self.classifier(jnp.concatenate([ehr_BD, cxr_BD], axis=-1))
        ehr_only_BK = self.ehr_classifier(ehr_BD)
        return {
            "logits": jnp.where(has_cxr_B[:, None], joint_BK, ehr_only_BK),
            "joint_logits": joint_BK,
            "ehr_only_logits": ehr_only_BK,
            "cxr_only_logits": self.cxr_classifier(cxr_BE),
            "ehr_features": ehr_BD,
            "cxr_features": cxr_BD,
        }


class MmtmModel(Model):
    """Encoders that gate each other after one ResNet stage and one LSTM layer, and three heads.

    stage: the ResNet stage, 1..4. Beside 'logits', those of the joint head: 'cxr_only_logits',
    'ehr_only_logits' [B, K]; 'cxr_only', 'ehr_only', 'late_average' [B, K], probabilities, the
    last of the modalities a row has; 'align_loss_rows' [B], 0 for a row that lacks one, and
    'align_loss', their mean over the rows that have both (of this device).
    """

    # Differs from MedFuse (trainers/mmtm_trainer.py): one update of the summed losses, not three in
    # turn, of which the one of the EHR head moved the X-ray encoder alone (its optimiser was given no other).
    heads = (
        Head(),
        Head("ehr_only_logits", needs=("ehr",), weight="ehr_only"),
        Head("cxr_only_logits", needs=("cxr",), weight="cxr_only"),
    )

    stage: int = 4

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.mmtm = mmtm.Mmtm()
        self.projection = linear(self.num_cxr_features)
        self.ehr_classifier = linear(self.num_labels)
        self.cxr_classifier = linear(self.num_labels)
        self.classifier = linear(self.num_labels)

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name) -> dict:
        ehr_BD, cxr_BE = self.encode(ehr_BTF, length_B, images, train, dropout_rows_B, axis_name)
        has_cxr_B = jnp.zeros(len(length_B), bool) if images is None else images.present_rows()
        projected_BE = self.projection(ehr_BD)
        joint_B2E = jnp.concatenate([projected_BE, cxr_BE], axis=-1)
        outputs = {"logits": self.classifier(joint_B2E), "ehr_features": ehr_BD, "cxr_features": cxr_BE}
        outputs |= self.single_heads(ehr_BD, cxr_BE, length_B > 0, has_cxr_B)
        return outputs | self.alignment(cxr_BE, projected_BE, (length_B > 0) & has_cxr_B)

    def encode(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name):
        """(stays' features [B, D], X-rays' features [B, E]), after the exchange."""
        if images is None:
            return self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B), jnp.zeros(
                (len(length_B), self.num_cxr_features)
            )
        stage_args = (train, images.valid_P, axis_name)
        x_PHWC = self.cxr_encoder.until(self.stage, images.image_PHWC, *stage_args)
        ehr_BD = jnp.zeros((len(length_B), self.ehr_hidden))
        if ehr_BTF is not None:
            hidden_BTD = self.ehr_encoder.first_layer(ehr_BTF, length_B)
            x_PHWC, hidden_BTD = self.mmtm(x_PHWC, hidden_BTD, length_B, images)
            ehr_BD = self.ehr_encoder.last_state(hidden_BTD, length_B, train, dropout_rows_B)
        for i in range(self.stage + 1, len(self.resnet_stage_sizes) + 1):
            x_PHWC = self.cxr_encoder.stage(i, x_PHWC, *stage_args)
        return ehr_BD, images.to_rows(resnet.pooled(x_PHWC))

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

    @classmethod
    def loss_weights(cls) -> set[str]:
        return super().loss_weights() | {"align"}

    def alignment(self, cxr_BE, projected_BE, has_both_B) -> dict:
        loss_B = jnp.where(has_both_B, mmtm.alignment_loss(cxr_BE, projected_BE), 0)
        return {"align_loss_rows": loss_B, "align_loss": jnp.sum(loss_B) / jnp.maximum(jnp.sum(has_both_B), 1)}


class DaftModel(Model):
    """The EHR model, its first layer's hidden states rescaled by the X-ray (after one ResNet stage).

    stage: the ResNet stage, 1..4; the later ones are not part of the model, as nothing reads them.
    """

    needs = ("ehr",)  # an X-ray alone has nothing to rescale

    stage: int = 4

    def setup(self):
        self.ehr_encoder = self.new_ehr_encoder()
        self.cxr_encoder = self.new_cxr_encoder()
        self.daft = daft.Daft()
        self.classifier = linear(self.num_labels)

    def forward(self, ehr_BTF, length_B, images, train, dropout_rows_B, axis_name) -> dict:
        if images is None or ehr_BTF is None:  # nothing to rescale with, or nothing to rescale
            ehr_BD = self.encode_ehr(ehr_BTF, length_B, train, dropout_rows_B)
        else:
            x_PHWC = self.cxr_encoder.until(self.stage, images.image_PHWC, train, images.valid_P, axis_name)
            hidden_BTD = self.ehr_encoder.first_layer(ehr_BTF, length_B)
            hidden_BTD = self.daft(resnet.pooled(x_PHWC), hidden_BTD, length_B, images)
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
    "medfuse_attention": (MedFuseAttention, {}),
    "unified": (Unified, {}),
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


def init(model: Model, key: jax.Array, extra: dict | None = None) -> dict:
    """Initial variables: {'params': ..., 'batch_stats': ... where there are X-rays}; to be called under jit.

    extra: values [1, ...] of the model's further modalities, whose sizes shape their encoders.
    A key of the `rbg` kind compiles three times faster than a threefry one, whose code is long.
    """
    # No size of the batch, the stay or the X-ray shapes a parameter: the smallest will do. Lazy:
    # the forward pass is traced only, and never compiled.
    ehr_BTF = jax.ShapeDtypeStruct((1, 1, len(schema.CHANNELS)), jnp.float32)
    image_PHW = jax.ShapeDtypeStruct((1, 32, 32), jnp.float32)
    return model.lazy_init(key, ehr_BTF, image=image_PHW, **({"extra": extra} if extra else {}))
