"""X-rays' times and labels, from the tables of MIMIC-CXR-JPG."""

import datetime

import polars as pl
import pytest
from raw_tables import image, image_path, write_mimic_cxr, write_table
from refusals import refused

from data_prep.images import metadata
from data_prep.raw import invalid, tables, times
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError


def _raw(root, images, **options):
    return tables.mimic_cxr(write_mimic_cxr(root, images, **options))


def test_study_times_may_lack_leading_zeros(tmp_path):
    images = [image(1, 0.5 + 42 / 3600), image(2, 15), image(3, 1, StudyTime=""), image(4, 1, StudyDate="")]
    table, counts = metadata.read_metadata(_raw(tmp_path, images))
    assert table["time"].cast(pl.String).to_list()[:2] == ["2150-01-01 00:30:42.000000", "2150-01-01 15:00:00.000000"]
    assert table["time"].to_list()[2:] == [None, None]
    assert counts["X-rays without a valid time (never paired)"] == 2
    assert table["path"].to_list() == [image_path(row) for row in images]
    assert all((tmp_path / path).is_file() for path in table["path"])


@pytest.mark.parametrize(
    ("date", "clock"),
    [
        (datetime.date(2150, 1, 1), datetime.time(15)),
        (datetime.datetime(2150, 1, 1), datetime.timedelta(hours=15)),
        (21500101, 150000.5),
        (21500101.0, "15:00:00"),
        (datetime.datetime(2150, 1, 1), datetime.timedelta(hours=15, seconds=0.5)),
    ],
)
def test_study_times_may_have_any_type_in_parquet(tmp_path, date, clock):
    raw = _raw(tmp_path, [image(1, 1)])
    path = raw["metadata"].path
    table = pl.read_csv(path).with_columns(StudyDate=pl.lit(date), StudyTime=pl.lit(clock))
    path.unlink()
    table.write_parquet(tmp_path / "mimic-cxr-2.0.0-metadata.parquet")
    found, _ = metadata.read_metadata(tables.mimic_cxr(tmp_path))
    assert found["time"].to_list() == [datetime.datetime(2150, 1, 1, 15)]


def test_ids_that_parquet_has_rounded_are_refused(tmp_path):
    ids = pl.DataFrame(
        {"stay_id": pl.Series([39553978.0], dtype=pl.Float32), "valuenum": pl.Series([1.5], dtype=pl.Float32)}
    )
    ids.write_parquet(tmp_path / "events.parquet")
    table = tables.Table(tmp_path / "events.parquet", "events", {name: name for name in ids.columns})
    assert table.read("valuenum")["valuenum"].to_list() == ["1.5"]
    with refused(path=table.path, value="stay_id"):
        table.read("stay_id")


def test_times_of_parquet_are_read_whole_or_not_at_all(tmp_path):
    raw = _raw(tmp_path / "csv", [image(n, 1) for n in range(200)], size=(8, 8))
    clocks = [datetime.timedelta(hours=hours) for hours in (30, -1, *[15] * 198)]
    table = pl.read_csv(raw["metadata"].path).with_columns(StudyTime=pl.Series(clocks))
    raw["metadata"].path.unlink()
    table.write_parquet(tmp_path / "csv/mimic-cxr-2.0.0-metadata.parquet")
    _, counts = metadata.read_metadata(tables.mimic_cxr(tmp_path / "csv"))
    assert counts["X-rays without a valid time (never paired)"] == 2
    half_past = datetime.datetime(2150, 1, 1, 1, 0, 0, 500_000)
    pl.DataFrame({"charttime": [half_past]}).write_parquet(tmp_path / "events.parquet")
    table = tables.Table(tmp_path / "events.parquet", "events", {"charttime": "charttime"})
    assert table.read("charttime").select(times.time("charttime"))["charttime"].to_list() == [half_past]


@pytest.mark.parametrize(
    ("changes", "with_ids", "without_time"),
    [
        ({"subject_id": "1000000x"}, 1, 0),
        ({"dicom_id": ""}, 1, 0),
        *(({"dicom_id": text}, 1, 0) for text in ("../../secret", "/etc/passwd", "a\0b", "a.b", "a" * 65)),
        ({"subject_id": "-10000002"}, 1, 0),
        ({"study_id": ""}, 1, 0),
        ({"study_id": "99999999999999999999"}, 1, 0),
        ({"StudyTime": "noon"}, 2, 1),
        ({"StudyDate": "21501345"}, 2, 1),
    ],
)
def test_invalid_rows_are_counted(tmp_path, monkeypatch, changes, with_ids, without_time):
    monkeypatch.setattr(invalid, "MAX_SHARE", 0.5)
    write_table(
        tmp_path / "mimic-cxr-2.0.0-chexpert.csv", "subject_id,study_id," + ",".join(schema.RADIOLOGY_LABELS), []
    )
    header = "dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime"
    write_table(tmp_path / "mimic-cxr-2.0.0-metadata.csv", header, [image(1, 1), image(2, 1) | changes])
    table, counts = metadata.read_metadata(tables.mimic_cxr(tmp_path))
    assert counts == {
        "rows of metadata": 2,
        "X-rays with ids": with_ids,
        "X-rays without a valid time (never paired)": without_time,
    }
    assert table["time"].drop_nulls().len() == 1 and table["dicom_id"][0] == "image-0001-00"


@pytest.mark.parametrize(
    ("column", "change", "form"),
    [
        ("dicom_id", lambda text: f"{text * 3}.dcm", "-9999-99.aaa'"),
        ("dicom_id", lambda text: "", "the first is empty"),
        ("dicom_id", lambda text: "\x1b[31m", "'?[99a'"),
        ("subject_id", lambda text: f"p{text}", "'a99999999'"),
        ("study_id", lambda text: f"s{text}", "'a99999999'"),
        ("study_id", lambda text: "-1", "'-9'"),
    ],
)
@pytest.mark.parametrize("num_bad", [1, 11])
def test_over_one_percent_of_invalid_ids_stop_the_build(tmp_path, capsys, column, change, form, num_bad):
    header = "dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime"
    rows = [image(n, 1) for n in range(100)]
    _raw(tmp_path, rows[:1] + rows[-1:], size=(8, 8))
    for row in rows[-num_bad:]:
        row[column] = change(str(row[column]))
    write_table(tmp_path / "mimic-cxr-2.0.0-metadata.csv", header, rows)
    raw = tables.mimic_cxr(tmp_path)
    if num_bad == 11:
        with refused(path=raw["metadata"].path, field=column, value=11) as caught:
            metadata.read_metadata(raw)
        assert form in str(caught.value)
    else:
        assert len(metadata.read_metadata(raw)[0]) == 99
        line, *others = capsys.readouterr().err.splitlines()
        assert len(others) == (column == "dicom_id")  # the split table lists an X-ray that has no row
        assert line.startswith("warning: ") and f"1 of 100 ids of X-rays in column {column!r}" in line and form in line


def test_a_metadata_table_without_valid_rows_is_reported(tmp_path):
    with pytest.raises(UserError) as raised:
        metadata.read_metadata(_raw(tmp_path, [image(1, 1) | {"study_id": ""}]))
    assert raised.value.path.name == "mimic-cxr-2.0.0-metadata.csv.gz"


def test_a_missing_table_is_reported(tmp_path):
    _raw(tmp_path, [image(1, 1)], gz=False)
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").unlink()
    with pytest.raises(UserError, match=r"mimic-cxr-2\.0\.0-metadata\.csv\.gz"):
        tables.mimic_cxr(tmp_path)


def test_an_image_without_a_metadata_row_is_reported_and_counted(tmp_path, capsys):
    images = [image(1, 1), image(2, 1)]
    raw = _raw(tmp_path, images, gz=False)
    header = "dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime"
    write_table(
        tmp_path / "mimic-cxr-2.0.0-metadata.csv", header, [{c: images[0][c] for c in header.split(",")}], gz=False
    )
    table, counts = metadata.read_metadata(raw)
    assert table["dicom_id"].to_list() == ["image-0001-00"]
    assert counts["X-rays without a metadata row"] == 1
    assert counts["dicom_ids without a metadata row"] == ["image-0002-00"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "dropping 1 X-ray(s)" in line and "metadata.csv" in line and "image-0002-00" not in line
