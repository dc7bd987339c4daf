"""Files that are whole or not there: what a kill may interrupt is written beside its place and renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from medfuse_jax.runtime.errors import TryLater, UserError

# What np.load raised for .npz files that were cut off at any place, had bytes changed, or lacked an array.
DAMAGED_NPZ = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
# How a filesystem says that it has no locks: a bucket mounted as a folder, NFS or Lustre without theirs.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def cache_dir() -> Path:
    """The user's cache folder for compiled programs and the synthetic cohort, readable by the user alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medfuse_jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache folder {folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME") from None
    return folder


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder, renamed to `path` when the block ends without an error."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Removes what `written_whole(path)` left where it was killed; for the file's only writer."""
    for unfinished in path.parent.glob(f".{path.name}.*.partial{path.suffix}"):
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict | list) -> None:
    """Writes JSON with sorted keys, atomically."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path, what_to_do: str, kind: type = dict):
    """Returns the content of a JSON file.

    kind: dict or list, what the file must hold. Raises UserError (path; the message ends in `what_to_do`) if the
    file is missing, damaged or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {what_to_do}", path=path) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {what_to_do}", path=path) from None
    if not isinstance(content, kind):
        raise UserError(f"{path} holds no JSON {'object' if kind is dict else 'array'}: {what_to_do}", path=path)
    return content


@contextlib.contextmanager
def must_write(what: object, hint: str = "") -> Iterator[None]:
    """Turns an OSError of the block into a UserError: `what` (a path, or --flag=path) cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}){hint}") from None


@contextlib.contextmanager
def locked(path: Path, what: str, busy: str) -> Iterator[None]:
    """Keeps a second process out of the block; the lock goes with the process, however it ends.

    path: the file to lock, made with its folder. TryLater: `busy` where another process holds it; UserError as
    `must_write(what)` where it cannot be made. A filesystem without locks is said, and nobody is kept out.
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
                f"warning: the filesystem of {path.parent} has no locks ({error.strerror}): see to it that no second "
                "process writes there",
                file=sys.stderr,
                flush=True,
            )
        yield
    finally:
        os.close(lock)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
