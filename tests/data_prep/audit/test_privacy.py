"""What would reveal a count of few people is hidden."""

import itertools

from data_prep.audit import privacy


def test_no_share_reveals_a_small_count():
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
