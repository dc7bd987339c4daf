"""The data of Figures 1, 4 and A1 to A3 of Hayat et al. 2022, as tables, and the curves drawn from them."""

import math

import matplotlib as mpl
import numpy as np

from medfuse_jax import schema
from medfuse_jax.paper import published, scores
from medfuse_jax.paper.cells import (
    BOTH_HEADS,
    DIFFERENCE_HEADS,
    KINDS,
    TASK_NAMES,
    Maker,
    Table,
    Value,
)
from medfuse_jax.report import withheld
from medfuse_jax.report.html import CHART_STYLE, new_figure, run_color, svg
from medfuse_jax.report.plots import draw_bounded

_SHARES = tuple(round(0.1 * n, 1) for n in range(11))
_CURVES = ("figure_a1", "figure_a2", "figure_a3")
_WIDTH_PX, _HEIGHT_PX = 420, 280


def figure_1(counts: dict[str, dict[str, tuple[int, int]]]) -> Table:
    """Return the sizes of the splits. counts: task -> split -> (stays or X-rays, those with an X-ray)."""
    body = []
    for task, by_split in counts.items():
        unit = schema.TASKS[task].unit
        for split, (count, paired) in by_split.items():
            cells = [
                _count(shown, published.number("figure1", task, split, what))
                for shown, what in (
                    (withheld.shown(count), unit),
                    (withheld.part(paired, count), "paired"),
                )
            ]
            body.append([f"{schema.TASKS[task].title}, {split}", unit, cells[0], "" if unit == "X-rays" else cells[1]])
    notes = ["The paper's counts are of MIMIC-IV 1.0; those of mortality are of X-rays up to the end of the stay."]
    head = ["Dataset", "Unit", "Records", "With an X-ray"]
    return Table("figure_1", "Figure 1. The splits", head, body, notes)


def _count(shown: int | str, paper: published.Number | None) -> Value | str:
    """Return a cell with a count, or with what is shown instead of it."""
    if isinstance(shown, int):
        return Value(shown, paper=paper, digits=0)
    return shown + (f" (paper {paper.value:,.0f})" if paper else "")


def figure_4(make: Maker) -> Table:
    title = "Figure 4. By type of phenotype, on the test stays with an X-ray"
    notes = make.gaps("paired", tasks=("pheno",)) + make.by_loss("E1", "OPT", tasks=("pheno",))
    table, found = Table("figure_4", title, ["Type", *BOTH_HEADS, *DIFFERENCE_HEADS], [], notes), make.both("pheno")
    if found is None:
        return table
    r, tested = found
    for kind in ("acute", "mixed", "chronic"):
        columns = [k for k, label in enumerate(r.labels) if KINDS.get(label) == kind]
        if not columns:
            continue
        parts = [paired.part(np.ones(len(paired.stay_id), bool), columns) for paired in tested]
        table.rows.append([kind, *make.macros_of_both(parts, ("figure4", "pheno", kind))])
    return table


def figure_a1(make: Maker) -> Table:
    head = ["EHR-only stays in training"] + [f"{TASK_NAMES[r.task]}, {on}" for r in make.tasks for on in _ON]
    body = []
    for share in sorted({share for r in make.tasks for share in r.opt_by_share}):
        cells = []
        for r in make.tasks:
            val = r.opt_by_share.get(share)
            parts = (val, val.paired) if val else (None, None)
            cells += [make.macro(part)[0] if part and len(part.stay_id) else "" for part in parts]
        body.append([_percent(share), *cells])
    notes = []
    for r in make.tasks:
        was = published.number("figure_a1", r.task, "OPT", "share")
        if "OPT" in r.models and was:
            notes.append(f"{TASK_NAMES[r.task]}: {r.models['OPT'].choice}; the paper chose {_percent(was.value)}.")
    title = "Figure A1. MedFuse's AUROC on the validation stays, by the share of EHR-only stays in training"
    return Table("figure_a1", title, head, body, notes)


_ON = ("all stays", "stays with an X-ray")


def figure_a2(make: Maker) -> Table:
    def at(share: float) -> list:
        both = zip(make.test("OPT", "paired"), make.test("OPT", "dropped"))
        return [a and b and scores.combine(a, b, scores.drawn(a.stay_id, share)) for a, b in both]

    title = "Figure A2. MedFuse (OPTIMAL) on the test stays with an X-ray, by the share of X-rays dropped"
    return _curve(make, "figure_a2", title, "X-rays dropped", at, make.gaps("paired"))


def figure_a3(make: Maker) -> Table:
    def at(share: float) -> list:
        return [of and of.part(of.has_cxr | scores.drawn(of.stay_id, share)) for of in make.test("OPT", "all")]

    title = "Figure A3. MedFuse (OPTIMAL) on the test stays with an X-ray and a share of the others"
    return _curve(make, "figure_a3", title, "EHR-only stays added", at, make.gaps("paired", "all"))


def _curve(make: Maker, name: str, title: str, what: str, at, notes: list[str]) -> Table:
    rows = [[_percent(share), *cells] for share in _SHARES if (cells := make.row(at(share)))]
    return Table(name, title, [what, *make.heads()], rows, notes + make.by_loss("OPT"))


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"


def chart(table: Table) -> str:
    """Return the AUROC curves of Figure A1, A2 or A3 with their intervals, as SVG; '' for another table."""
    if table.name not in _CURVES:
        return ""
    curves = {head: points for head in table.head[1:] if "AUPRC" not in head and (points := _points(table, head))}
    if not curves:
        return ""
    with mpl.rc_context(CHART_STYLE | {"axes.grid": True}):
        axes = new_figure(_WIDTH_PX, _HEIGHT_PX).add_axes((0.14, 0.19, 0.82, 0.62))
        for color, (head, points) in enumerate(curves.items()):
            draw_bounded(axes, points, run_color(color), head.removesuffix(", AUROC"))
        axes.set(xlabel=f"{table.head[0]}, %", ylabel="AUROC")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False, fontsize=9, columnspacing=1)
        return svg(axes.figure, table.title)


def _points(table: Table, head: str) -> list[tuple]:
    """Return the (x, y, low, high) of a curve's column, without those that have no number."""
    cells = [(float(row[0].removesuffix("%")), row[table.head.index(head)]) for row in table.rows]
    return [(x, of.ours, *of.drawn) for x, of in cells if isinstance(of, Value) and not math.isnan(of.ours)]
