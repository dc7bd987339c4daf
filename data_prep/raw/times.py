"""Read times in the forms that databases, pandas, R and spreadsheets write them in.

A time is read whole or not at all: am, pm and a zero UTC offset are read; other text after it makes it null. A
date alone is midnight. `1/31/2150` and `31.1.2150` are read if the other values of the column show whether the month
comes first. A year has four digits and is 1000 or later: `50-01-31` is null, and so is R's `0050-01-31`.
"""

import datetime

import polars as pl

_FORMAT = "%Y-%m-%d %H:%M:%S"  # as in MIMIC-IV
_MINUTE = "%Y-%m-%d %H:%M:00"
# From 1000 to 9999, in microseconds since 1970.
_FIRST_YEAR = (datetime.datetime(1000, 1, 1) - datetime.datetime(1970, 1, 1)) // datetime.timedelta(microseconds=1)
_END_OF_YEARS = (datetime.datetime.max - datetime.datetime(1970, 1, 1)) // datetime.timedelta(microseconds=1) + 1
_DATE = (
    r"(?:(?P<year>\d{4})[-/](?P<month>\d{1,2})[-/](?P<day>\d{1,2})"
    r"|(?P<year2>\d{4})(?P<month2>\d\d)(?P<day2>\d\d)(?:\.0*)?"
    r"|(?P<first>\d{1,2})[/.-](?P<second>\d{1,2})[/.-](?P<year3>\d{4}))"
)
_CLOCK = (
    r"(?P<hour>\d{1,2}):(?P<minute>[0-5]\d)(?::(?P<second_of_minute>[0-5]\d)(?P<fraction>\.\d{1,9})?)?"
    r"\s*(?P<half>[AaPp]\.?[Mm]\.?)?\s*(?:Z|UTC|GMT|[+-]00(?::?00)?)?"
)
_TIME = rf"^\s*{_DATE}(?:(?:T|\s+){_CLOCK})?\s*$"


def time(column: str) -> pl.Expr:
    """Parse a text column of times; those that cannot be read become null."""
    return pl.col(column).map_batches(read, return_dtype=pl.Datetime("us"))


def date(column: str) -> pl.Expr:
    """Parse a text column of dates as datetimes at 00:00, ignoring a time of day; null if unreadable."""
    return time(column).dt.truncate("1d")


def read(text: pl.Series) -> pl.Series:
    """Return the times (datetime, us) that `text` (string) gives, null where it gives none."""
    if len(text) and text[0] and not text[0].endswith(":00"):
        parsed = _read_seconds(text)
    else:  # the fast path: the large tables as downloaded have whole minutes
        parsed = text.str.to_datetime(_MINUTE, time_unit="us", strict=False)
        if parsed.null_count() > text.null_count():
            rest = (parsed.is_null() & text.is_not_null()).arg_true()
            parsed = parsed.scatter(rest, _read_seconds(text.gather(rest)))
    # %Y also reads year 0 and years of two digits. Compare integers, because Python's datetime has no year 0.
    microseconds = parsed.to_physical()
    first, last = microseconds.min(), microseconds.max()
    if first is None or (first >= _FIRST_YEAR and last < _END_OF_YEARS):
        return parsed
    return parsed.set((microseconds < _FIRST_YEAR) | (microseconds >= _END_OF_YEARS), None)


def _read_seconds(text: pl.Series) -> pl.Series:
    parsed = text.str.to_datetime(_FORMAT, time_unit="us", strict=False)
    parsed = parsed.set(text.str.ends_with("60"), None)  # %S takes 60 seconds
    other = text.filter(parsed.is_null()).drop_nulls().unique()
    if other.is_empty():
        return parsed
    return parsed.fill_null(text.replace_strict(other, _read_other(other), default=None, return_dtype=parsed.dtype))


def _read_other(text: pl.Series) -> pl.Series:
    found = text.str.extract_groups(_TIME).struct.unnest()
    number = pl.col("first", "second").cast(pl.Int64)
    day_first, month_first = found.select(number.max() > 12).fill_null(False).row(0)
    known = pl.lit(day_first != month_first)  # otherwise the order is unclear, or the column mixes both
    month, day = ("second", "first") if day_first else ("first", "second")
    hour, half = pl.col("hour").cast(pl.Int64), pl.col("half").str.slice(0, 1).str.to_lowercase()
    hour = (
        pl.when(half.is_null())
        .then(hour.fill_null(0))
        .when(hour.is_between(1, 12))  # 13 PM is no time
        .then(hour % 12 + pl.when(half == "p").then(12).otherwise(0))
    )
    parts = found.select(
        pl.format(
            "{}-{}-{} {}:{}:{}{}",
            pl.coalesce("year", "year2", pl.when(known).then("year3")),
            *(pl.coalesce(*names).str.zfill(2) for names in (("month", "month2", month), ("day", "day2", day))),
            hour.cast(pl.String).str.zfill(2),
            pl.col("minute").fill_null("00"),
            pl.col("second_of_minute").fill_null("00"),
            pl.col("fraction").fill_null(".0"),
        ).alias("time")
    )
    return parts["time"].str.to_datetime(f"{_FORMAT}%.f", time_unit="us", strict=False)


def study_times(frame: pl.DataFrame) -> pl.Series:
    """Return the times of `StudyDate` and `StudyTime` (text) to the second, null where one is missing or unreadable.

    StudyTime is HHMMSS.fff written as a number, so without leading zeros (3042.1 is 00:30:42), or a clock time, which
    may follow the '0 days' that pandas adds or the date that spreadsheets add. If all values are below 1, they are
    fractions of a day, as spreadsheets store times; with at most 10 distinct values, those above 0 are unreadable.
    So are more than 10 distinct numbers below 2400: they are HHMM, or all of the first 24 minutes of a day.
    """
    date_text = frame["StudyDate"].str.strip_chars()
    date = _without_exponent(date_text, r"^\d\.\d{7}0*[eE]\+?0?7$")  # only if the float kept all 8 digits
    clock = _without_exponent(frame["StudyTime"].str.strip_chars(), r"^[\d.]+[eE][+]?\d+$")
    number = clock.cast(pl.Float64, strict=False)
    number = number.zip_with(number.is_finite() & (number >= 0), pl.Series([None], dtype=number.dtype))
    if (number.max() or 0.0) < 1:
        if number.n_unique() > 10:
            clock = ((number * 86_400).round().cast(pl.Int64) * 10**9).cast(pl.Time).dt.to_string("%H:%M:%S")
        else:
            clock = clock.zip_with((number == 0).fill_null(True), pl.Series([None], dtype=pl.String))
    elif number.max() < 2400 and number.n_unique() > 10:
        clock = clock.zip_with(number.is_null(), pl.Series([None], dtype=pl.String))
    digits = clock.str.extract(r"^(\d{1,6})(?:[.,]\d*)?$", 1).str.zfill(6)
    digits = digits.str.replace(r"^(..)(..)(..)$", "${1}:${2}:${3}")
    clock = digits.fill_null(clock.replace("", None).str.replace(r"^(?:0 days|1[89]\d\d-\d\d-\d\d)[ T]+", ""))
    day = read(date)
    # A StudyDate with a clock time of its own is unreadable: StudyTime may contradict it.
    day = day.zip_with(day == day.dt.truncate("1d"), pl.Series([None], dtype=day.dtype))
    return read(day.dt.to_string("%Y-%m-%d") + " " + clock).dt.truncate("1s")


def _without_exponent(text: pl.Series, pattern: str) -> pl.Series:
    """Write numbers such as 1e+05 (R for 100000) in digits, if they match `pattern`."""
    has_exponent = text.str.contains(pattern).fill_null(False)
    digits = (
        text.zip_with(has_exponent, pl.Series([None], dtype=pl.String)).cast(pl.Float64).cast(pl.Int64, strict=False)
    )
    return digits.cast(pl.String).fill_null(text)
