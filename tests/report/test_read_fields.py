"""Fields of results, configs and metrics that are missing or damaged are left out of a report."""

import numpy as np
import pytest

from medfuse_jax import metrics
from medfuse_jax.report import read_fields

NAN = float("nan")


def test_pair_reads_an_interval_or_returns_two_nones():
    assert read_fields.pair(np.array([0.1, 0.2])) == (0.1, 0.2) == read_fields.pair([0.1, 0.2])
    assert {read_fields.pair(ends) for ends in (None, [0.1], "ab", 0.5)} == {(None, None)}


@pytest.mark.parametrize(
    ("auroc", "ci", "outside"),
    [(NAN, (NAN, NAN), False), (None, None, False), (0.9, (0.5, 0.8), True), (0.7, (0.5, 0.8), False)],
)
def test_a_mean_that_is_missing_is_not_outside_its_interval(auroc, ci, outside):
    scores = {"auroc_macro": auroc, "auroc_macro_ci": ci, "auprc_macro": NAN}
    assert read_fields.is_outside_its_ci(scores) == outside


def test_an_evaluation_of_one_class_is_not_outside_its_interval():
    scores = metrics.evaluate(np.zeros((12, 1), int), np.linspace(0.1, 0.9, 12)[:, None], 10)
    assert not read_fields.is_outside_its_ci(scores)


def test_all_is_left_out_where_not_all_records_are_scored():
    subsets = {"all": {"auroc_macro": 0.7}, "paired": {"auroc_macro": 0.8}, "unknown": {}, "unpaired": None}
    assert list(read_fields.comparable_subsets({"subsets": subsets})) == ["all", "paired"]
    assert list(read_fields.comparable_subsets({"subsets": subsets, "num_left_out": 3})) == ["paired"]
    only = {"subsets": {"all": {"auroc_macro": 0.7}}, "num_left_out": 3}
    assert list(read_fields.comparable_subsets(only)) == ["all"]


def test_a_comparison_on_all_needs_all_records_of_both_runs():
    known = [{"subset": "all", "num_samples": 20}, {"subset": "all", "num_samples": 19}, {"subset": "paired"}]
    result = {"subsets": {"all": {"num_samples": 20}}, "comparisons": [*known, {"subset": "unknown"}]}
    assert read_fields.comparisons(result) == [known[0], known[2]]
    assert read_fields.comparisons(result | {"num_left_out": 1}) == [known[2]]


def test_series_are_sorted_and_drop_what_is_no_number():
    lines = {2: {"loss": 0.2}, 1: {"loss": NAN}, 3: {"loss": "x"}, 4: {}, 0: {"loss": 1}}
    assert list(read_fields.series(lines, "loss").items()) == [(0, 1), (2, 0.2)]


@pytest.mark.parametrize("damage", [None, "x", 3, {"by": "Sex"}, {"by": "Sex", "groups": ["x"]}])
def test_damaged_subgroups_are_left_out(damage):
    whole = {"by": "Age", "groups": [{"group": "18-40"}]}
    assert read_fields.subgroups({"subgroups": [whole, damage]}) == [whole]
    assert read_fields.subgroups({"subgroups": damage}) == read_fields.subgroups(None) == []
