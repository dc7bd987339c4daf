"""A whole sweep, from its flags to its table. Read this file from top to bottom."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, parallel, train
from medfuse_jax import run as run_lib
from medfuse_jax.data import synthetic
from medfuse_jax.report import read_runs, terminal
from medfuse_jax.runs import preflight, sources, warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime import compilation, watchdog
from medfuse_jax.runtime.errors import UserError, check_choice
from medfuse_jax.sweep import adaptive, caching, frozen_encoders, groups, page, pruning, results, search
from medfuse_jax.sweep import leases as leases_lib
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.sweep import Sweep
from medfuse_jax.sweep.trial import Trial

ALGORITHMS = ("random", "optuna")
_DEFAULT_TRIALS = 10
_DEFAULT_ROUND = 5  # trials per round; more if there are more devices


@dataclasses.dataclass(frozen=True)
class Request:
    """The flags of the command, named as there except `specs` (--search) and `per_round` (--round).

    None stands for the default of num_trials, lanes and per_round. listed: a `sweep(add)` that takes the place of the
    one in the config's file.
    """

    config: ConfigDict
    config_path: Path | None
    workdir: Path
    specs: list[str]
    num_trials: int | None = None
    seed: int = 0
    lanes: int | None = None
    algorithm: str = "random"
    per_round: int | None = None
    pruning: str = pruning.NONE
    divide_trials: bool = False
    export: Sequence[int] = ()
    listed: Callable | None = None


def run(request: Request, start_s: float) -> None:
    """Run, resume or join a sweep; write sweep.csv, sweep.html, best_config.py and costs.json to the workdir.

    Processes that share the workdir, on any number of hosts, divide the encoders and trials among them by leases. Each
    ends when all trials have ended, and writes the same results. start_s: when the command started.
    """
    config, workdir = request.config, request.workdir
    config_lib.validate(config)
    _check_single_run_fields(config)
    compilation.configure()
    trials = _plan_trials(request)
    if unknown := set(request.export) - {trial.number for trial in trials.initial}:
        message = f"--export={min(unknown)}: the trials are 0 to {len(trials.initial) - 1}"
        raise UserError(message, field="--export", value=min(unknown))
    synthetic.set_data_dir(config)
    if config.data.order_seed < 0:  # a trial's own seed must not change the order of the data
        config.data.order_seed = config.seed
    workdir_lib.check_outside_sweeps(workdir)
    workdir_lib.check_outside_shards(workdir, config.data.dir)
    with contextlib.ExitStack() as closing:
        costs = Costs(compiled=closing.enter_context(compilation.counted()))
        base = run_lib.open_run(config, parallel.devices()[:1])
        if base.selected_by_loss:
            _check_without_auroc(request)
        pretrained = list(dict.fromkeys(name for trial in trials.initial for name in _pretrained(trial, config)))
        given, stages = sources.open_sources(config, workdir, pretrained, base.devices)
        preflight.check(base, stages)
        leases = leases_lib.Leases(workdir / "leases")
        sweep = Sweep(config, workdir, given | stages, leases, request.lanes, request.pruning, request.divide_trials)
        check = functools.partial(_check, sweep=sweep, by_loss=base.selected_by_loss, checked_models=set())
        for trial in trials.initial:
            check(trial)
        identity = (config, base.dataset.digest, trials.identity)
        results.claim(workdir, *identity, writes=False)  # leave a folder that is not this sweep's as it is
        closing.enter_context(leases)
        with leases.held("sweep"):
            results.claim(workdir, *identity)
        _pretrain(stages, leases, costs)
        costs.end_startup(start_s)
        trained = _train(sweep, trials.rounds(check), costs)
        print(costs.summary())
        with leases.held("results"):
            costs.write(workdir)
            _conclude(sweep, trained, request.export)


def _check_single_run_fields(config: ConfigDict) -> None:
    if config.profile_steps:
        message = "config.profile_steps is for single runs: leave it out of a sweep"
        raise UserError(message, field="config.profile_steps", value=config.profile_steps)
    if config.recurrence == "cudnn":
        message = "config.recurrence='cudnn' cannot run trials side by side: use pallas or chunks"
        raise UserError(message, field="config.recurrence", value="cudnn")


def _check_without_auroc(request: Request) -> None:
    """Raise UserError for flags that compare trials by a validation AUROC, which there is not."""
    for flag, value, default in (
        ("--algorithm", request.algorithm, "random"),
        ("--pruning", request.pruning, pruning.NONE),
    ):
        if value != default:
            message = (
                f"{flag}={value} compares validation AUROCs, and no label of the validation stays has both classes"
            )
            raise UserError(f"{message}: leave it out", field=flag, value=value)


def _pretrain(stages: dict, leases: leases_lib.Leases, costs: Costs) -> None:
    """Pre-train the encoders that no other process pre-trains, and wait for the rest."""

    def missing() -> list[str]:
        return [name for name, (folder, _) in stages.items() if not (folder / "trained.json").exists()]

    def claim() -> str:
        return next((name for name in missing() if leases.claim(f"pretrain_{name}")), "")

    for folder, staged in stages.values():  # also of a trained one, whose config names the shards, which may have moved
        workdir_lib.claim(folder, staged, by_sweep=True)
    with costs.timed("pretrain_s"):
        for name in leases.claimed(claim, missing, "encoders"):
            is_ours = functools.partial(leases.holds, f"pretrain_{name}")
            with contextlib.suppress(train.TakenOver):  # `holds` has already printed it
                train.pretrain({name: stages[name]}, by_sweep=True, is_ours=is_ours)
                if is_ours():
                    results.write_json(stages[name][0] / "trained.json", {})
                    leases.release(f"pretrain_{name}")
            watchdog.check()  # a signal that came meanwhile


def _train(sweep: Sweep, rounds: Iterable[list[Trial]], costs: Costs) -> list[Trial]:
    """Train the trials of each round that no other process trains, and wait for the rest; return all trials."""
    trials = []
    for of_round in rounds:
        claim = functools.partial(groups.claim, sweep, groups.split_into_groups(sweep, of_round))
        missing = functools.partial(groups.without_record, sweep, of_round)
        for share in sweep.leases.claimed(claim, missing, "trials"):
            with sweep.leases.busy():
                groups.train_group(sweep, share, costs)
        trials += of_round
    return trials


@dataclasses.dataclass(frozen=True)
class _Trials:
    """The trials of a sweep.

    identity: what determines them. initial: those drawn at random or listed, which are checked before any training;
    random search has no others. rounds: check -> rounds of trials, with `check` applied to trials drawn later.
    """

    identity: dict
    initial: list[Trial]
    rounds: Callable[[Callable[[Trial], None]], Iterable[list[Trial]]]


def _plan_trials(request: Request) -> _Trials:
    """Plan the trials: those of --search, else of the config's sweep(add), else the paper's learning rates."""
    check_choice("--algorithm", request.algorithm, ALGORITHMS)
    is_random = request.algorithm == "random"
    if request.per_round and is_random:
        raise UserError("--round needs --algorithm=optuna: random trials have no rounds", field="--round")
    listed = request.listed or (request.config_path and search.sweep_function(request.config_path))
    specs = request.specs or [search.PAPER_SEARCH]
    if listed and request.specs:
        print(f"--search replaces the trials listed in {request.config_path}")
    if listed and not request.specs:
        if not is_random:
            message = f"--algorithm={request.algorithm} needs --search: {request.config_path} lists its trials itself"
            raise UserError(message, field="--search")
        trials = search.collect(listed, request.config, request.num_trials)
    else:
        parameters = search.parse(specs, request.config)
        num_trials = _DEFAULT_TRIALS if request.num_trials is None else request.num_trials
        trials = search.draw(parameters, num_trials, request.seed)
    identity = {"algorithm": request.algorithm} | _pruning_identity(request)
    if is_random:
        return _Trials(identity | {"trials": [trial.values for trial in trials]}, trials, lambda check: [trials])
    adaptive.check_installed()
    per_round = request.per_round or _stored_round(request.workdir)
    identity |= {"search": specs, "trials": len(trials), "round": per_round, "seed": request.seed}
    rounds = functools.partial(adaptive.rounds, request.workdir, parameters, trials, per_round, request.seed)
    return _Trials(identity, trials, rounds)


def _pruning_identity(request: Request) -> dict:
    """Return {'pruning': rule}, or {} without pruning; raise UserError if the rule can end no trial."""
    check_choice("--pruning", request.pruning, pruning.RULES)
    if request.pruning == pruning.NONE:
        return {}
    if request.pruning == pruning.ASHA and request.config.num_epochs <= pruning.ETA:
        message = f"--pruning=asha compares trials from epoch {pruning.ETA} on: config.num_epochs is too small"
        raise UserError(message, field="--pruning", value=request.config.num_epochs)
    if request.pruning == pruning.MEDIAN and request.algorithm == "random":
        print("--pruning=median compares with finished trials: of random trials that start together, it ends none")
    return {"pruning": request.pruning}


def _stored_round(workdir: Path) -> int:
    """Return the default number of trials per round. A resumed sweep keeps its number on any number of devices."""
    stored = results.read_claim(workdir) or {"search": {}}
    return stored["search"].get("round") or max(_DEFAULT_ROUND, len(jax.devices()))


def _check(trial: Trial, sweep: Sweep, by_loss: bool, checked_models: set) -> None:
    """Raise UserError if a trial cannot run because of its values or the encoders that it starts from.

    by_loss: whether the validation loss, not an AUROC, chooses the sweep's trial. checked_models: the models whose
    encoders were checked already, with the encoders' names; this trial's is added.
    """
    with _trial_named(trial):
        if missing := [name for name in _pretrained(trial, sweep.config) if name not in sweep.encoders]:
            field = f"config.pretrain.{missing[0]}"
            raise UserError(f"it needs {field}, which no trial of the first round uses", field=field)
        config = sweep.config_of(trial)
        encoders = sweep.encoders_of(config)
        run = run_lib.open_run(config, parallel.devices()[:1])
        preflight.check(run, {}, says=False)  # any trial may be chosen and scored on the test split
        if run.selected_by_loss != by_loss:
            message = "its validation stays have an AUROC and those of the sweep's config have none, or the reverse"
            raise UserError(f"{message}: do not search config.method", field="config.method")
        caching.check_values(trial.values, config, encoders)
        if (run.options.model, *encoders) not in checked_models:
            for name, (folder, source) in encoders.items():
                sources.check(run, name, folder, source)
            sources.check_frozen(run, encoders)
            checked_models.add((run.options.model, *encoders))


def _pretrained(trial: Trial, config: ConfigDict) -> list[str]:
    """Return the encoders that the trial's config pre-trains; raise UserError if the config is invalid."""
    with _trial_named(trial):
        config = trial.config(config)
        config_lib.validate(config)
        return warm_start.staged(config)


@contextlib.contextmanager
def _trial_named(trial: Trial) -> Iterator[None]:
    """Add the trial's number and values to a UserError raised inside."""
    try:
        yield
    except UserError as error:
        error.args = (f"trial {trial.number} ({trial.describe()}): {error}",)
        raise


def _conclude(sweep: Sweep, trials: list[Trial], exported: Sequence[int]) -> None:
    """Write the table, score the chosen trial on the test split, and write the page. exported: from --export."""
    workdir = sweep.workdir
    records = [results.record(workdir, trial) for trial in trials]
    print(results.write_table(workdir, records, sweep.config.task))
    for trial, r in zip(trials, records):
        _update_paths(sweep, trial)
        if trial.number in exported and r["status"] == results.FAILED:
            print(f"--export={trial.number}: the trial failed and has no checkpoint")
        elif trial.number in exported:
            _export(sweep, trial)
            print(f"--export={trial.number}: written to {results.trial_dir(workdir, trial.number) / 'checkpoints'}")
    chosen = results.choose(records)
    if chosen is None:
        page.write(workdir, sweep.config.to_dict(), records)
        message = f"no trial of {workdir} finished: see the reasons in sweep.csv"
        raise results.NoneFinished(message, path=workdir / "sweep.csv")
    best = trials[records.index(chosen)]
    best_config = results.write_best_config(workdir, chosen, sweep.config_of(best))
    folder = results.trial_dir(workdir, best.number)
    if not (folder / "result.json").exists():
        _export(sweep, best)
        result = evaluate.evaluate(folder, devices=parallel.devices()[:1])
        assert result["best_epoch"] == chosen["best_epoch"], "the scored checkpoint is not the chosen one"
    if tested := read_runs.read_run(folder).result:
        print("\n" + terminal.table([tested]))
    path = page.write(workdir, sweep.config.to_dict(), records)
    print(f"\nchosen: trial {chosen['trial']} in {folder}; its config: {best_config}; all trials: {path}")


def _update_paths(sweep: Sweep, trial: Trial) -> None:
    """Set the paths of shards, features and encoders in a trial's config, in case they were moved."""
    path = results.trial_dir(sweep.workdir, trial.number) / "config.json"
    if not path.exists():  # the trial failed before its first step
        return
    config, current = config_lib.load(path), sweep.config_of(trial)
    before = config.copy_and_resolve_references()
    config.data.dir, config.data.cxr_features = current.data.dir, current.data.cxr_features
    config.init = current.init
    if config != before:
        config_lib.save(config, path)


def _export(sweep: Sweep, trial: Trial) -> None:
    """Write the checkpoint of a trial stored as state.npz."""
    folder = results.trial_dir(sweep.workdir, trial.number)
    if (folder / "state.npz").exists():
        config = sweep.config_of(trial)
        frozen_encoders.export(config, folder, sweep.encoders_of(config))
