"""Counts as pages show them: none of people below 10, and none that would reveal one in the same table.

A count of 0 to 9 is shown as '<10'. If the table's sum and its other counts would reveal it, one neighbouring count
is hidden too, as '≥10'.
"""

from medfuse_jax import schema

FEW, ENOUGH = f"<{schema.FEWEST_SHOWN}", f"≥{schema.FEWEST_SHOWN}"


def shown(count: int) -> int | str:
    """Return a count that stands alone, hidden if it is below 10."""
    return count if count >= schema.FEWEST_SHOWN else FEW


def cells(counts: dict[str, int]) -> dict[str, int | str]:
    """Return the counts of disjoint groups with a known sum, small ones hidden.

    If the hidden counts add up to less than 10, the next smallest is hidden too.
    """
    ordered = sorted(counts, key=lambda name: (counts[name], name))
    few = [name for name in ordered if counts[name] < schema.FEWEST_SHOWN]
    sum_hidden = sum(counts[name] for name in few)
    neighbour = ordered[len(few)] if 0 < len(few) < len(ordered) and sum_hidden < schema.FEWEST_SHOWN else None
    return {name: ENOUGH if name == neighbour else shown(count) for name, count in counts.items()}


def part(count: int, whole: int) -> int | str:
    """Return a count to be shown beside its total: a lower bound if the rest is below 10."""
    if count < schema.FEWEST_SHOWN:
        return FEW
    return count if whole - count >= schema.FEWEST_SHOWN else f"≥{whole - schema.FEWEST_SHOWN + 1}"
