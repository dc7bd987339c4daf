"""The tables over seeds and folds (--seeds, --folds): the mean and spread of each number."""

import math
import statistics

from medfuse_jax.paper.cells import Table, Value


def aggregate(made: list[list[Table]]) -> list[Table]:
    """Return the tables of several repeats as one list: each number is a mean, with its standard deviation.

    A row that some repeats lack, such as one for a choice that did not differ there, is the mean over the others, and a
    note says how many. Text that differs is left out, and so are notes that not all have.
    """
    names = dict.fromkeys(table.name for tables in made for table in tables)
    return [_joined([table for tables in made for table in tables if table.name == name]) for name in names]


def _joined(tables: list[Table]) -> Table:
    by_key: dict[tuple, list[list]] = {}
    for table in tables:
        for row in table.rows:
            by_key.setdefault(_key(row), []).append(row)
    rows = [[_cell(list(cells)) for cells in zip(*same)] for same in by_key.values()]
    notes = [note for note in tables[0].notes if all(note in table.notes for table in tables)]
    notes += [
        f"{', '.join(key)}: over {len(same)} of {len(tables)} repeats; the others have no such row."
        for key, same in by_key.items()
        if len(same) < len(tables)
    ]
    return Table(tables[0].name, tables[0].title, tables[0].head, rows, notes)


def _key(row: list) -> tuple:
    """Return the texts that name a row: its first cells, up to a number or a count such as '3 / 50'."""
    texts = [row[0]]
    for cell in row[1:]:
        if isinstance(cell, Value) or not cell or " / " in cell:  # empty: a number that only some repeats have
            break
        texts.append(cell)
    return tuple(texts)


def _cell(cells: list) -> Value | str:
    values = [cell for cell in cells if isinstance(cell, Value)]
    if not values:
        return cells[0] if len(set(cells)) == 1 else ""
    known = [value.ours for value in values if not math.isnan(value.ours)]
    first = values[0]
    return Value(
        statistics.fmean(known) if known else math.nan,
        paper=first.paper,
        digits=first.digits,
        is_change=first.is_change,
        spread=statistics.stdev(known) if len(known) > 1 else math.nan,
    )
