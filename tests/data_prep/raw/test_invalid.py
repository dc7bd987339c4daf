"""Ids that no row of a table lacks: few are warned of, many stop the build, and blank rows do not count."""

import polars as pl
import pytest
from refusals import refused

from data_prep.raw import invalid, tables


def _rows(num_bad: int, bad: str | None, blank_rows: int = 0) -> pl.DataFrame:
    rows = [{"hadm_id": bad if n < num_bad else str(20_000_000 + n), "icd_code": "4019"} for n in range(1200)]
    return pl.DataFrame([*rows, *[{"hadm_id": "", "icd_code": None}] * blank_rows])


@pytest.mark.parametrize(("bad", "form"), [("H20000000", "a99999999"), ("", "empty"), ("2.0e+07", "9.9a+99")])
def test_many_unreadable_ids_stop_a_build_and_few_are_warned_of(tmp_path, capsys, bad, form):
    invalid.check_ids(tmp_path, _rows(12, bad), "hadm_id")  # 1 %
    printed = capsys.readouterr().err
    assert form in printed and "12 of 1,200 ids in column 'hadm_id'" in printed and "20000000" not in printed
    with refused(path=tmp_path, field="hadm_id", value=13) as caught:
        invalid.check_ids(tmp_path, _rows(13, bad), "hadm_id")
    assert form in str(caught.value)


@pytest.mark.parametrize(("few", "num_rows"), [(10, 30), (4, 5)])
def test_a_small_table_may_have_a_few_that_are_not_all(tmp_path, capsys, few, num_rows):
    invalid.check_ids(tmp_path, _rows(few, "x").head(num_rows), "hadm_id")
    assert f"{few} of {num_rows} ids" in capsys.readouterr().err
    with refused(path=tmp_path, field="hadm_id", value=few + 1):
        invalid.check_ids(tmp_path, _rows(few + 1, "x").head(num_rows), "hadm_id")


def test_few_unreadable_times_of_a_small_table_stop_the_build(tmp_path):
    tally = invalid.Tally(invalid.TIMES)
    tally.add(pl.Series(["2150-01-31"] * 98 + ["2150-13-01 10:00:00"] * 2), pl.Series([True] * 98 + [False] * 2))
    with refused(path=tmp_path, field="intime", value=2) as caught:
        tally.check(tmp_path, "intime")
    assert "'9999-99-99 99:99:99', but not of a date" in str(caught.value)
    ids = invalid.Tally(invalid.IDS).add(pl.Series(["2150-13-01 10:00:00"]), pl.Series([False]))
    assert ids.first == "the first looks like '9999-99-99 99:99:99'"  # in another column than its own


def test_the_form_of_a_value_has_none_of_its_content():
    assert invalid.form("2150-13-45 Müller\n 9h") == "the first looks like '9999-99-99 aaaaaa? 9a'"


def test_blank_rows_do_not_count_and_blank_codes_do(tmp_path, capsys):
    rows = tables.without_blank_rows(_rows(0, None, blank_rows=100))
    invalid.check_ids(tmp_path, rows, "hadm_id", texts=("icd_code",))
    assert not capsys.readouterr().err and len(rows) == 1200
    rows = _rows(0, None).with_columns(icd_code=pl.when(pl.int_range(pl.len()) < 13).then(None).otherwise("icd_code"))
    with refused(path=tmp_path, field="icd_code", value=13):
        invalid.check_ids(tmp_path, rows, "hadm_id", texts=("icd_code",))
