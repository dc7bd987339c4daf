"""Weights from and to the released PyTorch models, by an explicit table of names.

A released checkpoint holds all parts of its model, whatever was trained: parts that a method
does not use are allowed, and `unused` lists them. Each entry that a method needs is used
exactly once; an unknown, missing, misshapen or non-finite one is a UserError that names it.

torch itself is needed only to read and write its own files (`pip install medfuse_jax[torch]`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from medfuse_jax.errors import UserError, check_choice
from medfuse_jax.models import methods

RESNET34_STAGES = (3, 4, 6, 3)
_BACKBONE = "cxr_model.vision_backbone."


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the entries that make one flax variable.

    names: of the state dict; two where they are added (an LSTM's biases).
    path: collection and names in the flax tree; kind: how the layouts differ, a key of _LAYOUTS.
    """

    names: tuple[str, ...]
    path: tuple[str, ...]
    kind: str


# kind -> torch's axes in flax's order. torch: Linear and LSTM [out, in], convolution [out, in, h, w].
_LAYOUTS = {"vector": (0,), "matrix": (1, 0), "convolution": (2, 3, 1, 0)}


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
        + _linear_rows(f"mmtm{place}.fc_visual", "mmtm", "film_gate")
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
_TABLES: dict[str, Callable[[tuple[int, ...]], list[Row]]] = {
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
    "joint_learnable": lambda stages: _concat(stages) + _MISSING_TOKEN,
    "mmtm3": lambda stages: _mmtm(stages, 3),
    "mmtm4": lambda stages: _mmtm(stages, 4),
    "daft3": lambda stages: _daft(stages, 3),
    "daft4": lambda stages: _daft(stages, 4),
}

# Released checkpoints hold these modules at five places, of which a method uses one; two tokens are never used.
_PLACES = range(5)
_NEVER_READ = ("sep_token", "cls_token")


def table(method: str, stage_sizes: Iterable[int] = RESNET34_STAGES) -> list[Row]:
    """The rows a method needs."""
    check_choice("method", method, _TABLES)
    return _TABLES[method](tuple(stage_sizes))


def known_names(stage_sizes: Iterable[int] = RESNET34_STAGES) -> set[str]:
    """Every name a released checkpoint of any method may hold."""
    rows = [row for method in _TABLES for row in table(method, stage_sizes)]
    rows += [row for place in _PLACES for row in _mmtm_rows(place) + _daft_rows(place)]
    names = {name for row in rows for name in row.names}
    counters = {name.replace("running_mean", "num_batches_tracked") for name in names if "running_mean" in name}
    return names | counters | set(_NEVER_READ)


def load(state_dict: Mapping[str, np.ndarray], method: str, num_labels: int, **options):
    """A released model: (model, variables) from a state dict of numpy arrays.

    options: fields of `methods.Model`, for sizes other than the released ones. UserError for
    an unknown or missing name, a wrong shape or label count, or a value that is not finite.
    """
    model = methods.build(method, num_labels, **options)
    rows = table(method, model.resnet_stage_sizes)
    _check_names(state_dict, rows, method, known_names(model.resnet_stage_sizes), model.resnet_stage_sizes)
    expected = traverse_util.flatten_dict(jax.eval_shape(lambda: methods.init(model, jax.random.key(0))))
    assert {row.path for row in rows} == set(expected), "the table and the model differ"
    flat = {row.path: _to_flax(row, state_dict, expected[row.path].shape, num_labels) for row in rows}
    return model, traverse_util.unflatten_dict(flat)


def unused(
    state_dict: Mapping[str, np.ndarray], method: str, stage_sizes: Iterable[int] = RESNET34_STAGES
) -> list[str]:
    """The entries of a released checkpoint that a method does not read, in the checkpoint's order."""
    used = {name for row in table(method, stage_sizes) for name in row.names}
    return [name for name in state_dict if name not in used]


def load_backbone(
    state_dict: Mapping[str, np.ndarray], stage_sizes: Iterable[int] = RESNET34_STAGES, width: int = 64
) -> dict:
    """ImageNet weights of a torchvision ResNet: {'params': {'cxr_encoder': ...}, 'batch_stats': ...}.

    Its ImageNet head (fc.weight, fc.bias) is left out.
    """
    rows = backbone_rows(stage_sizes, prefix="")
    known = {name for row in rows for name in row.names} | {"fc.weight", "fc.bias"}
    known |= {name.replace("running_mean", "num_batches_tracked") for name in known}
    _check_names(state_dict, rows, "the ImageNet backbone", known, stage_sizes)
    encoder = methods.build("uni_cxr", 1, resnet_stage_sizes=tuple(stage_sizes), resnet_width=width)
    expected = traverse_util.flatten_dict(jax.eval_shape(lambda: methods.init(encoder, jax.random.key(0))))
    return traverse_util.unflatten_dict(
        {row.path: _to_flax(row, state_dict, expected[row.path].shape, 1) for row in rows}
    )


def export(variables: Mapping, method: str) -> dict[str, np.ndarray]:
    """The state dict of a method's variables, under the released names: what `load` reads back.

    It holds the parts the method uses. Our one LSTM bias becomes the first of torch's two.
    """
    blocks = variables["params"].get("cxr_encoder", {})
    stage_sizes = tuple(sum(name.startswith(f"stage{i}_") for name in blocks) for i in range(1, 5))
    flat = traverse_util.flatten_dict(dict(variables))
    state_dict = {}
    for row in table(method, stage_sizes):
        if row.path not in flat:
            raise UserError(f"the variables lack {'/'.join(row.path)}, which method {method} has")
        value = np.asarray(flat[row.path], np.float32).transpose(np.argsort(_LAYOUTS[row.kind]))
        state_dict[row.names[0]] = np.ascontiguousarray(value)
        state_dict |= {name: np.zeros_like(value) for name in row.names[1:]}
        if row.names[0].endswith("running_var"):
            state_dict[row.names[0].replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state_dict


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict in a checkpoint file: `.pth.tar`, `.pth`, `.pt` or `.safetensors`.

    A training checkpoint's 'state_dict' entry is taken, and the prefix `module.` removed.
    Nothing in the file is executed. UserError where the file or the package to read it is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint file {path}")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path} needs torch: pip install torch, or convert it to .safetensors") from None
    import pickle

    # The released trainer stores its best AUROC as a numpy number, which weights_only refuses by
    # default. These types only hold a number.
    numpy_number = [
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
        np._core.multiarray.scalar,
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
    ]
    try:
        with torch.serialization.safe_globals(numpy_number):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a checkpoint that can be read safely ({reason})") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path} holds no state dict: expected names with tensors, or an entry 'state_dict' of them")
    return {name: t.float().numpy() if t.is_floating_point() else t.numpy() for name, t in tensors.items()}


def _check_names(state_dict, rows: list[Row], method: str, known: set[str], stages) -> None:
    needed = {name for row in rows for name in row.names}
    missing = [name for name in sorted(needed) if name not in state_dict]
    if missing:
        fitting = [m for m in _TABLES if all(name in state_dict for row in table(m, stages) for name in row.names)]
        hint = f"; it has all that {', '.join(fitting)} need" if fitting else ""
        raise UserError(f"the checkpoint lacks {_listed(missing)}, which {method} needs{hint}")
    unknown = [name for name in state_dict if name not in known]
    if unknown:
        raise UserError(f"the checkpoint holds {_listed(unknown)}, which no released model has")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _to_flax(row: Row, state_dict, shape: tuple[int, ...], num_labels: int) -> jax.Array:
    axes = _LAYOUTS[row.kind]
    expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    total = np.zeros(expected, np.float32)
    for name in row.names:
        value = np.asarray(state_dict[name])
        if value.shape != expected:
            if row.path[1] == "classifier" and value.shape[1:] == expected[1:]:
                raise UserError(
                    f"the checkpoint has {value.shape[0]} labels ({name} is {list(value.shape)}), not {num_labels}"
                )
            raise UserError(f"{name} has shape {list(value.shape)}; {list(expected)} was expected")
        if not np.isfinite(value).all():
            raise UserError(f"{name} holds {np.sum(~np.isfinite(value))} values that are not finite (NaN or infinite)")
        total = total + value.astype(np.float32)
    return jnp.asarray(total.transpose(axes))
