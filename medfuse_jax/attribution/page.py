"""The page on one stay's score: a chart of its variables by hour, and its X-rays with what the score needs of them.

It shows one patient's data: it is written beside the run, for its owner alone, and no report includes it.
"""

from html import escape

import matplotlib as mpl
import numpy as np

from medfuse_jax import schema
from medfuse_jax.attribution.result import Attribution
from medfuse_jax.report import html, style
from medfuse_jax.report.html import CHART_STYLE
from medfuse_jax.report.wording import method_name, number, task_name

_WIDTH_PX, _ROW_PX, _IMAGE_PX = 640, 18, 300
_COLORS = "RdBu_r"  # red: towards the label; blue: away from it
_WARNING = "This page shows one patient's data. Do not share it."


def write(found: Attribution) -> str:
    """Return the page as HTML."""
    at = "" if found.hour is None else f", hour {found.hour:g}"
    title = f"Stay {found.stay_id}: {found.label}"
    probability = "" if found.task == "length_of_stay" else f", {1 / (1 + np.exp(-found.score)):.1%}"
    facts = {
        "Model": f"{method_name(found.method)}, {task_name(found.task)}{at}",
        "Score": f"{number(found.score)} in logits{probability}",
        "With average series": f"{number(found.baseline)}; shares add up to within {abs(found.gap):.4f}",
    }
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    parts = [
        f'<header><h1>{escape(title)}</h1><div class="notice"><strong>{_WARNING}</strong></div>',
        f'<dl class="facts">{shown}</dl></header>',
        _series(found),
        _images(found),
        '<p class="note">Red raises the score, blue lowers it. A share says what this model did with this stay, not '
        "what causes the outcome.</p>",
    ]
    return html.document(title, "".join(parts), style.CSS)


def _series(found: Attribution) -> str:
    if not len(found.ehr_TF):
        return ""
    share_VT = found.variables_TV.T
    order = np.argsort(-np.abs(share_VT).sum(1), kind="stable")
    names = [schema.VARIABLES[v].name for v in order]
    limit = max(float(np.abs(share_VT).max()), 1e-9)
    height = _ROW_PX * len(names) + 60
    with mpl.rc_context(CHART_STYLE):
        axes = html.new_figure(_WIDTH_PX, height).add_axes((0.34, 45 / height, 0.64, 1 - 60 / height))
        ends = (0, share_VT.shape[1] * found.timestep_h, len(names) - 0.5, -0.5)
        look = {"cmap": _COLORS, "vmin": -limit, "vmax": limit, "aspect": "auto", "interpolation": "nearest"}
        axes.imshow(share_VT[order], extent=ends, **look)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("hours since the stay began")
        chart = html.svg(axes.figure, "Shares of the score by variable and hour")
    head = '<th scope="col">Variable</th><th scope="col" class="num">Share, in logits</th>'
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="num">{number(float(share_VT[v].sum()), 3, True)}</td></tr>'
        for name, v in zip(names, order)
    )
    caption = f"Integrated gradients; strongest colour {limit:.3f} in logits"
    table = html.table(head, body, "Shares by variable")
    return f'<section><h2>Time series</h2><div class="charts">{html.figure(chart, caption)}</div>{table}</section>'


def _images(found: Attribution) -> str:
    charts = []
    for number_of, (fallen_CC, grey_CC) in enumerate(zip(found.image_PCC, found.shown_PCC), start=1):
        limit = max(float(np.abs(fallen_CC).max()), 1e-9)
        with mpl.rc_context(CHART_STYLE):
            axes = html.new_figure(_IMAGE_PX, _IMAGE_PX).add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            axes.imshow(grey_CC, cmap="gray", vmin=0, vmax=1)
            axes.imshow(fallen_CC, cmap=_COLORS, vmin=-limit, vmax=limit, alpha=0.45)
            chart = html.svg(axes.figure, f"X-ray {number_of} with what the score needs of it")
        charts.append(html.figure(chart, f"X-ray {number_of}, occluded in parts; strongest colour {limit:.3f}"))
    return f'<section><h2>X-ray</h2><div class="charts">{"".join(charts)}</div></section>' if charts else ""
