"""The tables over seeds and folds: means and spreads by row, whatever rows a repeat lacks."""

import math

import pytest

from medfuse_jax.paper import formats, page, published, repeats
from medfuse_jax.paper.cells import Table, Value

_PAPER = published.Number(0.75, 0.72, 0.78)


def _table(rows: list[list], *notes: str) -> Table:
    return Table("table_5", "Table 5", ["Age", "Deaths / stays", "AUROC"], rows, list(notes))


def _repeat(auroc: float, deaths: int, *more: list) -> list[Table]:
    notes = ("the same", f"only of {deaths}")
    return [_table([["18-40", f"{deaths} / 50", Value(auroc, (0.1, 0.9), _PAPER, p=0.01)], *more], *notes)]


def test_numbers_become_means_with_a_deviation_and_differing_text_goes():
    (table,) = repeats.aggregate([_repeat(0.7, 3), _repeat(0.8, 4), _repeat(0.9, 5)])
    (row,) = table.rows
    assert row[:2] == ["18-40", ""] and row[2].ours == pytest.approx(0.8)
    assert row[2].spread == pytest.approx(0.1) and row[2].paper is _PAPER and row[2].is_outside
    assert math.isnan(row[2].low) and math.isnan(row[2].p)  # they were of one run
    assert table.notes == ["the same"]


def test_a_row_that_a_repeat_lacks_is_the_mean_of_the_others():
    more = ["chosen on paired", "1 / 5", Value(0.6)]
    (table,) = repeats.aggregate([_repeat(0.7, 3, more), _repeat(0.8, 3)])
    assert [row[0] for row in table.rows] == ["18-40", "chosen on paired"]
    assert table.rows[1][2].ours == 0.6 and math.isnan(table.rows[1][2].spread)
    assert table.notes[-1:] == ["chosen on paired: over 1 of 2 repeats; the others have no such row."]
    (table,) = repeats.aggregate([[_table([["a", "", Value(math.nan)]])], [_table([["a", "", Value(0.5)]])]])
    assert table.rows[0][2].ours == 0.5
    assert not Value(math.nan, paper=_PAPER).is_outside and Value(0.6, paper=_PAPER).is_outside


def test_a_row_without_a_number_in_one_repeat_stays_one_row():
    """As where the choices for one of two tasks differ in one fold alone."""
    first, second = (
        _table([["chosen on paired", *numbers]]) for numbers in (["", Value(0.9)], [Value(0.7), Value(0.8)])
    )
    (table,) = repeats.aggregate([[first], [second]])
    ((_, one, both),) = table.rows
    assert one.ours == 0.7 and both.ours == pytest.approx(0.85)


def test_every_format_shows_the_deviation(tmp_path):
    tables = repeats.aggregate([_repeat(0.7, 3), _repeat(0.8, 3)])
    value = tables[0].rows[0][2]
    assert formats.text(value) == "0.750 ± 0.071"
    assert formats.text(Value(0.02, spread=0.01, is_change=True)) == "+0.020 ± 0.010"
    assert value.drawn == pytest.approx((0.75 - value.spread, 0.75 + value.spread))
    text = page.write(tmp_path, tables, [], {}, [], synthetic=False).read_text()
    assert "± 0.071" in text and "± 0.071" in (tmp_path / "tables" / "table_5.md").read_text()
    assert r"$\pm$ 0.071" in (tmp_path / "tables" / "table_5.tex").read_text()
    assert "AUROC sd" in (tmp_path / "tables" / "table_5.csv").read_text().splitlines()[0]
