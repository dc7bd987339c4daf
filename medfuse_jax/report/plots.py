"""The report's charts, as inline SVG. Never imports jax.

Shape suffixes: N samples, K labels, G grid points, T time steps, M modalities.
"""

import math
from collections.abc import Sequence
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from medfuse_jax import ranks, schema
from medfuse_jax.report.html import CHART_STYLE, MUTED, NUM_COLORS, PAPER, new_figure, run_color, svg

STYLE = CHART_STYLE | {"axes.grid": True}
WIDTH_PX, LOW_PX, _HIGH_PX = 380, 250, 340  # close to the displayed size, so that text keeps its size
_DASHED = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (3, 3))}
_GRID_G = np.linspace(0, 1, 201)


# By epoch


def loss_curves(
    train: dict[int, float], val: dict[int, float], best_epoch: int | None, color: int, best_label: str = "chosen"
) -> str:
    """Draw training and validation loss by epoch, with the best epoch marked."""
    with mpl.rc_context(STYLE):
        axes = _epoch_axes(best_epoch, right=0.83)
        ends = []
        for values, name, line_color in ((train, "training", MUTED), (val, "validation", run_color(color))):
            if values:
                _plot_by_epoch(axes, values, line_color)
                ends.append((list(values.values())[-1], name, line_color))
        _label_ends(axes, ends)
        _label_best_epoch(axes, best_epoch, best_label)
        return svg(axes.figure, "Training and validation loss by epoch")


def auroc_curve(val: dict[int, float], best_epoch: int | None, color: int, best_label: str = "chosen") -> str:
    """Draw validation AUROC by epoch, with the best epoch and its value marked."""
    with mpl.rc_context(STYLE):
        axes = _epoch_axes(best_epoch, right=0.96)
        _plot_by_epoch(axes, val, run_color(color))
        if best_epoch in val:
            axes.plot([best_epoch], [val[best_epoch]], "o", color=run_color(color), markersize=6)
            axes.set_ymargin(0.16)  # room for the number above the curve
            is_late = best_epoch > (min(val) + max(val)) / 2
            axes.annotate(
                f"{val[best_epoch]:.3f}",
                (best_epoch, val[best_epoch]),
                xytext=(-6 if is_late else 6, 7),
                textcoords="offset points",
                ha="right" if is_late else "left",
                color=run_color(color),
                weight="bold",
            )
        _label_best_epoch(axes, best_epoch, best_label)
        return svg(axes.figure, "Validation AUROC by epoch")


def modality_curves(by_name: dict[str, dict[int, float]], best_epoch: int | None, color: int, best_label: str) -> str:
    """Draw one validation score by epoch for each of several inputs, named at their ends."""
    with mpl.rc_context(STYLE):
        axes = _epoch_axes(best_epoch, right=0.8)
        ends = []
        for i, (name, values) in enumerate(by_name.items()):
            line_color = run_color(color + i)
            _plot_by_epoch(axes, values, line_color)
            ends.append((list(values.values())[-1], name, line_color))
        _label_ends(axes, ends)
        _label_best_epoch(axes, best_epoch, best_label)
        return svg(axes.figure, "Validation score of both modalities and of each alone, by epoch")


def _epoch_axes(best_epoch: int | None, right: float) -> Axes:
    axes = new_figure(WIDTH_PX, LOW_PX).add_axes((0.13, 0.16, right - 0.13, 0.75))
    axes.grid(axis="x", visible=False)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=7, min_n_ticks=1)
    axes.yaxis.get_major_locator().set_params(nbins=5)
    axes.set_xlabel("epoch")
    if best_epoch is not None:
        axes.axvline(best_epoch, **_DASHED)
    return axes


def _plot_by_epoch(axes: Axes, values: dict[int, float], color: str) -> None:
    marker = "o" if len(values) <= 3 else None  # a line through one point is invisible
    axes.plot(list(values), list(values.values()), color=color, marker=marker, markersize=4)


def _label_best_epoch(axes: Axes, best_epoch: int | None, label: str) -> None:
    """Write the epoch above its line, within the chart's width. Call this last, when the x limits are final."""
    if best_epoch is not None:
        low, high = axes.get_xlim()
        share = (best_epoch - low) / (high - low)
        side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
        place = {"transform": axes.get_xaxis_transform(), "ha": side, "va": "bottom"}
        axes.text(best_epoch, 1.02, f"{label}: epoch {best_epoch}", color=MUTED, fontsize=9.5, **place)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Label lines at their right ends without overlap. ends: (y, name, color)."""
    low, high = axes.get_ylim()
    last = -np.inf
    for y, name, color in sorted(ends):
        last = max((y - low) / (high - low), last + 0.08)
        axes.text(1.02, last, name, transform=axes.transAxes, color=color, va="center", fontsize=9.5)


# ROC and precision-recall. kind: 'ROC' or 'PR'.


def curves(kind: str, labels_NK: np.ndarray, scores_NK: np.ndarray, color: int) -> str:
    """Draw one thin grey curve per label, and their mean; for a single label, only its curve."""
    with mpl.rc_context(STYLE):
        axes = _unit_axes(kind)
        curves_KG = _label_curves(kind, labels_NK, scores_NK)
        several = labels_NK.shape[1] > 1
        if several:
            for curve_G in curves_KG:
                axes.plot(*_points(kind, curve_G), color=MUTED, linewidth=0.7, alpha=0.45)
            _legend(axes, kind, [("mean of the labels", run_color(color)), ("each label", MUTED)])
        if curves_KG:
            axes.plot(*_points(kind, np.mean(curves_KG, axis=0)), color=run_color(color), linewidth=2.4)
        return svg(axes.figure, f"{kind} curves of {len(curves_KG)} labels" if several else f"{kind} curve")


def overlay(kind: str, runs: Sequence[tuple[str, int, np.ndarray, np.ndarray]]) -> str:
    """Draw the mean curves of several runs. runs: (name, color, labels [N, K], scores [N, K]) of each."""
    with mpl.rc_context(STYLE):
        axes = _unit_axes(kind)
        for _, color, labels_NK, scores_NK in runs:
            if curves_KG := _label_curves(kind, labels_NK, scores_NK):
                axes.plot(*_points(kind, np.mean(curves_KG, axis=0)), color=run_color(color))
        _legend(axes, kind, [(name, run_color(color)) for name, color, _, _ in runs])
        return svg(axes.figure, f"{kind} curves, mean over labels, of {', '.join(name for name, *_ in runs)}")


def draw_bounded(axes: Axes, points: Sequence[tuple], color: str, label: str = "") -> None:
    """Draw a line through the points (x, y, low, high), with a band from low to high."""
    x, y, low, high = zip(*points)
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(x, y, "o-", color=color, markersize=4, label=label)


def reliability(curve, color: int) -> str:
    """Draw the fraction of positives by mean score, a dot per bin, its area by the bin's samples; '' without any.

    curve: as in a result's calibration. Bins of fewer than schema.FEWEST_SHOWN samples, or of the hours of fewer stays,
    are left out.
    """
    bins = [b for b in curve if isinstance(b, dict)] if isinstance(curve, list) else []
    points = [(b.get("score"), b.get("positive"), b.get("num_samples"), b.get("num_stays", math.inf)) for b in bins]
    points = [p for p in points if all(isinstance(x, int | float) and math.isfinite(x) for x in p[:3])]
    points = [p for p in points if min(p[2:]) >= schema.FEWEST_SHOWN]
    if not points:
        return ""
    score, positive, count, _ = np.array(points, float).T
    with mpl.rc_context(STYLE):
        axes = _unit_axes("reliability")
        axes.plot(score, positive, color=run_color(color))
        axes.scatter(score, positive, s=15 + 120 * count / max(count.max(), 1), color=run_color(color), zorder=3)
        return svg(axes.figure, "Fraction of positives by mean score")


def by_hour(groups: list[dict], color: int) -> str:
    """Draw kappa, or AUROC without it, with its interval by hours since the stay began; '' without any.

    groups: of a result's subgroups, in order; those withheld leave a gap.
    """
    name = "kappa" if any("kappa" in group for group in groups) else "auroc_macro"
    points = [(x, group.get(name), *(group.get(f"{name}_ci") or (None, None))) for x, group in enumerate(groups)]
    points = [p if all(isinstance(x, int | float) for x in p) else (p[0], *[math.nan] * 3) for p in points]
    place, value, low, high = np.array(points, float).reshape(-1, 4).T
    if not np.isfinite(value).any():
        return ""
    with mpl.rc_context(STYLE):
        axes = new_figure(WIDTH_PX, LOW_PX).add_axes((0.13, 0.24, 0.83, 0.7))
        axes.grid(axis="x", visible=False)
        axes.vlines(place, low, high, color=run_color(color), alpha=0.4, linewidth=5)
        axes.plot(place, value, "o-", color=run_color(color))
        axes.set_xticks(range(len(groups)), [str(group.get("name")) for group in groups], rotation=20)
        title = "linear kappa" if name == "kappa" else "AUROC"
        axes.set(xlabel="hours since the stay began", ylabel=title, xlim=(-0.5, len(groups) - 0.5))
        return svg(axes.figure, f"{title} by hour of the stay")


def _unit_axes(kind: str) -> Axes:
    axes = new_figure(WIDTH_PX, _HIGH_PX).add_axes((0.13, 0.13, 0.83, 0.83))
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    if kind != "PR":
        names = {"ROC": ("1 − specificity", "sensitivity"), "reliability": ("mean score", "fraction of positives")}
        axes.set(**dict(zip(("xlabel", "ylabel"), names[kind])))
        axes.plot([0, 1], [0, 1], **_DASHED)
    else:
        axes.set(xlabel="recall (sensitivity)", ylabel="precision")
    return axes


def _label_curves(kind: str, labels_NK: np.ndarray, scores_NK: np.ndarray) -> list[np.ndarray]:
    """Return the curve [G] of every label that has both classes."""
    curve = {"ROC": _roc, "PR": _precision}[kind]
    columns = zip(np.asarray(labels_NK).T, np.asarray(scores_NK).T, strict=True)
    return [curve(label_N, score_N) for label_N, score_N in columns if 0 < label_N.sum() < len(label_N)]


def _roc(label_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Return the true positive rate [G]; at a jump, its upper end."""
    true, seen = _counts(label_N, score_N)
    false = seen - true
    return np.interp(_GRID_G, np.append(0, false / false[-1]), np.append(0, true / true[-1]))


def _precision(label_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """Return the precision [G] by recall, as a step function whose area is the average precision."""
    true, seen = _counts(label_N, score_N)
    return (true / seen)[np.searchsorted(true / true[-1], np.maximum(_GRID_G, 1e-12), side="left")]


def _counts(label_N: np.ndarray, score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of positives and of all samples down to each score, from the highest."""
    _, positive, is_end = (x[:, 0] for x in ranks.ranked(label_N[:, None], score_N[:, None]))
    return np.cumsum(positive)[is_end], np.flatnonzero(is_end) + 1


def _points(kind: str, curve_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of a curve. A ROC curve starts at (0, 0)."""
    return (np.append(0, _GRID_G), np.append(0, curve_G)) if kind == "ROC" else (_GRID_G, curve_G)


def _legend(axes: Axes, kind: str, names: list[tuple[str, str]]) -> None:
    """Write coloured names in the corner that the curves leave empty: bottom right for ROC, top right for PR."""
    top = 0.06 + 0.065 * (len(names) - 1) if kind == "ROC" else 0.95
    look = {"transform": axes.transAxes, "ha": "right", "va": "center"}
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
    for i, (name, color) in enumerate(names):
        weight = "normal" if color == MUTED else "bold"
        axes.text(0.98, top - 0.065 * i, name, color=color, weight=weight, bbox=box, **look)


# A table cell


def interval(
    axis: tuple[float, float],
    value: float,
    bounds: tuple[float | None, float | None],
    color: int,
    others: Sequence[tuple[float, int]] = (),
    reference: float | None = None,
) -> str:
    """Draw a value as a dot and its bounds as a line, on an axis (low, high).

    others: (value, color) of other runs, drawn as small dots. reference: where to draw a dashed line, if on the axis.
    """
    width_px, height_px, edge_px = 132, 16, 6
    low, high = axis

    def x(position):
        share = min(max((position - low) / (high - low), 0), 1) if high > low else 0.5
        return f"{edge_px + (width_px - 2 * edge_px) * share:.1f}"

    parts = []
    if reference is not None and low <= reference <= high:
        parts.append(f'<path d="M{x(reference)} 0V{height_px}" stroke="var(--muted)" stroke-dasharray="2 2"/>')
    css = f"var(--run{color % NUM_COLORS})"
    if None not in bounds:
        parts.append(f'<path d="M{x(bounds[0])} 8H{x(bounds[1])}" stroke="{css}" stroke-width="2" opacity=".5"/>')
    for other, other_color in others:
        parts.append(f'<circle cx="{x(other)}" cy="8" r="2.5" fill="var(--run{other_color % NUM_COLORS})"/>')
    parts.append(f'<circle cx="{x(value)}" cy="8" r="3.5" fill="{css}"/>')
    size = f'width="{width_px}" height="{height_px}" viewBox="0 0 {width_px} {height_px}"'
    return f'<svg class="interval" {size} aria-hidden="true">{"".join(parts)}</svg>'


# Attention weights


def weight_by_hour(weight_NT: np.ndarray, length_N: np.ndarray, timestep_h: float, color: int, to_end: bool) -> str:
    """Draw the mean weight and its 10th to 90th percentile by hours since the stay began, or before its end.

    Weights are multiples of the uniform weight, 1 / length, so that short and long stays can be averaged. The chart
    covers the hours that at least a tenth of the stays reach.
    """
    with mpl.rc_context(STYLE):
        axes = new_figure(WIDTH_PX, LOW_PX).add_axes((0.13, 0.18, 0.83, 0.72))
        axes.grid(axis="x", visible=False)
        relative_NT = _relative_weights(weight_NT, length_N, to_end)
        hour_T = (np.arange(relative_NT.shape[1]) + 0.5) * timestep_h
        low_T, high_T = np.nanpercentile(relative_NT, (10, 90), axis=0)
        axes.fill_between(hour_T, low_T, high_T, color=run_color(color), alpha=0.18, linewidth=0)
        marker = "o" if len(hour_T) <= 3 else None  # a line through one point is invisible
        axes.plot(hour_T, np.nanmean(relative_NT, axis=0), color=run_color(color), marker=marker)
        axes.axhline(1, **_DASHED)
        axes.set_ylim(bottom=0)
        label = "hours before the end" if to_end else "hours since the stay began"
        axes.set_xlabel(label)
        if to_end:
            axes.invert_xaxis()
        place = {"transform": axes.get_yaxis_transform(), "ha": "left", "va": "bottom", "fontsize": 9.5}
        axes.text(0.01, 1, "uniform", color=MUTED, **place)
        return svg(axes.figure, f"Attention weight by {label}")


def _relative_weights(weight_NT: np.ndarray, length_N: np.ndarray, to_end: bool) -> np.ndarray:
    """Return weights times the stay's length [N, T], NaN beyond its end. T: the 90th percentile of the lengths."""
    rows = np.flatnonzero(length_N > 0)
    length_N, weight_NT = length_N[rows], weight_NT[rows].astype(np.float32)
    num_time_steps = max(1, int(np.quantile(length_N, 0.9, method="lower"))) if len(rows) else 1
    time_NT = np.tile(np.arange(num_time_steps), (len(rows), 1))
    inside_NT = time_NT < length_N[:, None]
    if to_end:
        time_NT = length_N[:, None] - 1 - time_NT
    relative_NT = np.take_along_axis(weight_NT, np.where(inside_NT, time_NT, 0), axis=1) * length_N[:, None]
    return np.where(inside_NT, relative_NT, np.nan)


def weight_by_modality(weight_NM: np.ndarray, names: Sequence[str], color: int) -> str:
    """Draw each modality's mean weight and 10th to 90th percentile over the stays that have it."""
    shown = [(name, weight_N[weight_N > 0]) for name, weight_N in zip(names, weight_NM.T) if (weight_N > 0).any()]
    names = [name for name, _ in shown]
    height_px = 70 + 38 * len(names)
    bottom = 50 / height_px
    with mpl.rc_context(STYLE):
        axes = new_figure(WIDTH_PX, height_px).add_axes((0.25, bottom, 0.71, 0.96 - bottom))
        axes.grid(axis="y", visible=False)
        for row, (_, weight_N) in enumerate(shown):
            low, high = np.percentile(weight_N, (10, 90))
            axes.plot([low, high], [row, row], color=run_color(color), alpha=0.4, linewidth=5)
            axes.plot([weight_N.mean()], [row], "o", color=run_color(color), markersize=7)
            above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "weight": "bold"}
            axes.annotate(f"{weight_N.mean():.2f}", (weight_N.mean(), row), color=run_color(color), **above)
        axes.set(xlim=(-0.03, 1.03), ylim=(len(names) - 0.5, -0.7), xlabel="weight")
        axes.set_yticks(range(len(names)), names)
        return svg(axes.figure, f"Attention weight by modality: {', '.join(names)}")


def weight_strip(weight_T: np.ndarray, color: int, description: str) -> str:
    """Draw one stay's weights as a strip, first time step to last. The largest weight is fully opaque."""
    opacity_T = np.asarray(weight_T, np.float32) / max(float(np.max(weight_T)), 1e-9)
    rects = "".join(f'<rect x="{i}" width="1.02" height="1" opacity="{o:.2f}"/>' for i, o in enumerate(opacity_T))
    size = f'viewBox="0 0 {len(weight_T)} 1" preserveAspectRatio="none" role="img" aria-label="{escape(description)}"'
    return f'<svg class="strip" {size} fill="var(--run{color % NUM_COLORS})">{rects}</svg>'
