"""The 14 labels of X-rays: known values in any writing, and anything else refused."""

import polars as pl
import pytest
from raw_tables import image, write_mimic_cxr, write_table
from refusals import refused

from data_prep.images import chexpert, metadata
from data_prep.raw import tables
from medfuse_jax import schema

HEADER = "study_id," + ",".join(schema.RADIOLOGY_LABELS)


def _raw(root, rows=None):
    """Return the tables of an X-ray, with these rows of labels."""
    raw = tables.mimic_cxr(write_mimic_cxr(root, [image(1, 1)], size=(8, 8)))
    if rows is not None:
        write_table(root / "mimic-cxr-2.0.0-chexpert.csv", HEADER, rows)
    return raw


def _rows(values, column="Edema"):
    return [{"study_id": 50_000_100 + n, column: value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("positive", "negative", "uncertain"),
    [
        ("1.0", "0.0", "-1.0"),
        ("1", "0", "-1"),
        (" 1 ", "-0.0", "-1.00"),
        ("1e0", "0e0", "-1e+00"),
        ("True", "False", "-1"),
        ("TRUE", "false", ""),
    ],
)
def test_only_a_positive_finding_is_1_in_any_writing(tmp_path, capsys, positive, negative, uncertain):
    row = {"study_id": 50_000_100, "Edema": positive, "Fracture": negative, "Pneumonia": uncertain}
    labels = chexpert.read_labels(_raw(tmp_path, [row | {"No Finding": "1", "Lung Lesion": "NA"}]))
    assert {name for name in schema.RADIOLOGY_LABELS if labels[name][0]} == {"Edema", "No Finding"}
    assert labels.columns == ["study_id", *schema.RADIOLOGY_LABELS] and not capsys.readouterr().err


@pytest.mark.parametrize("dtype", [pl.Boolean, pl.Int8, pl.Float32])
def test_labels_may_have_any_type_in_parquet(tmp_path, dtype):
    raw = _raw(tmp_path)
    labels = [pl.Series(name, [name == "Edema"]).cast(dtype) for name in schema.RADIOLOGY_LABELS]
    raw["chexpert"].path.unlink()
    pl.DataFrame([pl.Series("study_id", [1]), *labels]).write_parquet(tmp_path / "mimic-cxr-2.0.0-chexpert.parquet")
    found = chexpert.read_labels(tables.mimic_cxr(tmp_path))
    assert [name for name in schema.RADIOLOGY_LABELS if found[name][0]] == ["Edema"]


@pytest.mark.parametrize(
    ("value", "form"),
    [("positive", "aaaaaaaa"), ("1,0", "9,9"), ("2", "9"), ("0.5", "9.9"), ("\u22121", "\u22129"), ("yes 7", "aaa 9")],
)
def test_over_one_percent_of_unknown_labels_stop_the_build(tmp_path, capsys, value, form):
    raw = _raw(tmp_path, _rows(["1.0"] * 89 + [""] * 50 + [value] * 11))
    with refused(path=raw["chexpert"].path, field="Edema", value=11) as caught:
        chexpert.read_labels(raw)
    assert "11 of 100 labels" in str(caught.value) and f"'{form}'" in str(caught.value)
    assert "positive" not in str(caught.value)
    raw = _raw(tmp_path, _rows(["1.0"] * 99 + [value]) + _rows([value] + ["0.0"] * 99, "Fracture"))
    assert chexpert.read_labels(raw)["Edema"].sum() == 99
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "1 of 100 labels in column 'Edema'" in line and f"'{form}'" in line
    assert "and 1 in other columns" in line


def test_over_one_percent_of_invalid_studies_stop_the_build(tmp_path):
    raw = _raw(tmp_path, [{"study_id": "s50000100", "Edema": "1.0"}])
    with refused(path=raw["chexpert"].path, field="study_id", value=1):
        chexpert.read_labels(raw)


@pytest.mark.parametrize("value", ["1.0", "-1.0"])
def test_labels_of_which_none_is_positive_give_a_warning(tmp_path, capsys, value):
    raw = _raw(tmp_path, _rows([value]))
    images, _ = metadata.read_metadata(raw)
    assert len(chexpert.labelled(raw, images)) == len(chexpert.of_labelled_studies(raw, images)) == 1
    printed = capsys.readouterr().err
    assert ("chexpert.csv.gz gives no X-ray a positive label" in printed) == (value == "-1.0")


def test_rows_without_any_value_do_not_count(tmp_path, capsys):
    rows = _rows(["1.0"] * 20)
    blank = [dict.fromkeys(rows[0], "")] * 15
    assert len(chexpert.read_labels(_raw(tmp_path, rows + blank))) == 20
    assert "invalid" not in capsys.readouterr().err


@pytest.mark.parametrize("lost", [1, 2])
def test_x_rays_of_studies_that_the_table_lacks_give_a_warning(tmp_path, capsys, lost):
    raw = _raw(tmp_path, _rows(["1.0"]))
    images = pl.DataFrame({"study_id": [50_000_100] * (100 - lost) + [1] * lost})
    assert len(chexpert.labelled(raw, images)) == 100 - lost
    assert ("the studies of 2 of 100 X-rays" in capsys.readouterr().err) == (lost == 2)


def test_a_missing_column_is_reported(tmp_path):
    raw = _raw(tmp_path)
    write_table(tmp_path / "mimic-cxr-2.0.0-chexpert.csv", HEADER.replace("Edema", "Oedema"), [])
    with refused(path=raw["chexpert"].path, field="Edema"):
        chexpert.read_labels(tables.mimic_cxr(tmp_path))
