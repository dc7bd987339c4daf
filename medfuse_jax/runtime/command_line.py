"""How every command starts and ends: parse the flags; report an error that the user can fix in one line.

Other errors keep their traceback.
"""

import contextlib
import difflib
import functools
import os
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from medfuse_jax.runtime import allocator, files, watchdog
from medfuse_jax.runtime.errors import TryLater, UserError, is_disk_full, is_out_of_memory, of_a_path, of_file

# Flags of any command that name a local folder.
_FOLDERS = ("config.data.dir", "data", "data_dir", "mimic_cxr", "mimic_iv", "out", "runs", "workdir")
_USER_ERROR = 2  # as in argparse and shells; jobs/gke_tpu.yaml relies on it


def run(main: Callable[[list[str]], None], pass_on_unknown: bool = False, resumes: bool = False) -> None:
    """Run a command's `main(argv)` under absl; exit with one line and `status(error)` if the user can fix the error.

    pass_on_unknown: whether to pass unknown options on to `main` rather than refuse them. resumes: whether rerunning
    the command resumes it.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax and TFDS log much that users do not need
        os.umask(0o077)  # output is patient data: only its owner may read it
        try:
            main(argv)
            sys.stdout.flush()  # here, so that a closed pipe or a full disk is one line too
        except Exception as error:
            if line := in_one_line(error, resumes):
                watchdog.leave(line, status(error))
            raise

    allocator.limit_arenas()
    watchdog.start(in_one_line(watchdog.Stopped(), resumes))
    threading.excepthook = _report_thread
    try:
        app.run(guarded, flags_parser=functools.partial(_parse_flags, pass_on_unknown=pass_on_unknown))
    except KeyboardInterrupt as error:
        watchdog.leave(in_one_line(error, resumes), status(error))


def DEFINE_config_file(name: str, text: str) -> None:
    """Define the flag of a config file, as ml_collections does; end with one line if a --flagfile cannot be read."""
    from ml_collections import config_flags  # late: not on the machines of benchmarks, which import this module

    try:
        _check_flag_files(sys.argv[1:])
        config_flags.DEFINE_config_file(name, None, text, lock_config=True)
    except UserError as error:
        _end(f"error: {error}")
    except flags.Error as error:  # it reads the command line at once
        _end(f"error: {' '.join(str(error).removeprefix('ERROR:: ').split())}")


def define_process_flags() -> None:
    """Define the flags of a command that several processes may run together (runtime/hosts.py)."""
    flags.DEFINE_bool("distributed", False, "Run as several processes that jax detects: Cloud TPU, Slurm, Open MPI.")
    flags.DEFINE_string("coordinator", None, "Run as several processes, started by hand: HOST:PORT of the first.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process", None, "With --coordinator: the number of this process, from 0.")


def in_one_line(error: BaseException, resumes: bool = False) -> str:
    """Return what a command prints for an error that the user can fix; '' for one that needs its traceback."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        saved = f" ({error})" if str(error) else ""
        return "interrupted" + ("; rerun the command to resume" if resumes else "") + saved
    if isinstance(error, BrokenPipeError):  # `| head` ends after its last line
        return "interrupted: what reads the output has ended" + ("; rerun the command to resume" if resumes else "")
    if is_out_of_memory(error):
        hint = ": reduce --config.batch_size or --config.eval.batch_size" if "config" in flags.FLAGS else ""
        return f"error: out of memory{hint} ({' '.join(str(error).split())[:200]})"
    if is_disk_full(error):
        return "error: the disk is full: free some space" + (" and rerun the command to resume" if resumes else "")
    if problem := of_a_path(error):
        return f"error: {problem}"
    return in_one_line(watchdog.Stopped(), resumes) if watchdog.received() else ""  # a library's answer to Stopped


def status(error: BaseException) -> int:
    """Return a command's exit status: 2 if it would fail again until the user changes something, otherwise 1."""
    fails_again = isinstance(error, UserError) and not isinstance(error, TryLater)
    return _USER_ERROR if fails_again or is_out_of_memory(error) or of_a_path(error) else 1


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread that failed, except for a full disk, which the main thread reports."""
    if not is_disk_full(failure.exc_value):
        threading.__excepthook__(failure)


def _end(line: str, status: int = _USER_ERROR) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


def _parse_flags(argv: list[str], pass_on_unknown: bool) -> list[str]:
    try:
        _check_flag_files(argv[1:])
        _check_config_flags(argv)
        rest = flags.FLAGS(argv, known_only=pass_on_unknown)
        _check_not_empty(flags.FLAGS)
        _check_folders(flags.FLAGS)
    except (flags.Error, TypeError, ValueError) as error:  # ml_collections raises the last two
        _end(f"error: {' '.join(str(error).split())}")
    except OSError as error:
        _end(in_one_line(error) or f"error: {error}")
    if len(rest) > 1 and not pass_on_unknown:
        _end(f"error: unknown argument {rest[1]!r}: every option starts with --; see --help")
    return rest


def _check_flag_files(arguments: list[str], read: tuple[str, ...] = ()) -> None:
    """Raise UserError for a --flagfile, also one named in another, that is a pipe or device, which may never end."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, is_assigned, value = argument.strip().partition("=")
        if name not in ("--flagfile", "-flagfile"):
            continue
        path = os.path.expanduser((value if is_assigned else following).strip())
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise UserError(f"--flagfile={path} is a pipe or device: give a file", field="--flagfile", path=path)
        if path not in read and Path(path).is_file():
            with contextlib.suppress(OSError, UnicodeDecodeError):  # absl reports it
                _check_flag_files(Path(path).read_text().splitlines(), (*read, path))


def _check_not_empty(values: flags.FlagValues) -> None:
    """Raise UserError for an empty folder, file or other value, unless the flag is empty by default."""
    for name in values:
        flag = values[name]
        if flag.present and flag.default is None and flag.value in ("", [], [""]):
            raise UserError(f"--{name} is empty: give a value, or leave it out", field=f"--{name}", value="")


def _check_folders(values: flags.FlagValues) -> None:
    """Raise UserError for what cannot be a folder, before anything is written."""
    for name in _FOLDERS:
        if name in values and values[name].value:
            for path in values[name].value if isinstance(values[name].value, list) else [values[name].value]:
                files.check_local(f"--{name}", path)
            if name in ("out", "workdir") and Path(values[name].value).resolve() == Path("/"):
                message = f"--{name}={values[name].value} is the root of all folders: give one below it"
                raise UserError(message, field=f"--{name}", value=values[name].value)
            if name == "workdir" and Path(values[name].value).is_file():
                message = f"--workdir={values[name].value} is a file: give a folder"
                raise UserError(message, field="--workdir", value=values[name].value)


def _check_config_flags(argv: list[str]) -> None:
    """Raise UserError for a --config file that cannot be used, or a --config.field that it does not have.

    ml_collections reports the first too late and the second as a bare KeyError.
    """
    options = [a.removeprefix("--").partition("=") for a in argv[1:] if a.startswith("--config")]
    given = [value for name, _, value in options if name == "config"]
    path = given[0] if given else ""
    if not path:
        if "--config=" in argv:
            raise UserError("--config is empty: give a Python file, such as configs/pheno.py", field="--config")
        return
    files.say_code_of_another(Path(path))
    if not Path(path).is_file() or Path(path).suffix != ".py":
        near = difflib.get_close_matches(Path(path).name, [p.name for p in Path(path).parent.glob("*.py")], n=1)
        near = [str(Path(path).with_name(name)) for name in near]
        raise _no_such(f"--config={path}", "a Python file", near, field="--config", path=path)
    try:
        config = runpy.run_path(path)["get_config"]()
    except Exception as error:  # the file is the user's own code
        raise UserError(
            f"--config={path} cannot be used ({of_file(path, error)})", field="--config", path=path
        ) from None
    if not hasattr(config, "to_dict"):
        message = f"--config={path}: its get_config() returns no config but a {type(config).__name__}"
        raise UserError(message, field="--config", path=path)
    fields = _names("config", config)
    for name, _, _ in options:
        if name.startswith("config.") and name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise _no_such(f"--{name}", f"a field of {path}", [f"--{n}" for n in near], field=f"--{name}")


def _names(parent: str, config) -> list[str]:
    """Return the dotted names of all fields of a ConfigDict."""
    names = []
    for key in config if hasattr(config, "keys") else ():
        names += [f"{parent}.{key}", *_names(f"{parent}.{key}", config[key])]
    return names


def _no_such(what: str, kind: str, near: list[str], **where) -> UserError:
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{what} is not {kind}{hint}", nearest=near[0] if near else "", **where)
