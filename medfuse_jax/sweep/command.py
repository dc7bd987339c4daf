"""A sweep from its flags to its table, read from top to bottom."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, experiment, main, parallel, train
from medfuse_jax.report import read_runs, terminal
from medfuse_jax.runs import warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime import compilation
from medfuse_jax.runtime.errors import UserError, check_choice
from medfuse_jax.sweep import adaptive, frozen_encoders, page, processes, results, search
from medfuse_jax.sweep import groups as run_lib
from medfuse_jax.sweep.costs import Costs

ALGORITHMS = ("random", "optuna")
_DEFAULT_TRIALS = 10
_DEFAULT_ROUND = 5  # trials of an adaptive search's round, where there are no more devices than that


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command is asked for, by its flags.

    specs: of --search. num_trials, lanes, per_round: None for what a sweep takes by itself. algorithm: 'random' draws
    all trials at once, 'optuna' `per_round` at a time, from what those before reached. export: trials whose
    checkpoints to write.
    """

    config: ConfigDict
    config_path: Path
    workdir: Path
    specs: list[str]
    num_trials: int | None = None
    seed: int = 0
    lanes: int | None = None
    algorithm: str = "random"
    per_round: int | None = None
    export: Sequence[int] = ()


def run(request: Request, process: processes.Process, started_s: float) -> None:
    """Runs or goes on with a sweep; leaves sweep.csv, sweep.html and best_config.py in the workdir.

    process: of several that share the workdir each trains its part of the trials; the first makes what all need, and
    what they come to.
    """
    config, workdir = request.config, request.workdir
    config_lib.validate(config)
    if config.profile_steps:
        raise UserError("config.profile_steps is of a run alone, not of trials: leave it out")
    if config.recurrence == "cudnn":
        raise UserError("config.recurrence is 'cudnn', which runs no trials side by side: take pallas, or chunks")
    compilation.keep()
    tried = _search(request, process.is_first)
    if unknown := set(request.export) - {trial.number for trial in tried.drawn}:
        raise UserError(f"--export={min(unknown)}: the trials are 0 to {len(tried.drawn) - 1}")
    _name_data(config, process.is_first)
    workdir_lib.check_outside_sweeps(workdir)
    workdir_lib.check_apart(workdir, config.data.dir)
    costs = Costs()
    compilation.count_into(costs.compiled)
    base = experiment.open_experiment(config, parallel.devices()[:1])
    experiment.check_recurrence(base)
    staged = list(dict.fromkeys(name for trial in tried.drawn for name in _staged(trial, config)))
    given, stages = warm_start.open_sources(config, workdir, staged, base.devices)
    in_rounds = request.algorithm != "random"
    sweep = run_lib.Sweep(config, workdir, given | stages, request.lanes, in_rounds)
    check = functools.partial(_check, sweep=sweep, fitting=set())
    for trial in tried.drawn:
        check(trial)
    claim = functools.partial(
        results.claim, workdir, config, base.dataset.digest, tried.identity, writes=process.is_first
    )
    with workdir_lib.locked(workdir) if process.is_first else contextlib.nullcontext():
        _begin(workdir, claim, stages, process.is_first, costs)
        costs.started(started_s)
        trials = _train(sweep, tried.rounds(check), process, costs)
        print(costs.summary())
        if process.is_first:
            _conclude(sweep, trials, request.export)


def _name_data(config: ConfigDict, is_first: bool) -> None:
    """Sets what a sweep of one process may leave open, and the order of the data, which all trials share."""
    if is_first:
        main.name_data(config)
    elif not config.data.dir:
        raise UserError("several processes need --config.data.dir: a folder that all of them see")
    if config.data.order_seed < 0:  # a trial's own seed leaves the order of the data alone
        config.data.order_seed = config.seed


def _begin(workdir: Path, claim: Callable[[], None], stages: dict, is_first: bool, costs: Costs) -> None:
    """Claims the folder and trains the encoders, or waits until the first process has."""
    ready = [workdir / "started.json", *(folder / "trained.json" for folder, _ in stages.values())]
    if is_first:
        claim()
        with costs.spent("pretrain_s"):
            train.pretrain(stages, by_sweep=True)
        for path in ready:
            results.write_whole(path, "{}\n")
    else:
        with costs.spent("pretrain_s"):
            processes.wait_for(lambda: [path.exists() for path in ready], "the first process to pre-train the encoders")
        claim()


def _train(
    sweep: run_lib.Sweep, rounds: Iterable[list[search.Trial]], process: processes.Process, costs: Costs
) -> list[search.Trial]:
    """Trains this process' part of each round's trials, and waits for the others'; returns all trials."""
    trials = []
    for drawn in rounds:
        dealt = len(trials)
        for group in run_lib.groups(sweep, drawn):
            run_lib.train_group(sweep, process.part(group, dealt), costs)
            dealt += len(group)
        trials += drawn
        processes.wait_for(functools.partial(_are_recorded, sweep.workdir, drawn), "the other processes")
    return trials


def _are_recorded(workdir: Path, trials: list[search.Trial]) -> list[bool]:
    return [results.record(workdir, trial) is not None for trial in trials]


@dataclasses.dataclass(frozen=True)
class _Search:
    """What is tried. identity: all that decides it; drawn: what is checked first; rounds: the trials as they come.

    rounds takes the check of a trial, for those that are drawn on the way.
    """

    identity: dict
    drawn: list[search.Trial]
    rounds: Callable[[Callable[[search.Trial], None]], Iterable[list[search.Trial]]]


def _search(request: Request, draws: bool) -> _Search:
    """The trials: by --search, else as the config's sweep(add) lists them, else the paper's learning rates.

    draws: whether this process draws the rounds, where there are any.
    """
    check_choice("--algorithm", request.algorithm, ALGORITHMS)
    if request.per_round and request.algorithm == "random":
        raise UserError("--round is of --algorithm=optuna; trials drawn at random are one round")
    listed = search.listed(request.config_path)
    specs = request.specs or [search.PAPER_SEARCH]
    if listed and request.specs and draws:
        print(f"--search is given: the trials that {request.config_path} lists are not run")
    if listed and not request.specs:
        if request.algorithm != "random":
            raise UserError(
                f"--algorithm={request.algorithm} needs --search: {request.config_path} lists its trials itself"
            )
        trials = search.collect(listed, request.config, request.num_trials)
    else:
        parameters = search.parse(specs, request.config)
        num_trials = _DEFAULT_TRIALS if request.num_trials is None else request.num_trials
        trials = search.draw(parameters, num_trials, request.seed)
    if request.algorithm == "random":
        identity = {"algorithm": "random", "trials": [trial.values for trial in trials]}
        return _Search(identity, trials, lambda check: [trials])
    adaptive.check_installed()
    per_round = request.per_round or _kept_round(request.workdir)
    identity = {
        "algorithm": request.algorithm,
        "search": specs,
        "trials": len(trials),
        "round": per_round,
        "seed": request.seed,
    }
    return _Search(
        identity,
        trials,
        lambda check: adaptive.rounds(request.workdir, parameters, trials, per_round, request.seed, draws, check),
    )


def _kept_round(workdir: Path) -> int:
    """Trials a round where none are given: a sweep that goes on keeps its own, however many devices there are now."""
    there = results.claimed(workdir) or {"search": {}}
    return there["search"].get("round") or max(_DEFAULT_ROUND, len(jax.devices()))


def _check(trial: search.Trial, sweep: run_lib.Sweep, fitting: set) -> None:
    """What is wrong with a trial is said before any is trained: its values, or what it starts from.

    fitting: the models that their encoders do fit, with the encoders' names; this one is added.
    """
    with _named(trial):
        if lacking := [name for name in _staged(trial, sweep.config) if name not in sweep.encoders]:
            raise UserError(f"it needs config.pretrain.{lacking[0]}, which none of the trials has that are drawn first")
        config = sweep.config_of(trial)
        encoders = sweep.encoders_of(config)
        run = experiment.open_experiment(config, parallel.devices()[:1])
        run.check_any("test", run.dataset.usable("test"))  # whichever is chosen is scored on it at the end
        frozen_encoders.check_values(trial.values, config, encoders)
        if (run.options.model, *encoders) not in fitting:
            for name, (folder, source) in encoders.items():
                warm_start.check(run, name, folder, source)
            warm_start.check_frozen(run, encoders)
            fitting.add((run.options.model, *encoders))


def _staged(trial: search.Trial, config: ConfigDict) -> list[str]:
    """The encoders that the trial's config would have pre-trained; UserError where it is wrong."""
    with _named(trial):
        config = trial.config(config)
        config_lib.validate(config)
        return warm_start.staged(config)


@contextlib.contextmanager
def _named(trial: search.Trial) -> Iterator[None]:
    """What is wrong with a trial is said with its number and values."""
    try:
        yield
    except UserError as error:
        raise UserError(f"trial {trial.number} ({trial.describe()}): {error}") from None


def _conclude(sweep: run_lib.Sweep, trials: list[search.Trial], wanted: Sequence[int]) -> None:
    """The table, the choice and its test result. wanted: further trials whose checkpoints to write."""
    workdir = sweep.workdir
    records = [results.record(workdir, trial) for trial in trials]
    print(results.write_table(workdir, records))
    for trial, r in zip(trials, records):
        _update_paths(sweep, trial)
        if trial.number in wanted and r["status"] == results.FAILED:
            print(f"--export={trial.number}: the trial failed and has no checkpoint")
        elif trial.number in wanted:
            _export(sweep, trial)
            print(f"--export={trial.number}: in {results.trial_dir(workdir, trial.number) / 'checkpoints'}")
    chosen = results.choose(records)
    if chosen is None:
        page.write(workdir, sweep.config.to_dict(), records)
        raise UserError(f"no trial of {workdir} finished with a validation AUROC: see the reasons in sweep.csv")
    best = trials[records.index(chosen)]
    best_config = results.write_best_config(workdir, chosen, sweep.config_of(best))
    folder = results.trial_dir(workdir, best.number)
    if not (folder / "result.json").exists():
        _export(sweep, best)
        result = evaluate.evaluate(folder, on=parallel.devices()[:1])  # the test split, once, for the chosen alone
        assert result["best_epoch"] == chosen["best_epoch"], "what was scored is not what was chosen"
    if tested := read_runs.read_run(folder).result:
        print("\n" + terminal.table([tested]))
    path = page.write(workdir, sweep.config.to_dict(), records)
    print(f"\nchosen: trial {chosen['trial']}, in {folder}; its config: {best_config}; all trials: {path}")


def _update_paths(sweep: run_lib.Sweep, trial: search.Trial) -> None:
    """Makes a trial's config name the shards and encoders where they are now."""
    path = results.trial_dir(sweep.workdir, trial.number) / "config.json"
    if not path.exists():  # the trial failed before its first step
        return
    config, now = config_lib.load(path), sweep.config_of(trial)
    if (config.data.dir, config.init) != (now.data.dir, now.init):
        config.data.dir, config.init = now.data.dir, now.init
        config_lib.save(config, path)


def _export(sweep: run_lib.Sweep, trial: search.Trial) -> None:
    """Writes the checkpoint of a trial whose state is in state.npz."""
    folder = results.trial_dir(sweep.workdir, trial.number)
    if (folder / "state.npz").exists():
        config = sweep.config_of(trial)
        frozen_encoders.export(config, folder, sweep.encoders_of(config))
