"""Which texts are copied to the records unchanged."""

import polars as pl
import pytest

from data_prep.raw import known_words, tables
from data_prep.synthetic import cohort
from medfuse_jax import schema


@pytest.mark.parametrize("field", schema.STATIC_TEXTS)
def test_known_words_are_kept_and_other_texts_replaced(field):
    first = known_words.WORDS[field][0]
    frame = pl.DataFrame({field: [first, f" {first} ", None, "", "Mr Smith", first.lower()]})
    expected = [first, first, "", "", "OTHER", "OTHER"]
    assert frame.select(known_words.word(field))[field].to_list() == expected


def test_the_warning_names_columns_not_words(capsys):
    columns = {field: ["OTHER", known_words.WORDS[field][0]] for field in schema.STATIC_TEXTS}
    known_words.warn_of_others(pl.DataFrame(columns | {"gender": ["F", "M"]}))
    printed = capsys.readouterr().err
    assert "1 stays have an unknown admission_type" in printed and "1 stays have an unknown first_careunit" in printed
    assert "gender" not in printed


def test_the_demo_and_the_synthetic_cohort_use_known_words(real_data):
    assert set(cohort.UNITS) <= set(known_words.WORDS["first_careunit"])
    raw = tables.mimic_iv(real_data / "mimic-iv-demo-2.2")
    for field, table in (("gender", "patients"), ("admission_type", "admissions"), ("first_careunit", "icustays")):
        assert not (raw[table].read(field).select(known_words.word(field))[field] == known_words.OTHER).any()


def test_races_are_grouped_and_no_other_text_is_kept():
    groups = {
        "White": ["WHITE", "White - Russian", " WHITE - BRAZILIAN"],
        "Black": ["BLACK/AFRICAN AMERICAN", "BLACK/CAPE VERDEAN"],
        "Hispanic or Latino": ["HISPANIC/LATINO - PUERTO RICAN", "HISPANIC OR LATINO"],
        "Asian": ["ASIAN", "ASIAN - CHINESE"],
        "Other": ["PORTUGUESE", "AMERICAN INDIAN/ALASKA NATIVE", "MULTIPLE RACE/ETHNICITY", "Mr Smith", "OTHER"],
        "Unknown": ["UNKNOWN", "UNABLE TO OBTAIN", "PATIENT DECLINED TO ANSWER", "", None],
    }
    assert tuple(groups) == schema.RACES
    for name, texts in groups.items():
        assert pl.DataFrame({"ethnicity": texts}).select(known_words.race("ethnicity"))["race"].to_list() == (
            [name] * len(texts)
        )
