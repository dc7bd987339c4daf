"""Which counts may be shown."""

import itertools

import pytest

from medfuse_jax.report import withheld


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
    assert list(withheld.cells(named).values()) == shown


def test_no_hidden_count_follows_from_the_sum_and_the_others():
    for counts in itertools.product((0, 3, 9, 10, 11, 40), repeat=3):
        shown = withheld.cells(dict(enumerate(counts)))
        hidden = [counts[i] for i, value in shown.items() if isinstance(value, str)]
        assert all(value >= 10 for value in shown.values() if isinstance(value, int))
        assert not hidden or (len(hidden) >= 2 and sum(hidden) >= 10) or len(hidden) == 3


def test_a_part_does_not_reveal_the_rest():
    assert [withheld.part(n, 100) for n in (0, 9, 10, 90, 91, 100)] == ["<10", "<10", 10, 90, "≥91", "≥91"]
