"""What a person sees while a build runs: a bar a phase on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm


def say(line: str) -> None:
    """One line on stderr, above the bar where there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def bar(items: Iterable, what: str, unit: str, total: int | None = None) -> Iterator:
    """Goes through `items`; a bar on a terminal, nothing elsewhere (the phase's own line says what came of it)."""
    yield from tqdm(items, desc=what, unit=f" {unit}", total=total, leave=False, disable=not sys.stderr.isatty())
