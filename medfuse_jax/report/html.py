"""The frame, style and charts that all our HTML pages share. Never imports jax.

A page is one self-contained file without scripts: one column, a light and a dark theme, readable from 390 px wide.
Matplotlib draws the charts in placeholder colours, which `svg` replaces with the page's CSS variables.
"""

import html
import io
import itertools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHART_ID = "chart-"  # prefix of every id in a chart; `document` makes it unique
NUM_COLORS = 7  # --run0 ... --run6
INK, MUTED, RULE, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"

CHART_STYLE = {
    "svg.fonttype": "none",  # keep text as text: in the page's font, readable by screen readers
    "svg.hashsalt": "medfuse_jax",
    "text.parse_math": False,  # names come from folders, where $ is an ordinary character
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

_CSS = """
:root {
  --paper: #fdfdfc; --ink: #1a1d21; --muted: #626b76; --rule: #e4e6e9; --wash: #f4f5f6; --notice: #a15c00;
  --run0: #0069ab; --run1: #cc5500; --run2: #00875f; --run3: #b0508a; --run4: #a87900; --run5: #3d9bd6; --run6: #55606b;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e8eaec; --muted: #98a2ad; --rule: #2c3238; --wash: #1d2125; --notice: #f0b257;
    --run0: #56b0ea; --run1: #ff9055; --run2: #35c79c; --run3: #e79cc8; --run4: #e8b53a; --run5: #9bd3f7;
    --run6: #c3cad1;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-size: 16px;
  font-family: Inter, ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 64rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2rem) 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.25rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 0.75rem; }
h2 { font-size: 1.35rem; letter-spacing: -0.01em; margin: 3rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 2rem 0 0.5rem; }
h4 { font-size: 0.9375rem; margin: 2rem 0 0.5rem; }
h1, h2, h3, h4 { text-wrap: balance; font-weight: 650; }
.lead { font-size: 1.125rem; max-width: 42rem; margin: 0 0 1.25rem; text-wrap: pretty; }
.note { color: var(--muted); font-size: 0.8125rem; max-width: 46rem; margin: 0.6rem 0 0; }
.soft { color: var(--muted); }
.notice {
  border-left: 3px solid var(--notice); background: var(--wash); padding: 0.65rem 0.9rem; margin: 0 0 1.25rem;
  font-size: 0.9375rem; max-width: 46rem; overflow-wrap: anywhere;
}
.notice strong { color: var(--notice); }
.notice ul { margin: 0.25rem 0 0; padding-left: 1.1rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2.25rem; margin: 0 0 0.5rem; font-size: 0.875rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }

/* A shadow on the side where a table scrolls. */
.scroll {
  overflow-x: auto; overscroll-behavior-x: contain; background-repeat: no-repeat;
  background-image: linear-gradient(to left, var(--paper) 40%, transparent),
    linear-gradient(to left, color-mix(in srgb, var(--ink) 11%, transparent), transparent);
  background-size: 40px 100%, 14px 100%; background-position: right; background-attachment: local, scroll;
}
.scroll:focus-visible, summary:focus-visible, pre:focus-visible { outline: 2px solid var(--run0); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { vertical-align: baseline; white-space: nowrap; font-weight: 400; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--muted); font-size: 0.8125rem; border-bottom: 1px solid var(--muted); vertical-align: bottom; }
tbody tr + tr > *, tbody + tbody tr > * { border-top: 1px solid var(--rule); }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.75rem 2.5rem; }
.chart { margin: 0; min-width: 0; }
.chart figcaption { font-size: 0.875rem; font-weight: 600; margin-bottom: 0.35rem; }
.chart svg { display: block; width: 100%; max-width: 30rem; height: auto; font-family: inherit; }
.chart svg * { stroke-linejoin: round; }
summary { cursor: pointer; }
footer { color: var(--muted); font-size: 0.8125rem; margin-top: 3rem; padding-top: 1rem; }
footer { border-top: 1px solid var(--rule); }
@media (max-width: 40rem) {
  table { font-size: 0.8125rem; }
  thead th { font-size: 0.75rem; }
  thead th:first-child, tbody th[scope="row"] { position: sticky; left: 0; background: var(--paper); z-index: 1; }
}
@media print { .scroll { overflow: visible; } }
"""


def document(title: str, body: str, css: str = "") -> str:
    """Return a whole page. title: text; body: HTML; css: additional rules."""
    count = itertools.count()
    # Give each chart its own ids, even if two charts are identical.
    body = re.sub("<svg.*?</svg>", lambda m: m[0].replace(_CHART_ID, f"c{next(count)}-"), body, flags=re.DOTALL)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)}</title>'
        f"<style>{_CSS}{css}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def figure(svg_text: str, caption: str) -> str:
    """Return a chart with its caption. caption: text."""
    return f'<figure class="chart"><figcaption>{html.escape(caption)}</figcaption>{svg_text}</figure>'


def table(head: str, body: str, caption: str) -> str:
    """Return a table that scrolls sideways. head, body: HTML of its cells and rows; caption: for screen readers."""
    caption = html.escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def synthetic_notice(num_synthetic: int, num_runs: int) -> str:
    """Return a notice that results come from synthetic patients; '' if none do."""
    if not num_synthetic:
        return ""
    which = "These results come" if num_synthetic == num_runs else "Some of these results come"
    return (
        f'<p class="notice"><strong>Synthetic patients.</strong> {which} from a synthetic cohort. '
        "They show that the software works, and say nothing about real patients.</p>"
    )


def pairing_notice(num_marked: int, num_runs: int, note: str) -> str:
    """Return a notice that results come from X-rays after the window; '' if none do. note: the sentence on them."""
    if not num_marked:
        return ""
    which = "" if num_marked == num_runs else " Some of these results come from such data."
    return f'<p class="notice"><strong>For comparison alone.</strong> {html.escape(note)}{which}</p>'


def run_color(color: int) -> str:
    """Return the placeholder colour for --run0, --run1, ...; colours repeat after NUM_COLORS."""
    return f"#0c000{color % NUM_COLORS}"


_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"}
_VARIABLES |= {run_color(i): f"--run{i}" for i in range(NUM_COLORS)}


def new_figure(width_px: int, height_px: int) -> "Figure":
    from matplotlib.figure import Figure  # takes seconds: import it only to draw a chart

    return Figure(figsize=(width_px / 72, height_px / 72))  # an SVG unit is 1/72 inch


def svg(chart: "Figure", description: str) -> str:
    """Return the figure as an inline <svg> in the page's colours and font, without unused ids."""
    buffer = io.StringIO()
    chart.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Remove <style>, which would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    width, height = chart.get_size_inches() * 72
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(description)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    # Round positions to 0.01 px, but not numbers in text.
    text = re.sub(r' (d|x|y|transform)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)
    text = re.sub(r"font-family: [^;]*; ", "", text).replace("xlink:href", "href")
    text = re.sub(r"\s*\n\s*", " ", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r' id="([\w.:-]+)"', lambda m: f' id="{_CHART_ID}{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(|href=")#([\w-]+)', rf"\1#{_CHART_ID}\2", text).strip()
