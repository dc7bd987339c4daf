"""The table of released checkpoints: which PyTorch entries make which flax variable.

The PyTorch names are those of the released MedFuse's modules and of torchvision's ResNet.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from medfuse_jax.models import registry
from medfuse_jax.runtime.errors import UserError, check_choice

RESNET34_STAGES = (3, 4, 6, 3)
_BACKBONE = "cxr_model.vision_backbone."
WRAPPER = "module."  # torch's DataParallel puts this before every name
# Before the names of a whole model, in any nesting: DataParallel, torch.compile, and users' own trainers.
_PREFIXES = (WRAPPER, "_orig_mod.", "model.", "net.")
_INNER = (".module.", "._orig_mod.")  # within a name, where only a part of the model was wrapped


def prefix(names: Iterable[str]) -> str:
    """Return what wrappers put before every name, such as 'module._orig_mod.'; '' if one name lacks it."""
    names, found = list(names), ""
    while names and (more := next((p for p in _PREFIXES if all(n.startswith(found + p) for n in names)), "")):
        found += more
    return found


def unwrapped(state_dict: Mapping) -> dict:
    """Return the state dict without the wrappers' prefix, if every name has it, and without wrappers inside names."""
    start, inner = len(prefix(state_dict)), {}
    for name, value in state_dict.items():
        name = name[start:]
        for wrapper in _INNER:
            name = name.replace(wrapper, ".")
        inner[name] = value
    # Two names that differ by a wrapper alone are not one model's.
    return inner if len(inner) == len(state_dict) else {name[start:]: value for name, value in state_dict.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """The entries of a state dict that make one flax variable.

    names: two if their values are added (an LSTM's biases). path: collection and names in flax. kind: a key of LAYOUTS.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    kind: str


# kind -> torch's axes in flax's order. Linear and LSTM in torch: [out, in]; convolution: [out, in, h, w].
LAYOUTS = {"vector": (0,), "matrix": (1, 0), "convolution": (2, 3, 1, 0)}


def _linear_rows(torch_name: str, *path: str, bias: bool = True) -> list[Row]:
    rows = [Row((f"{torch_name}.weight",), ("params", *path, "kernel"), "matrix")]
    return rows + [Row((f"{torch_name}.bias",), ("params", *path, "bias"), "vector")] * bias


def _lstm_rows(torch_name: str, *path: str) -> list[Row]:
    # Gates in the order i, f, g, o, as in torch.
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


def backbone_rows(
    stage_sizes: Iterable[int] = RESNET34_STAGES, kind: str = "resnet34", prefix: str = _BACKBONE
) -> list[Row]:
    """Return the rows of torchvision's ResNet; torchvision and flax both number stages from 1.

    kind: config.model.cxr_encoder. A block has as many convolutions as its kind, in order.
    """
    num_convs, first_projected = {"resnet34": (2, 2), "resnet50": (3, 1)}[kind]
    rows = _conv_norm_rows(f"{prefix}conv1", f"{prefix}bn1", ("cxr_encoder",), "stem_conv", "stem_norm")
    for i, num_blocks in enumerate(stage_sizes, start=1):
        for j in range(num_blocks):
            block, path = f"{prefix}layer{i}.{j}.", ("cxr_encoder", f"stage{i}_block{j}")
            for n in range(1, num_convs + 1):
                rows += _conv_norm_rows(f"{block}conv{n}", f"{block}bn{n}", path, f"conv{n}", f"norm{n}")
            if i >= first_projected and j == 0:
                shortcut = f"{block}downsample."
                rows += _conv_norm_rows(f"{shortcut}0", f"{shortcut}1", path, "shortcut_conv", "shortcut_norm")
    return rows


_EHR_ENCODER = [row for i in (0, 1) for row in _lstm_rows(f"ehr_model.layer{i}", "ehr_encoder", f"layer{i}")]
_MISSING_TOKEN = [Row(("missing_token",), ("params", "missing_token"), "vector")]


def _mmtm_rows(stage: int) -> list[Row]:
    layers = {"fc_squeeze": "squeeze", "fc_visual": "image_gate", "fc_skeleton": "ehr_gate"}
    return [row for name, ours in layers.items() for row in _linear_rows(f"mmtm{stage}.{name}", "mmtm", ours)]


def _daft_rows(stage: int) -> list[Row]:
    layers = {"aux_base": "squeeze", "aux_out": "excite"}
    prefix = f"daft_layer_{stage}.aux"
    return [r for name, ours in layers.items() for r in _linear_rows(f"{prefix}.{name}", "daft", ours, bias=False)]


def kind_of(names: Iterable[str]) -> str:
    """Return the kind of the ResNet in a checkpoint, whole or bare; that of the released ones if it has none."""
    return "resnet50" if any(name.endswith("layer1.0.conv3.weight") for name in names) else "resnet34"


def _layout(released: str, stage_sizes: tuple[int, ...], stage: int, kind: str) -> list[Row]:
    """Return the rows of a released checkpoint, or of one with another kind of ResNet, which has the same names.

    released: as in registry.Method. stage: the ResNet stage of MMTM or DAFT.
    """
    backbone = backbone_rows(stage_sizes, kind)

    def head(torch_name: str, name: str = "classifier") -> list[Row]:
        return _linear_rows(torch_name, name)

    both = _EHR_ENCODER + backbone + _linear_rows("projection", "projection")
    concat = both + head("fused_cls.0")
    own_heads = head("ehr_model.dense_layer", "ehr_classifier") + head("cxr_model.classifier.0", "cxr_classifier")
    return {
        "ehr": _EHR_ENCODER + head("ehr_model.dense_layer"),
        "cxr": backbone + head("cxr_model.classifier.0"),
        "concat": concat,
        "medfuse": both + _lstm_rows("lstm_fusion_layer", "fusion_lstm", "cell") + head("lstm_fused_cls.0"),
        "unified": concat + own_heads,
        "mmtm": both + _mmtm_rows(stage) + own_heads + head("joint_cls.0"),
        # DAFT does not use the ResNet's later stages.
        "daft": _EHR_ENCODER
        + backbone_rows(stage_sizes[:stage], kind)
        + _daft_rows(stage)
        + head("ehr_model.dense_layer"),
    }[released]


# Released checkpoints hold MMTM and DAFT modules for five stages, though a method uses only one, and two unused tokens.
_RELEASED_STAGES = range(5)
_UNUSED_TOKENS = {"sep_token", "cls_token"}


def table(
    method: str, stage_sizes: Iterable[int] = RESNET34_STAGES, missing: str = "", kind: str = "resnet34"
) -> list[Row]:
    """Return the rows that a method needs.

    missing: what replaces a missing X-ray in early and joint fusion: 'zeros', 'learnt' or '', the method's default.
    kind: config.model.cxr_encoder.
    Raises UserError for a method that was not released.
    """
    check_choice("method", method, registry.METHODS)
    row = registry.METHODS[method]
    if not row.released:
        raise UserError(
            f"the method {method!r} was never released: it cannot be imported or exported", field="method", value=method
        )
    if not row.model_class.uses_cxr:  # it may be 'features'
        kind = "resnet34"
    has_token = row.released == "concat" and (missing or row.fields.get("missing")) == "learnt"
    return _layout(row.released, tuple(stage_sizes), row.fields.get("stage", 0), kind) + _MISSING_TOKEN * has_token


def released_methods() -> list[str]:
    return [method for method, row in registry.METHODS.items() if row.released]


def known_names(stage_sizes: Iterable[int] = RESNET34_STAGES, kind: str = "resnet34") -> set[str]:
    """Return every name that a released checkpoint of any method may hold."""
    rows = [row for method in released_methods() for row in table(method, stage_sizes, kind=kind)]
    rows += [row for stage in _RELEASED_STAGES for row in _mmtm_rows(stage) + _daft_rows(stage)]
    names = {name for row in rows for name in row.names}
    counters = {name.replace("running_mean", "num_batches_tracked") for name in names if "running_mean" in name}
    return names | counters | _UNUSED_TOKENS
