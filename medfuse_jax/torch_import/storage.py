"""State dicts in files: what torch saves, and safetensors. Nothing in a file is executed."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import.names import unwrapped

# What torch.load and zipfile raised for checkpoints that were cut off at any place or had bytes changed.
_DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict in a checkpoint file: `.safetensors`, or whatever torch saved (`.pth.tar`, `.pth`, `.pt`).

    A training checkpoint's 'state_dict' entry is taken, and the prefix `module.` of data-parallel
    models removed. UserError where the file is missing or damaged, holds more than numbers, or the
    package to read it is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the checkpoint file in it")
    if not path.is_file():
        raise UserError(f"no checkpoint file {path}")
    if not path.stat().st_size:
        raise UserError(f"{path} is an empty file: copy or download it again")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not tensors:
        raise UserError(f"{path} holds no weights")
    return unwrapped(tensors)


def write(path: str | Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as `.safetensors`, or as `.pth.tar` with an entry 'state_dict', as the released trainer's.

    UserError for another suffix, a file that is there already, or a folder that cannot be written.
    """
    path = Path(path)
    if not path.name.endswith((".safetensors", ".pth.tar")):
        raise UserError(f"{path}: the name of an exported file ends in .safetensors or .pth.tar")
    if path.exists():
        raise UserError(f"{path} is there already: give another name")
    # Made in memory, and written here: both packages raise errors of their own where a file cannot be written.
    if path.suffix == ".safetensors":
        content = _safetensors(path).numpy.save(dict(state_dict))
    else:
        torch, made = _torch(path), io.BytesIO()
        torch.save({"state_dict": {name: torch.from_numpy(np.array(v)) for name, v in state_dict.items()}}, made)
        content = made.getbuffer()
    with files.must_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.written_whole(path) as unfinished:
            unfinished.write_bytes(content)


def _safetensors(path: Path):
    try:
        import safetensors.flax
        import safetensors.numpy
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    return safetensors


def _torch(path: Path):
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs torch: pip install torch, or use a .safetensors file") from None
    return torch


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = _safetensors(path)
    try:
        # flax, not numpy: the one of them that knows bfloat16
        return {name: np.asarray(value) for name, value in safetensors.flax.load_file(path).items()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} holds a type of number that cannot be read ({error})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    # The released trainer stores its best AUROC as a numpy number, others a list of scores as an array, which
    # weights_only refuses by default. These types only hold numbers.
    multiarray = np._core.multiarray
    numpy_numbers = [
        *(
            (made_by, f"numpy.{core}.multiarray.{made_by.__name__}")
            for made_by in (multiarray.scalar, multiarray._reconstruct)
            for core in ("core", "_core")
        ),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
    ]
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(numpy_numbers):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise UserError(f"{path} is not a checkpoint that can be read safely: {_reason(error)}") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path} holds no state dict: expected names with tensors, or an entry 'state_dict' of them")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{path}: {name} is a sparse, quantised or meta tensor; a plain one was expected")
    # A conjugated or negated tensor is a view with a mark, which numpy does not know.
    tensors = {str(name): tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items()}
    return {name: t.float().numpy() if t.is_floating_point() else t.numpy() for name, t in tensors.items()}


def _check_sums(path: Path) -> None:
    """Compares a zip file's parts with their checksums, which torch.load does not: a changed bit is no weight."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def _reason(error: Exception) -> str:
    """One line for what torch says in many."""
    said = " ".join(str(error).split())
    if any(
        words in said for words in ("GLOBAL ", "Unsupported", "Can only build")
    ):  # the weights-only reader met something that is not a number
        found = said.partition("GLOBAL ")[2].split(" ")[0]
        return f"it holds more than numbers ({found or 'objects'}), which could run code when opened"
    if isinstance(error, pickle.UnpicklingError) or not said:
        return "it is damaged, cut off, or not a file that torch saved"
    return f"it is damaged or cut off ({said[:100]})" if " " in said else "it is damaged or cut off"  # no bare KeyError
