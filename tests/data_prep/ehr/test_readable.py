"""Ids, times and values of events that cannot be read stop the build or give a warning, without their content."""

import gzip

import pytest
from build_cases import HEART_RATE, by_stay
from raw_tables import chart, lab, stay, write_mimic_iv
from refusals import refused

from data_prep import build
from medfuse_jax.runtime.errors import UserError

TEMPERATURE, PH, GLUCOSE, EYES = 223762, 50820, 50931, 220739
ADVICE = "more than 1 %: write them as MIMIC does, in whole numbers"


def _charts():
    return [chart(0, h / 20, HEART_RATE, "70") for h in range(1000)]


def _build(root, charts, labs=()):
    iv = write_mimic_iv(root / "iv", [stay(0)], charts, labs or [lab(0, 1, GLUCOSE, "110")], codes=[(0, "4019", 9)])
    build.build(iv, None, root / "out", tasks=["pheno"])
    return by_stay(root / "out", "pheno")[0]["ehr"]


@pytest.mark.parametrize("column", ["subject_id", "hadm_id", "stay_id", "itemid"])
@pytest.mark.parametrize(("unreadable", "stops"), [(10, False), (11, True)])
def test_unreadable_ids_of_events_warn_and_stop_above_1_percent(tmp_path, capsys, column, unreadable, stops):
    charts = _charts()
    charts += [chart(0, 1, 1, "9") for _ in range(2)]  # an item that no variable has is an id too
    for row in charts[:unreadable]:
        row[column] = f"S{row[column]}"
    if not stops:
        _build(tmp_path, charts)
        given = "1,002" if column == "itemid" else "1,000"
        line = f"10 of {given} ids in column '{column}' are invalid (the first looks like 'a"
        assert line in capsys.readouterr().err
        return
    with pytest.raises(UserError, match=ADVICE) as caught:
        _build(tmp_path, charts)
    assert (caught.value.field, caught.value.value) == (column, 11)
    assert caught.value.path == tmp_path / "iv/icu/chartevents.csv.gz" and "S" not in str(caught.value).split("like")[1]


@pytest.mark.parametrize(("written", "form"), [("H20000000", "a99999999"), ("2.0000001e+07", "9.9999999a+99")])
def test_unreadable_admissions_of_laboratory_rows_stop_the_build(tmp_path, written, form):
    labs = [lab(0, h, GLUCOSE, "110", hadm_id=written) for h in range(1, 9)]
    with pytest.raises(UserError, match=ADVICE) as caught:
        _build(tmp_path, _charts(), labs)
    assert caught.value.field == "hadm_id" and f"'{form}'" in str(caught.value)


def test_missing_admissions_and_text_of_laboratory_rows_are_usual(tmp_path, capsys):
    labs = [lab(0, h, GLUCOSE, "110", hadm_id="") for h in range(1, 9)]
    labs += [lab(0, h, GLUCOSE, "see comment", valuenum="120") for h in range(1, 9)]
    _build(tmp_path, _charts(), labs)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("column", ["subject_id", "hadm_id", "charttime", "itemid"])
@pytest.mark.parametrize(("blank", "stops"), [(10, False), (11, True)])
def test_what_no_event_lacks_may_be_missing_in_few(tmp_path, capsys, column, blank, stops):
    charts = _charts() + [dict.fromkeys(chart(0, 1, 1, "9"), "") for _ in range(50)]  # rows without any value
    for row in charts[:blank]:
        row[column] = ""
    if stops:
        with refused(field=column, value=11, path=tmp_path / "iv/icu/chartevents.csv.gz"):
            _build(tmp_path, charts)
        return
    _build(tmp_path, charts)
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1 and f"in column '{column}' are invalid (the first is empty)" in printed


def test_laboratory_rows_of_which_none_has_an_admission_give_a_warning(tmp_path, capsys):
    _build(tmp_path, _charts(), [lab(0, h, GLUCOSE, "110", hadm_id="") for h in range(1, 9)])
    assert "labevents.csv.gz: 8 of 8 rows have no hadm_id" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["{} ", "{}.0", " {}.", "0{}"])
def test_items_are_known_however_the_number_is_written(tmp_path, written):
    expected = _build(tmp_path / "a", _charts())
    charts = [row | {"itemid": written.format(HEART_RATE)} for row in _charts()]
    assert (_build(tmp_path / "b", charts) == expected).all()


@pytest.mark.parametrize(("lost", "warns"), [(100, False), (101, True)])
def test_a_variable_that_loses_more_than_10_percent_of_its_values_is_named(tmp_path, capsys, lost, warns):
    charts = [row | {"value": "" if n < lost else "70"} for n, row in enumerate(_charts())]
    _build(tmp_path, charts)
    printed = capsys.readouterr().err
    assert (f"chartevents.csv.gz: {lost} of 1,000 rows of Heart Rate have no valid value" in printed) == warns
    assert "comma" not in printed and printed.count("warning") == warns


@pytest.mark.parametrize(("lost", "warns"), [(100, False), (101, True)])
def test_a_variable_of_impossible_values_is_named(tmp_path, capsys, lost, warns):
    charts = [row | {"value": "999" if n < lost else "70"} for n, row in enumerate(_charts())]
    _build(tmp_path, charts)
    assert (f"{lost} of 1,000 rows of Heart Rate are impossible values" in capsys.readouterr().err) == warns


def test_eye_scores_that_pandas_lost_are_named(tmp_path, capsys):
    eyes = [chart(0, n / 20, EYES, "" if n < 400 else "Spontaneously") for n in range(1000)]
    _build(tmp_path, _charts() + eyes)
    printed = capsys.readouterr().err
    assert "400 of 1,000 rows of Glascow coma scale eye opening" in printed and "keep_default_na" in printed


@pytest.mark.parametrize(("moved", "warns"), [(50, False), (51, True)])
def test_values_that_are_not_valuenum_are_named(tmp_path, capsys, moved, warns):
    """As of a decimal comma in a cell without quotes, which cuts a value in two."""
    moved_row = {"value": "98", "valuenum": "6"}
    _build(tmp_path, [row | (moved_row if n < moved else {}) for n, row in enumerate(_charts())])
    assert (f"value is not valuenum in {moved} of 1,000 rows" in capsys.readouterr().err) == warns


def test_times_saved_as_dates_are_named(tmp_path, capsys):
    _build(tmp_path, [row | {"charttime": row["charttime"][:10]} for row in _charts()])
    assert "1,000 of 1,000 times are at midnight" in capsys.readouterr().err


@pytest.mark.parametrize(("outside", "warns"), [(20, False), (21, True)])
def test_a_table_in_another_time_zone_is_named(tmp_path, capsys, outside, warns):
    charts = [chart(0, -5 if n < outside else 1 + n / 20, HEART_RATE, "70") for n in range(1000)]
    labs = [lab(0, 100 + n / 20, GLUCOSE, "110") for n in range(99)] + [lab(0, 1, GLUCOSE, "110")]  # after the stay
    _build(tmp_path, charts, labs)
    printed = capsys.readouterr().err
    assert ("21 of 1,000 rows are before or after the stay that they name" in printed) == warns
    assert printed.count("warning") == warns


def test_rows_that_name_no_stay_may_be_outside_of_it(tmp_path, capsys):
    ward = [chart(0, -5, HEART_RATE, "70", stay_id="") for _ in range(400)]
    _build(tmp_path, [*ward, *_charts()])
    assert "warning" not in capsys.readouterr().err


def test_stays_without_chart_rows_are_named(tmp_path, capsys):
    stays, labs = [stay(n) for n in range(3)], [lab(n, 1, GLUCOSE, "110") for n in range(3)]
    codes = [(n, "4019", 9) for n in range(3)]
    iv = write_mimic_iv(tmp_path / "iv", stays, [chart(n, 1, HEART_RATE, "70") for n in range(2)], labs, codes=codes)
    build.build(iv, None, tmp_path / "out", tasks=["pheno"])
    printed = capsys.readouterr().err
    assert "chartevents.csv.gz has no row that can be used for 1 of 3 stays" in printed
    assert printed.count("warning") == 1


@pytest.mark.parametrize(("first", "hidden"), [(b'70"', None), (b'"70', 400)])
def test_rows_between_two_lone_quotes_stop_the_build(tmp_path, first, hidden):
    """In a cell that begins with a quote they become one cell; else polars loses them, unless it reads all columns."""
    iv = write_mimic_iv(tmp_path / "iv", [stay(0)], _charts(), codes=[(0, "4019", 9)])
    path = iv / "icu/chartevents.csv.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    for n, cell in ((100, first), (501, b'70"')):
        lines[n] = lines[n].replace(b",70", b"," + cell, 1)
    path.write_bytes(gzip.compress(b"".join(lines)))
    with refused(path=path, value=hidden):
        build.build(iv, None, tmp_path / "out", tasks=["pheno"])


def test_a_decimal_comma_is_named(tmp_path, capsys):
    charts = [*_charts(), *(chart(0, h, TEMPERATURE, "36,6") for h in range(1, 9)), chart(0, 1, TEMPERATURE, "37")]
    labs = [lab(0, h, PH, "7,41") for h in range(1, 9)]
    _build(tmp_path, charts, labs)
    printed = capsys.readouterr().err
    for table, rows, variable in (("chartevents", 9, "Temperature"), ("labevents", 8, "pH")):
        line = (
            f"{table}.csv.gz: 8 of {rows} rows of {variable} have no valid value and are left out; most have a decimal"
        )
        assert line in printed


def test_values_that_mimic_itself_withholds_are_no_loss(tmp_path, capsys):
    """The demo's laboratory has ___ for most glucose values, with the number in valuenum, which `released` ignores."""
    charts = [row | {"value": "___" if n < 750 else "70"} for n, row in enumerate(_charts())]
    _build(tmp_path, charts)
    assert "warning" not in capsys.readouterr().err
