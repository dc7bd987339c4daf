"""The data of Figures 1, 4 and A1 to A3 of Hayat et al. 2022, as tables, and the curves drawn from them."""

import math

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from medfuse_jax import schema
from medfuse_jax.paper import published, scores
from medfuse_jax.paper.cells import (
    BOTH_HEADS,
    DIFFERENCE_HEADS,
    KINDS,
    METRICS,
    TASK_NAMES,
    Maker,
    Table,
    Value,
)
from medfuse_jax.report import withheld
from medfuse_jax.report.html import CHART_STYLE, MUTED, new_figure, run_color, svg
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


def charts(table: Table) -> list[tuple[str, str]]:
    """Return the caption and SVG of each chart of a table: the paper's figures, with our intervals."""
    if table.name == "figure_4":
        drawn = [(m.upper(), _types(table, m.upper())) for m in METRICS]
    else:
        drawn = [("AUROC", _curves(table))] if table.name in _CURVES else []
    values = [cell for row in table.rows for cell in row if isinstance(cell, Value)]
    has_spread = any(not math.isnan(value.spread) for value in values)
    bounds = "± standard deviation" if has_spread else "with 95 % interval"
    return [(f"{metric}, {bounds}", chart) for metric, chart in drawn if chart]


def _types(table: Table, metric: str) -> str:
    """Draw one metric of both models by type of phenotype, and the paper's as a line; '' without a number."""
    models = {name: [row[table.head.index(f"{name}, {metric}")] for row in table.rows] for name in ("LSTM", "MedFuse")}
    if all(math.isnan(value.ours) for values in models.values() for value in values):
        return ""
    with mpl.rc_context(CHART_STYLE | {"axes.grid": True, "axes.grid.axis": "y"}):
        axes = _axes(metric)
        papers = []
        for color, (name, values) in enumerate(models.items()):
            place = np.arange(len(values)) + 0.24 * color - 0.12
            low, high = np.array([value.drawn for value in values]).T
            axes.vlines(place, low, high, color=run_color(color), alpha=0.4, linewidth=5)
            axes.plot(place, [value.ours for value in values], "o", color=run_color(color), label=name)
            papers += [(x, value.paper.value) for x, value in zip(place, values) if value.paper]
        if papers:
            x, y = np.array(papers).T
            axes.hlines(y, x - 0.1, x + 0.1, color=MUTED, linewidth=1.5, label="paper")
        axes.set_xticks(range(len(table.rows)), [row[0] for row in table.rows])
        axes.set(xlim=(-0.5, len(table.rows) - 0.5))
        return _finished(axes, f"{table.title}, {metric}", 3)


def _curves(table: Table) -> str:
    """Draw the AUROC of Figure A1, A2 or A3, which is what the paper draws; '' without a number."""
    curves = {head: points for head in table.head[1:] if "AUPRC" not in head and (points := _points(table, head))}
    if not curves:
        return ""
    with mpl.rc_context(CHART_STYLE | {"axes.grid": True}):
        axes = _axes("AUROC")
        for color, (head, points) in enumerate(curves.items()):
            draw_bounded(axes, points, run_color(color), head.removesuffix(", AUROC"))
        axes.set(xlabel=f"{table.head[0]}, %")
        return _finished(axes, table.title, 2)


def _axes(metric: str) -> Axes:
    axes = new_figure(_WIDTH_PX, _HEIGHT_PX).add_axes((0.14, 0.17, 0.82, 0.67))
    axes.set(ylabel=metric)
    return axes


def _finished(axes: Axes, title: str, columns: int) -> str:
    look = {"frameon": False, "fontsize": 9, "columnspacing": 1}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=columns, **look)
    return svg(axes.figure, title)


def _points(table: Table, head: str) -> list[tuple]:
    """Return the (x, y, low, high) of a curve's column, without those that have no number."""
    cells = [(float(row[0].removesuffix("%")), row[table.head.index(head)]) for row in table.rows]
    return [(x, of.ours, *of.drawn) for x, of in cells if isinstance(of, Value) and not math.isnan(of.ours)]
