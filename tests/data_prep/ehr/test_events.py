"""Raw rows to events: which rows are kept, and how each profile cleans a value."""

import gzip

import polars as pl
import pytest
from raw_tables import chart, lab, stay, write_mimic_iv

from data_prep import profiles
from data_prep.ehr import cleaning, cohort, events
from data_prep.raw import invalid, tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

EYE, MOTOR, VERBAL, CAPILLARY = 220739, 223901, 223900, 223951
FIO2, HEIGHT_IN, HEIGHT_CM, TEMP_F, TEMP_C = 223835, 226707, 226730, 223761, 223762
HEART_RATE, SYSTOLIC, DIASTOLIC, WEIGHT_LB, WEIGHT_KG = 220045, 220050, 220051, 226531, 224639
GLUCOSE_LAB, PH_LAB, O2_LAB = 50931, 50820, 50817


def _extract(root, charts=(), labs=(), profile="paper", stays=None):
    """Return events as rows (stay, time_s, variable name, value), and the counts."""
    raw = tables.mimic_iv(write_mimic_iv(root / "raw", stays or [stay(1), stay(2)], charts, labs))
    folder = root / "events"
    folder.mkdir()
    cohort_stays, _ = cohort.read_stays(raw)
    events.extract(raw, cohort_stays, profiles.rules(profile), folder)
    frames = [events.read_bucket(folder, b) for b in range(events.num_buckets(len(cohort_stays)))]
    frames = [f.select("stay", "time_s", "variable", "value") for f in frames if f is not None]
    rows = [(s, t, schema.VARIABLES[v].name, value) for frame in frames for s, t, v, value in frame.iter_rows()]
    return rows, events.read_counts(folder)


def _class(variable, text):
    return float(schema.VARIABLES[cleaning.VARIABLE[variable]].classes.index(text))


EYES = "Glascow coma scale eye opening"
VALUES = [
    # row, paper, released (None: dropped)
    (chart(1, 5, FIO2, "40"), 0.4, 0.4),
    (chart(1, 5, FIO2, "0.5"), 0.5, 0.005),
    (chart(1, 5, HEIGHT_IN, "70"), 177.8, 70),
    (chart(1, 5, HEIGHT_CM, "170"), 170, 170),
    (chart(1, 5, HEIGHT_CM, "825070"), None, 825070),
    (chart(1, 5, HEIGHT_CM, "0"), None, 0),
    (chart(1, 5, HEIGHT_IN, "0"), None, 0),
    (chart(1, 5, WEIGHT_KG, "0"), None, 0),
    (chart(1, 5, HEART_RATE, "0"), 0, 0),
    (chart(1, 5, HEIGHT_CM, "250"), 240, 250),
    (chart(1, 5, TEMP_F, "98.6"), 37, 37),
    (chart(1, 5, TEMP_F, "78"), 25.5556 + 0.4444, 78),  # clipped to 26
    (chart(1, 5, TEMP_C, "37.5"), 37.5, 37.5),
    (chart(1, 5, TEMP_C, "99"), None, 37.2222),  # Fahrenheit in the Celsius item
    (chart(1, 5, WEIGHT_LB, "100"), 45.3592, 45.3592),
    (chart(1, 5, WEIGHT_KG, "100"), 100, 100),
    (chart(1, 5, SYSTOLIC, "120/80"), 120, 120),
    (chart(1, 5, DIASTOLIC, "120/80"), 80, 80),
    (chart(1, 5, 220277, "0.97"), 97, 97),
    (chart(1, 5, 220277, "97"), 97, 97),
    (chart(1, 5, HEART_RATE, " 80 "), 80, 80),
    (chart(1, 5, HEART_RATE, "nan"), None, None),
    (chart(1, 5, HEART_RATE, "1e999"), None, None),
    (chart(1, 5, EYE, "To Speech"), _class(EYES, "To Speech"), _class(EYES, "To Speech")),
    (chart(1, 5, EYE, "None"), _class(EYES, "None"), _class(EYES, "None")),
    (chart(1, 5, EYE, "winks"), None, None),
    (chart(1, 5, CAPILLARY, "Abnormal >3 Seconds"), 1, None),
    (chart(1, 5, CAPILLARY, "Normal <3 Seconds"), 0, None),
    (lab(1, 5, GLUCOSE_LAB, "110"), 110, 110),
    (lab(1, 5, GLUCOSE_LAB, "___", valuenum="110"), 110, None),
    (lab(1, 5, GLUCOSE_LAB, "ERROR", valuenum=""), None, None),
    (lab(1, 5, GLUCOSE_LAB, "-5"), None, None),
    (lab(1, 5, PH_LAB, "5.0"), None, 5.0),
    (lab(1, 5, O2_LAB, "0.9"), 90, 90),
]


@pytest.mark.parametrize(("profile", "column"), [("paper", 1), ("released", 2)])
def test_each_profile_cleans_values_its_own_way(tmp_path, profile, column):
    """All rows in one extraction, told apart by their second."""
    rows = [row | {"charttime": f"2150-01-01 05:00:{i:02d}"} for i, (row, *_) in enumerate(VALUES)]
    charts, labs = ([row for row in rows if ("stay_id" in row) == is_chart] for is_chart in (True, False))
    extracted, _ = _extract(tmp_path, charts, labs, profile)
    value_of = {time_s - 5 * 3600: value for _, time_s, _, value in extracted}
    for i, case in enumerate(VALUES):
        expected = case[column]
        assert value_of.get(i) == (None if expected is None else pytest.approx(expected, rel=1e-5)), case[0]


def test_rows_outside_their_stay_are_dropped_and_every_row_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(invalid, "MAX_SHARE", 0.5)
    charts = [
        chart(1, 5, HEART_RATE, "80"),
        chart(1, 0, HEART_RATE, "81"),
        chart(1, 72, HEART_RATE, "82"),
        chart(1, -0.01, HEART_RATE, "83"),
        chart(1, 72.01, HEART_RATE, "84"),
        chart(1, 5, HEART_RATE, "85", stay_id=30_999_999),
        chart(1, 5, HEART_RATE, "86", hadm_id=20_999_999),
        chart(1, 5, HEART_RATE, "87", hadm_id="unknown"),
        chart(1, 5, HEART_RATE, "88", charttime="2150-13-45 00:00:00"),
        chart(1, 5, HEART_RATE, "fast"),
        chart(1, 5, 999_999, "89"),
        chart(1, 6, HEART_RATE, "90", stay_id=""),
        chart(2, 7, HEART_RATE, "400"),
        chart(2, 7, HEART_RATE, "360"),
        chart(1, 5, HEART_RATE, "91", subject_id=10_000_002),
        chart(1, 5, HEART_RATE, "92", subject_id=""),
    ]
    labs = [lab(2, 8, GLUCOSE_LAB, "100"), lab(2, 9, GLUCOSE_LAB, "101", subject_id=1)]
    rows, counts = _extract(tmp_path, charts, labs)
    assert [(s, t, v) for s, t, name, v in rows if name == "Heart Rate"] == [
        (0, 18000, 80),
        (0, 0, 81),
        (0, 259200, 82),
        (0, 21600, 90),
        (1, 25200, 350),
    ]
    assert [row for row in rows if row[2] == "Glucose"] == [(1, 28800, "Glucose", 100)]
    assert {fate: by_variable.get("Heart Rate", 0) for fate, by_variable in counts.items()} == {
        "kept": 5,
        "another stay": 1,
        "another patient": 2,
        "no stay of the cohort": 2,
        "no valid time": 1,
        "before or after the stay": 2,
        "no valid value": 1,
        "impossible value": 1,
        "clipped (and kept)": 1,
    }


def test_batches_and_buckets_change_nothing(tmp_path, monkeypatch):
    charts = [chart(n, hour, HEART_RATE, str(60 + hour)) for hour in range(1, 40) for n in (1, 2, 3)]
    labs = [lab(n, hour, GLUCOSE_LAB, str(90 + hour)) for hour in range(1, 20) for n in (1, 2, 3)]
    stays = [stay(1), stay(2), stay(3)]
    usual, counts = _extract(tmp_path, charts, labs, stays=stays)
    monkeypatch.setattr(events, "ROWS_PER_BATCH", 5)
    monkeypatch.setattr(events, "ROWS_PER_WRITE", 10)
    monkeypatch.setattr(events, "STAYS_PER_BUCKET", 2)
    # polars would read a small table in one batch.
    monkeypatch.setattr(pl.LazyFrame, "collect_batches", lambda self: self.collect().iter_slices(3))
    (tmp_path / "small").mkdir()
    small, small_counts = _extract(tmp_path / "small", charts, labs, stays=stays)
    assert len(usual) == 174 and sorted(small) == sorted(usual) and small_counts == counts
    # 117 and 57 rows, read 6 at a time, written 12 at a time.
    last_part = {path.parent.name: path.name for path in sorted((tmp_path / "small/events").glob("*/*.parquet"))}
    assert last_part == {"bucket=00000": "000014.parquet", "bucket=00001": "000014.parquet"}
    for n in range(3):  # each stay's events stay in table order
        assert [row for row in small if row[0] == n] == [row for row in usual if row[0] == n]


def test_a_time_beyond_int32_is_outside_the_stay(tmp_path):
    far = chart(1, 1, HEART_RATE, "90", charttime="2240-01-01 00:00:00")
    raw = tables.mimic_iv(write_mimic_iv(tmp_path / "raw", [stay(1)], [chart(1, 5, HEART_RATE, "80"), far]))
    stays = cohort.read_stays(raw)[0].with_columns(los_h=pl.lit(24.0 * 365 * 400))
    (tmp_path / "events").mkdir()
    events.extract(raw, stays, profiles.PAPER, tmp_path / "events")
    assert events.read_bucket(tmp_path / "events", 0)["time_s"].to_list() == [5 * 3600]
    assert events.read_counts(tmp_path / "events")["before or after the stay"] == {"Heart Rate": 1}


def test_quotes_line_ends_and_ragged_rows_are_read(tmp_path):
    root = write_mimic_iv(tmp_path / "raw", [stay(1)], [chart(1, 5, HEART_RATE, "80")])
    path = root / "icu/chartevents.csv.gz"
    header, row = gzip.decompress(path.read_bytes()).decode().splitlines()
    other = row.replace(",80,80,", ',"81",81,').replace("05:00:00", "06:00:00")
    path.write_bytes(
        gzip.compress(f"{header}\r\n{row}\r\n{other}\n{row[:20]}\n{row.replace(',80,', ',')},,,,,,\n".encode())
    )
    raw = tables.mimic_iv(root)
    (tmp_path / "events").mkdir()
    events.extract(raw, cohort.read_stays(raw)[0], profiles.PAPER, tmp_path / "events")
    assert events.read_bucket(tmp_path / "events", 0)["value"].to_list()[:2] == [80, 81]


def test_an_error_names_a_truncated_table(tmp_path):
    charts = [chart(1, 5 + i / 3600, HEART_RATE, str(60 + i * 7919 % 97)) for i in range(3000)]
    root = write_mimic_iv(tmp_path / "raw", [stay(1)], charts)
    path = root / "icu/chartevents.csv.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    raw = tables.mimic_iv(root)
    (tmp_path / "events").mkdir()
    with pytest.raises(UserError) as caught:
        events.extract(raw, cohort.read_stays(raw)[0], profiles.PAPER, tmp_path / "events")
    assert caught.value.path == path and "truncated" in str(caught.value)


def test_every_item_belongs_to_one_variable():
    for items in (events.CHART_ITEMS, events.LAB_ITEMS):
        ids = [item for group in items.values() for item in group]
        assert len(ids) == len(set(ids)) and set(items) <= set(cleaning.VARIABLE)
