"""Every published version of MIMIC-IV and MIMIC-CXR-JPG, plain or gzipped, gives the same records."""

import gzip

import numpy as np
import polars as pl
import pytest
from raw_tables import chart, image, lab, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.raw import tables
from medfuse_jax import records, schema

# version -> folder of patients and admissions, latest anchor years, has admit_provider_id, version by content alone.
VERSIONS = {
    "1.0": ("core", "2014 - 2016", False, "1.0"),
    "2.0": ("hosp", "2014 - 2016", False, "2.0 or 2.1"),
    "2.1": ("hosp", "2017 - 2019", False, "2.0 or 2.1"),
    "2.2": ("hosp", "2017 - 2019", True, "2.2"),
    "3.0": ("hosp", "2020 - 2022", True, "3.0 or 3.1"),
    "3.1": ("hosp", "2020 - 2022", True, "3.0 or 3.1"),
}


def _iv(root, version, gz):
    layout, years, has_provider, _ = VERSIONS[version]
    stays = [stay(n, anchor_year_group=years) for n in range(6)]
    charts = [chart(n, h, 220045, str(60 + n)) for n in range(6) for h in (1, 30)]
    codes = [(n, "4019", 9) if n % 2 else (n, "I10", 10) for n in range(6)]
    write_mimic_iv(root, stays, charts, [lab(0, 2, 50931, "110")], codes, layout=layout, gz=gz)
    if layout == "hosp" and not has_provider:
        path = root / "hosp" / ("admissions.csv.gz" if gz else "admissions.csv")
        text = pl.read_csv(path, infer_schema=False).drop("admit_provider_id").write_csv().encode()
        path.write_bytes(gzip.compress(text) if gz else text)
    return root


@pytest.mark.parametrize(
    ("version", "gz"),
    [("1.0", True), ("1.0", False), ("2.0", True), ("2.1", False), ("2.2", True), ("3.0", False), ("3.1", True)],
)
def test_each_version_gives_the_same_records(tmp_path, version, gz):
    root = _iv(tmp_path / "physionet.org/files/mimiciv" / version, version, gz)
    build.build(root, None, tmp_path / "out", tasks=["pheno", "mortality"])
    manifest = records.manifest(tmp_path / "out", "pheno")
    assert manifest["source"]["mimic_iv"] == version
    found = {r["stay_id"]: r for s in schema.SPLITS for r in records.open_split(tmp_path / "out", "pheno", s)}
    assert sorted(found) == [30_000_000 + n for n in range(6)]
    hypertension = [p.ccs for p in schema.PHENOTYPES].index(98)
    for n in range(6):
        record = found[30_000_000 + n]
        assert record["label"][hypertension] == 1 and record["label"].sum() == 1
        np.testing.assert_array_equal(record["ehr"][0, schema.CHANNELS.index("Heart Rate")], 60 + n)


@pytest.mark.parametrize("version", VERSIONS)
def test_folder_name_gives_the_version_if_the_files_agree(tmp_path, version):
    unnamed = VERSIONS[version][3]
    assert tables.mimic_iv_version(tables.mimic_iv(_iv(tmp_path / "raw", version, False))) == unnamed
    as_zip = _iv(tmp_path / f"mimic-iv-{version}", version, False)
    assert tables.mimic_iv_version(tables.mimic_iv(as_zip)) == version
    other = "1.0" if version != "1.0" else "2.2"
    misnamed = _iv(tmp_path / f"mimic-iv-{other}", version, False)
    assert tables.mimic_iv_version(tables.mimic_iv(misnamed)) == unnamed


def test_demo_is_recognised(real_data):
    found = tables.mimic_iv(real_data / "mimic-iv-demo-2.2")
    assert tables.mimic_iv_version(found) == "2.2 (demo)"


def test_complete_version_3_is_recognised_by_its_diagnoses(tmp_path, monkeypatch):
    raw = tables.mimic_iv(_iv(tmp_path / "raw", "3.1", False))
    assert tables.mimic_iv_version(raw) == "3.0 or 3.1"
    monkeypatch.setattr(tables, "DIAGNOSES_OF_3_1", 6)
    assert tables.mimic_iv_version(raw) == "3.1"
    misnamed = tables.mimic_iv(_iv(tmp_path / "mimic-iv-3.0", "3.1", False))
    assert tables.mimic_iv_version(misnamed) == "3.1"


# Files beside the tables, which are those of 2.0.0 in all cases -> recognised version.
CXR_FOLDERS = {
    "tables alone": ((), "2.0.0 or 2.1.0"),
    "test set": (("mimic-cxr-2.1.0-test-set-labeled.csv", "study_id,Edema\n1,1.0\n"), "2.1.0"),
    "list of images": (("IMAGE_FILENAMES", "files/p10/p10000032/a.jpg\n"), "2.1.0"),
    "checksums of 2.1.0": (
        ("SHA256SUMS.txt", "0a mimic-cxr-2.0.0-split.csv.gz\n1b mimic-cxr-2.1.0-test-set-labeled.csv\n"),
        "2.1.0",
    ),
    "checksums of 2.0.0": (("SHA256SUMS.txt", "0a mimic-cxr-2.0.0-split.csv.gz\n"), "2.0.0"),
}


@pytest.mark.parametrize(("beside", "version"), CXR_FOLDERS.values(), ids=CXR_FOLDERS)
def test_files_give_the_cxr_version(tmp_path, beside, version):
    root = write_mimic_cxr(tmp_path / "cxr", [image(1, 1)], version="2.0.0", gz=version == "2.0.0")
    if beside:
        (root / beside[0]).write_text(beside[1])
    assert tables.mimic_cxr_version(tables.mimic_cxr(root)) == version


@pytest.mark.parametrize("gz", [True, False])
def test_cxr_versions_are_printed_and_stored(tmp_path, capsys, gz):
    images = [image(n, 5, Edema="1.0") for n in range(6)]
    version = "2.0.0" if gz else "2.1.0"
    root = write_mimic_cxr(tmp_path / "cxr", images, size=(16, 16), version=version, gz=gz)
    (root / "SHA256SUMS.txt").write_text("0a mimic-cxr-2.0.0-split.csv.gz\n" if gz else "")
    build.build(_iv(tmp_path / "iv", "2.2", gz), root, tmp_path / "out", tasks=["pheno", "radiology"])
    assert records.manifest(tmp_path / "out", "radiology")["source"]["mimic_cxr"] == version
    printed = capsys.readouterr().err.splitlines()
    assert f"MIMIC-CXR-JPG {version} in {root}" in printed and f"MIMIC-IV 2.2 in {tmp_path / 'iv'}" in printed
    rows = [r for s in schema.SPLITS for r in records.open_split(tmp_path / "out", "radiology", s)]
    assert len(rows) == 6 and all(r["label"][schema.RADIOLOGY_LABELS.index("Edema")] for r in rows)


@pytest.mark.parametrize("name", ["physionet.org/files/mimic-cxr-jpg/{}", "mimic-cxr-jpg-{}.physionet.org"])
def test_folder_name_gives_the_cxr_version_unless_the_files_disagree(tmp_path, name):
    for version in ("2.0.0", "2.1.0"):
        root = write_mimic_cxr(tmp_path / name.format(version), [image(1, 1)])
        assert tables.mimic_cxr_version(tables.mimic_cxr(root)) == version
    (root / "SHA256SUMS.txt").write_text("0a mimic-cxr-2.0.0-split.csv.gz\n")
    assert tables.mimic_cxr_version(tables.mimic_cxr(root)) == "2.0.0"
    newer = write_mimic_cxr(tmp_path / "other", [image(1, 1)], version="2.1.0", gz=False)
    assert tables.mimic_cxr_version(tables.mimic_cxr(newer)) == "2.1.0"


def _written_as(root, ending, tree):
    """Copy a tree's tables in another format, with the types that pandas would give them, and names in capitals."""
    for path in tree.rglob("*.csv.gz"):
        table = pl.read_csv(path, try_parse_dates=True, schema_overrides={"icd_code": pl.String})
        table = table.rename(str.upper)
        target = root / path.relative_to(tree).with_name(path.name.replace(".csv.gz", ending))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".parquet":
            table.write_parquet(target)
        else:
            table.write_csv(target, compression="zstd", datetime_format="%Y-%m-%dT%H:%M:%S")
    return root


@pytest.mark.parametrize("ending", [".csv.zst", ".parquet"])
def test_other_formats_and_column_names_in_capitals_give_the_same_records(tmp_path, ending):
    iv = _iv(tmp_path / "iv", "2.2", gz=True)
    cxr = write_mimic_cxr(tmp_path / "cxr", [image(n, 5, Edema="1.0") for n in range(6)], size=(16, 16))
    other_iv, other_cxr = (_written_as(tmp_path / ending / tree.name, ending, tree) for tree in (iv, cxr))
    (other_cxr / "files").symlink_to(cxr / "files")
    build.build(iv, cxr, tmp_path / "a")
    build.build(other_iv, other_cxr, tmp_path / "b")
    for task in build.DEFAULT_TASKS:
        for split in schema.SPLITS:
            (a, b) = (list(records.open_split(tmp_path / out, task, split)) for out in "ab")
            assert len(a) == len(b)
            for ours, others in zip(a, b):
                for name, value in ours.items():
                    np.testing.assert_array_equal(others[name], value)
