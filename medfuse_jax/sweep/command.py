"""A sweep from its flags to its table, read from top to bottom."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, experiment, main, parallel, starts, train
from medfuse_jax import workdir as workdir_lib
from medfuse_jax.errors import UserError, check_choice
from medfuse_jax.sweep import adaptive, heads, page, pods, results, search
from medfuse_jax.sweep import run as run_lib

ALGORITHMS = ("random", "optuna")
_DEFAULT_TRIALS = 10
_DEFAULT_ROUND = 5  # trials of an adaptive search's round, where there are no more devices than that


def run(
    config: ConfigDict,
    config_path: Path,
    workdir: Path,
    *,
    specs: list[str],
    num_trials: int | None,
    seed: int,
    lanes: int | None,
    started_s: float,
    algorithm: str = "random",
    per_round: int | None = None,
    process: int = 0,
    num_processes: int = 1,
) -> None:
    """Runs or goes on with a sweep; leaves sweep.csv, sweep.html and best_config.py in the workdir.

    algorithm, per_round: 'random' draws all trials at once, 'optuna' so many a round, from what those before reached.
    process, num_processes: of several processes that share the workdir each trains its part of the trials; the
    first makes what all need, and what they come to.
    """
    config_lib.validate(config)
    if config.profile_steps:
        raise UserError("config.profile_steps is of a run alone, not of trials: leave it out")
    experiment.use_compilation_cache()
    is_first = process == 0
    search_plan = _plan(config, config_path, workdir, specs, num_trials, seed, algorithm, per_round, is_first)
    if is_first:
        main.name_data(config)
    elif not config.data.dir:
        raise UserError("several processes need --config.data.dir: a folder that all of them see")
    if config.data.order_seed < 0:  # a trial's own seed leaves the order of the data alone
        config.data.order_seed = config.seed
    costs = run_lib.Costs()
    _count_compilation(costs)
    base = experiment.open_experiment(config, parallel.devices()[:1])
    staged = list(dict.fromkeys(name for trial in search_plan.drawn for name in _staged(trial, config)))
    given, stages = starts.open_sources(config, workdir, staged, base.devices)
    sweep = run_lib.Sweep(config, workdir, given | stages, lanes, in_rounds=algorithm != "random")
    check = functools.partial(_check, sweep=sweep, fitting=set())
    for trial in search_plan.drawn:
        check(trial)
    claim = functools.partial(results.claim, workdir, config, base.dataset.digest, search_plan.identity, is_first)
    ready = [workdir / "started.json", *(folder / "trained.json" for folder, _ in stages.values())]
    with workdir_lib.locked(workdir) if is_first else contextlib.nullcontext():
        if is_first:
            claim()
            with costs.spent("pretrain_s"):
                train.pretrain(stages)
            for path in ready:
                results.write_whole(path, "{}\n")
        else:
            with costs.spent("pretrain_s"):
                pods.wait_for(lambda: [p.exists() for p in ready], "the first process to pre-train the encoders")
            claim()
        costs.startup_s = time.perf_counter() - started_s - costs.pretrain_s - costs.compile_s
        trials = []
        for drawn in search_plan.rounds(check):
            dealt = len(trials)
            for group in run_lib.groups(sweep, drawn):
                run_lib.train_group(sweep, pods.mine(group, process, num_processes, dealt), costs)
                dealt += len(group)
            trials += drawn
            pods.wait_for(functools.partial(_are_recorded, workdir, drawn), "the other processes")
        print(
            f"once for {costs.trials} trials: pre-training {costs.pretrain_s:.1f} s, start-up {costs.startup_s:.1f} s, "
            f"encoding {costs.encode_s:.1f} s, compilation {costs.compile_s:.1f} s, "
            f"waiting for input {costs.input_s:.1f} s; {costs.steps} steps of all in {costs.train_s:.1f} s"
        )
        if is_first:
            _conclude(sweep, trials)


def _are_recorded(workdir: Path, trials: list[search.Trial]) -> list[bool]:
    return [results.record(workdir, trial) is not None for trial in trials]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is tried. identity: all that decides it; drawn: what is checked first; rounds: the trials as they come.

    rounds takes the check of a trial, for those that are drawn on the way.
    """

    identity: dict
    drawn: list[search.Trial]
    rounds: Callable[[Callable[[search.Trial], None]], Iterable[list[search.Trial]]]


def _plan(
    config: ConfigDict,
    config_path: Path,
    workdir: Path,
    specs: list[str],
    num_trials: int | None,
    seed: int,
    algorithm: str,
    per_round: int | None,
    is_first: bool,
) -> _Plan:
    """The trials: by --search, else as the config's sweep(add) lists them, else the paper's learning rates."""
    check_choice("--algorithm", algorithm, ALGORITHMS)
    if per_round and algorithm == "random":
        raise UserError("--round is of --algorithm=optuna; trials drawn at random are one round")
    listed = search.listed(config_path)
    if listed and not specs:
        if algorithm != "random":
            raise UserError(f"--algorithm={algorithm} needs --search: {config_path} lists its trials itself")
        trials = search.collect(listed, config, num_trials)
    else:
        specs = specs or [search.PAPER_SEARCH]
        parameters = search.parse(specs, config)
        trials = search.draw(parameters, _DEFAULT_TRIALS if num_trials is None else num_trials, seed)
    if algorithm == "random":
        identity = {"algorithm": algorithm, "trials": [trial.values for trial in trials]}
        return _Plan(identity, trials, lambda check: [trials])
    adaptive.check_installed()
    if not per_round:  # a sweep that goes on keeps its own, however many devices there are now
        there = results.claimed(workdir) or {"search": {}}
        per_round = there["search"].get("round") or max(_DEFAULT_ROUND, len(jax.devices()))
    identity = {"algorithm": algorithm, "search": specs, "trials": len(trials), "round": per_round, "seed": seed}
    return _Plan(
        identity,
        trials,
        lambda check: adaptive.rounds(workdir, parameters, trials, per_round, seed, is_first, check),
    )


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
        heads.check_values(trial.values, config, encoders)
        if (run.options.model, *encoders) not in fitting:
            for name, (folder, source) in encoders.items():
                starts.check(run, name, folder, source)
            starts.check_frozen(run, encoders)
            fitting.add((run.options.model, *encoders))


def _staged(trial: search.Trial, config: ConfigDict) -> list[str]:
    """The encoders that the trial's config would have pre-trained; UserError where it is wrong."""
    with _named(trial):
        config = trial.config(config)
        config_lib.validate(config)
        return starts.staged(config)


@contextlib.contextmanager
def _named(trial: search.Trial) -> Iterator[None]:
    """What is wrong with a trial is said with its number and values."""
    try:
        yield
    except (UserError, TypeError) as error:
        raise UserError(f"trial {trial.number} ({trial.describe()}): {error}") from None


def _count_compilation(costs: run_lib.Costs) -> None:
    """Keeps costs.compile_s up to date."""

    def listen(event: str, duration_s: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            costs.compile_s += duration_s

    jax.monitoring.register_event_duration_secs_listener(listen)


def _conclude(sweep: run_lib.Sweep, trials: list[search.Trial]) -> None:
    """The table, the choice and its test result."""
    workdir = sweep.workdir
    records = [results.record(workdir, trial) for trial in trials]
    print(results.write_table(workdir, records))
    chosen = results.choose(records)
    if chosen is None:
        page.write(workdir, sweep.config.to_dict(), records)
        raise UserError(f"no trial of {workdir} finished with a validation AUROC: see the reasons in sweep.csv")
    best_config = results.write_best_config(workdir, chosen)
    folder = results.trial_dir(workdir, chosen["trial"])
    if not (folder / "result.json").exists():
        chosen_config = config_lib.load(folder / "config.json")
        if (folder / "state.npz").exists():
            heads.export(chosen_config, folder, sweep.encoders_of(chosen_config))
        result = evaluate.evaluate(folder, on=parallel.devices()[:1])  # the test split, once, for the chosen alone
        assert result["best_epoch"] == chosen["best_epoch"], "what was scored is not what was chosen"
    path = page.write(workdir, sweep.config.to_dict(), records)
    print(f"chosen: trial {chosen['trial']}, in {folder}; its config: {best_config}; all trials: {path}")
