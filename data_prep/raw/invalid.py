"""Refuse a table with many invalid values, and warn of few. Messages show the form of a value, never the value."""

from pathlib import Path

import polars as pl

from data_prep import progress
from data_prep.raw import parse, times
from medfuse_jax.runtime.errors import UserError

_LONGEST = 40  # characters of a form
_FEW_IDS = 10  # of a small table, in which they may be more than 1 %


def form(value: str | None) -> str:
    """Return what the first invalid value looks like, for a message: 'a' for each letter, '9' for each digit."""
    text = "".join(character if character.isprintable() else "?" for character in (value or "").strip())
    if not text:
        return "the first is empty"
    # The end of a long value tells more: an image's name with .dcm behind it is too long already.
    shown = times.form(text) if len(text) <= _LONGEST else f"...{times.form(text[3 - _LONGEST :])}"
    return f"the first looks like '{shown}'"


def check_ids(path: Path, rows: pl.DataFrame, *names: str, texts: tuple[str, ...] = ()) -> None:
    """Check, as `check` does, ids that no row of a table lacks: numbers (`names`) and texts. Blank rows do not count.

    rows: text.
    """
    given = rows.filter(~pl.all_horizontal(parse.missing(pl.col(column)) for column in rows.columns))
    numbers = given.select(parse.integer(name) for name in names)
    columns = {name: (given[name].filter(numbers[name].is_null()), len(given)) for name in names}
    columns |= {name: (given[name].filter(parse.missing(given[name])), len(given)) for name in texts}
    remedy = "write them as MIMIC does; ids are whole numbers"
    check(path, columns, "ids", effect="their rows are left out", remedy=remedy, few=_FEW_IDS)


def check(
    path: Path, columns: dict[str, tuple[pl.Series, int]], what: str, effect: str, remedy: str, few: int = 0
) -> None:
    """Warn of invalid values in a table's columns; raise UserError if they are more than 1 % of a column.

    columns: name -> the invalid values (text), and how many values are given. what, effect, remedy: what the values
    are, what happens to the invalid ones, and how to write them. few: so many never stop a build.
    """
    found = {}
    for column, (values, given) in columns.items():
        if not len(values):
            continue
        found[column] = len(values)
        message = f"{path}: {len(values):,} of {given:,} {what} in column {column!r} are invalid ({form(values[0])})"
        if len(values) > max(few, times.MAX_UNREADABLE * given):
            raise UserError(f"{message}; that is more than 1 %: {remedy}", path=path, field=column, value=len(values))
        if len(found) == 1:
            first = message
    if found:
        rest = sum(found.values()) - next(iter(found.values()))
        others = f", and {rest:,} in other columns" if rest else ""
        progress.say(f"warning: {first}{others}; {effect}")
