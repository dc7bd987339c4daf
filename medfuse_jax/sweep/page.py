"""sweep.html: what was tried against what it reached, the choice marked, and every trial's curve."""

import math
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from medfuse_jax.report import html, read_runs, style
from medfuse_jax.report.html import CHART_STYLE, INK, MUTED, run_color
from medfuse_jax.report.read_runs import TASK_NAMES, method_name, number
from medfuse_jax.sweep import results

_STYLE = CHART_STYLE | {"axes.grid": True}
_WIDTH_PX, _HEIGHT_PX = 420, 290
_MAX_TICKS = 5  # labels of a log axis
_MAX_CHARACTERS = 42  # of all names below an axis, side by side
_MAX_NAME = 18  # characters of a tilted one
_CHOSEN = run_color(1)
_NAMES = {
    "learning_rate": "learning rate",
    "model.dropout": "dropout",
    "data.ehr_only_ratio": "fraction of EHR-only stays",
}


def write(workdir: Path, config: dict, records: list[dict]) -> Path:
    """Writes sweep.html. config: of the sweep, as config.json holds one; records: how each trial ended."""
    chosen = results.choose(records)
    curves = {r["trial"]: _curve(workdir, r["trial"]) for r in records}
    methods = {r["values"].get("method", config["method"]) for r in records}
    method = next(iter(methods))
    by = method_name(method) if len(methods) == 1 else f"{len(methods)} methods"
    title = f"Sweep: {TASK_NAMES.get(config['task'], config['task'])} with {by}"
    charts = [
        _chart(_scatter(field, records, chosen), f"Best validation AUROC by {_name(field)}") for field in _axes(records)
    ]
    charts.append(_chart(_all_curves(curves, chosen), "Validation AUROC by epoch, every trial"))
    body = (
        f"<header><h1>{escape(title)}</h1>{_lead(workdir, records, chosen)}"
        f"{_notice(workdir, chosen or records[0])}</header>"
        f'<div class="charts">{"".join(charts)}</div>'
        f"<section><h2>All trials</h2>{_table(records, chosen)}</section>"
    )
    path = workdir / "sweep.html"
    results.write_whole(path, html.document(title, body, style.CSS))
    return path


def _name(field: str) -> str:
    return _NAMES.get(field, field)


def _curve(workdir: Path, number: int) -> dict[int, float]:
    run = read_runs.read_run(results.trial_dir(workdir, number))
    return read_runs.series(run.val, "val_auroc")


def _lead(workdir: Path, records: list[dict], chosen: dict | None) -> str:
    failed = sum(r["status"] == results.FAILED for r in records)
    text = f"{len(records)} trials" + (f", of which {failed} failed" if failed else "") + ". "
    if chosen:
        values = ", ".join(f"{_name(field)} {_text(field, value)}" for field, value in chosen["values"].items())
        text += (
            f"Chosen by validation alone: trial {chosen['trial']} ({values}), with an AUROC of "
            f"{number(chosen['val_auroc'])} at epoch {chosen['best_epoch']}."
        )
        test = read_runs.read_run(results.trial_dir(workdir, chosen["trial"])).result
        if test:
            scores = read_runs.section(read_runs.section(test, "subsets"), "all")
            low, high = read_runs.pair(scores.get("auroc_macro_ci"))
            # Chosen before the sweep went on with more trials, or scored by hand.
            others = ", ".join(str(r["trial"]) for r in records if r is not chosen and _is_scored(workdir, r["trial"]))
            scored = f"this trial and, at another time, for trial {others}" if others else "this trial only"
            text += (
                f" Its AUROC on the test stays, scored for {scored}, is {number(scores.get('auroc_macro'))} "
                f"(95 % confidence interval {number(low)} to {number(high)})."
            )
    else:
        text += "None has a validation AUROC."
    return f'<p class="lead">{escape(text)}</p>'


def _is_scored(workdir: Path, number: int) -> bool:
    return (results.trial_dir(workdir, number) / "result.json").exists()


def _notice(workdir: Path, record: dict) -> str:
    if not read_runs.read_run(results.trial_dir(workdir, record["trial"])).is_synthetic:
        return ""
    return (
        '<p class="notice"><strong>Synthetic patients.</strong> These results come from an invented cohort. '
        "They show that the software works, and say nothing about real patients.</p>"
    )


def _chart(svg: str, title: str) -> str:
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}</figure>'


# Charts


def _axes(records: list[dict]) -> list[str]:
    """The searched fields that took several values, but for the seed, where order means nothing."""
    fields = dict.fromkeys(field for r in records for field in r["values"] if field != "seed")
    return [f for f in fields if len({str(r["values"].get(f)) for r in records}) > 1]


def _scatter(field: str, records: list[dict], chosen: dict | None) -> str:
    with mpl.rc_context(_STYLE):
        axes = _new_axes(_name(field), "validation AUROC")
        shown = [r for r in records if r.get("val_auroc") is not None and field in r["values"]]
        values = [r["values"][field] for r in shown]
        are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if not are_numbers:
            values = [str(v) for v in values]
        for value, r in zip(values, shown):
            is_chosen = r is chosen
            size = {"markersize": 9 if is_chosen else 6, "zorder": 3 if is_chosen else 2}
            axes.plot([value], [r["val_auroc"]], "o", color=_CHOSEN if is_chosen else run_color(0), **size)
        axes.margins(x=0.08, y=0.2)
        if not are_numbers:
            _fit_names(axes, list(dict.fromkeys(values)))
        elif values and min(values) > 0 and (field == "learning_rate" or max(values) / min(values) > 20):
            _scale_log(axes)
        if chosen in shown:
            at = (axes.convert_xunits(values[shown.index(chosen)]), chosen["val_auroc"])
            _say_chosen(axes, at, f"trial {chosen['trial']}: {chosen['val_auroc']:.3f}")
        return html.svg(axes.figure, f"Best validation AUROC of each trial by {_name(field)}")


def _scale_log(axes: Axes) -> None:
    """Makes the x axis logarithmic, with few labels at any range. Call it after drawing: it reads the axis' limits."""
    axes.set_xscale("log")
    axes.autoscale_view()
    low, high = axes.get_xlim()
    write = "{:g}".format if low >= 0.005 else _scientific
    labels = {write(tick): tick for tick in _log_ticks(low, high)}  # of ticks that read the same, one
    axes.set_xticks(list(labels.values()), list(labels))
    axes.xaxis.set_minor_locator(NullLocator())


def _log_ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between low and high: powers of ten where there are three, else in smaller steps."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // _MAX_TICKS)]
    steps = MaxNLocator(_MAX_TICKS - 1).tick_values(low, high)
    return [float(tick) for tick in steps if low <= tick <= high]


def _scientific(tick: float) -> str:
    """'2.5e−4': as the table has it, without a leading zero."""
    mantissa, exponent = f"{tick:.5e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


def _fit_names(axes: Axes, names: list[str]) -> None:
    """Tilts and shortens the names below an axis where they would overlap. names: in the order of the axis."""
    if sum(map(len, names)) > _MAX_CHARACTERS:
        shown = [name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}" for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=35, ha="right", rotation_mode="anchor")
        left, _, width, _ = axes.get_position().bounds
        axes.set_position((left, 0.36, width, 0.59))


def _say_chosen(axes: Axes, at: tuple[float, float], text: str) -> None:
    """Beside the point, turned inwards: the text never leaves the chart. Last: the limits are known then."""
    axes.autoscale_view()  # or they are those of an empty chart
    share = axes.transAxes.inverted().transform(axes.transData.transform(at))[0]
    side = "left" if share < 0.25 else "right" if share > 0.75 else "center"
    place = {"textcoords": "offset points", "color": _CHOSEN, "weight": "bold"}
    axes.annotate(text, at, xytext=(0, 9), ha=side, **place)


def _all_curves(curves: dict[int, dict[int, float]], chosen: dict | None) -> str:
    with mpl.rc_context(_STYLE):
        axes = _new_axes("epoch", "validation AUROC")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=7, min_n_ticks=1)
        of_chosen = chosen["trial"] if chosen else None
        for trial, values in sorted(curves.items(), key=lambda item: item[0] == of_chosen):
            if not values:
                continue
            is_chosen = trial == of_chosen
            look = {"color": _CHOSEN, "linewidth": 2.2} if is_chosen else {"color": MUTED, "linewidth": 1, "alpha": 0.7}
            axes.plot(
                list(values), list(values.values()), marker="o" if len(values) <= 3 else None, markersize=4, **look
            )
        if chosen and chosen["best_epoch"] in curves[of_chosen]:
            point = (chosen["best_epoch"], curves[of_chosen][chosen["best_epoch"]])
            axes.plot(*point, "o", color=_CHOSEN, markersize=7)
            axes.set_ymargin(0.2)
            _say_chosen(axes, point, f"trial {of_chosen}, the chosen")
        return html.svg(axes.figure, "Validation AUROC of every trial by epoch, the chosen trial marked")


def _new_axes(x_label: str, y_label: str) -> Axes:
    axes = html.new_figure(_WIDTH_PX, _HEIGHT_PX).add_axes((0.16, 0.17, 0.8, 0.78))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.label.set_color(INK)
    return axes


# The table


def _table(records: list[dict], chosen: dict | None) -> str:
    fields = list(dict.fromkeys(field for r in records for field in r["values"]))
    names = [_NAMES[f][0].upper() + _NAMES[f][1:] if f in _NAMES else f for f in fields]
    heads = ["Trial", *names, "Validation AUROC", "Best epoch", "Epochs", "Ended"]
    head = "".join(
        f'<th scope="col" class="{"num" if 0 < i < len(heads) - 1 else ""}">{escape(h)}</th>'
        for i, h in enumerate(heads)
    )
    rows = []
    for r in results.in_order(records):
        cells = [_text(field, r["values"].get(field)) for field in fields]
        cells += [number(r.get("val_auroc"), 4), *(_text(field, r.get(field)) for field in ("best_epoch", "epochs"))]
        name = f"{r['trial']}{', chosen' if r is chosen else ''}"
        ended = r["status"] + (f": {r['reason']}" if r["reason"] else "")
        rows.append(
            f'<tr class="{"main" if r is chosen else ""}"><th scope="row">{name}</th>'
            + "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
            + f'<td class="wrap">{escape(ended)}</td></tr>'
        )
    caption = "Every trial, the best validation AUROC first"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _text(field: str, value) -> str:
    if value is None:
        return "–"
    if field == "learning_rate":
        return _scientific(value)
    return f"{value:.5g}" if isinstance(value, float) and math.isfinite(value) else str(value)
