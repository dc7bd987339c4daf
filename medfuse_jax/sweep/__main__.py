"""Tries an experiment with many settings: `python -m medfuse_jax.sweep --config=FILE --trials=10 --workdir=DIR`.

The same command goes on where a stopped sweep was. See docs/sweeps.md.
"""

import functools
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import UserError


def main(argv: list[str]) -> None:
    from medfuse_jax.sweep import command, processes  # late: a wrong flag is refused before jax starts

    given = flags.FLAGS
    for name, least in (("trials", 1), ("lanes", 1), ("round", 1), ("seed", 0)):
        if given[name].value is not None and given[name].value < least:
            raise UserError(f"--{name}={given[name].value}: give at least {least}")
    process = processes.start(given.coordinator, given.num_processes, given.process, given.distributed)
    request = command.Request(
        given.config,
        Path(config_flags.get_config_filename(given["config"])),
        Path(given.workdir),
        given.search,
        num_trials=given.trials,
        seed=given.seed,
        lanes=given.lanes,
        algorithm=given.algorithm,
        per_round=given.round,
        export=_numbers(given.export),
    )
    processes.run(functools.partial(command.run, request, process, _STARTED_S))


def _numbers(texts: list[str]) -> list[int]:
    """The trials that --export names."""
    for text in texts:
        if not text.isdecimal():
            raise UserError(f"--export={','.join(texts)}: {text!r} is not a trial's number, as in sweep.csv")
    return [int(text) for text in texts]


_STARTED_S = time.perf_counter()

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "An experiment, such as configs/pheno.py.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder for the sweep, on a filesystem that all its processes see.")
    flags.DEFINE_integer("trials", None, "How many trials: 10, or all that the config's sweep(add) lists.")
    flags.DEFINE_multi_string(
        "search", [], "NAME:KIND(VALUE,...), KIND loguniform, uniform, int or choice; repeatable."
    )
    flags.DEFINE_string("algorithm", "random", "random, or optuna: rounds of trials, each drawn from the ones before.")
    flags.DEFINE_integer("round", None, "With --algorithm=optuna: trials a round; 5, or as many as devices.")
    flags.DEFINE_integer("seed", 0, "Of the trials drawn; each trial's own seed is config.seed, unless searched.")
    flags.DEFINE_integer("lanes", None, "Trials a device computes in one call; measured where not given.")
    flags.DEFINE_list("export", [], "Numbers of trials whose checkpoints to write at the end, to evaluate or combine.")
    flags.DEFINE_bool("distributed", False, "Several processes, as jax finds them: Cloud TPU, Slurm, Open MPI.")
    flags.DEFINE_string("coordinator", None, "Several processes, by hand: HOST:PORT of the first.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process", None, "With --coordinator: which of them this one is, from 0.")
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main, resumes=True)
