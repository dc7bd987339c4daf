"""Codes to labels, and what is said of the other routes."""

import numpy as np
import polars as pl
import pytest
import yaml
from raw_tables import stay, write_mimic_iv

from data_prep.labels import phenotypes
from data_prep.raw import tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError


def _labels(tmp_path, codes, table=None, num_stays=3):
    stays = [stay(n) for n in range(num_stays)]
    raw = tables.mimic_iv(write_mimic_iv(tmp_path / "raw", stays, codes=codes))
    frame = pl.DataFrame({name: [s[name] for s in stays] for name in ("subject_id", "hadm_id")})
    label_NK, counts = phenotypes.labels(raw, frame, table)
    return [{schema.PHENOTYPES[k].ccs for k in np.flatnonzero(row)} for row in label_NK], label_NK, counts


def test_labels_belong_to_their_admission_in_the_order_of_the_tasks(tmp_path):
    codes = [(0, "4019", 9), (0, "I2510", 10), (0, "4019", 9), (2, " I10. ", 10), (2, "U9999", 10), (2, "4019", 10)]
    codes += [(0, text, 10) for text in ("SMITH", "I1", "i2510", "I10 HIGH STREET", "", "I251000X")]
    found, label_NK, counts = _labels(tmp_path, codes)
    assert found == [{98, 101}, set(), {98}]
    assert label_NK.dtype == np.int8 and label_NK.shape == (3, 25)
    assert label_NK[0].tolist() == [int(p.ccs in (98, 101)) for p in schema.PHENOTYPES]
    against = counts.pop("against")
    assert counts == {
        "route": "gem",
        "rows_without_a_valid_code": 6,
        "distinct_codes": {"ICD-9": 1, "ICD-10": 4},
        "distinct_codes_unmapped": {"ICD-10": 2},
        "unmapped": [["4019", 10, 1], ["U9999", 10, 1]],
        "stays_without_a_code": 1,
        "rows_of_another_patient": 0,
    }
    other = against["gem, last row"]  # which takes I25.10 for 104, none of the 25
    assert other["codes"] == [["I2510", 10, 1, [101], []]]
    assert (other["stays"], other["stays_with_all_labels_equal"]) == (3, 2)
    assert {label: n for label, n in other["only_here"].items() if n} == {
        "Coronary atherosclerosis and other heart disease": 1
    }
    assert not any(other["only_there"].values())


def _table(**changes):
    table = {p.name: {"id": p.ccs, "type": p.kind, "use_in_benchmark": True, "codes": []} for p in schema.PHENOTYPES}
    table["Shock"]["codes"] = ["R571", 78551]
    return table | changes


def test_a_table_alone_decides(tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(_table()))
    found, _, counts = _labels(tmp_path, [(0, "4019", 9), (0, "R571", 10), (1, "78551", 9)], path)
    assert found == [{249}, {249}, set()] and counts["route"] == "table"
    assert ["4019", 9, 1, [], [98]] in counts["against"]["gem"]["codes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not a YAML file"),
        ("- 1", "has no entry with id 157"),
        (yaml.safe_dump({k: v for k, v in _table().items() if k != "Shock"}), "has no entry with id 249"),
        (yaml.safe_dump(_table(Shock={"id": 249})), "'Shock' needs an id"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, text, message):
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        phenotypes.read_table(tmp_path / "table.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        phenotypes.read_table(tmp_path / "nothing.yaml")


def test_on_the_demo_icd9_labels_are_the_released_ones_and_icd10_adds_what_is_missing(real_data):
    """112 stays; the disagreements are those docs/phenotypes.md counts."""
    from data_prep.ehr import cohort

    raw = tables.mimic_iv(real_data / "mimic-iv-demo-2.2")
    stays, _ = cohort.read_stays(raw)
    ours, _ = phenotypes.labels(raw, stays, None)
    released, _ = phenotypes.labels(raw, stays, real_data / "released/icd_9_10_definitions_2.yaml")
    versions = raw["diagnoses_icd"].read("hadm_id", "icd_version").with_columns(tables.integer("hadm_id")).unique()
    ninth = stays.join(versions.filter(pl.col("icd_version") == "9"), on="hadm_id", how="left", maintain_order="left")
    is_ninth = ninth["icd_version"].is_not_null().to_numpy()
    assert is_ninth.sum() == 68
    np.testing.assert_array_equal(ours[is_ninth], released[is_ninth])
    assert (
        int((ours > released).sum()),
        int((ours < released).sum()),
        int((ours == released).all(1).sum()),
    ) == EXPECTED


EXPECTED = (42, 0, 87)  # labels more and fewer than the released ones, stays with all 25 equal
