"""What of a count may be shown."""

import itertools

import pytest

from data_prep.audit import privacy


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ([100, 50, 10], [100, 50, 10]),
        ([100, 50, 9], [100, "≥10", "<10"]),
        ([100, 5, 7], [100, "<10", "<10"]),
        ([100, 5, 4], ["≥10", "<10", "<10"]),  # 9 hidden together would be a count below 10
        ([3, 2], ["<10", "<10"]),
        ([0, 30, 30], ["<10", "≥10", 30]),
        ([], []),
    ],
)
def test_cells(counts, shown):
    named = {str(i): count for i, count in enumerate(counts)}
    assert list(privacy.cells(named).values()) == shown


def test_no_hidden_cell_follows_from_the_total_and_the_others():
    for counts in itertools.product((0, 3, 9, 10, 11, 40), repeat=3):
        shown = privacy.cells(dict(enumerate(counts)))
        hidden = [counts[i] for i, value in shown.items() if isinstance(value, str)]
        assert all(value >= 10 for value in shown.values() if isinstance(value, int))
        assert not hidden or (len(hidden) >= 2 and sum(hidden) >= 10) or len(hidden) == 3


def test_a_sum_that_is_not_to_be_known_leaves_one_of_10_or_more_hidden():
    for counts in itertools.product((0, 3, 9, 10, 11, 40), repeat=3):
        shown = privacy.cells(dict(enumerate(counts)), hide_sum=True)
        usual = privacy.cells(dict(enumerate(counts)))
        assert "≥10" in shown.values() or max(counts) < 10
        assert all(isinstance(shown[i], str) for i, value in usual.items() if isinstance(value, str))
    assert privacy.cells({"a": 40, "b": 30, "c": 0, "d": 5}, hide_sum=True) == {
        "a": 40,
        "b": "≥10",
        "c": "<10",
        "d": "<10",
    }


def test_groups_that_share_members():
    assert privacy.apart({"a": 100, "b": 95, "c": 90, "d": 4}, []) == {"a": 100, "b": "≥10", "c": 90, "d": "<10"}
    assert privacy.apart({"a": 100, "b": 100}, [103, "<10"]) == {"a": "≥10", "b": "≥10"}


def test_part():
    assert [privacy.part(n, 100, False) for n in (9, 10, 90, 91, 100)] == ["<10", 10, 90, "≥10", "≥10"]
    assert [privacy.part(n, 100) for n in (0, 9, 10, 90, 91, 100)] == ["<10", "<10", 10, 90, "≥91", "≥91"]
    assert privacy.share(25, 100) == 0.25 and privacy.share(5, 100) is None and privacy.share(0, 0) is None


def test_what_one_has_many_of_is_hidden_with_its_people():
    hours, people = {"a": 72, "b": 240, "c": 2400, "d": 0}, {"a": 3, "b": 10, "c": 100, "d": 0}
    assert privacy.many(hours, people, False) == {"a": None, "b": 240, "c": 2400, "d": None}
    assert privacy.many(hours, people, True) == {"a": None, "b": None, "c": 2400, "d": None}
    assert privacy.many({"b": 240, "c": 2400}, people, True) == {"b": 240, "c": 2400}
    assert privacy.many({"a": 72}, people, True) == {"a": None}


def _flow(*stays):
    return privacy.flow([{"filter": str(i), "stays": n} for i, n in enumerate(stays)])


def test_a_filter_that_removes_few_is_shown_with_its_neighbour():
    assert _flow(100, 100, 97, 60, 60) == [
        {"filter": "0", "stays": 100, "removed": None},
        {"filter": "1", "stays": 100, "removed": 0},
        {"filter": "2; 3", "stays": 60, "removed": 40},
        {"filter": "4", "stays": 60, "removed": 0},
    ]
    assert _flow(100, 60, 55) == [
        {"filter": "0", "stays": 100, "removed": None},
        {"filter": "1; 2", "stays": 55, "removed": 45},
    ]
    assert _flow(100, 100, 95) == [{"filter": "0; 1; 2", "stays": 95, "removed": None}]


def test_no_filter_that_removed_few_can_be_worked_out():
    for stays in itertools.product((100, 97, 93, 85, 60), repeat=4):
        steps = _flow(100, *sorted(stays, reverse=True))
        assert steps[-1]["stays"] == min(stays) and "; ".join(s["filter"] for s in steps) == "0; 1; 2; 3; 4"
        left = [step["stays"] for step in steps]
        assert all(a == b or a - b >= 10 for a, b in itertools.pairwise(left))


def test_what_is_left_below_10_is_hidden():
    assert _flow(100, 4)[-1] == {"filter": "1", "stays": "<10", "removed": "≥10"}
    assert _flow(4, 4, 0)[-1]["stays"] == "<10"
