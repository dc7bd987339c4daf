"""How every command starts and ends: flags, and one line for what its user can put right.

A traceback is left for what we did wrong.
"""

import difflib
import functools
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from medfuse_jax.runtime.errors import TryLater, UserError, is_disk_full, is_out_of_memory, of_file

_USER_ERROR = 2  # as argparse and shells have it; jobs/gke_tpu.yaml asks for it


def run(main: Callable[[list[str]], None], pass_on_unknown: bool = False, resumes: bool = False) -> None:
    """Runs a command's `main(argv)` under absl; a UserError ends it with one line, and with the status of `status`.

    pass_on_unknown: whether options that are none of absl's go to `main` rather than being refused. resumes: whether
    the same command goes on where it was stopped.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax and TFDS say much that no user needs
        os.umask(0o077)  # what is written is about patients: for its owner alone
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's stop is a user's
        try:
            main(argv)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt):
                _leave(in_one_line(error, resumes), status(error))
            if line := in_one_line(error, resumes):
                _end(line, status(error))
            raise

    app.run(guarded, flags_parser=functools.partial(_parse_flags, pass_on_unknown=pass_on_unknown))


def in_one_line(error: BaseException, resumes: bool = False) -> str:
    """What a command says of an error that its user can put right; '' of one that needs its traceback."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped" + ("; the same command goes on where this one was" if resumes else "")
    if is_out_of_memory(error):
        trains = "config" in flags.FLAGS
        hint = ": give a smaller --config.batch_size or --config.eval.batch_size" if trains else ""
        return f"error: the memory is too small{hint} ({' '.join(str(error).split())[:200]})"
    if is_disk_full(error):
        return "error: no space is left on the disk: free some" + (", and the same command goes on" if resumes else "")
    return ""


def status(error: BaseException) -> int:
    """What a command exits with: 2 where the same command would fail again until its user puts something right."""
    fails_again = isinstance(error, UserError) and not isinstance(error, TryLater)
    return _USER_ERROR if fails_again or is_out_of_memory(error) else 1


def _leave(line: str, status: int) -> NoReturn:
    """Ends the process at once: one interrupted while a thread starts would wait for that thread for ever."""
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


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
