"""One clear line for what a user can cause, and a traceback only for what we did wrong."""

import difflib
import functools
import os
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

_USER_ERROR = 2  # as argparse and shells have it; jobs/gke_tpu.yaml asks for it


class UserError(ValueError):
    """Something the user can put right: the message says what, where and what to do."""


class TryLater(UserError):
    """What the very same command may get past: another process at work, a cluster that is not there yet."""


def check_choice(what: str, value: object, allowed: Iterable[str]) -> None:
    """Raises UserError naming `what`, the value, the choices and the nearest of them."""
    allowed = list(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{what} is {value!r}; it must be one of {', '.join(map(str, allowed))}.{hint}")


def of_file(path: str | Path, error: Exception) -> str:
    """What code of the user's own raised, in one line: the last of its file's lines on the way, and what was said."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):  # found before any line of the file ran
        places.append((error.filename or "", error.lineno))
    lines = [line for file, line in places if Path(file).resolve() == Path(path).resolve()]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run(main: Callable[[list[str]], None], pass_on_unknown: bool = False) -> None:
    """Runs a command's `main(argv)` under absl; a UserError ends it with one line, and with the status of `status`.

    pass_on_unknown: whether options that are none of absl's go to `main` rather than being refused.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax and TFDS say much that no user needs
        os.umask(0o077)  # what is written is about patients: for its owner alone
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's stop is a user's
        try:
            main(argv)
        except (Exception, KeyboardInterrupt) as error:
            if line := in_one_line(error):
                _end(line, status(error))
            raise

    app.run(guarded, flags_parser=functools.partial(_parse_flags, pass_on_unknown=pass_on_unknown))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small, the host's or a device's: jax raises its own error, for other things too."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room on a disk: orbax, numpy and others each say it in another type."""
    return "No space left on device" in str(error)


def in_one_line(error: BaseException) -> str:
    """What a command says of an error that its user can put right; '' of one that needs its traceback."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on where this one was"
    if is_out_of_memory(error):
        trains = "config" in flags.FLAGS
        hint = ": give a smaller --config.batch_size or --config.eval.batch_size" if trains else ""
        return f"error: the memory is too small{hint} ({' '.join(str(error).split())[:200]})"
    if is_disk_full(error):
        return "error: no space is left on the disk: free some, and the same command goes on"
    return ""


def status(error: BaseException) -> int:
    """What a command exits with: 2 where the same command would fail again until its user puts something right."""
    fails_again = isinstance(error, UserError) and not isinstance(error, TryLater)
    return _USER_ERROR if fails_again or is_out_of_memory(error) else 1


def _end(line: str, status: int = _USER_ERROR) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


def _parse_flags(argv: list[str], pass_on_unknown: bool) -> list[str]:
    """Parses the command line; what is wrong with it is one line, whoever finds it.

    absl raises flags.Error; ml_collections, for a field of --config, whatever setting it raises.
    """
    if problem := _config_problem(argv):
        _end(f"error: {problem}")
    try:
        left = flags.FLAGS(argv, known_only=pass_on_unknown)
    except (flags.Error, TypeError, ValueError) as error:
        if "must have a value other than None" in str(error):
            missing = re.search(r"--(\w+)", str(error))[1]
            example = ", such as --config=configs/pheno.py" if missing == "config" else ""
            _end(f"error: the flag --{missing} is missing{example}; --help lists the flags")
        _end(f"error: {_of_flag(str(error))}")
    if len(left) > 1 and not pass_on_unknown:
        _end(f"error: unknown argument {left[1]!r}: every option starts with --; see --help")
    return left


_WRONG_TYPE = {  # what Python, absl and ml_collections say of a value of another type, and what it should have been
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "oolean argument to boolean flag": "true or false",  # absl: Non-boolean
    "as a ConfigDict": "given by its fields, such as --config.data.dir=DIR",
}


def _of_flag(said: str) -> str:
    """What a parser of flags said, in the words of the command line where the type is what is wrong."""
    flag = re.match(r"flag (--[\w.]+=.*?): ", said)
    for words, needed in _WRONG_TYPE.items():
        if flag and words in said:
            return f"{flag[1]} must be {needed}"
    return said


def _config_problem(argv: list[str]) -> str:
    """What is wrong with --config=FILE or the name of a --config.field=value, '' where nothing is."""
    options = [a.removeprefix("--").partition("=") for a in argv[1:] if a.startswith("--config")]
    path = next((value for name, _, value in options if name == "config"), "")
    if not path:
        return ""  # a flag that is required says so itself
    if not Path(path).is_file():
        there = [str(p) for p in sorted(Path(path).parent.glob("*.py"))]
        near = difflib.get_close_matches(path, there, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(there) or 'none in that folder'}."
        return f"--config={path} is not a file. {hint}"
    if Path(path).suffix != ".py":
        return f"--config={path} is not a Python file such as configs/pheno.py"
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # the file is the user's own, and may fail in any way
        return f"--config={path} cannot be used ({of_file(path, error)})"
    for name, _, _ in options:
        node, parts = config, name.split(".")
        for depth, part in enumerate(parts[1:], start=1):
            if not hasattr(node, "keys") or part not in node:
                return _no_such_field(parts, depth, list(node) if hasattr(node, "keys") else [])
            node = node[part]
    return ""


def _no_such_field(parts: list[str], depth: int, there: list[str]) -> str:
    parent = ".".join(parts[:depth])
    near = difflib.get_close_matches(parts[depth], there, n=1, cutoff=0.5)
    hint = (
        f"Did you mean --{parent}.{near[0]}?" if near else f"{parent} has: {', '.join(sorted(there)) or 'no fields'}."
    )
    return f"--{'.'.join(parts)} is not a field. {hint}"
