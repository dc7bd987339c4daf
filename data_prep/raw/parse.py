"""Parse text columns of raw tables: numbers, null where a cell cannot be read. Times are read by times.py."""

import polars as pl

# What stands for no value, in lower case: an empty cell, and what R, pandas, SAS, spreadsheets and databases write.
_NO_VALUE = ("", "na", "n/a", "#n/a", "<na>", "nan", "nat", "null", "(null)", "[null]", "none", ".", r"\n")


def missing(text: pl.Expr | pl.Series) -> pl.Expr | pl.Series:
    """Return where ids or times (text) are missing, not unreadable."""
    return text.fill_null("").str.strip_chars().str.to_lowercase().is_in(_NO_VALUE)


def integer(column: str) -> pl.Expr:
    """Parse a text column as int64, null if not a whole number; accept '20000000.0', as pandas writes ids."""
    return pl.col(column).map_batches(_integers, return_dtype=pl.Int64)


def _integers(text: pl.Series) -> pl.Series:
    text = text.str.strip_chars()
    parsed = text.cast(pl.Int64, strict=False)
    if parsed.null_count() == text.null_count():  # the fast path: tables as downloaded
        return parsed
    return parsed.zip_with(parsed.is_not_null(), text.str.extract(r"^(-?\d+)\.0*$", 1).cast(pl.Int64, strict=False))


def number(column: str) -> pl.Expr:
    """Parse a text column as a finite float64, else null."""
    value = pl.col(column).str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)
