"""All tables and figures in the paper's order, and the numbers that must be equal between them."""

import dataclasses
import itertools
import math

from medfuse_jax.paper import figures, tables
from medfuse_jax.paper.cells import BOTH_HEADS, TASK_NAMES, Maker, Table, Value

_LSTM = ("LSTM", "EHR, partial", "paired")  # rows of Table 1 whose means Table 4 has, too
_OPTIMAL = (tables.OPT_TITLE, "partial", "paired")


@dataclasses.dataclass(frozen=True)
class Check:
    """Two numbers of ours that describe the same thing."""

    what: str
    a: float
    b: float

    @property
    def holds(self) -> bool:
        return math.isclose(self.a, self.b, rel_tol=0, abs_tol=1e-9)

    @property
    def is_empty(self) -> bool:
        """Whether neither number is known."""
        return math.isnan(self.a) and math.isnan(self.b)


def make_all(make: Maker, counts: dict) -> tuple[list[Table], list[Check]]:
    """Return the tables that have a row, and the self-checks. counts: see `figures.figure_1`."""
    made = [
        figures.figure_1(counts),
        *(maker(make) for maker in (tables.table_1, tables.table_2, tables.table_3, tables.table_4, figures.figure_4)),
        *(maker(make) for maker in (tables.table_5, tables.table_a1)),
        *(maker(make) for maker in (figures.figure_a1, figures.figure_a2, figures.figure_a3)),
        *(maker(make) for maker in (tables.table_a2, tables.table_a3)),
    ]
    made = [table for table in made if table.rows]
    checks = _checks({table.name: table for table in made}, make.heads())
    return made, [check for check in checks if not check.is_empty]


def describe_checks(checks: list[Check]) -> str:
    """Return one line on how many self-checks hold, or that there was none to make."""
    if not checks:
        return "no self-check: no two tables have a number of the same thing"
    return f"{sum(check.holds for check in checks)} of {len(checks)} self-checks hold"


def _checks(made: dict[str, Table], heads: list[str]) -> list[Check]:
    def row(name: str, *texts: str) -> list:
        return _row(made, name, *texts)[-len(heads) :]  # the numbers under `heads`, the last columns

    optimal, lstm = (row("table_1", *texts) for texts in (_OPTIMAL, _LSTM))
    pairs = (
        ("Figure A2 at 0 % and Table 2", row("figure_a2", "0 %"), row("table_2", tables.OPT_TITLE)),
        ("Figure A2 at 100 % and Table 1", row("figure_a2", "100 %"), row("table_1", f"{tables.OPT_TITLE}, no X-ray")),
        ("Figure A3 at 0 % and Table 2", row("figure_a3", "0 %"), row("table_2", tables.OPT_TITLE)),
        ("Figure A3 at 100 % and Table 3", row("figure_a3", "100 %"), row("table_3", tables.OPT_TITLE)),
    )
    found = [(f"{what}, {head}", a, b) for what, *both in pairs for head, a, b in zip(heads, *both)]
    is_pheno = [head.startswith(TASK_NAMES["pheno"]) for head in heads]
    of_table_1 = [*itertools.compress(lstm, is_pheno), *itertools.compress(optimal, is_pheno)]
    means = _row(made, "table_4", "Average")[4:8]
    found += [(f"Table 4's mean and Table 1, {head}", a, b) for head, a, b in zip(BOTH_HEADS, means, of_table_1)]
    return [Check(what, a.ours, b.ours) for what, a, b in found if isinstance(a, Value) and isinstance(b, Value)]


def _row(made: dict[str, Table], name: str, *texts: str) -> list:
    """Return the cells of the row that starts with these texts; [] if there is none."""
    rows = made[name].rows if name in made else []
    return next((row for row in rows if tuple(row[: len(texts)]) == texts), [])
