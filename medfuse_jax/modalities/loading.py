"""Modalities beside EHR and film, by name: `static`, or a file of your own (docs/encoders.md).

A modality is a module with two names in it:

    table(part, train) -> float32 [N, ...]   values of the records of one split, NaN throughout where one has none
    Encoder(width)                           flax module: values [B, ...], finite -> tokens [B, width]

part, train: the index of the split and of the train split (records.INDEX_FIELDS). What is learnt from the data,
such as categories, is learnt from `train` alone, so that every split has the same values.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import numpy as np

from medfuse_jax.errors import UserError, check_choice
from medfuse_jax.modalities import static

_OURS = {"static": static}
_TAKEN = ("ehr", "cxr")  # names of the encoders there are


@dataclasses.dataclass(frozen=True)
class Modality:
    """One modality, loaded."""

    name: str
    table: Callable[[dict, dict], np.ndarray]
    encoder: Callable[[int], nn.Module]


def load(names: str) -> tuple[Modality, ...]:
    """The modalities of a config's `model.modalities`, in its order; UserError for one that cannot be."""
    loaded = tuple(_load(name.strip()) for name in names.split(",") if name.strip())
    all_names = [modality.name for modality in loaded]
    for name in all_names:
        if all_names.count(name) > 1 or name in _TAKEN or not name.isidentifier():
            raise UserError(
                f"config.model.modalities={names}: {name!r} is taken, or no Python name; the file's name is the "
                "modality's, so rename the file"
            )
    return loaded


def tables(modality: Modality, index: dict[str, dict]) -> dict[str, np.ndarray]:
    """{split: float32 [N, ...]}; UserError where `table` gave anything else, or nothing at all to learn from."""
    made = {}
    for split, part in index.items():
        values_N = np.asarray(modality.table(part, index["train"]), np.float32)
        num_records = len(part["stay_id"])
        where = f"config.model.modalities: table() of {modality.name!r}, {split} split"
        if values_N.ndim < 2 or len(values_N) != num_records:
            raise UserError(f"{where}: shape {values_N.shape}; it must be [{num_records}, ...], a row a record")
        values_NV = values_N.reshape(num_records, -1) if num_records else np.zeros((0, 1), np.float32)
        absent_NV = np.isnan(values_NV)
        broken_N = np.isinf(values_NV).any(1) | (absent_NV.any(1) & ~absent_NV.all(1))
        if broken_N.any():
            raise UserError(
                f"{where}: record {broken_N.argmax()} has some NaN or inf; a row is finite, or NaN throughout (missing)"
            )
        if split == "train" and absent_NV.all():
            raise UserError(f"{where}: no record has a value, so there is nothing to learn from")
        made[split] = values_N
    return made


def digest(of_shards: str, extra: dict[str, dict[str, np.ndarray]]) -> str:
    """A hash of the shards' and of every modality's content; that of the shards where there is no modality."""
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
        check_choice("config.model.modalities (or FILE.py)", name, _OURS)
    for wanted in ("table", "Encoder"):
        if not hasattr(module, wanted):
            raise UserError(f"config.model.modalities: {name} has no {wanted}; see docs/encoders.md")
    return Modality(Path(name).stem, module.table, module.Encoder)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"config.model.modalities: there is no file {path} (looked for from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
