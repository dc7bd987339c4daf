"""What a sweep tries: parameters with their ranges, and the trials drawn from them.

A trial is a pure function of (sweep seed, its number), so every host draws the same list, and a
longer list begins with the shorter one.
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

# Short names; any other parameter goes by its field's name.
ALIASES = {"lr": "learning_rate", "dropout": "model.dropout", "ehr_only_ratio": "data.ehr_only_ratio"}
# Hayat et al. 2022, 4.4: 10 learning rates, log-uniform in [1e-5, 1e-3].
PAPER_SEARCH = "lr:loguniform(1e-5,1e-3)"
# The same for all trials: what they start from, what they are ranked on, and what changes no number.
_NOT_SEARCHED = (
    "name",
    "task",
    "encoders",
    "init.",
    "pretrain.",
    "data.dir",
    "data.drop_",
    "data.order_seed",
    "data.synthetic",
    "data.val_stays",
    "eval.",
    "parallel",
    "placement",
    "profile_steps",
    "recurrence",
)
_KINDS = ("loguniform", "uniform", "int", "choice")
_REDRAWS = 1000
_MOST = 2**63 - 1  # of an int, either way


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A config field and what it is drawn from.

    kind: 'loguniform' or 'uniform' between two bounds, 'int' from the first to the last, or 'choice'.
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
        share = rng.random()
        return self.as_shown(low * (high / low) ** share if self.kind == "loguniform" else low + (high - low) * share)

    def as_shown(self, value):
        """A number between two bounds in five digits, so that what a table shows is what ran; else as it is."""
        if self.kind not in ("loguniform", "uniform"):
            return value
        low, high = self.values
        return min(max(float(f"{value:.5g}"), low), high)

    def can_draw(self, value) -> bool:
        """Whether a value that was read from a file is one of this parameter's."""
        if self.kind == "choice":
            return any(type(value) is type(one) and value == one for one in self.values)
        low, high = self.values
        return type(value) is (int if self.kind == "int" else float) and low <= value <= high


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: its number, and the fields in which its config differs from the sweep's."""

    number: int
    values: dict

    def config(self, base: ConfigDict) -> ConfigDict:
        """The sweep's config with the trial's values; UserError for one of the wrong type."""
        config = base.copy_and_resolve_references()
        for field, value in self.values.items():
            try:
                config.update_from_flattened_dict({field: value})
            except TypeError:
                example = config_lib.flat(base)[field]
                raise UserError(f"config.{field} is {value!r}; give a value like {example!r}") from None
        return config

    def describe(self) -> str:
        return ", ".join(f"{short_name(field)} {value}" for field, value in self.values.items())


def short_name(field: str) -> str:
    return {full: alias for alias, full in ALIASES.items()}.get(field, field)


def parse(specs: list[str], config: ConfigDict) -> list[Parameter]:
    """Parameters from 'name:kind(value,...)' each; UserError for what cannot be read or drawn."""
    parameters = [_parse_one(spec.strip(), config) for spec in specs]
    fields = [parameter.field for parameter in parameters]
    if twice := [field for field in fields if fields.count(field) > 1]:
        raise UserError(f"--search names {twice[0]} twice: give each parameter one range")
    return parameters


def _parse_one(spec: str, config: ConfigDict) -> Parameter:
    match = re.fullmatch(r"([\w.]+)\s*:\s*(\w+)\((.*)\)", spec)
    if not match:
        raise UserError(f"--search={spec} is not NAME:KIND(VALUE,...); for example --search='{PAPER_SEARCH}'")
    name, kind, inside = match.groups()
    check_choice(f"--search={spec}: the kind", kind, _KINDS)
    field = find_field(name, config, "--search")
    texts = [text.strip() for text in inside.split(",") if text.strip()]
    if kind == "choice":
        if not texts:
            raise UserError(f"--search={spec} lists no value")
        values = tuple(_read(text, config_lib.flat(config)[field], spec) for text in texts)
        return Parameter(field, kind, values)
    if len(texts) != 2:
        raise UserError(f"--search={spec} must give two bounds, low and high, not {len(texts)}")
    low, high = (_read(text, 0 if kind == "int" else 0.0, spec) for text in texts)
    example = config_lib.flat(config)[field]
    if isinstance(example, bool) or not isinstance(example, (int,) if kind == "int" else (float,)):
        kinds = "choice" if isinstance(example, bool | str | list) else "int" if isinstance(example, int) else "uniform"
        raise UserError(
            f"--search={spec}: {field} holds values such as {example!r}, which {kind} does not draw: use {kinds}"
        )
    if low >= high:
        raise UserError(f"--search={spec}: the range is upside down or empty ({low} to {high}); give low, then high")
    if kind == "int" and not -_MOST <= low < high <= _MOST:
        raise UserError(f"--search={spec}: the bounds of an int must lie between -2**63 and 2**63")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"--search={spec}: a log-uniform range starts above 0, not at {low}")
    return Parameter(field, kind, (low, high))


def find_field(name: str, config: ConfigDict, where: str) -> str:
    """The config field that a parameter's name or alias means; UserError with the nearest name else."""
    field = ALIASES.get(name, name)
    fields = config_lib.flat(config)
    searchable = [f for f in fields if not f.startswith(_NOT_SEARCHED)]
    if field in fields and field not in searchable:
        raise UserError(f"{where}: {field} is not tried, all trials of a sweep share it: give --config.{field}")
    if field not in searchable:
        check_choice(f"{where}: the parameter", name, [*ALIASES, *searchable])
    return field


def _read(text: str, example, spec: str):
    """A value of the type of the field's own."""
    if isinstance(example, str):
        return text.strip("'\"")
    if isinstance(example, bool):
        check_choice(f"--search={spec}: a value", text.lower(), ("true", "false"))
        return text.lower() == "true"
    try:
        value = int(text) if isinstance(example, int) else float(text)
    except ValueError:
        value = math.nan
    if not isinstance(example, int | float) or not math.isfinite(value):
        raise UserError(f"--search={spec}: {text!r} is not a value for a field that holds {example!r}")
    return value


def draw(parameters: list[Parameter], num_trials: int, seed: int) -> list[Trial]:
    """Different trials drawn from the parameters; UserError where there are not so many."""
    trials, seen = [], set()
    for number in range(num_trials):
        for attempt in range(_REDRAWS):
            values = {p.field: p.draw(_rng(seed, number, attempt, p.field)) for p in parameters}
            if tuple(values.values()) not in seen:
                break
        else:
            raise UserError(f"--trials={num_trials}: --search has only {len(seen)} different trials")
        seen.add(tuple(values.values()))
        trials.append(Trial(number, values))
    return trials


def _rng(seed: int, number: int, attempt: int, field: str) -> np.random.Generator:
    """A parameter's own: another parameter beside it does not change what is drawn."""
    return np.random.default_rng([seed, number, attempt, zlib.crc32(field.encode())])


def listed(config_path: Path) -> Callable | None:
    """The config file's own `sweep(add)`, or None where it has none."""
    return runpy.run_path(str(config_path)).get("sweep")


def collect(sweep: Callable, config: ConfigDict, num_trials: int | None) -> list[Trial]:
    """The trials that a config's `sweep(add)` adds: add(lr=1e-3, **{"model.dropout": 0.2}) a trial.

    num_trials: only the first so many, or all.
    """
    if not callable(sweep) or len(inspect.signature(sweep).parameters) != 1:
        raise UserError("the config's sweep must take one argument: def sweep(add): add(lr=1e-4)")
    trials = []

    def add(*unnamed, **values):
        if unnamed:
            raise UserError(f"the config's sweep(add) calls add({unnamed[0]!r}): name the parameter, as add(lr=1e-4)")
        fields = {}
        for name, value in values.items():
            field = find_field(name, config, "the config's sweep(add)")
            if field in fields:
                raise UserError(f"the config's sweep(add) gives one trial {field} twice ({short_name(field)}, {field})")
            fields[field] = value.item() if isinstance(value, np.generic) else value
        if same := [trial.number for trial in trials if trial.values == fields]:
            raise UserError(f"the config's sweep(add) adds trial {same[0]} again ({Trial(0, fields).describe()})")
        trials.append(Trial(len(trials), fields))

    try:
        sweep(add)
    except UserError:
        raise
    except Exception as error:  # the file is the user's own, and may fail in any way
        path = sweep.__code__.co_filename if inspect.isfunction(sweep) else ""
        raise UserError(f"the config's sweep(add) fails ({of_file(path, error)})") from None
    if not trials:
        raise UserError("the config's sweep(add) adds no trial")
    if num_trials is not None and num_trials > len(trials):
        raise UserError(f"--trials={num_trials}: the config's sweep(add) lists only {len(trials)}")
    return trials[:num_trials]
