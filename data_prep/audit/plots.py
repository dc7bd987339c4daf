"""The audit's charts, as inline SVG."""

import matplotlib as mpl

from data_prep.audit import privacy
from medfuse_jax.report.html import CHART_STYLE, INK, MUTED, RULE, new_figure, run_color, svg

_STYLE = CHART_STYLE | {"ytick.color": INK}
_OURS, _PAPERS = run_color(0), run_color(1)
_WIDTH_PX = 400


def prevalence(labels: list[str], ours: list[float | None], paper: list[float | None]) -> str:
    """A dot a label for ours, a ring for the paper's, largest of the paper's first."""
    order = sorted(range(len(labels)), key=lambda k: paper[k] or 0.0)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(24 * len(labels) + 50, left=0.47, bottom_px=40)
        for row, k in enumerate(order):
            if paper[k] is not None and ours[k] is not None:
                axes.plot([paper[k], ours[k]], [row, row], color=RULE, linewidth=2.5, zorder=1)
            if paper[k] is not None:
                axes.plot(paper[k], row, "o", markersize=7, markerfacecolor="none", color=_PAPERS, markeredgewidth=1.6)
            if ours[k] is not None:
                axes.plot(ours[k], row, "o", markersize=6, color=_OURS)
        axes.set_yticks(range(len(order)), [_short(labels[k]) for k in order])
        axes.set(ylim=(-0.7, len(order) - 0.3), xlabel="share of the training stays")
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        return svg(figure, "Share of positives by label, ours and the paper's")


def observed(names: list[str], shares: list[float | None]) -> str:
    """A bar a variable: the share of steps in which it was observed."""
    order = sorted(range(len(names)), key=lambda i: shares[i] or 0.0)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(22 * len(names) + 50, left=0.47, bottom_px=40)
        values = [shares[i] or 0.0 for i in order]
        axes.barh(range(len(order)), values, color=_OURS, height=0.62)
        for row, i in enumerate(order):
            text = "too few to show" if shares[i] is None else f"{shares[i]:.0%}" if shares[i] >= 0.01 else "under 1%"
            axes.text((shares[i] or 0.0) + 0.015, row, text, va="center", color=MUTED, fontsize=9.5)
        axes.set_yticks(range(len(order)), [_short(names[i]) for i in order])
        axes.set(xlim=(0, 1.12), ylim=(-0.7, len(order) - 0.3), xlabel="share of steps with an observation")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axes.grid(axis="x")
        return svg(figure, "Share of time steps in which each variable was observed")


def bars(counts: dict[str, int | str], what: str, unit: str) -> str:
    """A bar an interval; one that may not be shown is a pale stub with its text."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(230, left=0.12, bottom_px=62)
        shown = [n if isinstance(n, int) else 0 for n in counts.values()]
        axes.bar(range(len(counts)), shown, color=_OURS, width=0.72)
        for place, count in enumerate(counts.values()):
            hidden = isinstance(count, str)
            axes.annotate(
                count if hidden else f"{count:,}",
                (place, 0 if hidden else count),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=MUTED,
                fontsize=9,
            )
        names = [f"{name}+" if name.endswith("-") else name for name in (n.replace("-", "–") for n in counts)]
        names = [name.replace("–+", "+").rstrip("–") for name in names]
        names[-1] = names[-1].rstrip("+") + "+"
        axes.set_xticks(range(len(counts)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set(xlabel=unit, ylabel=what, ylim=(0, max([*shown, privacy.SMALLEST]) * 1.12))
        axes.yaxis.get_major_locator().set_params(nbins=4, integer=True)
        axes.grid(axis="y")
        return svg(figure, f"{what} by {unit}: " + ", ".join(f"{k}: {v}" for k, v in counts.items()))


def _short(name: str, longest: int = 28) -> str:
    name = name.split(" (")[0].replace("Glascow coma scale", "GCS")
    return name if len(name) <= longest else name[: longest - 1].rstrip(" ;,") + "…"


def _axes(height_px: int, left: float, bottom_px: int):
    figure = new_figure(_WIDTH_PX, height_px)
    bottom = bottom_px / height_px
    return figure, figure.add_axes((left, bottom, 0.97 - left, 0.98 - bottom - 8 / height_px))
