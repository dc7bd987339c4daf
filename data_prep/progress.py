"""Progress of a build: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm


def say(line: str) -> None:
    """Print a line on stderr, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def bar(items: Iterable, what: str, unit: str, total: int | None = None) -> Iterator:
    """Iterate over `items` with a progress bar, if stderr is a terminal."""
    yield from tqdm(items, desc=what, unit=f" {unit}", total=total, leave=False, disable=not sys.stderr.isatty())
