"""Parse the times of raw tables."""

import polars as pl

from data_prep.raw.tables import Table
from medfuse_jax.runtime.errors import UserError

_MAX_UNREADABLE = 0.01


def time(column: str) -> pl.Expr:
    """Parse a text column 'YYYY-MM-DD HH:MM:SS', else null; accepts a 'T' before the clock, and missing seconds."""
    return pl.col(column).map_batches(_times, return_dtype=pl.Datetime("us"))


def _times(text: pl.Series) -> pl.Series:
    def parse(text: pl.Series, form: str) -> pl.Series:
        return text.str.slice(0, 19).str.to_datetime(form, time_unit="us", strict=False)

    parsed = parse(text, "%Y-%m-%d %H:%M:%S")
    if parsed.null_count() == text.null_count():  # the fast path: tables as downloaded
        return parsed
    spaced = text.str.strip_chars().str.replace("T", " ", literal=True)
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M"):
        parsed = parsed.zip_with(parsed.is_not_null(), parse(spaced, form))
    return parsed


def date(column: str) -> pl.Expr:
    """Parse a text column that begins 'YYYY-MM-DD' as a datetime at 00:00, else null."""
    return pl.col(column).str.strip_chars().str.slice(0, 10).str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)


def count_unreadable(raw: dict[str, Table]) -> dict[str, int]:
    """Count the unreadable times of admissions and deaths, by 'table.column'. UserError if over 1 % of a column."""
    counts = {}
    for name, columns in {"admissions": ("admittime", "dischtime", "deathtime"), "patients": ("dod",)}.items():
        table = raw[name].read(*columns)
        for column in columns:
            given = table.filter(pl.col(column).str.strip_chars().fill_null("") != "").select(column)
            parsed = given.select(date(column) if column == "dod" else time(column))
            counts[f"{name}.{column}"] = unreadable = parsed[column].null_count()
            if unreadable > _MAX_UNREADABLE * len(given):
                raise UserError(
                    f"{raw[name].path}: {unreadable:,} of {len(given):,} times in column {column!r} cannot be read, "
                    "more than 1 %; write them as MIMIC does: YYYY-MM-DD HH:MM:SS (dod: YYYY-MM-DD)",
                    path=raw[name].path,
                    field=column,
                    value=unreadable,
                )
    return counts
