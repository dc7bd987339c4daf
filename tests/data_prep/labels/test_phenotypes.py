"""Mapping the diagnoses of stays to labels."""

import numpy as np
import polars as pl
import pytest
import yaml
from raw_tables import stay, write_mimic_iv
from refusals import refused

from data_prep.labels import phenotypes
from data_prep.raw import parse, tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError


def _labels(tmp_path, codes, table=None, num_stays=3):
    stays = [stay(n) for n in range(num_stays)]
    raw = tables.mimic_iv(write_mimic_iv(tmp_path / "raw", stays, codes=codes))
    frame = pl.DataFrame({name: [s[name] for s in stays] for name in ("subject_id", "hadm_id")})
    label_NK, counts = phenotypes.labels(raw, frame, table)
    return [{schema.PHENOTYPES[k].ccs for k in np.flatnonzero(row)} for row in label_NK], label_NK, counts


def test_labels_belong_to_their_admission_in_label_order(tmp_path):
    codes = [(0, "4019", 9), (0, "I2510", 10), (0, "4019", 9), (2, " I10. ", 10), (2, "U9999", 10), (2, "4019", 10)]
    codes += [(0, text, 10) for text in ("SMITH", "I1", "I10 HIGH STREET", "", "I251000X")]
    labels, label_NK, counts = _labels(tmp_path, codes)
    assert labels == [{98, 101}, set(), {98}]
    assert label_NK.dtype == np.int8 and label_NK.shape == (3, 25)
    assert label_NK[0].tolist() == [int(p.ccs in (98, 101)) for p in schema.PHENOTYPES]
    assert counts == {
        "route": "gem",
        "rows_without_a_valid_code": 5,
        "distinct_codes": {"ICD-9": 1, "ICD-10": 4},
        "distinct_codes_unmapped": {"ICD-10": 2},
        "unmapped": [["4019", 10, 1], ["U9999", 10, 1]],
        "stays_without_a_code": 1,
        "rows_of_another_patient": 0,
    }


@pytest.mark.parametrize(("code", "version"), [("414 9", 9), ("I10", 9), ("4019", 10), ("250-00", 9), ("4019", 8)])
@pytest.mark.parametrize("wrong", [1, 2])
def test_codes_that_are_not_of_their_version_give_a_warning(tmp_path, capsys, code, version, wrong):
    _labels(tmp_path, [(0, "4019", 9)] * (100 - wrong) + [(0, code, version)] * wrong)
    assert ("2 of 100 diagnoses have no valid code" in capsys.readouterr().err) == (wrong == 2)


def _table(**changes):
    table = {p.name: {"id": p.ccs, "type": p.kind, "use_in_benchmark": True, "codes": []} for p in schema.PHENOTYPES}
    table["Shock"]["codes"] = ["R571", 78551]
    return table | changes


def test_a_table_replaces_the_route(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(_table()))
    labels, _, counts = _labels(tmp_path, [(0, "4019", 9), (0, "R571", 10), (1, "78551", 9)], path)
    assert labels == [{249}, {249}, set()]
    assert counts["route"] == "table" and counts["unmapped"] == [["4019", 9, 1]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: [", None),
        ("- 1", 157),
        (yaml.safe_dump({k: v for k, v in _table().items() if k != "Shock"}), 249),
        (yaml.safe_dump(_table(Shock={"id": 249})), "Shock"),
        ("since: 2001-02-30", None),
        (None, None),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, value):
    path = tmp_path / "table.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        phenotypes.read_table(path)
    assert (caught.value.field, caught.value.path, caught.value.value) == ("--phenotypes", path, value)


def test_on_the_demo_icd9_labels_equal_the_released_ones_and_icd10_adds_labels(real_data):
    """112 stays; docs/phenotypes.md gives the same numbers."""
    from data_prep.ehr import cohort

    raw = tables.mimic_iv(real_data / "mimic-iv-demo-2.2")
    stays, _ = cohort.read_stays(raw)
    ours, _ = phenotypes.labels(raw, stays, None)
    released, _ = phenotypes.labels(raw, stays, real_data / "released/icd_9_10_definitions_2.yaml")
    diagnoses = raw["diagnoses_icd"].read("hadm_id", "icd_version").with_columns(parse.integer("hadm_id"))
    in_icd9 = diagnoses.filter(pl.col("icd_version") == "9")["hadm_id"].unique()
    is_icd9 = stays["hadm_id"].is_in(in_icd9.implode()).to_numpy()
    assert is_icd9.sum() == 68
    np.testing.assert_array_equal(ours[is_icd9], released[is_icd9])
    more, fewer, equal = (ours > released).sum(), (ours < released).sum(), (ours == released).all(1).sum()
    assert (more, fewer, equal) == (42, 0, 87)


@pytest.mark.parametrize("lost", [False, True])
def test_codes_without_their_leading_zeros_are_refused(tmp_path, capsys, lost):
    """E. coli (041.49) without its zero is the code of a heart disease (414.9)."""
    codes = ["04149", "04111", "0412", "0389", "4019"]
    codes = [(0, code.lstrip("0") if lost else code, 9) for code in codes] + [(1, "389", 10)]
    if lost:
        with refused(field="icd_code", value=1):
            _labels(tmp_path, codes)
    else:
        labels, _, _ = _labels(tmp_path, codes)
        assert labels[0] == {2, 98} and "gives no stay" not in capsys.readouterr().err


def test_codes_that_were_numbers_are_refused(tmp_path):
    """4019.0 is no code with a dot: 40190 is none, and 389.0, once 0389, is a hearing loss."""
    with refused(field="icd_code", value=2):
        _labels(tmp_path, [(0, "4019.0", 9), (0, "389.0", 9), (0, "25000.0", 9), (0, "V3000", 9)])


def test_codes_may_have_a_dot_and_small_letters(tmp_path):
    labels, _, _ = _labels(tmp_path, [(0, "038.9", 9), (1, "i10", 10), (2, "401.0", 9)])
    assert labels == _labels(tmp_path / "as published", [(0, "0389", 9), (1, "I10", 10), (2, "4010", 9)])[0]
    assert all(labels)


def test_codes_in_another_writing_have_not_lost_their_zeros(tmp_path, capsys):
    labels, _, _ = _labels(tmp_path, [(0, f"ICD9:{code}", 9) for code in range(4000, 4300)])
    assert labels[0] == set() and "300 of 300 diagnoses have no valid code" in capsys.readouterr().err


def test_a_real_sized_table_without_any_leading_zero_is_refused(real_data, tmp_path):
    """Only codes that exist in both forms, so that no single one shows the loss."""
    diagnoses = pl.read_csv(real_data / "mimic-iv-demo-2.2/hosp/diagnoses_icd.csv.gz", infer_schema=False)
    codes = diagnoses.filter(icd_version="9")["icd_code"]
    phenotypes._check_leading_zeros(codes, tmp_path)
    with refused(field="icd_code", value=0):
        phenotypes._check_leading_zeros(codes.filter(~codes.str.starts_with("0")), tmp_path)


def test_a_table_that_gives_no_label_gives_a_warning(tmp_path, capsys):
    _labels(tmp_path, [(0, "V3000", 9)])
    assert "diagnoses_icd.csv.gz gives no stay a phenotype" in capsys.readouterr().err
