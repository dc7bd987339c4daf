"""Which texts are copied as they are."""

import polars as pl
import pytest

from data_prep.raw import known_words
from data_prep.synthetic import cohort
from medfuse_jax import records


@pytest.mark.parametrize("field", records.STATIC_TEXTS)
def test_a_known_word_stays_and_any_other_text_becomes_one(field):
    first = known_words.WORDS[field][0]
    frame = pl.DataFrame({field: [first, f" {first} ", None, "", "Mr Smith", first.lower()]})
    expected = [first, first, "", "", "OTHER", "OTHER"]
    assert frame.select(known_words.word(field))[field].to_list() == expected


def test_what_became_other_is_said_without_its_text(capsys):
    columns = {field: ["OTHER", known_words.WORDS[field][0]] for field in records.STATIC_TEXTS}
    known_words.report(pl.DataFrame(columns | {"gender": ["F", "M"]}))
    said = capsys.readouterr().err
    assert "the admission_type of 1 stays" in said and "the first_careunit of 1 stays" in said and "gender" not in said


def test_the_words_are_those_of_the_demo_and_of_the_made_up_cohort(real_data):
    import gzip

    assert set(cohort.UNITS) <= set(known_words.WORDS["first_careunit"])
    root = real_data / "mimic-iv-demo-2.2"
    for field, table in (
        ("gender", "hosp/patients"),
        ("admission_type", "hosp/admissions"),
        ("first_careunit", "icu/icustays"),
    ):
        with gzip.open(root / f"{table}.csv.gz") as lines:
            found = pl.read_csv(lines.read(), columns=[field])
        assert not (found.select(known_words.word(field))[field] == known_words.OTHER).any()
