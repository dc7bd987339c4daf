"""Parse text columns of raw tables: numbers, times and dates, null where a cell cannot be read."""

import polars as pl


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


def time(column: str) -> pl.Expr:
    """Parse a text column of 'YYYY-MM-DD HH:MM:SS', else null; accept a 'T' before the time, and missing seconds."""
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
