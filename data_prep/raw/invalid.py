"""Refuse a table in which many values of a column are invalid, and warn of few.

Messages show what a value looks like ('a' for each letter, '9' for each digit), never the value.
"""

import dataclasses
import re
from pathlib import Path

import polars as pl

from data_prep import progress
from data_prep.raw import parse
from medfuse_jax.runtime.errors import UserError

MAX_SHARE = 0.01
FEW = 10  # a small table may have as many, though they are more than 1 %
_LONGEST = 40  # characters of a form
_COMPLETE = re.compile("'9999-99-99(?: 99:99:99)?'$")


@dataclasses.dataclass(frozen=True)
class Kind:
    """The kind of values in a column, for messages: their name, how to write them, what happens to invalid ones.

    needed: a missing value is invalid too. few: up to this many invalid values do not stop a build, unless all are.
    """

    name: str
    written: str
    effect: str
    needed: bool = False
    few: int = FEW


# Even a few invalid times stop a build if they are more than 1 %: what depends on them would be dropped silently.
TIMES = Kind("times", "write them as MIMIC does, YYYY-MM-DD HH:MM:SS", "they count as missing", few=0)
GIVEN_TIMES = Kind("times", "give every row a time", "their rows are left out", needed=True)
AGES = Kind("ages", "write them as MIMIC does, in whole years", "their stays are left out", needed=True, few=0)
IDS = Kind("ids", "write them as MIMIC does, in whole numbers", "their rows are left out", needed=True)
OPTIONAL_IDS = dataclasses.replace(IDS, needed=False)


@dataclasses.dataclass
class Tally:
    """How many values of a column are given, how many of them are invalid, and what the first of those looks like."""

    kind: Kind
    num_given: int = 0
    num_invalid: int = 0
    first: str = ""

    def add(self, text: pl.Series, valid: pl.Series) -> "Tally":
        """Count the values of `text`; valid: true for those that are, aligned with it."""
        other = text.filter(~valid)
        wrong = other.fill_null("") if self.kind.needed else other.filter(~parse.missing(other))
        if len(wrong) and not self.num_invalid:
            self.first = form(wrong[0])
            if self.kind.name == TIMES.name and _COMPLETE.search(self.first):
                self.first += ", but not of a date from the year 1000 on, or not of an hour"
        self.num_given += len(text) - len(other) + len(wrong)
        self.num_invalid += len(wrong)
        return self

    def check(self, path: Path, column: str) -> int:
        """Return how many values are invalid, with a warning; raise UserError if they are many."""
        check(path, {column: self})
        return self.num_invalid


def check(path: Path, tallies: dict[str, Tally]) -> None:
    """Warn in one line of the invalid values in a table's columns; raise UserError if more than 1 % of one are."""
    found = {column: tally for column, tally in tallies.items() if tally.num_invalid}
    messages = []
    for column, tally in found.items():
        kind = tally.kind
        share = f"{tally.num_invalid:,} of {tally.num_given:,}"
        messages.append(f"{path}: {share} {kind.name} in column {column!r} are invalid ({tally.first})")
        is_many = tally.num_invalid > kind.few or tally.num_invalid == tally.num_given
        if is_many and tally.num_invalid > MAX_SHARE * tally.num_given:
            message = f"{messages[-1]}; that is more than 1 %: {kind.written}"
            raise UserError(message, path=path, field=column, value=tally.num_invalid)
    if messages:
        first, *rest = found.values()
        others = f", and {sum(tally.num_invalid for tally in rest):,} in other columns" if rest else ""
        progress.say(f"warning: {messages[0]}{others}; {first.kind.effect}")


def check_ids(path: Path, rows: pl.DataFrame, *names: str, texts: tuple[str, ...] = ()) -> None:
    """Check ids that no row of a table lacks: numbers (`names`) and texts. rows: text."""
    numbers = rows.select(parse.integer(name) for name in names)
    tallies = {name: Tally(IDS).add(rows[name], numbers[name].is_not_null()) for name in names}
    tallies |= {name: Tally(IDS).add(rows[name], ~parse.missing(rows[name])) for name in texts}
    check(path, tallies)


def form(value: str | None) -> str:
    """Return what a value looks like, as a message says it of the first invalid one."""
    text = "".join(character if character.isprintable() else "?" for character in (value or "").strip())
    if not text:
        return "the first is empty"
    shown = " ".join(re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "9", text)).split())
    # The end of a long value tells more: an image's name with .dcm behind it is too long already.
    return f"the first looks like '{shown if len(shown) <= _LONGEST else '...' + shown[3 - _LONGEST :]}'"
