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
