"""Atomic writes (a temporary file is renamed), JSON, locks and hashes."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import sys
import threading
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np

from medfuse_jax.runtime.errors import TryLater, UserError, is_disk_full

# What reading raises for .npz files that are truncated, have changed bytes or lack an array.
DAMAGED_NPZ = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)
_LINE_SEAL = 8  # characters: enough against damage
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # classes of Unicode's bidirectional text
_TRUSTED = (0,)  # users whose code needs no warning: root
# Error numbers of filesystems without locks: a bucket mounted as a folder, NFS or Lustre with locks off.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def check_local(flag: str, path: str | Path) -> None:
    """Raise UserError for an address such as gs://bucket/folder or gs:bucket, and for a name with control characters.

    Control characters include those that turn the direction of the text around them, such as U+202E.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|(gs|s3|hdfs):", str(path)):
        message = f"{flag} is {path}, an address; mount it (gcsfuse, s3fs) and give that folder"
        raise UserError(message, field=flag, value=str(path))
    if any(unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in _TURNS for c in str(path)):
        message = f"{flag} is {str(path)!r}, a name with control characters: give another"
        raise UserError(message, field=flag, value=str(path))


def say_code_of_another(path: Path, chosen_by: Path | None = None) -> None:
    """Print a warning, once in a process, if the Python file to run next is of another user, or chosen by one.

    chosen_by: the folder of the config that names the file.
    """
    for place in (path, chosen_by):
        with contextlib.suppress(OSError):
            if place is not None and place.stat().st_uid not in (*_TRUSTED, os.getuid()):
                _warn_of_code(path, place)


@functools.cache
def _warn_of_code(path: Path, place: Path) -> None:
    print(f"warning: {path} is code and runs now; {place} belongs to another user", file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """Create and return the user's private cache folder, for compiled programs and the synthetic cohort."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medfuse_jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        message = f"the cache folder {folder} cannot be created ({error.strerror}): set XDG_CACHE_HOME"
        raise UserError(message, path=folder) from None
    return folder


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` when the block ends without an error."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed `written_whole(path)` left. Only for a file that no other process writes."""
    for unfinished in path.parent.glob(f".{path.name}.*.partial{path.suffix}"):
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def open_to_append(path: str | Path, flag: str) -> TextIO:
    """Open a file for records, with its folder; raise UserError naming the flag if it cannot be written."""
    with must_write(f"{flag}={path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8")


def json_text(content: dict | list, sort_keys: bool = True, ensure_ascii: bool = True) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=1, sort_keys=sort_keys, ensure_ascii=ensure_ascii) + "\n"


def write_json(path: Path, content: dict | list, sort_keys: bool = True) -> None:
    """Write a JSON file atomically."""
    write_text(path, json_text(content, sort_keys))


def sealed(content: dict) -> dict:
    """Return a JSON object with the hash of its content as 'seal', which `read_json` checks and removes."""
    return content | {"seal": seal(content)}


def seal(content: dict, name: str = "seal") -> str:
    """Return the SHA-256 of an object's fields, as JSON has them, except `name`, which stores it."""
    rest = {key: value for key, value in content.items() if key != name}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, what_to_do: str, kind: type = dict, must_be_sealed: bool = False):
    """Return the content of a JSON file.

    kind: dict or list, the type that the file must hold. must_be_sealed: refuse one without a seal (see `sealed`).
    Raises UserError, with the path and a message that ends in `what_to_do`, if the file is missing, damaged, of another
    type, or does not match its seal.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError("a pipe or device")  # reading one may never end
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {what_to_do}", path=path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {what_to_do}", path=path) from None
    if not isinstance(content, kind):
        raise UserError(f"{path} holds no JSON {'object' if kind is dict else 'array'}: {what_to_do}", path=path)
    if not isinstance(content, dict):
        return content
    if (must_be_sealed or "seal" in content) and content.get("seal") != seal(content):
        raise UserError(f"{path} was changed after it was written: {what_to_do}", path=path)
    return {name: value for name, value in content.items() if name != "seal"}


def json_line(content: dict) -> str:
    """Return a line of a file of JSON objects, with its own short seal, which `read_json_lines` checks and removes."""
    return json.dumps(content | {"seal": seal(content)[:_LINE_SEAL]}) + "\n"


def read_json_lines(path: Path) -> list[dict | None]:
    """Return the objects of a file with one a line, None for a damaged line; raise OSError if it cannot be read.

    A last line without its end is being written, or was when its process ended: it is left out.
    """
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_line(text) for text in lines]


def _line(text: str) -> dict | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    given = content.pop("seal", None)  # lines of earlier versions have none
    return content if given in (None, seal(content)[:_LINE_SEAL]) else None


@contextlib.contextmanager
def must_write(what: object, hint: str = "") -> Iterator[None]:
    """Turn an OSError in the block into a UserError saying that `what` (a path, or --flag=path) cannot be written."""
    try:
        yield
    except OSError as error:
        kind = TryLater if is_disk_full(error) else UserError
        raise kind(f"{what} cannot be written ({error.strerror}){hint}", path=error.filename) from None


@contextlib.contextmanager
def locked(path: Path, what: str, busy: str) -> Iterator[None]:
    """Keep other processes out of the block; the system releases the lock when the process ends.

    path: the lock file, created with its folder. Raises TryLater(busy) if another process holds it, and UserError, as
    `must_write(what)` does, if it cannot be created. On a filesystem without locks, only prints a warning.
    """
    with must_write(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryLater(busy) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: the filesystem of {path.parent} has no locks ({error.strerror}): make sure that no other "
                "process writes there",
                file=sys.stderr,
                flush=True,
            )
        yield
    finally:
        os.close(lock)


def remembered_sha256(path: Path, known: dict[str, dict]) -> dict:
    """Return {'seen', 'sha256'} of a file, which is hashed only if it differs from its entry in `known`, by path.

    seen: size, mtime, and ctime, which cannot be set back.
    """
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    entry = known.get(str(path.resolve()))
    return entry if entry and entry.get("seen") == seen else {"seen": seen, "sha256": sha256(path)}


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open an .npz file; raise one of DAMAGED_NPZ unless every array in it, and its name, are as they were written."""
    with zipfile.ZipFile(path) as whole:
        if damaged := whole.testzip():
            raise zipfile.BadZipFile(f"{damaged} was changed")
    with np.load(path) as stored:
        yield stored


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
