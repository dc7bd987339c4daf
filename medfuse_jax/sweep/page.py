"""sweep.html: the AUROC of each trial by its values, the curve of every trial, and a table of all trials."""

import math
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from medfuse_jax.report import html, notices, read_fields, read_runs, style
from medfuse_jax.report.html import CHART_STYLE, INK, MUTED, run_color
from medfuse_jax.report.wording import method_name, number, task_name
from medfuse_jax.sweep import results

_STYLE = CHART_STYLE | {"axes.grid": True}
_WIDTH_PX, _HEIGHT_PX = 420, 290
_MIN_LOG_RATIO = 1000  # largest value / smallest above which an axis is logarithmic; a learning rate's axis always is
_MAX_TICKS = 5  # on a log axis
_MAX_CHARACTERS = 42  # of all names below an axis, in one line
_MAX_NAME = 18  # characters of a tilted name
_CHOSEN = run_color(1)
_NAMES = {
    "learning_rate": "learning rate",
    "model.dropout": "dropout",
    "data.ehr_only_ratio": "fraction of EHR-only stays",
}


def write(workdir: Path, config: dict, records: list[dict]) -> Path:
    """Write sweep.html; return its path. config: the sweep's, as in config.json. records: those of all trials."""
    chosen = results.choose(records)
    methods = {r["values"].get("method", config["method"]) for r in records}
    by = method_name(methods.pop()) if len(methods) == 1 else f"{len(methods)} methods"
    score = results.score_name(records, config["task"])
    title = f"Sweep: {task_name(config['task'])} with {by}"
    charts = [
        html.figure(_scatter(field, records, chosen, score), f"Best validation {score} by {_name(field)}")
        for field in _varied_fields(records)
    ]
    runs = {r["trial"]: read_runs.read_run(results.trial_dir(workdir, r["trial"])) for r in records}
    curves = {trial: read_fields.series(run.val, f"val_{score.lower()}") for trial, run in runs.items()}
    charts.append(html.figure(_all_curves(curves, chosen, score), f"Validation {score} by epoch, every trial"))
    body = (
        f"<header><h1>{escape(title)}</h1>{_lead(runs, records, chosen, score)}"
        f"{notices.of_data([runs[(chosen or records[0])['trial']]])}</header>"
        f'<div class="charts">{"".join(charts)}</div>'
        f"<section><h2>All trials</h2>{_table(records, chosen, score)}</section>"
    )
    path = workdir / "sweep.html"
    results.write_text(path, html.document(title, body, style.CSS))
    return path


def _name(field: str) -> str:
    return _NAMES.get(field, field if "." in field else field.replace("_", " "))


def _lead(runs: dict[int, read_runs.Run], records: list[dict], chosen: dict | None, score: str) -> str:
    counts = [(sum(r["status"] == status for r in records), status) for status in (results.FAILED, results.PRUNED)]
    ended = ", ".join(f"{count} {status}" for count, status in counts if count)
    text = f"{len(records)} trials" + (f" ({ended})" if ended else "") + ". "
    if not chosen:
        return f'<p class="lead">{escape(text)}None has a validation {score}.</p>'
    values = ", ".join(f"{_name(field)} {_format(field, value)}" for field, value in chosen["values"].items())
    text += (
        f"Trial {chosen['trial']} ({values}) was chosen on validation alone: {score} "
        f"{number(results.score_of(chosen))} at epoch {chosen['best_epoch']}."
    )
    if scores := runs[chosen["trial"]].scores():
        low, high = read_fields.pair(scores.get("auroc_macro_ci"))
        text += (
            f" Its test AUROC is {number(scores.get('auroc_macro'))} (95 % confidence interval {number(low)} to "
            f"{number(high)})."
        )
        # These were chosen before trials were added to the sweep, or were scored by hand.
        others = [str(r["trial"]) for r in records if r is not chosen and runs[r["trial"]].finished_at]
        text += (
            f" The test stays were also scored for trial {', '.join(others)}, at another time."
            if others
            else " No other trial was scored on the test stays."
        )
    return f'<p class="lead">{escape(text)}</p>'


def _varied_fields(records: list[dict]) -> list[str]:
    """Return the searched fields with several values, without the seed, whose order has no meaning."""
    fields = dict.fromkeys(field for r in records for field in r["values"] if field != "seed")
    return [f for f in fields if len({str(r["values"].get(f)) for r in records}) > 1]


def _scatter(field: str, records: list[dict], chosen: dict | None, score: str) -> str:
    with mpl.rc_context(_STYLE):
        axes = _new_axes(_name(field), f"validation {score}")
        shown = [r for r in records if results.score_of(r) is not None and field in r["values"]]
        values = [r["values"][field] for r in shown]
        are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if not are_numbers:
            values = [str(v) for v in values]
        for value, r in zip(values, shown):
            look = {"color": run_color(0), "markersize": 6, "zorder": 2}
            if r is chosen:
                look = {"color": _CHOSEN, "markersize": 9, "zorder": 3}
            axes.plot([value], [results.score_of(r)], "o", **look)
        axes.margins(x=0.08, y=0.2)
        if not are_numbers:
            _tilt_long_names(axes, list(dict.fromkeys(values)))
        elif values and min(values) > 0 and (field == "learning_rate" or max(values) / min(values) > _MIN_LOG_RATIO):
            _set_log_scale(axes)
        if chosen in shown:
            point = (axes.convert_xunits(values[shown.index(chosen)]), results.score_of(chosen))
            _label_point(axes, point, f"trial {chosen['trial']}: {results.score_of(chosen):.3f}")
        return html.svg(axes.figure, f"Best validation {score} of each trial by {_name(field)}")


def _set_log_scale(axes: Axes) -> None:
    """Make the x axis logarithmic, with few labels for any range. Call this after plotting."""
    axes.set_xscale("log")
    axes.autoscale_view()
    low, high = axes.get_xlim()
    text = "{:g}".format if low >= 0.005 else _scientific
    labels = {text(tick): tick for tick in _log_ticks(low, high)}  # one tick per text
    axes.set_xticks(list(labels.values()), list(labels))
    axes.xaxis.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float) -> list[float]:
    """Return two to five round numbers from low to high: powers of ten if there are three, else smaller steps."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // _MAX_TICKS)]
    steps = MaxNLocator(_MAX_TICKS - 1).tick_values(low, high)
    return [float(tick) for tick in steps if low <= tick <= high]


def _scientific(value: float) -> str:
    """Format a number as in '2.5e−4', without a leading zero in the exponent."""
    mantissa, exponent = f"{value:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


def _tilt_long_names(axes: Axes, names: list[str]) -> None:
    """Tilt and shorten the names below an axis if they would overlap. names: in the order of the axis."""
    if sum(map(len, names)) > _MAX_CHARACTERS:
        shown = [name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}" for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=35, ha="right", rotation_mode="anchor")
        left, _, width, _ = axes.get_position().bounds
        axes.set_position((left, 0.36, width, 0.59))


def _label_point(axes: Axes, point: tuple[float, float], text: str) -> None:
    """Write above a point, towards the chart's middle. Call this last, when the axis limits are known."""
    axes.autoscale_view()
    x = axes.transAxes.inverted().transform(axes.transData.transform(point))[0]
    side = "left" if x < 0.25 else "right" if x > 0.75 else "center"
    axes.annotate(text, point, xytext=(0, 9), textcoords="offset points", ha=side, color=_CHOSEN, weight="bold")


def _all_curves(curves: dict[int, dict[int, float]], chosen: dict | None, score: str) -> str:
    with mpl.rc_context(_STYLE):
        axes = _new_axes("epoch", f"validation {score}")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=7, min_n_ticks=1)
        chosen_trial = chosen["trial"] if chosen else None
        for trial, values in sorted(curves.items(), key=lambda item: item[0] == chosen_trial):
            look = {"color": MUTED, "linewidth": 1, "alpha": 0.7}
            if trial == chosen_trial:
                look = {"color": _CHOSEN, "linewidth": 2.2}
            marker = "o" if len(values) <= 3 else None
            axes.plot(list(values), list(values.values()), marker=marker, markersize=4, **look)
        if chosen and chosen["best_epoch"] in curves[chosen_trial]:
            point = (chosen["best_epoch"], curves[chosen_trial][chosen["best_epoch"]])
            axes.plot(*point, "o", color=_CHOSEN, markersize=7)
            axes.set_ymargin(0.2)
            _label_point(axes, point, f"trial {chosen_trial}, chosen")
        return html.svg(axes.figure, f"Validation {score} of every trial by epoch, with the chosen trial highlighted")


def _new_axes(x_label: str, y_label: str) -> Axes:
    axes = html.new_figure(_WIDTH_PX, _HEIGHT_PX).add_axes((0.16, 0.17, 0.8, 0.78))
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    return axes


def _table(records: list[dict], chosen: dict | None, score: str) -> str:
    fields = list(dict.fromkeys(field for r in records for field in r["values"]))
    names = [name if "." in name else name[0].upper() + name[1:] for name in map(_name, fields)]
    numeric = [*names, f"Validation {score}", "Best epoch", "Epochs"]
    head = "".join(
        f'<th scope="col"{css}>{escape(text)}</th>'
        for css, texts in (("", ["Trial"]), (' class="num"', numeric), ("", ["Status"]))
        for text in texts
    )
    rows = []
    for r in results.ranked(records):
        cells = [_format(field, r["values"].get(field)) for field in fields]
        cells += [number(results.score_of(r), 4), *(_format(field, r.get(field)) for field in ("best_epoch", "epochs"))]
        rows.append(
            f'<tr class="{"main" if r is chosen else ""}">'
            f'<th scope="row">{r["trial"]}{", chosen" if r is chosen else ""}</th>'
            + "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
            + f'<td class="wrap">{escape(results.status_text(r))}</td></tr>'
        )
    return html.table(head, "".join(rows), f"Every trial, the best validation {score} first")


def _format(field: str, value) -> str:
    if value is None:
        return "–"
    if field == "learning_rate":
        return _scientific(value)
    return f"{value:.5g}" if isinstance(value, float) and math.isfinite(value) else str(value)
