"""Watch whether an events table's ids, times and values can be read: stop the build or warn where many cannot."""

from collections import Counter

import polars as pl

from data_prep import progress
from data_prep.ehr.cleaning import NO_VALUE
from data_prep.raw import invalid, parse, tables, times
from medfuse_jax import schema

_IDS = ("subject_id", "hadm_id", "stay_id")
_TIMES = ("charttime", "storetime")
_DECIMAL_COMMA = r"^[+-]?\d+,\d+$"


class Watch:
    """Counts of one table's ids, times and values that are missing or cannot be read.

    columns: those that are read. optional: those of ids that rows may lack.
    """

    def __init__(self, table: tables.Table, columns: list[str], *optional: str):
        self.table, self.optional = table, optional
        kinds = dict.fromkeys(("itemid", *_IDS), invalid.IDS) | dict.fromkeys(_TIMES, invalid.TIMES)
        kinds |= dict.fromkeys(optional, invalid.OPTIONAL_IDS)
        self.tallies = {name: invalid.Tally(kind) for name, kind in kinds.items() if name in columns}
        self.timed = invalid.Tally(invalid.GIVEN_TIMES)
        self.num_rows = 0  # of known items
        self.rows: Counter = Counter()  # by variable
        self.lost: Counter = Counter()  # of those: without a valid value
        self.commas: Counter = Counter()  # of those: with a decimal comma

    def known_items(self, batch: pl.DataFrame, items: list[int]) -> pl.DataFrame:
        """Return the rows (text) of `items`, with itemid as int64 and the times read; count what cannot be."""
        number = batch.select(parse.integer("itemid")).to_series()
        if number.null_count():
            batch = tables.without_blank_rows(batch)
            number = batch.select(parse.integer("itemid")).to_series()
        self.tallies["itemid"].add(batch["itemid"], number.is_not_null())
        text = batch.with_columns(number).filter(pl.col("itemid").is_in(items))
        batch = text.with_columns(times.time(name) for name in _TIMES if name in text.columns)
        for name in _IDS:
            if name in text.columns:
                self.tallies[name].add(text[name], text.select(parse.integer(name).is_not_null()).to_series())
        for name in _TIMES:
            if name in text.columns:
                self.tallies[name].add(text[name], batch[name].is_not_null())
        self.timed.add(text["charttime"], ~parse.missing(text["charttime"]))
        self.num_rows += len(batch)
        return batch

    def add_values(self, cleaned: pl.DataFrame) -> None:
        """Count the rows that `cleaning.clean` returned."""
        # MIMIC itself writes ___ for what it withholds; the number beside it is in valuenum, which `released` ignores.
        withheld = pl.col("text").str.contains(r"^\s*_+\s*$").fill_null(False)
        lost = cleaned.filter((pl.col("fate") == NO_VALUE) & ~withheld)
        commas = lost.filter(pl.col("text").str.contains(_DECIMAL_COMMA))
        for counter, rows in ((self.rows, cleaned), (self.lost, lost), (self.commas, commas)):
            counter.update(dict(rows.group_by("variable").len().iter_rows()))

    def check(self) -> dict[str, int]:
        """Return how many times of each column are invalid; warn of what is lost.

        Raises UserError if more than 1 % of a column's ids or times are invalid, among the rows of known items.
        """
        itemids = self.tallies["itemid"]
        if itemids.invalid:  # of all of the table's, not of those that passed its filter
            with tables.reading(self.table.path):
                itemids.given = self.table.scan("itemid").select(pl.len()).collect(engine="streaming").item()
        for name, tally in self.tallies.items():
            tally.check(self.table.path, name)
        self.timed.check(self.table.path, "charttime")
        self._warn_of_missing_admissions()
        self._warn_of_values()
        if not self.num_rows:
            progress.say(f"warning: {self.table.path} has no row of any variable; is the table complete?")
        return {name: self.tallies[name].invalid for name in _TIMES if name in self.tallies}

    def _warn_of_missing_admissions(self) -> None:
        given = self.tallies["hadm_id"].given
        if "hadm_id" in self.optional and given <= invalid.MAX_SHARE * self.num_rows > 0:
            progress.say(
                f"warning: {self.table.path}: {self.num_rows - given:,} of {self.num_rows:,} rows have no hadm_id and "
                "are left out; is the column complete?"
            )

    def _warn_of_values(self) -> None:
        most = [variable for variable, rows in sorted(self.rows.items()) if self.lost[variable] > rows / 2]
        if not most:
            return
        rows, lost, commas = (sum(counter[v] for v in most) for counter in (self.rows, self.lost, self.commas))
        names = ", ".join(schema.VARIABLES[variable].name for variable in most)
        hint = "; most have a decimal comma: write 36.6, not 36,6" if commas > lost / 2 else ""
        progress.say(
            f"warning: {self.table.path}: {lost:,} of {rows:,} rows of {names} have no valid value and are left "
            f"out{hint}"
        )
