"""Which file of a table is read, and what a damaged one is said to be."""

import gzip

import polars as pl
import pytest
from raw_tables import image, stay, write_mimic_cxr, write_mimic_iv
from refusals import refused

from data_prep.raw import tables


def test_of_two_files_of_a_table_the_build_says_which_it_reads(tmp_path, capsys):
    images = [image(1, 1)]
    for gz in (True, False):
        write_mimic_cxr(tmp_path / "cxr", images, size=(8, 8), gz=gz)
        write_mimic_iv(tmp_path / "iv", [stay(1)], gz=gz)
    (tmp_path / "iv/hosp/patients.csv").unlink()
    (tmp_path / "cxr/mimic-cxr-2.0.0-chexpert.csv").unlink()
    (tmp_path / "cxr/mimic-cxr-2.0.0-split.csv").unlink()
    assert tables.mimic_iv(tmp_path / "iv")["admissions"].path == tmp_path / "iv/hosp/admissions.csv.gz"
    (line,) = capsys.readouterr().err.splitlines()
    names = [tmp_path / "iv/hosp" / name for name in ("admissions.csv.gz", "admissions.csv")]
    assert line == f"warning: {names[0]} is read, not {names[1]} (4 more such files are not read)"
    assert tables.mimic_cxr(tmp_path / "cxr")["metadata"].path.suffix == ".gz"
    (line,) = capsys.readouterr().err.splitlines()
    names = [tmp_path / "cxr" / f"mimic-cxr-2.0.0-metadata.{end}" for end in ("csv.gz", "csv")]
    assert line == f"warning: {names[0]} is read, not {names[1]}"


def test_lists_of_others_beside_the_tables_are_not_read(tmp_path, capsys):
    root = write_mimic_cxr(tmp_path, [image(1, 1)], size=(8, 8), gz=False)
    (root / "mimic-cxr-ehr-split.csv").write_text("dicom_id\n")  # of the released code
    assert tables.mimic_cxr(root)["split"].path.name == "mimic-cxr-2.0.0-split.csv"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_only_of_a_csv_a_quote_may_be_open(tmp_path, ending):
    path = tmp_path / f"table{ending}"
    if ending == ".csv":
        path.write_text('a,b\n1,"2\n')
    else:
        pl.DataFrame({"a": ["1"]}).write_parquet(path)
        path.write_bytes(path.read_bytes()[:-9])
    table = tables.Table(path, path.name, {"a": "a"})
    with refused(path=path) as caught:
        table.read("a")
    assert ("a quote in it" in str(caught.value)) == (ending == ".csv")
    assert ("Parquet" in str(caught.value)) == (ending == ".parquet")


def test_rows_of_admissions_between_two_lone_quotes_are_refused(tmp_path):
    root = write_mimic_iv(tmp_path, [stay(n) for n in range(100)])
    path = root / "hosp/admissions.csv.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    cells = lines[20].split(b",")
    lines[20] = b",".join([*cells[:5], b'"' + cells[5], *cells[6:]])
    cells = lines[60].split(b",")
    lines[60] = b",".join([*cells[:5], cells[5] + b'"', *cells[6:]])
    path.write_bytes(gzip.compress(b"".join(lines)))
    with refused(path=path, value=39):
        tables.mimic_iv(root)["admissions"].read("hadm_id")


def test_a_table_that_is_a_folder_of_parts_is_named(tmp_path):
    root = write_mimic_iv(tmp_path, [stay(0)])
    (root / "icu/chartevents.csv.gz").unlink()
    (root / "icu/chartevents.parquet").mkdir()
    with refused(path=root / "icu/chartevents.parquet", field="--mimic_iv"):
        tables.mimic_iv(root)


def test_item_ids_of_six_digits_may_be_of_32_bit_floats(tmp_path):
    path = tmp_path / "chartevents.parquet"
    pl.DataFrame({"itemid": pl.Series([220_045], dtype=pl.Float32)}).write_parquet(path)
    assert tables.Table(path, path.name, {"itemid": "itemid"}).read("itemid")["itemid"].to_list() == ["220045.0"]
