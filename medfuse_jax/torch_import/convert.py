"""Convert state dicts to flax variables and back, using the table in names.py."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from medfuse_jax.models import registry
from medfuse_jax.models.model import Model, variable_shapes
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import.names import (
    LAYOUTS,
    RESNET34_STAGES,
    WRAPPER,
    Row,
    backbone_rows,
    kind_of,
    known_names,
    released_methods,
    table,
    unwrapped,
)


def load(state_dict: Mapping[str, np.ndarray], method: str, num_labels: int, **options):
    """Load a released model from a state dict of numpy arrays; return (model, variables).

    All names may begin with `module.`, as torch's DataParallel saves them. options: fields of the model, for sizes
    other than the released ones. Raises UserError for an unknown or missing name, a wrong shape or number of labels,
    or a value that is not finite.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        kind = type(state_dict).__name__
        what = f"the state dict is a {kind}, not arrays by name: pass what torch_import.read(FILE) returns"
        raise UserError(what, field="state_dict", value=kind)
    model = registry.build(method, num_labels, **options)
    return model, fill(model, method, state_dict)


def fill(model: Model, method: str, state_dict: Mapping[str, np.ndarray]) -> dict:
    """Return the variables of a model that `registry.build` made for `method`. Raise UserError as `load` does."""
    if model.uses_ehr and model.ehr_kind != "lstm":
        what = f"config.model.ehr_encoder is {model.ehr_kind!r}; the released models have an LSTM: use 'lstm'"
        raise UserError(what, field="config.model.ehr_encoder", value=model.ehr_kind, nearest="lstm")
    state_dict = unwrapped(state_dict)
    stages, kind = model.resnet_stage_sizes, model.cxr_kind
    rows = table(method, stages, getattr(model, "missing", ""), kind)
    if model.uses_cxr and not is_backbone(state_dict):
        _check_kind(state_dict, kind)
    known = known_names(stages, kind_of(state_dict))
    _check_names(state_dict, rows, method, known, _hint(state_dict, stages))
    expected = _shapes(model)
    assert {row.path for row in rows} == set(expected), "the table and the model differ"
    return traverse_util.unflatten_dict({row.path: _to_flax(row, state_dict, expected[row.path]) for row in rows})


def is_backbone(state_dict: Mapping[str, np.ndarray]) -> bool:
    """Return whether this is a bare ResNet, such as torchvision's ImageNet weights, not a released model."""
    return "conv1.weight" in state_dict


def fill_backbone(model: Model, state_dict: Mapping[str, np.ndarray]) -> dict:
    """Return a model's X-ray encoder from a torchvision ResNet: {'params': {'cxr_encoder': ...}, 'batch_stats': ...}.

    Ignores its ImageNet head (fc.weight, fc.bias) and the stages that the model lacks. Raises UserError as `load` does.
    """
    if not model.uses_cxr:
        raise UserError("the checkpoint is an X-ray encoder (a ResNet), and config.method has none", field="method")
    state_dict = unwrapped(state_dict)
    expected = _shapes(model)
    rows = backbone_rows(model.resnet_stage_sizes, model.cxr_kind, prefix="")
    known = {name for row in rows for name in row.names} | {"fc.weight", "fc.bias"}
    known |= {name.replace("running_mean", "num_batches_tracked") for name in known}
    rows = [row for row in rows if row.path in expected]
    _check_kind(state_dict, model.cxr_kind)
    _check_names(state_dict, rows, "the X-ray encoder", known)
    return traverse_util.unflatten_dict({row.path: _to_flax(row, state_dict, expected[row.path]) for row in rows})


def unused(
    state_dict: Mapping[str, np.ndarray],
    method: str,
    stage_sizes: Iterable[int] = RESNET34_STAGES,
    missing: str = "",
    kind: str = "resnet34",
) -> list[str]:
    """Return the entries of a released checkpoint that a method does not read, in file order.

    missing, kind: as in `table`.
    """
    used = {name for row in table(method, stage_sizes, missing, kind) for name in row.names}
    return [name for name in state_dict if name not in used]


def export(variables: Mapping, method: str) -> dict[str, np.ndarray]:
    """Return a method's variables as a state dict with the released names; `load` reads back the same bits.

    Our single LSTM bias becomes the first of torch's two. Raises UserError for a variable without a released name, or a
    missing one.
    """
    blocks = variables["params"].get("cxr_encoder", {})
    stage_sizes = tuple(sum(name.startswith(f"stage{i}_") for name in blocks) for i in range(1, 5))
    flat = traverse_util.flatten_dict(dict(variables))
    missing = "learnt" if "missing_token" in variables["params"] else "zeros"
    kind = "resnet50" if "conv3" in blocks.get("stage1_block0", {}) else "resnet34"
    rows = table(method, stage_sizes, missing, kind)
    if unnamed := sorted("/".join(path) for path in flat.keys() - {row.path for row in rows}):
        raise UserError(
            f"the run cannot be exported: a released {method} has no {_listed(unnamed)}", field="method", value=unnamed
        )
    state_dict = {}
    for row in rows:
        if row.path not in flat:
            raise UserError(f"the run cannot be exported: it lacks {'/'.join(row.path)} of {method}", value=row.path)
        value = np.asarray(flat[row.path], np.float32).transpose(np.argsort(LAYOUTS[row.kind]))
        state_dict[row.names[0]] = np.ascontiguousarray(value)
        # -0.0 rather than 0.0: adding it changes no bit of the other bias.
        state_dict |= {name: np.full_like(value, -0.0) for name in row.names[1:]}
        if row.names[0].endswith("running_var"):
            state_dict[row.names[0].replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state_dict


def _shapes(model: Model) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return {path: shape} of a model's variables."""
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variable_shapes(model)).items()}


def _check_names(state_dict, rows: list[Row], reader: str, known: set[str], hint: str = "") -> None:
    wrapped = [name for name in state_dict if name.startswith(WRAPPER)]
    if wrapped:  # a prefix that all names had would have been removed
        others = [name for name in state_dict if name not in wrapped]
        raise UserError(
            f"some names of the checkpoint begin with {WRAPPER!r} ({_listed(wrapped)}) and others do not "
            f"({_listed(others)}): give the checkpoint of one model",
            value=wrapped,
        )
    needed = {name for row in rows for name in row.names}
    if missing := [name for name in sorted(needed) if name not in state_dict]:
        raise UserError(f"the checkpoint lacks {_listed(missing)}, which {reader} needs{hint}", value=missing)
    if unknown := [name for name in state_dict if name not in known]:
        raise UserError(f"the checkpoint holds {_listed(unknown)}, which no released model has", value=unknown)


def _check_kind(state_dict, kind: str) -> None:
    """Raise UserError if the checkpoint's ResNet has blocks of another kind; it may have none at all."""
    if not any(name.endswith("layer1.0.conv1.weight") for name in state_dict) or kind_of(state_dict) == kind:
        return
    raise UserError(
        f"the checkpoint's X-ray encoder has the blocks of a {kind_of(state_dict)}, and config.model.cxr_encoder is "
        f"{kind!r}: use --config.model.cxr_encoder={kind_of(state_dict)}",
        field="config.model.cxr_encoder",
        value=kind,
        nearest=kind_of(state_dict),
    )


def _hint(state_dict, stages) -> str:
    """Return a hint at what the checkpoint does hold, judging by its names; '' if they match no method."""
    if is_backbone(state_dict):
        return "; it is a bare ResNet, from which an X-ray encoder can start"
    kind = kind_of(state_dict)
    methods = [m for m in released_methods() if _has_all(state_dict, table(m, stages, kind=kind))]
    return f"; it has all weights of {', '.join(methods)}" if methods else ""


def _has_all(state_dict, rows: list[Row]) -> bool:
    return all(name in state_dict for row in rows for name in row.names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _to_flax(row: Row, state_dict, shape: tuple[int, ...]) -> jax.Array:
    axes = LAYOUTS[row.kind]
    expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    values = [_checked(name, _array(name, state_dict[name]), expected, row) for name in row.names]
    return jnp.asarray(functools.reduce(np.add, values).transpose(axes))


def _array(name: str, value) -> np.ndarray:
    """Return one entry as an array. Raise UserError if numpy cannot make one, as of a bfloat16 tensor."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"{name} is not a numpy array ({' '.join(str(error).split())}): pass tensor.detach().float().numpy()"
        raise UserError(what, field=name, value=type(value).__name__) from None


def _checked(name: str, value: np.ndarray, expected: tuple[int, ...], row: Row) -> np.ndarray:
    """Return one entry as float32. Raise UserError if its shape, type or values are not valid for the weight."""
    shape = value.shape
    if shape != expected and row.path[1].endswith("classifier") and shape[1:] == expected[1:]:
        raise UserError(
            f"the checkpoint has {shape[0]} labels, not {expected[0]} (shape of {name})", field=name, value=shape
        )
    if shape != expected:
        raise UserError(f"{name} has shape {list(shape)}, not {list(expected)}", field=name, value=shape)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{name} holds {value.dtype} values, not floating-point ones", field=name, value=value.dtype)
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)  # overflow becomes infinite and is refused below
    if count := np.sum(~np.isfinite(value)):
        raise UserError(f"{name} holds {count} value(s) that are NaN or infinite", field=name, value=count)
    if row.path[-1] == "var" and (count := np.sum(value < 0)):
        raise UserError(f"{name} holds {count} negative variance(s)", field=name, value=count)
    return value
