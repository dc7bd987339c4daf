"""A run's config: its fields (fields.py), what they must satisfy (checks.py), and configs in files.

Each of `configs/*.py` starts from `default()` and sets what differs. docs/config.md lists all fields.
"""

from collections.abc import Iterable
from pathlib import Path

from medfuse_jax.config.checks import check_devices, parse_profile_steps, validate
from medfuse_jax.config.fields import (
    FIELDS,
    MOVABLE,
    ConfigDict,
    Field,
    default,
    describe,
    flat,
    is_execution_only,
    names,
    pretraining,
    reads_features,
    section,
    set_fields,
    stage,
    stages,
    table,
)
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

__all__ = [
    "FIELDS", "MOVABLE", "Field", "check_devices", "default", "describe", "difference", "flat", "is_execution_only",
    "load", "names", "parse_profile_steps", "pretraining", "reads_features", "save", "section", "stage", "stages",
    "table", "validate", "with_defaults",
]  # fmt: skip


_IN_EVERY_VERSION = {"name", "task", "method"}


def save(config: ConfigDict, path: Path) -> None:
    """Write the resolved config as JSON, without the fields of a stage that are not set."""
    files.write_json(path, files.sealed(set_fields(config.copy_and_resolve_references())))


def load(path: Path) -> ConfigDict:
    """Read what `save` wrote; raise UserError if it is missing or not a valid config.

    A field that it lacks gets its default (`with_defaults`).
    """
    content = files.read_json(path, f"{path.parent} is not the workdir of a run, or was damaged: give another one")
    config = with_defaults(_lists_to_tuples(content))
    try:
        validate(config)
    except UserError as error:
        what = f"{path} is of another version or was edited: {error}"
        raise UserError(what, field=error.field, path=path, value=error.value) from None
    return config


def with_defaults(content: dict) -> ConfigDict:
    """Return a stored config, in which a field that an earlier version did not have is what was done until then."""
    config = ConfigDict(content)
    for name in (name for name in FIELDS if name not in _IN_EVERY_VERSION):
        section, _, key = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        part = config[section] if section else config
        if isinstance(part, ConfigDict) and key not in part:
            part[key] = FIELDS[name].default
    return config


def difference(a: ConfigDict, b: ConfigDict, ignored: Iterable[str] = ()) -> str:
    """Describe the first field in which two configs differ: 'field is X there and Y here', or '' for none.

    Task and method come first: most other differences follow from them. Execution-only fields, those of MOVABLE and the
    `ignored` fields are not compared.
    """
    flat_a, flat_b = (flat(c) for c in (a, b))
    fields = {name for name in flat_a.keys() | flat_b.keys() if not is_execution_only(name)} - {*MOVABLE, *ignored}
    differing = sorted(f for f in fields if flat_a.get(f) != flat_b.get(f))
    if not differing:
        return ""
    first = next((f for f in ("task", "method") if f in differing), differing[0])
    others = [f"config.{f}" for f in differing if f != first]
    more = f" (also: {', '.join(others[:3])}{', ...' if others[3:] else ''})" if others else ""
    return f"config.{first} is {flat_a.get(first)} there and {flat_b.get(first)} here{more}"


def _lists_to_tuples(value):
    if isinstance(value, dict):
        return {k: _lists_to_tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value
