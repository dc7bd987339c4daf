"""Train a config with many settings: `python -m medfuse_jax.sweep --config=FILE --trials=10 --workdir=DIR`.

Rerunning the command resumes a stopped sweep; running it on further hosts shares the trials. See docs/sweeps.md.
"""

import dataclasses
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import UserError


def main(argv: list[str]) -> None:
    # Imported here, so that absl checks the flags before jax is imported.
    from medfuse_jax.sweep import command, repeats

    given = flags.FLAGS
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
        pruning=given.pruning,
        divide_trials=given.divide_trials,
        export=_parse_numbers(given.export),
    )
    if given.seeds == 1 and not given.folds:
        command.run(request, _START_S)
        return
    if any(text.partition(":")[0] in ("seed", "data.fold", "data.folds") for text in given.search):
        raise UserError("--search varies what --seeds and --folds set: leave one of them out", field="--search")
    of = repeats.plan(given.config.seed, given.seeds, given.folds)

    def sweep(config, folder: Path) -> None:
        command.run(dataclasses.replace(request, config=config, workdir=folder), time.perf_counter())

    repeats.run(of, request.workdir, given.config, sweep)


def _parse_numbers(texts: list[str]) -> list[int]:
    for text in texts:
        if not text.isdecimal():
            message = f"--export={','.join(texts)}: {text!r} is not a trial number, as in sweep.csv"
            raise UserError(message, field="--export", value=text)
    return [int(text) for text in texts]


_START_S = time.perf_counter()

if __name__ == "__main__":
    command_line.DEFINE_config_file("config", "A config file, such as configs/pheno.py.")
    flags.DEFINE_string("workdir", None, "Folder for the sweep, on a filesystem that all its hosts share.")
    flags.DEFINE_integer(
        "trials", None, "Number of trials; by default 10, or all that the config's sweep(add) lists.", lower_bound=1
    )
    flags.DEFINE_multi_string(
        "search",
        [],
        "NAME:KIND(VALUE,...), KIND being loguniform, uniform, int or choice; by default the paper's learning rates.",
    )
    flags.DEFINE_string(
        "algorithm", "random", "'random', or 'optuna': rounds of trials that learn from earlier rounds."
    )
    flags.DEFINE_integer(
        "round",
        None,
        "Trials per round of --algorithm=optuna; by default the larger of 5 and the number of devices.",
        lower_bound=1,
    )
    flags.DEFINE_string("pruning", "none", "Which trials to end early: 'none', 'median' or 'asha' (docs/sweeps.md).")
    flags.DEFINE_integer(
        "seed", 0, "Seed of the search. The trials train with config.seed, unless it is searched.", lower_bound=0
    )
    flags.DEFINE_integer(
        "seeds", 1, "Repeat the sweep with so many seeds of the trials, from config.seed on.", lower_bound=1
    )
    flags.DEFINE_integer(
        "folds", 0, "Repeat it on so many folds of the patients (docs/sweeps.md); 0: the shards' splits.", lower_bound=0
    )
    flags.DEFINE_integer(
        "lanes",
        None,
        "Trials per device in one call; by default the fastest, as measured.",
        lower_bound=1,
    )
    flags.DEFINE_bool("divide_trials", False, "Divide a trial's batches over several devices where there are enough.")
    flags.DEFINE_list("export", [], "Numbers of the trials whose checkpoints to write, to evaluate or combine them.")
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run(main, resumes=True)
