"""The search space of a sweep: parameters with their ranges, and the trials drawn from them.

A trial depends only on the sweep's seed and its own number. Every host therefore draws the same list, and a longer list
starts with the shorter one.
"""

import dataclasses
import inspect
import math
import re
import runpy
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError, check_choice, of_file
from medfuse_jax.sweep.trial import ALIASES, Trial, short_name

# Hayat et al. 2022, 4.4: 10 learning rates, log-uniform in [1e-5, 1e-3].
PAPER_SEARCH = "lr:loguniform(1e-5,1e-3)"
_KINDS = ("loguniform", "uniform", "int", "choice")
_MAX_REDRAWS = 1000
_MAX_INT = 2**63 - 1
_IN_FILE = "the config's sweep(add)"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A config field and its range.

    kind: 'loguniform' or 'uniform' between two bounds, 'int' between two bounds (inclusive), or 'choice'.
    """

    field: str
    kind: str
    values: tuple

    def draw(self, rng: np.random.Generator):
        if self.kind == "choice":
            return self.values[rng.integers(len(self.values))]
        low, high = self.values
        if self.kind == "int":
            return int(rng.integers(low, high + 1))
        u = rng.random()
        return self.rounded(low * (high / low) ** u if self.kind == "loguniform" else low + (high - low) * u)

    def rounded(self, value):
        """Round a real number to five digits, so that the tables show the value that was used."""
        if self.kind not in ("loguniform", "uniform"):
            return value
        low, high = self.values
        return min(max(float(f"{value:.5g}"), low), high)

    def contains(self, value) -> bool:
        if self.kind == "choice":
            return any(type(value) is type(choice) and value == choice for choice in self.values)
        low, high = self.values
        return type(value) is (int if self.kind == "int" else float) and low <= value <= high


def parse(specs: list[str], config: ConfigDict) -> list[Parameter]:
    """Parse specs of the form 'name:kind(value,...)'; raise UserError for an invalid one."""
    parameters = [_parse_one(spec.strip(), config) for spec in specs]
    fields = [parameter.field for parameter in parameters]
    if repeated := [field for field in fields if fields.count(field) > 1]:
        raise _search_error(f" names {repeated[0]} twice: give each parameter one range", repeated[0])
    return parameters


def _parse_one(spec: str, config: ConfigDict) -> Parameter:
    match = re.fullmatch(r"([\w.]+)\s*:\s*(\w+)\((.*)\)", spec)
    if not match:
        raise _search_error(f"={spec} is not NAME:KIND(VALUE,...); for example --search='{PAPER_SEARCH}'", spec)
    name, kind, inside = match.groups()
    check_choice("--search kind", kind, _KINDS)
    field = find_field(name, config, "--search")
    example = config_lib.flat(config)[field]
    texts = [text.strip() for text in inside.split(",") if text.strip()]
    if kind == "choice":
        if not texts:
            raise _search_error(f"={spec} lists no values; give at least one", "")
        return Parameter(field, kind, tuple(_parse_value(text, example, spec) for text in texts))
    if type(example) is not (int if kind == "int" else float):
        usable = {int: "int", float: "uniform"}.get(type(example), "choice")
        raise _search_error(f"={spec}: {field} has values like {example!r}; use {usable} instead of {kind}", kind)
    if len(texts) != 2:
        raise _search_error(f"={spec} has {len(texts)} bounds; give two, low and high", texts)
    low, high = (_parse_value(text, example, spec) for text in texts)
    if low >= high:
        raise _search_error(f"={spec}: {low} is not below {high}; give the low bound first", (low, high))
    if kind == "int" and not -_MAX_INT <= low < high <= _MAX_INT:
        raise _search_error(f"={spec}: the bounds of an int must be between -2**63 and 2**63", (low, high))
    if kind == "loguniform" and low <= 0:
        raise _search_error(f"={spec}: the low bound of loguniform is {low}; it must be above 0", (low, high))
    return Parameter(field, kind, (low, high))


def _search_error(message: str, value) -> UserError:
    return UserError(f"--search{message}", field="--search", value=value)


def find_field(name: str, config: ConfigDict, where: str) -> str:
    """Return the config field of a parameter's name or alias; raise UserError if it cannot be searched."""
    field = ALIASES.get(name, name)
    fields = config_lib.flat(config)
    searchable = [f for f in fields if f in config_lib.names(searchable=True)]
    if field in fields and field not in searchable:
        message = f"{where}: {field} cannot be searched, because all trials share it; set --config.{field} instead"
        raise UserError(message, field=where, value=name)
    if field not in searchable:
        check_choice(f"{where} parameter", name, [*ALIASES, *searchable])
    return field


def _parse_value(text: str, example, spec: str):
    """Parse a value of the same type as `example`."""
    if isinstance(example, str):
        return text.strip("'\"")
    if isinstance(example, bool):
        check_choice(f"--search={spec}: the value", text.lower(), ("true", "false"))
        return text.lower() == "true"
    try:
        value = int(text) if isinstance(example, int) else float(text)
    except ValueError:
        value = math.nan
    if not isinstance(example, int | float) or not math.isfinite(value):
        raise _search_error(f"={spec}: {text!r} is invalid; give a value like {example!r}", text)
    return value


def draw(parameters: list[Parameter], num_trials: int, seed: int) -> list[Trial]:
    """Draw different trials; raise UserError if the parameters do not have that many combinations."""
    trials, seen = [], set()
    for number in range(num_trials):
        for attempt in range(_MAX_REDRAWS):
            values = {p.field: p.draw(_rng(seed, number, attempt, p.field)) for p in parameters}
            if tuple(values.values()) not in seen:
                break
        else:
            message = f"--trials={num_trials}: --search has only {len(seen)} different trials"
            raise UserError(message, field="--trials", value=num_trials)
        seen.add(tuple(values.values()))
        trials.append(Trial(number, values))
    return trials


def _rng(seed: int, number: int, attempt: int, field: str) -> np.random.Generator:
    """Return one parameter's own generator, so that adding a parameter does not change the draws of the others."""
    return np.random.default_rng([seed, number, attempt, zlib.crc32(field.encode())])


def sweep_function(config_path: Path) -> Callable | None:
    """Return the config file's `sweep(add)`, or None if it has none."""
    return runpy.run_path(str(config_path)).get("sweep")


def collect(sweep: Callable, config: ConfigDict, num_trials: int | None) -> list[Trial]:
    """Return the trials that `sweep(add)` adds, one per call: add(lr=1e-3, **{"model.dropout": 0.2}).

    num_trials: how many of them to return, from the first; None for all.
    """
    if not callable(sweep) or len(inspect.signature(sweep).parameters) != 1:
        raise UserError("the config's sweep must take one argument: def sweep(add): add(lr=1e-4)", field="sweep")
    trials = []

    def add(*unnamed, **values):
        if unnamed:
            raise _file_error(f" calls add({unnamed[0]!r}): name the parameter, as in add(lr=1e-4)", unnamed[0])
        fields = {}
        for name, value in values.items():
            field = find_field(name, config, _IN_FILE)
            if field in fields:
                raise _file_error(f" sets {field} twice in one trial ({short_name(field)}, {field})", field)
            fields[field] = value.item() if isinstance(value, np.generic) else value
        if same := [trial.number for trial in trials if trial.values == fields]:
            raise _file_error(f" repeats trial {same[0]} ({Trial(0, fields).describe()})", fields)
        trials.append(Trial(len(trials), fields))

    try:
        sweep(add)
    except UserError:
        raise
    except Exception as error:  # user code: it can fail in any way
        path = sweep.__code__.co_filename if inspect.isfunction(sweep) else ""
        raise _file_error(f" failed ({of_file(path, error)})", type(error)) from None
    if not trials:
        raise _file_error(" adds no trials: add at least one, as in add(lr=1e-4)", 0)
    if num_trials is not None and num_trials > len(trials):
        message = f"--trials={num_trials}: {_IN_FILE} lists only {len(trials)}"
        raise UserError(message, field="--trials", value=num_trials)
    return trials[:num_trials]


def _file_error(message: str, value) -> UserError:
    return UserError(f"{_IN_FILE}{message}", field=_IN_FILE, value=value)
