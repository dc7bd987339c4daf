"""The numbers printed in Hayat et al. 2022, to show beside ours.

published.csv has one row per number: table, task, row, metric, value, low, high (its 95 % confidence interval).
"""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

_DEPTHS = {"M5": {"pheno": 4, "mortality": 4}, "M6": {"pheno": 3, "mortality": 4}}  # notes below Table A1


class Number(NamedTuple):
    """A published number with its confidence interval, None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def excludes(self, value: float) -> bool:
        """Return whether a value lies outside the confidence interval; False if there is none."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@functools.cache
def _numbers() -> dict[tuple[str, ...], Number]:
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (r["table"], r["task"], r["row"], r["metric"]): Number(
            *(float(r[name]) if r[name] else None for name in ("value", "low", "high"))  # type: ignore[arg-type]
        )
        for r in rows
    }


def number(table: str, task: str, row: str, metric: str) -> Number | None:
    """Return a published number; None if the paper does not give it."""
    return _numbers().get((table, task, row, metric))


def rate(task: str, training: str) -> float | None:
    """Return the best learning rate of a training (Table A1)."""
    found = number("table_a1", task, training, "rate")
    return found.value if found else None


def depth(task: str, training: str) -> int:
    """Return the ResNet layer after which MMTM (M5) or DAFT (M6) did best."""
    return _DEPTHS[training][task]
