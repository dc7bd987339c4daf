"""The audit's charts, as inline SVG that takes its colours and font from the page."""

import html
import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from data_prep import privacy

# Stand-in colours that become the page's CSS variables, so that a chart follows it from light to dark.
_INK, _MUTED, _RULE, _OURS, _PAPERS = "#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule", _OURS: "--ours", _PAPERS: "--papers"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, and readers of screens can read it
    "svg.hashsalt": "medfuse",
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_WIDTH_PX = 400
CHART = "@chart@"  # begins every id; the page puts the chart's number there


def prevalence(labels: list[str], ours: list[float | None], paper: list[float | None]) -> str:
    """A dot a label for ours, a ring for the paper's, largest of the paper's first."""
    order = sorted(range(len(labels)), key=lambda k: paper[k] or 0.0)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(24 * len(labels) + 50, left=0.47, bottom_px=40)
        for row, k in enumerate(order):
            if paper[k] is not None and ours[k] is not None:
                axes.plot([paper[k], ours[k]], [row, row], color=_RULE, linewidth=2.5, zorder=1)
            if paper[k] is not None:
                axes.plot(paper[k], row, "o", markersize=7, markerfacecolor="none", color=_PAPERS, markeredgewidth=1.6)
            if ours[k] is not None:
                axes.plot(ours[k], row, "o", markersize=6, color=_OURS)
        axes.set_yticks(range(len(order)), [_short(labels[k]) for k in order])
        axes.set(ylim=(-0.7, len(order) - 0.3), xlabel="share of positives among the training stays")
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        return _svg(figure, "Share of positives by label, ours and the paper's")


def observed(names: list[str], shares: list[float | None]) -> str:
    """A bar a variable: the share of steps in which it was observed."""
    order = sorted(range(len(names)), key=lambda i: shares[i] or 0.0)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(22 * len(names) + 50, left=0.47, bottom_px=40)
        values = [shares[i] or 0.0 for i in order]
        axes.barh(range(len(order)), values, color=_OURS, height=0.62)
        for row, i in enumerate(order):
            text = "too few to show" if shares[i] is None else f"{shares[i]:.0%}" if shares[i] >= 0.01 else "under 1%"
            axes.text((shares[i] or 0.0) + 0.015, row, text, va="center", color=_MUTED, fontsize=9.5)
        axes.set_yticks(range(len(order)), [_short(names[i]) for i in order])
        axes.set(xlim=(0, 1.12), ylim=(-0.7, len(order) - 0.3), xlabel="share of steps with an observation")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        axes.grid(axis="x")
        return _svg(figure, "Share of time steps in which each variable was observed")


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
                color=_MUTED,
                fontsize=9,
            )
        names = [f"{name}+" if name.endswith("-") else name for name in (n.replace("-", "–") for n in counts)]
        names = [name.replace("–+", "+").rstrip("–") for name in names]
        names[-1] = names[-1].rstrip("+") + "+"
        axes.set_xticks(range(len(counts)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        axes.set(xlabel=unit, ylabel=what, ylim=(0, max([*shown, privacy.SMALLEST]) * 1.12))
        axes.yaxis.get_major_locator().set_params(nbins=4, integer=True)
        axes.grid(axis="y")
        return _svg(figure, f"{what} by {unit}: " + ", ".join(f"{k}: {v}" for k, v in counts.items()))


def _short(name: str, longest: int = 34) -> str:
    name = name.split(" (")[0].replace("Glascow coma scale", "GCS")
    return name if len(name) <= longest else name[: longest - 1].rstrip(" ;,") + "…"


def _axes(height_px: int, left: float, bottom_px: int):
    figure = Figure(figsize=(_WIDTH_PX / 72, height_px / 72))  # an SVG's unit is 1/72 inch
    bottom = bottom_px / height_px
    return figure, figure.add_axes((left, bottom, 0.97 - left, 0.98 - bottom - 8 / height_px))


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A <style> would be the whole page's.
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    width, height = figure.get_size_inches() * 72
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(description)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    text = re.sub(r' (d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    text = re.sub(r"font-family: [^;]*; ", "", re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text))
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    text = re.sub(r"\s*\n\s*", " ", text.replace("xlink:href", "href"))
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r' id="([\w.:-]+)"', lambda m: f' id="{CHART}{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(|href=")#([\w-]+)', rf"\1#{CHART}\2", text).strip()
