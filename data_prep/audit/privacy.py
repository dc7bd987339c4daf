"""Hide what would reveal a count of people below 10 in the audit: shares, counts of hours, and filters' counts.

Counts themselves: medfuse_jax/report/withheld.py.
"""

from medfuse_jax import schema
from medfuse_jax.report.withheld import ENOUGH, FEW, part

SMALLEST = schema.FEWEST_SHOWN


def share(count: int, whole: int) -> float | None:
    """Return `count` / `whole`, or None if the count is hidden."""
    return round(count / whole, 4) if whole and isinstance(part(count, whole), int) else None


def by_people(counts: dict[str, int], people: dict[str, int], known_sum: bool) -> dict[str, int | None]:
    """Return counts of hours or time steps, None where fewer than 10 people are behind one.

    people: how many are behind each count. known_sum: the sum of the counts is known, so if any is hidden, the
    smallest other is hidden too.
    """
    hidden = {name for name in counts if people[name] < SMALLEST}
    others = [name for name in counts if name not in hidden]
    if hidden and others and known_sum:
        hidden.add(min(others, key=lambda name: (counts[name], name)))
    return {name: None if name in hidden else count for name, count in counts.items()}


def flow(steps: list[dict]) -> list[dict]:
    """Merge each filter that removed 1 to 9 stays with its neighbours.

    steps: {'filter', 'stays'} in order. Returns {'filter', 'stays', 'removed'}; removed is None in the first row.
    """
    rows: list[dict] = []
    pending: list[str] = []  # filters that removed too few, even together
    for step in steps:
        pending.append(step["filter"])
        removed = rows[-1]["stays"] - step["stays"] if rows else None
        if removed is None or removed == 0 or removed >= SMALLEST:
            rows.append({"filter": "; ".join(pending), "stays": step["stays"], "removed": removed})
            pending = []
    while pending:  # the last filters: merge them into earlier rows
        pending.insert(0, rows.pop()["filter"])
        removed = rows[-1]["stays"] - steps[-1]["stays"] if rows else None
        if removed is None or removed >= SMALLEST:
            rows.append({"filter": "; ".join(pending), "stays": steps[-1]["stays"], "removed": removed})
            pending = []
    few = next((i for i, row in enumerate(rows) if row["stays"] < SMALLEST), None)
    if few is None:
        return rows
    last = rows[few]
    return [*rows[:few], last | {"stays": FEW, "removed": ENOUGH if last["removed"] else last["removed"]}]
