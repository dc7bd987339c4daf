"""The table of names: which entries of a released PyTorch checkpoint make which flax variable.

Names and layouts are those of the released MedFuse's modules and of torchvision's ResNet.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from medfuse_jax.models import registry
from medfuse_jax.runtime.errors import UserError, check_choice

RESNET34_STAGES = (3, 4, 6, 3)
_BACKBONE = "cxr_model.vision_backbone."
WRAPPER = "module."  # before every name where torch's DataParallel was saved with its model


def unwrapped(state_dict: Mapping) -> dict:
    """The entries without the wrapper's name, where every one has it."""
    if all(name.startswith(WRAPPER) for name in state_dict):
        return {name.removeprefix(WRAPPER): value for name, value in state_dict.items()}
    return dict(state_dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the entries that make one flax variable.

    names: of the state dict; two where they are added (an LSTM's biases).
    path: collection and names in the flax tree; kind: how the layouts differ, a key of LAYOUTS.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    kind: str


# kind -> torch's axes in flax's order. torch: Linear and LSTM [out, in], convolution [out, in, h, w].
LAYOUTS = {"vector": (0,), "matrix": (1, 0), "convolution": (2, 3, 1, 0)}


def _linear_rows(torch_name: str, *path: str, bias: bool = True) -> list[Row]:
    rows = [Row((f"{torch_name}.weight",), ("params", *path, "kernel"), "matrix")]
    return rows + [Row((f"{torch_name}.bias",), ("params", *path, "bias"), "vector")] * bias


def _lstm_rows(torch_name: str, *path: str) -> list[Row]:
    # torch's gates stand in the order i, f, g, o, and so do ours
    return [
        Row((f"{torch_name}.weight_ih_l0",), ("params", *path, "input_kernel"), "matrix"),
        Row((f"{torch_name}.weight_hh_l0",), ("params", *path, "recurrent_kernel"), "matrix"),
        Row((f"{torch_name}.bias_ih_l0", f"{torch_name}.bias_hh_l0"), ("params", *path, "bias"), "vector"),
    ]


def _norm_rows(torch_name: str, *path: str) -> list[Row]:
    return [
        Row((f"{torch_name}.weight",), ("params", *path, "scale"), "vector"),
        Row((f"{torch_name}.bias",), ("params", *path, "bias"), "vector"),
        Row((f"{torch_name}.running_mean",), ("batch_stats", *path, "mean"), "vector"),
        Row((f"{torch_name}.running_var",), ("batch_stats", *path, "var"), "vector"),
    ]


def _conv_norm_rows(conv: str, norm: str, path: tuple[str, ...], flax_conv: str, flax_norm: str) -> list[Row]:
    kernel = Row((f"{conv}.weight",), ("params", *path, flax_conv, "kernel"), "convolution")
    return [kernel, *_norm_rows(norm, *path, flax_norm)]


def backbone_rows(stage_sizes: Iterable[int] = RESNET34_STAGES, prefix: str = _BACKBONE) -> list[Row]:
    """torchvision's ResNet of basic blocks; stages count from 1 in both."""
    rows = _conv_norm_rows(f"{prefix}conv1", f"{prefix}bn1", ("cxr_encoder",), "stem_conv", "stem_norm")
    for i, num_blocks in enumerate(stage_sizes, start=1):
        for j in range(num_blocks):
            block, path = f"{prefix}layer{i}.{j}.", ("cxr_encoder", f"stage{i}_block{j}")
            rows += _conv_norm_rows(f"{block}conv1", f"{block}bn1", path, "conv1", "norm1")
            rows += _conv_norm_rows(f"{block}conv2", f"{block}bn2", path, "conv2", "norm2")
            if i > 1 and j == 0:
                shortcut = f"{block}downsample."
                rows += _conv_norm_rows(f"{shortcut}0", f"{shortcut}1", path, "shortcut_conv", "shortcut_norm")
    return rows


_EHR_ENCODER = _lstm_rows("ehr_model.layer0", "ehr_encoder", "layer0") + _lstm_rows(
    "ehr_model.layer1", "ehr_encoder", "layer1"
)
_PROJECTION = _linear_rows("projection", "projection")
_MISSING_TOKEN = [Row(("missing_token",), ("params", "missing_token"), "vector")]
_FUSION_LSTM = _lstm_rows("lstm_fusion_layer", "fusion_lstm", "cell")


def _mmtm_rows(place: int) -> list[Row]:
    return (
        _linear_rows(f"mmtm{place}.fc_squeeze", "mmtm", "squeeze")
        + _linear_rows(f"mmtm{place}.fc_visual", "mmtm", "image_gate")
        + _linear_rows(f"mmtm{place}.fc_skeleton", "mmtm", "ehr_gate")
    )


def _daft_rows(place: int) -> list[Row]:
    layer = f"daft_layer_{place}.aux"
    return _linear_rows(f"{layer}.aux_base", "daft", "squeeze", bias=False) + _linear_rows(
        f"{layer}.aux_out", "daft", "excite", bias=False
    )


def _concat(stage_sizes):
    return _EHR_ENCODER + backbone_rows(stage_sizes) + _PROJECTION + _linear_rows("fused_cls.0", "classifier")


def _mmtm(stage_sizes, stage):
    return (
        _EHR_ENCODER
        + backbone_rows(stage_sizes)
        + _PROJECTION
        + _mmtm_rows(stage)
        + _linear_rows("ehr_model.dense_layer", "ehr_classifier")
        + _linear_rows("cxr_model.classifier.0", "cxr_classifier")
        + _linear_rows("joint_cls.0", "classifier")
    )


def _daft(stage_sizes, stage):
    return (
        _EHR_ENCODER
        + backbone_rows(stage_sizes[:stage])  # what comes after feeds nothing
        + _daft_rows(stage)
        + _linear_rows("ehr_model.dense_layer", "classifier")
    )


# method -> its rows, given the ResNet's stage sizes
TABLES: dict[str, Callable[[tuple[int, ...]], list[Row]]] = {
    "uni_ehr": lambda stages: _EHR_ENCODER + _linear_rows("ehr_model.dense_layer", "classifier"),
    "uni_cxr": lambda stages: backbone_rows(stages) + _linear_rows("cxr_model.classifier.0", "classifier"),
    "medfuse": lambda stages: (
        _EHR_ENCODER
        + backbone_rows(stages)
        + _PROJECTION
        + _FUSION_LSTM
        + _linear_rows("lstm_fused_cls.0", "classifier")
    ),
    "early": _concat,
    "joint": _concat,
    "joint_zeros": _concat,
    "unified": lambda stages: (
        _concat(stages)
        + _linear_rows("ehr_model.dense_layer", "ehr_classifier")
        + _linear_rows("cxr_model.classifier.0", "cxr_classifier")
    ),
    "joint_learnable": _concat,
    "mmtm3": lambda stages: _mmtm(stages, 3),
    "mmtm4": lambda stages: _mmtm(stages, 4),
    "daft3": lambda stages: _daft(stages, 3),
    "daft4": lambda stages: _daft(stages, 4),
}

# Released checkpoints hold these modules at five places, of which a method uses one; two tokens are never used.
_PLACES = range(5)
_NEVER_READ = ("sep_token", "cls_token")


def table(method: str, stage_sizes: Iterable[int] = RESNET34_STAGES, missing: str = "") -> list[Row]:
    """The rows a method needs.

    missing: what stands for a missing X-ray in early and joint fusion, 'zeros' or 'learnt'; '': what the method's
    name says. UserError for a method that was not released.
    """
    check_choice("method", method, registry.METHODS)
    if method not in TABLES:
        raise UserError(
            f"the released models have no method {method!r}, so there is nothing to import from or to export to"
        )
    missing = missing or registry.METHODS[method][1].get("missing", "")
    has_token = missing == "learnt" and TABLES[method] is _concat
    return TABLES[method](tuple(stage_sizes)) + _MISSING_TOKEN * has_token


def known_names(stage_sizes: Iterable[int] = RESNET34_STAGES) -> set[str]:
    """Every name a released checkpoint of any method may hold."""
    rows = [row for method in TABLES for row in table(method, stage_sizes)]
    rows += [row for place in _PLACES for row in _mmtm_rows(place) + _daft_rows(place)]
    names = {name for row in rows for name in row.names}
    counters = {name.replace("running_mean", "num_batches_tracked") for name in names if "running_mean" in name}
    return names | counters | set(_NEVER_READ)
