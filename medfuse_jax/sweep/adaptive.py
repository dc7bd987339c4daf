"""Trials by Optuna (extra `optuna`), a round at a time: each round knows what those before it reached.

A round is drawn from the sweep's seed, its number and the records of the rounds before it, and kept in a file
before any of its trials starts: so every process and every later start has the same trials.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import processes, results
from medfuse_jax.sweep.search import Parameter, Trial

_TRIES = 100


def check_installed() -> None:
    """UserError where Optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("--algorithm=optuna needs Optuna: pip install optuna") from None


def rounds(
    workdir: Path,
    parameters: list[Parameter],
    at_random: list[Trial],
    per_round: int,
    seed: int,
    draws: bool,
    check: Callable[[Trial], None],
) -> Iterator[list[Trial]]:
    """Yields the trials, `per_round` at a time and as many in all as `at_random` holds, once those before are recorded.

    at_random: different trials of the same parameters, for when Optuna proposes none that is new. draws: whether
    this process draws the rounds; the others wait for their files. check: raises UserError for a trial that cannot
    run; another is then drawn in its place.
    """
    trials = []
    for start in range(0, len(at_random), per_round):
        number, path = start // per_round, workdir / "rounds" / f"{start // per_round:03d}.json"
        count = min(per_round, len(at_random) - start)
        if draws and not path.exists():
            known = [(trial, results.record(workdir, trial)) for trial in trials]
            drawn = _propose(parameters, known, at_random, count, [seed, number], check)
            results.write_whole(path, json.dumps([trial.values for trial in drawn], indent=1) + "\n")
        processes.wait_for(lambda path=path: [path.exists()], f"the first process to draw round {number}")
        drawn = [Trial(start + i, values) for i, values in enumerate(_read(path, parameters, count))]
        for trial in drawn:
            check(trial)
        trials += drawn
        yield drawn


def _read(path: Path, parameters: list[Parameter], count: int) -> list[dict]:
    """The values of a round's trials, `count` of them and each of what the parameters can be."""
    try:
        drawn = json.loads(path.read_text())
        if not isinstance(drawn, list) or len(drawn) != count:
            raise ValueError(f"it does not list {count} trials")
        for values in drawn:
            if not isinstance(values, dict) or values.keys() != {parameter.field for parameter in parameters}:
                raise ValueError(f"{values} does not give each parameter of --search a value")
            for parameter in parameters:
                if not parameter.can_draw(values[parameter.field]):
                    raise ValueError(f"--search draws no {parameter.field} of {values[parameter.field]!r}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and the round is drawn again") from None
    return drawn


def _propose(
    parameters: list[Parameter],
    known: list[tuple[Trial, dict]],
    at_random: list[Trial],
    count: int,
    seed: list[int],
    check: Callable[[Trial], None],
) -> list[Trial]:
    """The next trials, all new and all able to run, by a tree-structured Parzen estimator of what the known reached."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=1, seed=int(np.random.SeedSequence(seed).generate_state(1)[0])
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {parameter.field: _distribution(parameter) for parameter in parameters}
    for trial, record in known:
        finished = record["status"] == results.FINISHED and record["val_auroc"] is not None
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if finished else optuna.trial.TrialState.FAIL,
                value=record["val_auroc"] if finished else None,
                params=trial.values,
                distributions=distributions,
            )
        )
    seen = [trial.values for trial, _ in known]
    proposed = []
    for number in range(len(known), len(known) + count):
        candidates = (Trial(number, values) for values in _candidates(study, distributions, parameters, at_random))
        proposed.append(next(trial for trial in candidates if trial.values not in seen and _can_run(trial, check)))
        seen.append(proposed[-1].values)
    return proposed


def _can_run(trial: Trial, check: Callable[[Trial], None]) -> bool:
    try:
        check(trial)
    except UserError:
        return False
    return True


def _candidates(study, distributions: dict, parameters: list[Parameter], at_random: list[Trial]) -> Iterator[dict]:
    """What Optuna proposes, a number of times; then trials drawn at random."""
    for _ in range(_TRIES):
        asked = study.ask(distributions)
        yield {parameter.field: parameter.as_shown(asked.params[parameter.field]) for parameter in parameters}
    for trial in at_random:
        yield trial.values


def _distribution(parameter: Parameter):
    from optuna import distributions

    if parameter.kind == "choice":
        return distributions.CategoricalDistribution(parameter.values)
    low, high = parameter.values
    if parameter.kind == "int":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=parameter.kind == "loguniform")
