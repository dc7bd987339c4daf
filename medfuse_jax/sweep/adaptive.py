"""Trials that Optuna (extra `optuna`) proposes, a round at a time, from the results of earlier rounds.

A round depends on the sweep's seed, the round's number and the records of earlier rounds. It is written to a file
before any of its trials starts, so that every host and every rerun has the same trials. Any host may draw a round: all
would draw the same.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results
from medfuse_jax.sweep.search import Parameter
from medfuse_jax.sweep.trial import Trial

_MAX_PROPOSALS = 100
_WORST = -1.0  # of AUROC and kappa, for a trial that failed, so that the search leaves its region


def check_installed() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError("--algorithm=optuna needs Optuna: pip install optuna", field="--algorithm") from None


def rounds(
    workdir: Path,
    parameters: list[Parameter],
    random_trials: list[Trial],
    per_round: int,
    seed: int,
    check: Callable[[Trial], None],
) -> Iterator[list[Trial]]:
    """Yield rounds of `per_round` trials, in total as many trials as `random_trials`.

    Each round needs the records of all earlier rounds. random_trials: used when Optuna proposes no new trial.
    check: raises UserError for a trial that cannot run, which is then drawn again.
    """
    trials = []
    for start in range(0, len(random_trials), per_round):
        number, path = start // per_round, workdir / "rounds" / f"{start // per_round:03d}.json"
        count = min(per_round, len(random_trials) - start)
        if not path.exists():
            known = [(trial, results.record(workdir, trial)) for trial in trials]
            proposed = _propose(parameters, known, random_trials, count, [seed, number], check)
            results.write_json(path, [trial.values for trial in proposed])
        drawn = [Trial(start + i, values) for i, values in enumerate(_read(path, parameters, count))]
        for trial in drawn:
            check(trial)
        trials += drawn
        yield drawn


def _read(path: Path, parameters: list[Parameter], count: int) -> list[dict]:
    """Read a round's file; raise UserError unless it has `count` trials with a valid value for each parameter."""
    hint = "delete it to draw the round again"
    drawn = files.read_json(path, hint, kind=list)
    fields = [parameter.field for parameter in parameters]
    invalid = [
        values
        for values in drawn
        if not isinstance(values, dict)
        or values.keys() != set(fields)
        or not all(parameter.contains(values[parameter.field]) for parameter in parameters)
    ]
    if invalid or len(drawn) != count:
        problem = f"--search cannot draw {invalid[0]}" if invalid else f"{len(drawn)} trials instead of {count}"
        raise UserError(f"{path} is damaged ({problem}): {hint}", path=path, value=invalid or len(drawn))
    return [{field: values[field] for field in fields} for values in drawn]


def _propose(
    parameters: list[Parameter],
    known: list[tuple[Trial, dict]],
    random_trials: list[Trial],
    count: int,
    seed: list[int],
    check: Callable[[Trial], None],
) -> list[Trial]:
    """Propose `count` new trials that can run, with a tree-structured Parzen estimator on the known records."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # constant_liar: the trials of this round, proposed but not trained, count as bad, which spreads them.
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=1, seed=int(np.random.SeedSequence(seed).generate_state(1)[0]), constant_liar=True
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {parameter.field: _distribution(parameter) for parameter in parameters}
    aurocs = [_WORST if record.get("val_auroc") is None else record["val_auroc"] for _, record in known]
    if max(aurocs, default=_WORST) > _WORST:  # from failures alone, it would take some for good
        for (trial, _), auroc in zip(known, aurocs):
            study.add_trial(optuna.trial.create_trial(value=auroc, params=trial.values, distributions=distributions))
    seen, proposed = [trial.values for trial, _ in known], []
    for number in range(len(known), len(known) + count):
        candidates = (Trial(number, values) for values in _candidates(study, distributions, parameters, random_trials))
        proposed.append(next(trial for trial in candidates if trial.values not in seen and _can_run(trial, check)))
        seen.append(proposed[-1].values)
    return proposed


def _can_run(trial: Trial, check: Callable[[Trial], None]) -> bool:
    try:
        check(trial)
    except UserError:
        return False
    return True


def _candidates(study, distributions: dict, parameters: list[Parameter], random_trials: list[Trial]) -> Iterator[dict]:
    """Yield a limited number of Optuna's proposals, then the random trials."""
    for _ in range(_MAX_PROPOSALS):
        asked = study.ask(distributions)
        yield {parameter.field: parameter.rounded(asked.params[parameter.field]) for parameter in parameters}
    yield from (trial.values for trial in random_trials)


def _distribution(parameter: Parameter):
    from optuna import distributions

    if parameter.kind == "choice":
        return distributions.CategoricalDistribution(parameter.values)
    low, high = parameter.values
    if parameter.kind == "int":
        return distributions.IntDistribution(low, high)
    return distributions.FloatDistribution(low, high, log=parameter.kind == "loguniform")
