"""Counts of people that may be shown: none below 10, and none that can be worked out from the others.

A count of 0 to 9 is shown as '<10'. Of counts that add up to a number that is known, one hidden alone could
be had by subtraction, so the next smallest are hidden too, as '≥10', until what is hidden is 10 or more together.
"""

from collections.abc import Iterable

SMALLEST = 10
FEW, ENOUGH = f"<{SMALLEST}", f"≥{SMALLEST}"


def cells(counts: dict[str, int], hide_sum: bool = False) -> dict[str, int | str]:
    """Counts of groups that share nobody and have a known sum, as they may be shown.

    hide_sum: the sum is not to be known either, so at least one count of 10 or more is hidden.
    """
    ordered = sorted(counts, key=lambda name: (counts[name], name))
    few = [name for name in ordered if counts[name] < SMALLEST]
    hidden = list(few)
    for name in ordered[len(few) :]:
        enough = sum(counts[h] for h in hidden) >= SMALLEST if hidden else True
        if enough and (len(hidden) > len(few) or not hide_sum):
            break
        hidden.append(name)
    shown = {}
    for name, count in counts.items():
        shown[name] = count if name not in hidden else FEW if count < SMALLEST else ENOUGH
    return shown


def part(count: int, whole: int, whole_is_shown: bool = True) -> int | str:
    """A count of some of `whole`, as it may be shown; where `whole` is hidden, nothing may give it away."""
    if count < SMALLEST:
        return FEW
    if not whole_is_shown:
        return count if whole - count >= SMALLEST else ENOUGH
    return count if whole - count >= SMALLEST else f"≥{whole - SMALLEST + 1}"


def share(count: int, whole: int) -> float | None:
    """The share `count` is of `whole`, None where the count may not be shown."""
    return round(count / whole, 4) if whole and isinstance(part(count, whole), int) else None


def many(counts: dict[str, int], people: dict[str, int], known_sum: bool) -> dict[str, int | None]:
    """Counts of what one person has many of (hours, steps), None where fewer than 10 people are behind one.

    people: how many are behind each count. known_sum: what the counts add up to is known, so where some are hidden
    the smallest of the others is, too.
    """
    hidden = {name for name in counts if people[name] < SMALLEST}
    others = [name for name in counts if name not in hidden]
    if hidden and others and known_sum:
        hidden.add(min(others, key=lambda name: (counts[name], name)))
    return {name: None if name in hidden else count for name, count in counts.items()}


def apart(counts: dict[str, int], others: Iterable[int | str]) -> dict[str, int | str]:
    """Counts of groups that share members, as they may be shown beside `others`: no two shown differ by 1 to 9."""
    shown: dict[str, int | str] = {}
    seen = list(others)
    for name, count in counts.items():
        near = any(isinstance(other, int) and 0 < abs(count - other) < SMALLEST for other in seen)
        shown[name] = FEW if count < SMALLEST else ENOUGH if near else count
        seen.append(shown[name])
    return shown


def flow(steps: list[dict]) -> list[dict]:
    """Filters and how many stays each left; those that removed 1 to 9 are shown together with their neighbours.

    steps: {'filter', 'stays'} in order. Returns {'filter', 'stays', 'removed'} (removed None: before the first);
    what is left below 10 ends it as '<10'.
    """
    shown: list[dict] = []
    waiting: list[str] = []  # filters that removed too few to be seen alone, even together
    for step in steps:
        waiting.append(step["filter"])
        removed = shown[-1]["stays"] - step["stays"] if shown else None
        if removed is None or removed == 0 or removed >= SMALLEST:
            shown.append({"filter": "; ".join(waiting), "stays": step["stays"], "removed": removed})
            waiting = []
    while waiting:  # the last ones: with those before them
        last = shown.pop()
        waiting.insert(0, last["filter"])
        removed = shown[-1]["stays"] - steps[-1]["stays"] if shown else None
        if removed is None or removed >= SMALLEST:
            shown.append({"filter": "; ".join(waiting), "stays": steps[-1]["stays"], "removed": removed})
            waiting = []
    few = next((i for i, step in enumerate(shown) if step["stays"] < SMALLEST), None)
    if few is None:
        return shown
    last = shown[few]
    return [*shown[:few], last | {"stays": FEW, "removed": ENOUGH if last["removed"] else last["removed"]}]
