"""Read and write state dicts in torch and safetensors files. Reading a file never runs code from it."""

import argparse
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import.names import prefix, unwrapped

_ENTRIES = ("state_dict", "model_state_dict", "model")  # names of a training checkpoint's weights; the first is read
_SAVE = "save it with torch.save({'state_dict': model.state_dict()}, FILE)"
# What torch.load and zipfile raise for a checkpoint that is truncated or has changed bytes.
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


def read(path: str | Path, notes: list[str] | None = None) -> dict[str, np.ndarray]:
    """Read the state dict of a checkpoint file: `.safetensors`, or any torch file (`.pth.tar`, `.pth`, `.pt`).

    From a training checkpoint, only the entry 'state_dict', 'model_state_dict' or 'model' is read. Prefixes of wrappers
    (names.unwrapped) are removed; notes gets a line that says so. Raises UserError if the file is missing, is damaged
    or holds more than numbers, or if the package that reads it is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a checkpoint file", path=path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}", path=path)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: copy or download it again", path=path)
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not tensors:
        raise UserError(f"{path} holds no weights", path=path)
    if notes is not None and (removed := prefix(tensors)):
        notes.append(f"names: removed {removed!r}, which a wrapper put before each")
    result = unwrapped(tensors)
    if notes is not None and (changed := set(result) - {name[len(prefix(tensors)) :] for name in tensors}):
        notes.append(f"names: removed what wrappers of a part put into {len(changed)} of them")
    return result


def write(path: str | Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as `.safetensors`, or as `.pth.tar` with an entry 'state_dict', like the released trainer.

    Raises UserError for another suffix, an existing file, or a folder that cannot be written.
    """
    path = Path(path)
    if not path.name.endswith((".safetensors", ".pth.tar")):
        raise UserError(f"{path}: an exported file must end in .safetensors or .pth.tar", path=path)
    if path.exists():
        raise UserError(f"{path} already exists: give another name", path=path)
    # Serialise in memory, because each package raises its own errors if a file cannot be written.
    if path.suffix == ".safetensors":
        content = _safetensors(path).numpy.save(dict(state_dict))
    else:
        torch, buffer = _torch(path), io.BytesIO()
        torch.save({"state_dict": {name: torch.from_numpy(np.array(v)) for name, v in state_dict.items()}}, buffer)
        content = buffer.getbuffer()
    with files.must_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.written_whole(path) as unfinished:
            unfinished.write_bytes(content)


def _safetensors(path: Path):
    try:
        import safetensors.flax
        import safetensors.numpy
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install safetensors", path=path) from None
    return safetensors


def _torch(path: Path):
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs torch: pip install torch, or use a .safetensors file", path=path) from None
    return torch


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = _safetensors(path)
    try:
        # flax rather than numpy, which has no bfloat16
        return {name: np.asarray(value) for name, value in safetensors.flax.load_file(path).items()}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged, truncated or not of safetensors ({error})", path=path) from None
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} holds an unsupported number type ({error})", path=path) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})", path=path) from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    # The released trainer also stores its best AUROC, as a numpy number; others store arrays of scores. weights_only
    # refuses both by default, but they are safe to allow: these types hold only numbers.
    functions = [getattr(np._core.multiarray, name) for name in ("scalar", "_reconstruct")]
    allowed = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in functions for core in ("core", "_core")]
    codes = np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"
    # Trainers store their arguments: a Namespace holds values by name.
    allowed += [argparse.Namespace, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in codes}]
    try:
        _check_checksums(path)
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read safely: {_reason(error)}", path=path) from None
    tensors = content
    if isinstance(content, dict):
        entry = next((name for name in _ENTRIES if isinstance(content.get(name), dict)), None)
        tensors = content[entry] if entry else content
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path} holds no state dict: expected tensors by name; {_SAVE}", path=path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UserError(f"{path}: {name} is a sparse, quantised or meta tensor, not a plain one", path=path)
    # torch conjugates and negates lazily, which numpy cannot represent.
    tensors = {str(name): tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items()}
    return {name: t.float().numpy() if t.is_floating_point() else t.numpy() for name, t in tensors.items()}


def _check_checksums(path: Path) -> None:
    """Verify the checksums in a zip file. torch.load does not, so a flipped bit in a weight would go unnoticed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def _reason(error: Exception) -> str:
    """Return in one line why a file cannot be read."""
    message = " ".join(str(error).split())
    if any(words in message for words in ("GLOBAL ", "Unsupported", "Can only build")):  # refused by weights_only
        name = message.partition("GLOBAL ")[2].split(" ")[0]
        return f"it holds more than numbers ({name or 'objects'}), which could run code when opened; {_SAVE}"
    if isinstance(error, pickle.UnpicklingError) or not message:
        return "it is damaged, truncated or not a torch file"
    # A KeyError's message is only a key, which would not help.
    return "it is damaged or truncated" + (f" ({message[:100]})" if " " in message else "")
