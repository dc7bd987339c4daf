"""Splits of patients: by lists, by a hash."""

import polars as pl
import pytest

from data_prep.ehr import splits
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError


def test_hashed_splits_are_stable_seeded_and_70_10_20():
    subjects = pl.Series(range(10_000_000, 10_020_000))
    split_of = splits.assign(subjects)
    shares = {name: list(split_of.values()).count(name) / len(subjects) for name in schema.SPLITS}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.01)
    # A change here moves patients between splits of existing data.
    golden = ["test", "val", "train", "test", "train", "train", "test", "train"]
    assert [split_of[10_000_000 + n] for n in range(8)] == golden
    other = splits.assign(subjects, seed=1)
    assert 0.4 < sum(other[s] == split_of[s] for s in subjects) / len(subjects) < 0.7


@pytest.mark.parametrize(
    "text",
    [
        "1,1\n2,0\n3,1\n",
        "subject_id,in\n1,1\n2,0\n3,1\n",
        "1\n3\n",
        "subject_id\n1\n\n3",
        "\ufeff1,1\n2,0\n3,1",  # this and the next two: from a spreadsheet or pandas
        "\ufeffsubject_id,in\n1,1.0\n2,0.0\n3.0,1\n",
        "1.0\n3.\n",
        '"1","1"\n"3","1"\n',
        ",subject_id,in\n0,1,1\n1,2,0\n2,3,1\n",  # pandas with its index
        '"","SUBJECT_ID"\n"1",1\n"2",3\n',  # R with its row names
    ],
)
def test_id_lists_may_have_any_published_form(tmp_path, text):
    (tmp_path / "ids.csv").write_text(text)
    assert splits.read_id_list(tmp_path / "ids.csv") == {1, 3}


def test_lists_decide_and_all_others_train(tmp_path):
    (tmp_path / "val.csv").write_text("1,1\n2,0\n9,1\n")
    (tmp_path / "test.csv").write_text("2,1\n")
    split_of = splits.assign(pl.Series([1, 2, 3]), tmp_path / "val.csv", tmp_path / "test.csv")
    assert split_of == {1: "val", 2: "test", 3: "train", 9: "val"}


@pytest.mark.parametrize(
    ("val", "test", "field", "row", "value"),
    [
        ("1\n", None, "--test_ids", None, None),
        ("1\n", "1\n", "", None, 1),
        ("1\nx\n", "2\n", "", 2, "x"),
        ("1,2\n", "2\n", "", 1, "1,2"),
        ("1,0.5\n", "2\n", "", 1, "1,0.5"),
        ("1.5\n", "2\n", "", 1, "1.5"),
        ("1,1,1\n", "2\n", "", 1, "1,1,1"),
        ("1\n\u00b2\n", "2\n", "", 2, "\u00b2"),  # str.isdigit() accepts it, int() does not
        ("7\n", "8\n", "", None, None),  # no patient of the cohort
    ],
)
def test_bad_lists_are_refused(tmp_path, val, test, field, row, value):
    (tmp_path / "val.csv").write_text(val)
    if test is not None:
        (tmp_path / "test.csv").write_text(test)
    with pytest.raises(UserError) as caught:
        splits.assign(pl.Series([1, 2]), tmp_path / "val.csv", None if test is None else tmp_path / "test.csv")
    assert (caught.value.field, caught.value.row, caught.value.value) == (field, row, value)
    assert caught.value.path == (None if field else tmp_path / "val.csv")


def test_a_list_without_patients_of_the_cohort_gives_a_warning(tmp_path, capsys):
    (tmp_path / "val.csv").write_text("5\n7\n")
    (tmp_path / "test.csv").write_text("1\n")
    split_of = splits.assign(pl.Series([1, 2]), tmp_path / "val.csv", tmp_path / "test.csv")
    assert {subject: split_of[subject] for subject in (1, 2)} == {1: "test", 2: "train"}
    assert f"none of the 2 patients in {tmp_path / 'val.csv'} is in the cohort" in capsys.readouterr().err
