"""The report's curves of AUROC with fewer X-rays, other stays or fewer hours of EHR. Never imports jax."""

import matplotlib as mpl

from medfuse_jax.report import html, plots
from medfuse_jax.report.read_fields import pair
from medfuse_jax.report.read_runs import Run
from medfuse_jax.report.wording import unit

_CAPTIONS = {
    "cxr_dropped": ("AUROC by share of X-rays dropped, {unit} with an X-ray", "X-rays dropped"),
    "ehr_only": ("AUROC on {unit} with an X-ray and a share of the others", "share of the others added"),
    "ehr_hours": ("AUROC by hours of EHR read, all {unit}", "first hours read"),
}


def robustness(run: Run) -> str:
    """Return the charts of one run's robustness.json; '' if it has none, or one of other weights."""
    curves = run.robustness.get("curves") if run.result and run.robustness.get("step") == run.result.get("step") else []
    charts = ""
    for curve in filter(_is_curve, curves if isinstance(curves, list) else []):
        found = [(p.get("at"), p.get("auroc_macro"), *pair(p.get("auroc_macro_ci"))) for p in curve["points"]]
        points = [point for point in found if None not in point]
        if curve.get("name") in _CAPTIONS and len(points) > 1:
            caption, label = _CAPTIONS[curve["name"]]
            charts += html.figure(_chart(points, run.color, label), caption.format(unit=unit(run.task)))
    note = '<p class="note">Bands: 95 % intervals. The stays of a smaller share are among those of a larger one.</p>'
    return f'<h4>With less data</h4><div class="charts">{charts}</div>{note}' if charts else ""


def _is_curve(curve) -> bool:
    points = curve.get("points") if isinstance(curve, dict) else None
    return isinstance(points, list) and all(isinstance(point, dict) for point in points)


def _chart(points: list[tuple], color: int, label: str) -> str:
    is_hours = points[-1][0] > 1
    with mpl.rc_context(plots.STYLE):
        axes = html.new_figure(plots.WIDTH_PX, plots.LOW_PX).add_axes((0.15, 0.19, 0.81, 0.76))
        if is_hours:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g} h")
        else:
            axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        plots.draw_bounded(axes, points, html.run_color(color))
        axes.set(xlabel=label, ylabel="AUROC")
        return html.svg(axes.figure, f"AUROC by {label}")
