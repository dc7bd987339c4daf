"""Which counts may be shown."""

import itertools

import pytest

from data_prep.audit import privacy


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ([100, 50, 10], [100, 50, 10]),
        ([100, 50, 9], [100, "≥10", "<10"]),
        ([100, 5, 7], [100, "<10", "<10"]),
        ([100, 5, 4], ["≥10", "<10", "<10"]),  # 9 hidden together are still too few
        ([3, 2], ["<10", "<10"]),
        ([0, 30, 30], ["<10", "≥10", 30]),
        ([], []),
    ],
)
def test_one_neighbour_of_a_small_count_is_hidden(counts, shown):
    named = {str(i): count for i, count in enumerate(counts)}
    assert list(privacy.cells(named).values()) == shown


def test_no_hidden_count_follows_from_the_sum_and_the_others():
    for counts in itertools.product((0, 3, 9, 10, 11, 40), repeat=3):
        shown = privacy.cells(dict(enumerate(counts)))
        hidden = [counts[i] for i, value in shown.items() if isinstance(value, str)]
        assert all(value >= 10 for value in shown.values() if isinstance(value, int))
        assert not hidden or (len(hidden) >= 2 and sum(hidden) >= 10) or len(hidden) == 3


def test_a_part_does_not_reveal_the_rest():
    assert [privacy.part(n, 100) for n in (0, 9, 10, 90, 91, 100)] == ["<10", "<10", 10, 90, "≥91", "≥91"]
    assert privacy.share(25, 100) == 0.25 and privacy.share(5, 100) is None and privacy.share(0, 0) is None


def test_hours_of_few_people_are_hidden():
    hours, people = {"a": 72, "b": 240, "c": 2400, "d": 0}, {"a": 3, "b": 10, "c": 100, "d": 0}
    assert privacy.by_people(hours, people, False) == {"a": None, "b": 240, "c": 2400, "d": None}
    assert privacy.by_people(hours, people, True) == {"a": None, "b": None, "c": 2400, "d": None}
    assert privacy.by_people({"b": 240, "c": 2400}, people, True) == {"b": 240, "c": 2400}
    assert privacy.by_people({"a": 72}, people, True) == {"a": None}


def _flow(*stays):
    return privacy.flow([{"filter": str(i), "stays": n} for i, n in enumerate(stays)])


def test_a_filter_that_removes_few_is_merged_with_its_neighbour():
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


def test_no_filter_that_removed_few_follows_from_the_others():
    for stays in itertools.product((100, 97, 93, 85, 60), repeat=4):
        rows = _flow(100, *sorted(stays, reverse=True))
        assert rows[-1]["stays"] == min(stays) and "; ".join(row["filter"] for row in rows) == "0; 1; 2; 3; 4"
        left = [row["stays"] for row in rows]
        assert all(a == b or a - b >= 10 for a, b in itertools.pairwise(left))


def test_fewer_than_10_left_are_hidden():
    assert _flow(100, 4)[-1] == {"filter": "1", "stays": "<10", "removed": "≥10"}
    assert _flow(4, 4, 0)[-1]["stays"] == "<10"
