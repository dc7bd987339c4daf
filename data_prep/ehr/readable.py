"""Check the ids, times and values of an events table: stop the build or warn if many are missing or invalid."""

from collections import Counter
from collections.abc import Iterator

import polars as pl

from data_prep import progress
from data_prep.ehr.cleaning import IMPOSSIBLE, NO_VALUE, VARIABLE
from data_prep.raw import invalid, parse, tables, times
from medfuse_jax import schema

_IDS = ("subject_id", "hadm_id", "stay_id")
_TIMES = ("charttime", "storetime")
_DECIMAL_COMMA = r"^[+-]?\d+,\d+$"
# Glucose and pH of urine and other fluids: texts such as NEG, and a pH below that of blood.
_OTHER_FLUIDS = (51478, 51491, 51094, 50831)
# The largest fraction of a variable's rows, those of other fluids apart, that gives no warning:
_MAX_LOST = 0.1  # without a valid value; in the MIMIC-IV demo none
_MAX_IMPOSSIBLE = 0.1  # outside its range; in the demo at most 0.2 %
# The same of all rows:
_MAX_OTHER_NUMBER = 0.05  # whose value is not valuenum
_MAX_OUTSIDE = 0.02  # with a stay_id, but before or after that stay; in the demo 0.6 %, and 3.0 % if four hours late
_EYE_SCORE = "Glascow coma scale eye opening"


class Watch:
    """Counts of one table's ids, times and values that are missing or invalid, and of the stays that have rows.

    columns: those that are read. optional: those of ids that rows may lack. num_stays: how many stays should have a
    row; 0 if none has to.
    """

    def __init__(self, table: tables.Table, columns: list[str], *optional: str, num_stays: int = 0):
        self.table, self.optional, self.num_stays = table, optional, num_stays
        kinds = dict.fromkeys(("itemid", *_IDS), invalid.IDS) | dict.fromkeys(_TIMES, invalid.TIMES)
        kinds |= dict.fromkeys(optional, invalid.OPTIONAL_IDS)
        self.tallies = {name: invalid.Tally(kind) for name, kind in kinds.items() if name in columns}
        self.timed = invalid.Tally(invalid.GIVEN_TIMES)
        self.num_rows = 0  # of known items
        self.num_long = self.num_midnight = self.num_numbers = self.num_other_numbers = 0
        self.num_inside = self.num_outside = 0  # rows with the stay_id of a stay: within it, or before or after it
        self.rows: Counter = Counter()  # by variable
        self.lost: Counter = Counter()  # of those: without a valid value
        self.commas: Counter = Counter()  # of those: with a decimal comma
        self.empty: Counter = Counter()  # of the lost: without any text
        self.impossible: Counter = Counter()  # outside the range of the variable: dropped or clipped
        self.stays: set[int] = set()  # those with a row that is kept

    def known_items(self, batch: pl.DataFrame, items: list[int]) -> pl.DataFrame:
        """Return the rows (text) of `items`, with itemid as int64 and the times read; count what cannot be."""
        self.num_long += batch["is_long"].sum()
        batch = batch.drop("is_long")
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
        self.num_midnight += (batch["charttime"] == batch["charttime"].dt.truncate("1d")).sum()
        self.num_rows += len(batch)
        return batch

    def compare_numbers(self, batch: pl.DataFrame) -> None:
        """Count how often `value` is another number than `valuenum`, both text."""
        numbers = batch.select(parse.number("value"), parse.number("valuenum")).drop_nulls()
        difference = (numbers["value"] - numbers["valuenum"]).abs()
        self.num_numbers += len(numbers)
        self.num_other_numbers += (difference > 1e-3 * numbers["value"].abs()).sum()

    def add_named(self, num_inside: int, num_outside: int) -> None:
        """Count rows with the stay_id of a stay of the cohort: those within the stay, and those before or after it."""
        self.num_inside += num_inside
        self.num_outside += num_outside

    def add_values(self, cleaned: pl.DataFrame) -> None:
        """Count the rows that `cleaning.clean` returned."""
        self.stays.update(cleaned.filter(pl.col("fate").is_null())["stay"].unique())
        cleaned = cleaned.filter(~pl.col("itemid").is_in(_OTHER_FLUIDS))
        # MIMIC itself writes ___ for what it withholds; the number beside it is in valuenum, which `released` ignores.
        withheld = pl.col("text").str.contains(r"^\s*_+\s*$").fill_null(False)
        lost = cleaned.filter((pl.col("fate") == NO_VALUE) & ~withheld)
        commas = lost.filter(pl.col("text").str.contains(_DECIMAL_COMMA))
        empty = lost.filter(parse.missing(pl.col("text")))
        impossible = cleaned.filter((pl.col("fate") == IMPOSSIBLE) | pl.col("clipped"))
        found = (self.rows, cleaned), (self.lost, lost), (self.commas, commas), (self.empty, empty)
        for counter, rows in (*found, (self.impossible, impossible)):
            counter.update(dict(rows.group_by("variable").len().iter_rows()))

    def check(self) -> dict[str, int]:
        """Return how many times of each column are invalid; warn of what is lost.

        Raises UserError if more than 1 % of a column's ids or times are invalid, among the rows of known items, or if a
        cell holds rows.
        """
        path = self.table.path
        if self.num_long:
            self.table.check_hidden_rows()
        itemids = self.tallies["itemid"]
        if itemids.num_invalid:  # of all of the table's, not of those that passed its filter
            with tables.reading(path):
                itemids.num_given = self.table.scan("itemid").select(pl.len()).collect(engine="streaming").item()
        for name, tally in self.tallies.items():
            tally.check(path, name)
        self.timed.check(path, "charttime")
        for message in self._warnings():
            progress.say(f"warning: {path}{message}")
        return {name: self.tallies[name].num_invalid for name in _TIMES if name in self.tallies}

    def _warnings(self) -> Iterator[str]:
        if not self.num_rows:
            yield " has no row of any variable; is the table complete?"
            return
        given = self.tallies["hadm_id"].num_given
        if "hadm_id" in self.optional and given <= invalid.MAX_SHARE * self.num_rows:
            lost = f"{self.num_rows - given:,} of {self.num_rows:,} rows"
            yield f": {lost} have no hadm_id and are left out; is the column complete?"
        if self.num_rows > invalid.FEW and self.num_midnight > self.num_rows / 2:
            yield f": {self.num_midnight:,} of {self.num_rows:,} times are at midnight; were they saved as dates?"
        if self.num_other_numbers > max(invalid.FEW, _MAX_OTHER_NUMBER * self.num_numbers):
            rows = f"{self.num_other_numbers:,} of {self.num_numbers:,} rows"
            yield f": value is not valuenum in {rows}; are the columns in place, and is the decimal mark a point?"
        num_named = self.num_inside + self.num_outside
        if self.num_outside > max(invalid.FEW, _MAX_OUTSIDE * num_named):
            rows = f"{self.num_outside:,} of {num_named:,} rows"
            yield f": {rows} are before or after the stay that they name; are the times of all tables in one time zone?"
        yield from self._warnings_of_values()
        unused = self.num_stays - len(self.stays)
        if unused > invalid.MAX_SHARE * self.num_stays:
            yield (
                f" has no row that can be used for {unused:,} of {self.num_stays:,} stays; is it complete, and are all "
                "tables of one version?"
            )

    def _warnings_of_values(self) -> Iterator[str]:
        names, rows, lost = self._many(self.lost, _MAX_LOST)
        if names:
            hint = ""
            if sum(self.commas.values()) > lost / 2:
                hint = "; most have a decimal comma: write 36.6, not 36,6"
            elif _EYE_SCORE in names and self.empty[VARIABLE[_EYE_SCORE]] > self.lost[VARIABLE[_EYE_SCORE]] / 2:
                hint = "; the eye score None is a class, which pandas reads as missing unless keep_default_na=False"
            yield f": {lost:,} of {rows:,} rows of {names} have no valid value and are left out{hint}"
        names, rows, impossible = self._many(self.impossible, _MAX_IMPOSSIBLE)
        if names:
            yield (
                f": {impossible:,} of {rows:,} rows of {names} are impossible values, and are left out or clipped; are "
                "they in MIMIC's units?"
            )

    def _many(self, counter: Counter, share: float) -> tuple[str, int, int]:
        """Return the names of variables of which `counter` has many rows, all of their rows, and those counted.

        Ten rows or fewer are not many, unless they are more than half of the variable's.
        """
        many = [
            variable
            for variable, rows in sorted(self.rows.items())
            if counter[variable] > rows / 2 or counter[variable] > max(invalid.FEW, share * rows)
        ]
        names = ", ".join(schema.VARIABLES[variable].name for variable in many)
        return names, sum(self.rows[v] for v in many), sum(counter[v] for v in many)
