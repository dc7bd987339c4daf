"""Times in the forms that databases, pandas, R and spreadsheets write; what cannot be read whole is refused."""

import datetime
import shutil

import polars as pl
import pytest
from build_cases import HEART_RATE, by_stay
from raw_tables import at, chart, image, lab, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.raw import invalid, times
from medfuse_jax import records, schema
from medfuse_jax.runtime.errors import UserError

MORNING, AFTERNOON = datetime.datetime(2150, 1, 31, 1, 30), datetime.datetime(2150, 1, 31, 13, 30)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2150-01-31", datetime.datetime(2150, 1, 31)),
        ("21500131", datetime.datetime(2150, 1, 31)),
        ("2150-01-31 13:30:00", AFTERNOON),
        (" 2150-01-31T13:30 ", AFTERNOON),
        ("2150-01-31 13:30:00.250", AFTERNOON + datetime.timedelta(milliseconds=250)),
        ("2150-01-31T13:30:00Z", AFTERNOON),
        ("2150-01-31 13:30:00 UTC", AFTERNOON),
        ("2150-01-31 13:30:00+00:00", AFTERNOON),
        ("2150-01-31 13:30:00-05:00", None),
        ("2150-01-31 13:30:00 EST", None),
        ("2150-01-31 01:30:00 PM", AFTERNOON),
        ("2150-01-31 1:30 p.m.", AFTERNOON),
        ("2150-01-31 01:30 am", MORNING),
        ("2150-01-31 12:00 AM", datetime.datetime(2150, 1, 31)),
        ("2150-01-31 13:30 PM", None),
        ("2150/1/31 13:30", AFTERNOON),
        ("1/31/2150 13:30", AFTERNOON),
        ("31.01.2150 13:30", AFTERNOON),
        ("31/1/2150 1:30 PM", AFTERNOON),
        ("1/12/2150 13:30", None),  # December or January
        ("2150-02-31", None),
        ("2150-01-31 24:00:00", None),
        ("2150-01-31 13:30:00 or so", None),
        ("31-JAN-50", None),
        ("50-01-31 13:30:00", None),
        ("  50-01-31 13:30:00", None),  # as long as one with four digits
        ("50-01-31", None),
        ("0050-01-31 13:30:00", None),  # what R makes of 50-01-31
        ("00500131", None),
        ("00-01-31 13:30:00", None),  # Python has no year 0
        ("+12150-01-31 13:30:00", None),
        ("9999-12-31 23:59:59", datetime.datetime(9999, 12, 31, 23, 59, 59)),
        ("1/31/0050", None),
        ("1/31/50 13:30", None),
        ("2150-01-31 13:30:60", None),
        ("2150-01-31 13:30: 60", None),
        ("2150-01-31 13:30:60.5", None),
        ("2150-01-31 1:30:60 PM", None),
        ("1000-01-01 00:00:00", datetime.datetime(1000, 1, 1)),
        ("", None),
    ],
)
def test_a_time_is_read_whole_or_not_at_all(text, expected):
    assert times.read(pl.Series([text, None])).to_list() == [expected, None]


def test_a_bad_time_among_others_is_refused_alone():
    text = pl.Series(["2150-01-31 13:30:00", "50-01-31 13:30:00", None, "2150-01-31 13:30:60"])
    assert times.read(text).to_list() == [AFTERNOON, None, None, None]


@pytest.mark.parametrize("columns", [("admittime", "dischtime", "deathtime"), ("dod",), ("intime", "outtime")])
def test_years_of_two_digits_stop_the_build(tmp_path, columns):
    whole = stay(0, deathtime=at(70), dod="2150-01-03")
    short = {column: whole[column].replace("2150", "00").replace("2149", "00") for column in columns}
    iv = write_mimic_iv(tmp_path / "iv", [whole | short], [chart(0, 3, HEART_RATE, "70")])
    with pytest.raises(UserError, match="looks like '99-99-99") as caught:
        build.build(iv, None, tmp_path / "out", tasks=["mortality"])
    assert caught.value.field in columns and not (tmp_path / "out/mortality").exists()


def test_years_of_two_digits_in_events_stop_the_build(tmp_path):
    charts = [chart(0, h, HEART_RATE, "70", charttime=at(h).removeprefix("21")) for h in range(1, 9)]
    iv = write_mimic_iv(tmp_path / "iv", [stay(0)], charts)
    with pytest.raises(UserError, match="looks like '99-99-99 99:99:99'") as caught:
        build.build(iv, None, tmp_path / "out", tasks=["pheno"])
    assert caught.value.field == "charttime"


def test_a_column_shows_whether_the_month_comes_first():
    dates = times.read(pl.Series(["1/2/2150", "1/31/2150"]))
    assert dates.to_list() == [datetime.datetime(2150, 1, 2), datetime.datetime(2150, 1, 31)]
    assert times.read(pl.Series(["1/2/2150", "31/1/2150"]))[0] == datetime.datetime(2150, 2, 1)
    assert times.read(pl.Series(["1/31/2150", "31/1/2150"])).to_list() == [None, None]


def _study_time(date, clock):
    return times.study_times(pl.DataFrame({"StudyDate": [date, None], "StudyTime": [clock, clock]}))[0]


@pytest.mark.parametrize(
    "date", ["21500131", "21500131.0", "2.1500131e7", "2150-01-31", "2150-01-31 00:00:00 UTC", "1/31/2150"]
)
def test_study_dates(date):
    assert _study_time(date, "133000.123") == AFTERNOON


@pytest.mark.parametrize("date", ["2.150013e7", "2.150013e+07", "2e7", "2.15001310e8", "50-01-31", "500131"])
def test_study_dates_that_lost_digits_are_refused(date):
    assert _study_time(date, "133000.123") is None


@pytest.mark.parametrize(
    ("clock", "expected"),
    [
        *((text, AFTERNOON) for text in ("133000", "133000.9", "133000,9", "1.33e+05", "13:30:00", "13:30", "1:30 PM")),
        *((text, AFTERNOON) for text in ("13:30:00.123", "0 days 13:30:00", "1900-01-01 13:30:00")),
        *((text, MORNING) for text in ("13000.0", "1:30:00")),
        *((text, None) for text in ("", "noon", "246060.0", "133060", "13:30:60", "-5", "1333000", "1 days 13:30:00")),
    ],
)
def test_study_times(clock, expected):
    assert _study_time("2150-01-31", clock) == expected
    assert _study_time("2150-01-31 10:00:00", clock) is None  # two clock times


def test_many_study_times_below_1_are_fractions_of_a_day():
    clocks = [str(hour / 24) for hour in range(24)]
    found = times.study_times(pl.DataFrame({"StudyDate": ["21500131"] * 24, "StudyTime": clocks}))
    assert found.dt.hour().to_list() == list(range(24))


@pytest.mark.parametrize(("clocks", "read"), [(range(100, 2300, 100), 0), (range(100, 2500, 100), 24), ([1034], 1)])
def test_many_study_times_of_four_digits_are_not_taken_for_minutes_and_seconds(clocks, read):
    clocks = list(map(str, clocks))
    found = times.study_times(pl.DataFrame({"StudyDate": ["21500131"] * len(clocks), "StudyTime": clocks}))
    assert found.drop_nulls().len() == read


def test_few_study_times_below_1_are_midnight_or_unreadable():
    assert _study_time("2150-01-31", "0.0") == datetime.datetime(2150, 1, 31)
    assert _study_time("2150-01-31", "0.5625") is None  # 13:30 as a fraction of a day, or half a second past midnight


def test_a_study_time_without_a_value_does_not_hide_the_others():
    clocks = [*(str(hour / 24) for hour in range(24)), "NaN", "-0.5", "-inf", None]
    found = times.study_times(pl.DataFrame({"StudyDate": ["21500131"] * 28, "StudyTime": clocks}))
    assert found.dt.hour().to_list() == [*range(24), None, None, None, None]


@pytest.mark.parametrize("nothing", ["NA", "NaT", "NULL", "#N/A", "(null)", "."])
def test_what_stands_for_no_time_is_missing_and_not_unreadable(tmp_path, capsys, nothing):
    text = pl.Series(["2150-01-31", nothing, f" {nothing.lower()}", "", None, "2150-01"])
    tally = invalid.Tally(invalid.TIMES).add(text, times.read(text).is_not_null())
    assert (tally.num_given, tally.num_invalid, tally.first) == (2, 1, "the first looks like '9999-99'")
    stays = [stay(n, deathtime=nothing, dod=nothing) for n in range(3)]
    charts = [chart(n, 3, HEART_RATE, "70", storetime=nothing) for n in range(3)]
    labs = [lab(n, 3, 50931, nothing, valuenum="110", hadm_id=nothing) for n in range(3)]
    images = [image(0, 10), image(1, 10, StudyTime=nothing)]
    iv, cxr = write_mimic_iv(tmp_path / "iv", stays, charts, labs), write_mimic_cxr(tmp_path / "cxr", images)
    build.build(iv, cxr, tmp_path / "out", tasks=["mortality"])
    counts = records.manifest(tmp_path / "out", "mortality")["counts"]
    assert not any(counts["unreadable_times"].values())
    assert counts["event_rows"]["no hadm_id"] == {"Glucose": 3}
    assert [record["has_cxr"] for _, record in sorted(by_stay(tmp_path / "out", "mortality").items())] == [1, 0, 0]
    assert "1 of 2 X-rays have no valid time" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"StudyDate": "20500101"}, {"subject_id": 19_000_000}, {}, "missing"])
def test_x_rays_of_which_none_belongs_to_a_stay_give_a_warning(tmp_path, capsys, change):
    is_missing = change == "missing"
    images = [image(n, 10, **({} if is_missing else change)) for n in range(3)]
    iv = write_mimic_iv(tmp_path / "iv", [stay(n) for n in range(3)], [chart(n, 3, HEART_RATE, "70") for n in range(3)])
    cxr = write_mimic_cxr(tmp_path / "cxr", images)
    if is_missing:  # the X-rays were taken during stays
        shutil.rmtree(cxr / "files")
    build.build(iv, cxr, tmp_path / "out", tasks=["pheno"], allow_missing_images=1.0 if is_missing else None)
    says_none = "none of the 3 AP X-rays was taken in a task's window" in capsys.readouterr().err
    assert says_none == (bool(change) and not is_missing)


def test_x_rays_are_paired_whatever_wrote_their_dates(tmp_path, capsys):
    images = [image(n, 10, StudyDate="2150-01-01", StudyTime="10:00:00") for n in range(3)]
    iv = write_mimic_iv(tmp_path / "iv", [stay(n) for n in range(3)], [chart(n, 3, HEART_RATE, "70") for n in range(3)])
    build.build(iv, write_mimic_cxr(tmp_path / "cxr", images), tmp_path / "out", tasks=["pheno"])
    assert all(record["has_cxr"] for record in by_stay(tmp_path / "out", "pheno").values())
    assert "valid time" not in capsys.readouterr().err


@pytest.mark.parametrize(("unreadable", "stops"), [(2, False), (3, True)])
def test_unreadable_times_of_events_and_x_rays_warn_and_stop_above_1_percent(tmp_path, capsys, unreadable, stops):
    charts = [chart(0, h / 4, HEART_RATE, "70") for h in range(200)]
    images = [image(n, 10) for n in range(200)]
    for row, picture in zip(charts[:unreadable], images):
        row["charttime"] = "2150-01-01 noon"
        picture["StudyTime"] = "SMITH"
    iv, cxr = write_mimic_iv(tmp_path / "iv", [stay(0)], charts), write_mimic_cxr(tmp_path / "cxr", images, (8, 8))
    for folder, column in ((None, "charttime"), (cxr, "StudyDate, StudyTime")):
        if stops:
            with pytest.raises(UserError, match=r"more than 1 %") as caught:
                build.build(iv, folder, tmp_path / "out", tasks=["pheno"])
            assert (caught.value.field, caught.value.value) == (column, 3) and "SMITH" not in str(caught.value)
        else:
            build.build(iv, folder, tmp_path / f"out {column}", tasks=["pheno"])
            assert f"2 of 200 times in column '{column}'" in capsys.readouterr().err
            counts = records.manifest(tmp_path / f"out {column}", "pheno")["counts"]
            assert counts["unreadable_times"]["chartevents.charttime"] == 2


def test_an_afternoon_is_not_read_as_morning(tmp_path):
    charts = [chart(0, 1, HEART_RATE, "90", charttime="2150-01-01 01:30:00 PM"), chart(0, 40, HEART_RATE, "70")]
    iv = write_mimic_iv(tmp_path / "iv", [stay(0, dischtime="2150-01-05", deathtime=at(80))], charts)
    build.build(iv, None, tmp_path / "out", tasks=["pheno", "mortality"], timestep_h=1)
    observed = by_stay(tmp_path / "out", "pheno")[0]["ehr"][:, schema.CHANNELS.index("mask->Heart Rate")]
    assert observed.nonzero()[0].tolist() == [13, 39]
    assert by_stay(tmp_path / "out", "mortality")[0]["label"].tolist() == [1]


def test_the_demo_without_its_midnights_is_the_same(real_data):
    text = pl.read_csv(real_data / "mimic-iv-demo-2.2/icu/chartevents.csv.gz", columns=["charttime"])["charttime"]
    short = text.str.replace(" 00:00:00", "", literal=True)
    assert (short != text).sum() > 3223 and times.read(short).equals(times.read(text))
