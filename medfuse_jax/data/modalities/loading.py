"""Load modalities beside EHR and X-ray, by name: `static`, or a file of your own (docs/encoders.md).

A modality is a module that defines two names:

    table(part, train) -> float32 [N, ...]   values of one split's records; all NaN for a record that has none
    Encoder(width)                           flax module: values [B, ...], finite -> tokens [B, width]

part, train: the index of the split and of the train split (records.INDEX_FIELDS). Learn
whatever depends on the data, such as categories, from `train` alone, so that all splits are encoded alike.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import numpy as np

from medfuse_jax import schema
from medfuse_jax.data.modalities import static
from medfuse_jax.runtime import errors
from medfuse_jax.runtime.errors import UserError, check_choice

_OURS = {"static": static}
_TAKEN = ("ehr", "cxr")  # names of the other encoders


@dataclasses.dataclass(frozen=True)
class Modality:
    """A loaded modality. file: the user's file, named in errors; None for one of ours."""

    name: str
    table: Callable[[dict, dict], np.ndarray]
    encoder: Callable[[int], nn.Module]
    file: Path | None = None


def listed(names: str) -> list[str]:
    """Return the names and files in a config's `model.modalities`."""
    return [name.strip() for name in names.split(",") if name.strip()]


def load(names: str) -> tuple[Modality, ...]:
    """Load the modalities of a config's `model.modalities`, in its order; raise UserError for an invalid one."""
    loaded = tuple(_load(name) for name in listed(names))
    all_names = [modality.name for modality in loaded]
    for name in all_names:
        if all_names.count(name) > 1 or name in _TAKEN or not name.isidentifier():
            raise UserError(
                f"config.model.modalities={names}: {name!r} is taken, or no Python name; a modality is "
                "named after its file, so rename the file"
            )
    return loaded


def tables(modality: Modality, index: dict[str, dict]) -> dict[str, np.ndarray]:
    """Return {split: float32 [N, ...]}; raise UserError if `table` gives anything else, or nothing to learn from."""
    made = {}
    seen = {split: {n: v for n, v in part.items() if n != schema.RACE} for split, part in index.items()}
    for split, part in seen.items():
        where = f"config.model.modalities: table() of {modality.name!r}, {split} split"
        with _users_own(modality.file, where):
            given = modality.table(part, seen["train"])
        try:
            values_N = np.asarray(given, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: it must give rows of numbers, all of one shape ({error})") from None
        num_records = len(part["stay_id"])
        if values_N.ndim < 2 or len(values_N) != num_records:
            raise UserError(f"{where}: shape {values_N.shape}; it must be [{num_records}, ...], one row per record")
        shape, of_train = list(values_N.shape[1:]), list(made.get("train", values_N).shape[1:])
        if shape != of_train:
            raise UserError(
                f"{where}: a row has shape {shape}, one of the train split {of_train}; they must be the same"
            )
        values_NV = values_N.reshape(num_records, -1) if num_records else np.zeros((0, 1), np.float32)
        absent_NV = np.isnan(values_NV)
        broken_N = np.isinf(values_NV).any(1) | (absent_NV.any(1) & ~absent_NV.all(1))
        if broken_N.any():
            raise UserError(
                f"{where}: record {broken_N.argmax()} has some NaN or inf; a row must be finite, or all NaN if missing"
            )
        if split == "train" and absent_NV.all():
            raise UserError(f"{where}: no record has a value, so there is nothing to learn from")
        made[split] = values_N
    return made


def check_encoder(modality: Modality, values_N: np.ndarray, width: int) -> None:
    """Raise UserError unless the modality's encoder turns its values [N, ...] into tokens [B, width]."""
    where = f"config.model.modalities: the Encoder of {modality.name!r}"
    values_BV = np.zeros((2, *values_N.shape[1:]), np.float32)  # two: one token for the whole batch must not pass
    with _users_own(modality.file, f"{where} with values of shape {list(values_BV.shape)}"):
        encoder = modality.encoder(width)
        variables = jax.eval_shape(encoder.init, jax.random.key(0), values_BV)
        if further := sorted(set(variables) - {"params"}):
            raise UserError(f"{where} has variables of the kind {further[0]}; parameters alone are kept and trained")
        token_BD = jax.eval_shape(encoder.apply, variables, values_BV)
    found = list(getattr(token_BD, "shape", ()))
    if found != [2, width]:
        raise UserError(
            f"{where} gives {found or type(token_BD).__name__} for 2 rows; it must give tokens [2, {width}]"
        )


def digest(of_shards: str, extra: dict[str, dict[str, np.ndarray]]) -> str:
    """Return a hash of the shards' digest and every modality's values; the shards' digest if there is no modality."""
    if not extra:
        return of_shards
    content = hashlib.sha256(of_shards.encode())
    for name, by_split in extra.items():
        for split, values_N in by_split.items():
            content.update(f"{name} {split} {values_N.shape}".encode())
            content.update(np.ascontiguousarray(values_N))
    return content.hexdigest()


def _load(name: str) -> Modality:
    module = _OURS.get(name) if not name.endswith(".py") else _from_file(Path(name))
    if module is None:
        check_choice("config.model.modalities", name, [*_OURS, "a file of your own (FILE.py)"])
    for wanted in ("table", "Encoder"):
        if not hasattr(module, wanted):
            raise UserError(f"config.model.modalities: {name} has no {wanted}; see docs/encoders.md")
    file = Path(name) if module is not _OURS.get(name) else None
    return Modality(Path(name).stem, module.table, module.Encoder, file)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"config.model.modalities: there is no file {path} (working folder: {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with _users_own(path, "config.model.modalities"):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _users_own(file: Path | None, what: str) -> Iterator[None]:
    """Turn whatever the user's file raises in the block into a UserError; let our own errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the file is the user's own, and may fail in any way
        if file is None:
            raise
        raise UserError(f"{what}: {file} cannot be used ({errors.of_file(file, error)})") from None
