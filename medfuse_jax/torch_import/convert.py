"""State dicts to flax variables and back, by the table of names."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from medfuse_jax.models import registry
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import.names import (
    LAYOUTS,
    RESNET34_STAGES,
    TABLES,
    WRAPPER,
    Row,
    backbone_rows,
    known_names,
    table,
    unwrapped,
)


def load(state_dict: Mapping[str, np.ndarray], method: str, num_labels: int, **options):
    """A released model: (model, variables) from a state dict of numpy arrays.

    Names may all begin with `module.`, as torch's DataParallel saves them. options: fields of
    `methods.Model`, for sizes other than the released ones. UserError for an unknown or missing
    name, a wrong shape or label count, or a value that is not finite.
    """
    model = registry.build(method, num_labels, **options)
    return model, fill(model, method, state_dict)


def fill(model: registry.Model, method: str, state_dict: Mapping[str, np.ndarray]) -> dict:
    """The variables of a model that `methods.build` made for `method`; UserError as in `load`."""
    state_dict = unwrapped(state_dict)
    stages = model.resnet_stage_sizes
    rows = table(method, stages, getattr(model, "missing", ""))
    _check_names(state_dict, rows, method, known_names(stages), _hint(state_dict, stages))
    expected = _shapes(model)
    assert {row.path for row in rows} == set(expected), "the table and the model differ"
    return traverse_util.unflatten_dict({row.path: _to_flax(row, state_dict, expected[row.path]) for row in rows})


def is_backbone(state_dict: Mapping[str, np.ndarray]) -> bool:
    """Whether this is a bare ResNet, such as torchvision's ImageNet weights, not a released model."""
    return "conv1.weight" in state_dict


def fill_backbone(model: registry.Model, state_dict: Mapping[str, np.ndarray]) -> dict:
    """A torchvision ResNet's weights for a model's X-ray encoder: {'params': {'cxr_encoder': ...}, 'batch_stats': ...}.

    Its ImageNet head (fc.weight, fc.bias) is left out, and the stages that the model has not. UserError as in `load`.
    """
    state_dict = unwrapped(state_dict)
    expected = _shapes(model)
    rows = backbone_rows(model.resnet_stage_sizes, prefix="")
    known = {name for row in rows for name in row.names} | {"fc.weight", "fc.bias"}
    known |= {name.replace("running_mean", "num_batches_tracked") for name in known}
    rows = [row for row in rows if row.path in expected]
    if not rows:
        raise UserError("these are the weights of an X-ray encoder (a ResNet), which this config's method has not")
    _check_names(state_dict, rows, "the X-ray encoder", known)
    return traverse_util.unflatten_dict({row.path: _to_flax(row, state_dict, expected[row.path]) for row in rows})


def unused(
    state_dict: Mapping[str, np.ndarray],
    method: str,
    stage_sizes: Iterable[int] = RESNET34_STAGES,
    missing: str = "",
) -> list[str]:
    """The entries of a released checkpoint that a method does not read, in its order. missing: as in `table`."""
    used = {name for row in table(method, stage_sizes, missing) for name in row.names}
    return [name for name in state_dict if name not in used]


def export(variables: Mapping, method: str) -> dict[str, np.ndarray]:
    """The state dict of a method's variables, under the released names: what `load` reads back, bit for bit.

    It holds the parts the method uses. Our one LSTM bias becomes the first of torch's two. UserError where a
    variable has no released name, or one that the method has is not there.
    """
    blocks = variables["params"].get("cxr_encoder", {})
    stage_sizes = tuple(sum(name.startswith(f"stage{i}_") for name in blocks) for i in range(1, 5))
    flat = traverse_util.flatten_dict(dict(variables))
    missing = "learnt" if "missing_token" in variables["params"] else "zeros"
    rows = table(method, stage_sizes, missing)
    if nameless := sorted(flat.keys() - {row.path for row in rows}):
        left = _listed(["/".join(path) for path in nameless])
        raise UserError(f"the variables hold {left}, which a released {method} has not: such a run is not exported")
    state_dict = {}
    for row in rows:
        if row.path not in flat:
            raise UserError(f"the variables lack {'/'.join(row.path)}, which method {method} has")
        value = np.asarray(flat[row.path], np.float32).transpose(np.argsort(LAYOUTS[row.kind]))
        state_dict[row.names[0]] = np.ascontiguousarray(value)
        # -0.0, not 0.0: the one zero that changes no bit of what it is added to
        state_dict |= {name: np.full_like(value, -0.0) for name in row.names[1:]}
        if row.names[0].endswith("running_var"):
            state_dict[row.names[0].replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state_dict


def _shapes(model: registry.Model) -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path: shape} of a model's variables."""
    variables = jax.eval_shape(lambda: registry.init(model, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def _check_names(state_dict, rows: list[Row], what: str, known: set[str], hint: str = "") -> None:
    wrapped = [name for name in state_dict if name.startswith(WRAPPER)]
    if wrapped:  # all of them would have been unwrapped
        rest = [name for name in state_dict if name not in wrapped]
        raise UserError(
            f"the checkpoint has names with {WRAPPER!r} before them ({_listed(wrapped)}) and without "
            f"({_listed(rest)}): give one model's"
        )
    needed = {name for row in rows for name in row.names}
    missing = [name for name in sorted(needed) if name not in state_dict]
    if missing:
        raise UserError(f"the checkpoint lacks {_listed(missing)}, which {what} needs{hint}")
    unknown = [name for name in state_dict if name not in known]
    if unknown:
        raise UserError(f"the checkpoint holds {_listed(unknown)}, which no released model has")


def _hint(state_dict, stages) -> str:
    """What a checkpoint without the names that were looked for is, as far as its names tell."""
    if is_backbone(state_dict):
        return "; it is a bare ResNet, for an X-ray encoder to start from"
    fitting = [m for m in TABLES if all(name in state_dict for row in table(m, stages) for name in row.names)]
    return f"; it has all weights of {', '.join(fitting)}" if fitting else ""


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _to_flax(row: Row, state_dict, shape: tuple[int, ...]) -> jax.Array:
    axes = LAYOUTS[row.kind]
    expected = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    values = [_checked(name, np.asarray(state_dict[name]), expected, row) for name in row.names]
    return jnp.asarray(functools.reduce(np.add, values).transpose(axes))


def _checked(name: str, value: np.ndarray, expected: tuple[int, ...], row: Row) -> np.ndarray:
    """One entry as float32; UserError where its shape, type or values are not a weight's."""
    if value.shape != expected:
        if row.path[1].endswith("classifier") and value.shape[1:] == expected[1:]:
            raise UserError(
                f"the checkpoint has {value.shape[0]} labels ({name} is {list(value.shape)}), not {expected[0]}"
            )
        raise UserError(f"{name} has shape {list(value.shape)}; {list(expected)} was expected")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{name} holds {value.dtype} numbers; floating-point ones were expected")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)  # what is too large for it becomes infinite, and is said
    if not np.isfinite(value).all():
        raise UserError(f"{name} holds {np.sum(~np.isfinite(value))} value(s) that are not finite (NaN or infinite)")
    if row.path[-1] == "var" and (value < 0).any():
        raise UserError(f"{name} holds {np.sum(value < 0)} value(s) below 0; variances were expected")
    return value
