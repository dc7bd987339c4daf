"""The build cache: folders of intermediate results under `<out>/.cache`, each written once.

The name of an entry's folder contains a key, the hash of its inputs and options. An entry is written to a temporary
folder and renamed when complete, so that a stopped build can resume. `entry.json`, written last, lists the other files
and their sizes; an entry that does not match its list is rebuilt.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from data_prep import progress
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import TryLater, UserError, is_disk_full

FOLDER = ".cache"
FILE_LIST = "entry.json"


def key(**parts: object) -> str:
    """Return a hash of named values, serialised as JSON, or as str() where JSON cannot hold them."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def private(out: Path) -> Iterator[Path]:
    """Create `out` and its cache, readable by the owner only, and lock them against other builds.

    Raise TryLater if the disk is full.
    """
    busy = f"another build is writing to --out={out}; wait for it, or use another folder"
    old_umask = os.umask(0o077)
    try:
        with files.locked(out / FOLDER / "lock", f"--out={out}", busy):
            yield out / FOLDER
    except (OSError, RuntimeError, pl.exceptions.PolarsError) as error:
        if not is_disk_full(error):
            raise
        raise TryLater(
            f"no space left under --out={out}; free some and rerun the command to resume", field="--out", path=out
        ) from None
    finally:
        os.umask(old_umask)


def entry(folder: Path, name: str, entry_key: str, write: Callable[[Path], None]) -> Path:
    """Return `<folder>/<name>-<key>`; call `write(temporary folder)` first, unless it is cached and intact."""
    cached = folder / f"{name}-{entry_key}"
    if cached.is_dir():
        if _is_intact(cached):
            return cached
        progress.say(f"{cached} is damaged; rebuilding it")
    temporary = folder / f"{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    files.write_json(temporary / FILE_LIST, _sizes(temporary))
    for old in folder.glob(f"{name}-*"):
        shutil.rmtree(old)
    temporary.rename(cached)
    return cached


def _sizes(folder: Path) -> dict[str, int]:
    """Return file -> bytes, for every file under `folder` except the list itself."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths if path != folder / FILE_LIST}


def _is_intact(folder: Path) -> bool:
    try:
        return files.read_json(folder / FILE_LIST, "it will be rebuilt") == _sizes(folder)
    except UserError:
        return False


def move_into_place(cached: Path, target: Path) -> None:
    """Rename a cache entry to `target`, replacing an older one."""
    (cached / FILE_LIST).unlink()  # not needed in a dataset, whose manifest lists the files
    old = cached.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    cached.rename(target)
    shutil.rmtree(old, ignore_errors=True)
