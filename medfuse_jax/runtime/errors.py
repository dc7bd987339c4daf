"""Errors that a user can cause. Each message is one line: what is wrong, where, what to do."""

import difflib
import errno
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

_OF_A_PATH = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM)
_OF_A_PATH += (errno.EROFS,)
# The last is numpy's, which reserves the space of an array first.
_DISK_FULL = ("No space left", "quota exceeded", "File too large", "Not enough free space")
_NOT_WRITTEN = re.compile(r"\d+ requested and \d+ written")  # numpy's, later


class UserError(ValueError):
    """An error that the user can fix: the message says what is wrong, where, and what to do.

    field: the config field or flag, such as 'config.batch_size' or '--split'; path: the file or folder; row: the number
    of its row, from 1; value: what was given; nearest: the choice to suggest instead. Those that do not apply are '' or
    None. Callers and tests read these attributes; people read the message.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        path: str | Path | None = None,
        row: int | None = None,
        value: object = None,
        nearest: str = "",
    ):
        super().__init__(message)
        self.field, self.path, self.row = field, None if path is None else Path(path), row
        self.value, self.nearest = value, nearest


class TryLater(UserError):
    """A transient error: retrying may succeed (another process holds the folder, a cluster is not up yet)."""


def check_choice(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raise UserError if the value is not allowed, with `what`, the value, the choices and the nearest of them."""
    allowed = list(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"{what} is {value!r}; it must be one of {', '.join(map(str, allowed))}.{hint}",
        field=what,
        value=value,
        nearest=near[0] if near else "",
    )


def of_file(path: str | Path, error: Exception) -> str:
    """Describe in one line an error that the user's own file raised, with the line number in that file."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):  # found before any line of the file ran
        places.append((error.filename or "", error.lineno))
    lines = [line for file, line in places if Path(file).resolve() == Path(path).resolve()]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def of_a_path(error: BaseException) -> str:
    """Describe an error of a path that cannot be what it must be (a file, a folder, ours); '' for any other error."""
    if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename is not None:
        return f"{str(error.filename)[:300]} cannot be used: {error.strerror}"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the host or a device ran out of memory; jax has no separate error type for it."""
    is_exhausted = "RESOURCE_EXHAUSTED" in str(error) and not is_disk_full(error)  # tensorstore's word for that
    return isinstance(error, MemoryError) or is_exhausted


def is_disk_full(error: BaseException) -> bool:
    """Return whether a disk or quota was full, or this error is due to one that says so.

    orbax, numpy, polars and others each raise a different type, some without an errno.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if any(text in str(error) for text in _DISK_FULL) or _NOT_WRITTEN.search(str(error)):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_disk_full(cause)
