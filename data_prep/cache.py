"""Stages that are done once: each writes to a temporary folder that is renamed when whole.

A finished stage is recognised by a key, the hash of its inputs and options, which is part of
its folder's name; so a stopped build leaves nothing that looks finished, and goes on when run again.
The last file it writes lists all others and their sizes; a folder that disagrees with its list is made anew.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl

from data_prep import progress
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

HIDDEN = ".stages"
LIST = "stage.json"


def key(**parts: object) -> str:
    """A hash of anything JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def private(out: Path) -> Iterator[Path]:
    """Makes `out` and its stage folder, for the owner alone, and keeps a second build out of it."""
    busy = f"another build is writing to --out={out}: wait for it, or give another folder"
    before = os.umask(0o077)
    try:
        with files.locked(out / HIDDEN / "lock", f"--out={out}", busy):
            yield out / HIDDEN
    except (OSError, RuntimeError, pl.exceptions.PolarsError) as error:
        if isinstance(error, UserError) or not _is_full(error):
            raise
        # What was whole before the disk filled up stays whole.
        raise UserError(f"no space left under --out={out}: free some and run the same command again") from None
    finally:
        os.umask(before)


def _is_full(error: Exception) -> bool:
    """Whether a write failed for want of space; only some of the writers (numpy's does not) pass the errno on."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    said = ("No space left", "quota exceeded", "File too large", " requested and ")
    return any(text in str(error) for text in said)


def run(folder: Path, name: str, stage_key: str, write: Callable[[Path], None]) -> Path:
    """The folder `<folder>/<name>-<key>`, written by `write(temporary folder)` unless it is there already and whole."""
    done = folder / f"{name}-{stage_key}"
    if done.is_dir():
        if _is_whole(done):
            return done
        progress.say(f"{done} is damaged and is made anew")
    temporary = folder / f"{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    (temporary / LIST).write_text(json.dumps(_sizes(temporary)))
    for old in folder.glob(f"{name}-*"):
        shutil.rmtree(old)
    temporary.rename(done)
    return done


def _sizes(folder: Path) -> dict[str, int]:
    """File -> bytes, of all under `folder` but the list itself."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths if path != folder / LIST}


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / LIST).read_text()) == _sizes(folder)
    except (OSError, ValueError):
        return False


def put_in_place(new: Path, target: Path) -> None:
    """Renames a finished stage to `target`, taking the place of an older one."""
    (new / LIST).unlink()  # a dataset lists its files itself
    old = new.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
