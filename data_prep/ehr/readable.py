"""Watch whether the ids and values of an events table can be read: stop the build or warn where many cannot."""

from collections import Counter

import polars as pl

from data_prep import progress
from data_prep.ehr.cleaning import NO_VALUE
from data_prep.raw import parse, tables, times
from medfuse_jax import schema

_IDS = ("subject_id", "hadm_id", "stay_id")
_DECIMAL_COMMA = r"^[+-]?\d+,\d+$"


def _tally() -> times.Tally:
    return times.Tally(what="ids", written="as MIMIC does, in whole numbers", effect="their rows are left out")


class Watch:
    """Counts of the ids and values of one table that cannot be read."""

    def __init__(self, table: tables.Table):
        self.table = table
        self.ids = {name: _tally() for name in ("itemid", *_IDS) if name in table.columns}
        self.rows: Counter = Counter()  # by variable
        self.lost: Counter = Counter()  # of those: without a valid value
        self.commas: Counter = Counter()  # of those: with a decimal comma

    def known_items(self, batch: pl.DataFrame, items: list[int]) -> pl.DataFrame:
        """Return the rows of `items`, with itemid as int64."""
        text, batch = batch["itemid"], batch.with_columns(parse.integer("itemid"))
        self.ids["itemid"].add(text, batch["itemid"])
        return batch.filter(pl.col("itemid").is_in(items))

    def add_ids(self, batch: pl.DataFrame) -> None:
        """Count the ids (text) of rows of known items."""
        for name in _IDS:
            if name in batch.columns:
                self.ids[name].add(batch[name], batch.select(parse.integer(name)).to_series())

    def add_values(self, cleaned: pl.DataFrame) -> None:
        """Count the rows that `cleaning.clean` returned."""
        # MIMIC itself writes ___ for what it withholds; the number beside it is in valuenum, which `released` ignores.
        withheld = pl.col("text").str.contains(r"^\s*_+\s*$").fill_null(False)
        lost = cleaned.filter((pl.col("fate") == NO_VALUE) & ~withheld)
        commas = lost.filter(pl.col("text").str.contains(_DECIMAL_COMMA))
        for counter, rows in ((self.rows, cleaned), (self.lost, lost), (self.commas, commas)):
            counter.update(dict(rows.group_by("variable").len().iter_rows()))

    def check(self) -> None:
        """Raise UserError for a column with more than 1 % unreadable ids; warn of fewer, and of lost values."""
        itemids = self.ids["itemid"]
        if itemids.unreadable:  # of all of the table's, not of those that passed its filter
            with tables.reading(self.table.path):
                given = self.table.scan("itemid").select((~parse.missing(pl.col("itemid"))).sum())
                itemids.given = given.collect(engine="streaming").item()
        for name, tally in self.ids.items():
            tally.check(self.table.path, name)
        self._warn_of_values()

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
