"""The report as one HTML page: text, tables and charts of runs, finished or not. Never imports jax.

Text from files is escaped.
"""

import datetime
import json
from html import escape
from pathlib import Path

from medfuse_jax.report import html, notices, plots, read_fields, read_runs, repeats, style, tables, terminal, wording
from medfuse_jax.report.attention import attention
from medfuse_jax.report.read_fields import HOUR, pair, section, series
from medfuse_jax.report.read_runs import Run
from medfuse_jax.report.robustness import robustness
from medfuse_jax.report.wording import number, task_name
from medfuse_jax.runtime import files

_MAX_OVERLAID = 5  # runs in one chart
_INPUTS = {"both": "both", "ehr": "series", "cxr": "X-ray"}  # of runs/alone.py


def write(runs_dirs: list[str | Path], out_dir: str | Path) -> str:
    """Report on the runs at and below `runs_dirs` in `<out_dir>/index.html`; return a text table and the page's path.

    Raises UserError if there is no run or the page cannot be written.
    """
    runs = read_runs.find_runs([Path(folder) for folder in runs_dirs])
    path = Path(out_dir) / "index.html"
    content = page(runs)
    with files.must_write(f"--out={out_dir}", ": give another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, content)
    scored = [run for run in runs if run.result]
    table = terminal.table([run.result for run in scored], [run.name for run in scored])
    warnings = [problem for run in runs for problem in run.problems]
    for task in dict.fromkeys(run.task for run in runs):
        warnings += notices.other_data([run for run in runs if run.task == task])
    problems = "\n".join(f"warning: {warning}" for warning in warnings)
    return "\n\n".join(part for part in (table, problems, f"report: {path}") if part)


def page(runs: list[Run]) -> str:
    """Return the whole HTML document."""
    title, ordered = _title(runs), _main_first(runs)
    by_task = {task: [run for run in runs if run.task == task] for task in dict.fromkeys(run.task for run in ordered)}
    parts = [_header(ordered, title), _problems(runs)]
    parts += [_task_section(task, group, len(by_task) > 1) for task, group in by_task.items()]
    parts.append(repeats.section_of(ordered))
    sections = [_run_section(run, runs, is_open=run is ordered[0]) for run in ordered]
    parts.append(f"<section><h2>Each run</h2>{''.join(sections)}</section>")
    now = datetime.datetime.now().astimezone()
    parts.append(f"<footer>Written by medfuse_jax.report on {now:%-d %B %Y at %H:%M %Z}.</footer>")
    return html.document(title, "".join(parts), style.CSS)


def _main_first(runs: list[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: run.is_pretraining)


# The head


def _title(runs: list[Run]) -> str:
    main = [run for run in runs if not run.is_pretraining] or runs
    methods = list(dict.fromkeys(wording.title(run.result or {"method": run.method}) for run in main))
    tasks = " and ".join(dict.fromkeys(task_name(run.task) for run in main))
    return f"{tasks} with {methods[0]}" if len(methods) == 1 else f"{tasks} by {len(methods)} methods"


def _header(runs: list[Run], title: str) -> str:
    """Return the page's header. runs: main runs before pre-training runs."""
    main, result = runs[0], runs[0].result or {}
    is_single = sum(not run.is_pretraining for run in runs) <= 1
    facts = {"Data": "; ".join(dict.fromkeys(map(_source, _sources(runs, is_single))))}
    if is_single:
        facts |= {"Model selected by": result.get("selected_by"), "Seed": (main.result or main.config).get("seed")}
        facts["Finished"] = f"{main.finished_at:%-d %B %Y, %H:%M}" if main.finished_at else ""
    else:
        facts["Runs"] = len(runs)
    shown = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v not in ("", None)
    )
    lead = _lead(main) if is_single else ""
    notice = notices.of_data(runs)
    return f'<header><h1>{escape(title)}</h1>{lead}{notice}<dl class="facts">{shown}</dl></header>'


def _sources(runs: list[Run], is_single: bool) -> list[Run]:
    """Return the runs whose data the head names."""
    return runs[:1] if is_single else [run for run in runs if run.result and not run.is_pretraining] or runs[:1]


def _source(run: Run) -> str:
    """Return where a run's data are and how they were prepared."""
    data = {**section(run.config, "data"), **section(run.result or {}, "data")}
    profile, timestep_h = data.get("profile"), data.get("timestep_h")
    known = (
        data.get("dir"),
        profile and f"profile {profile}",
        f"time steps of {timestep_h:g} h" if isinstance(timestep_h, int | float) else None,
    )
    return " · ".join(str(x) for x in known if x)


def _lead(main: Run) -> str:
    """Return the result in a sentence or two, for a page on one run."""
    scores, unit = main.scores(), wording.unit(main.task)
    if not scores:
        return f'<p class="lead">{escape(f"{main.name} is not evaluated yet: {_progress(main)}.")}</p>'
    if number(scores.get("auroc_macro")) == "–":
        return f'<p class="lead">{escape(f"{main.name} has no AUROC on the test set.")}</p>'
    low, high = pair(scores.get("auroc_macro_ci"))
    left_out = main.result.get("num_left_out")
    text = (
        f"{main.name} reaches {'a mean' if len(main.label_names) > 1 else 'an'} AUROC of "
        f"{number(scores.get('auroc_macro'))} (95 % confidence interval {number(low)} to {number(high)}) "
        f"on {number(scores.get('num_samples'), 0)} test {unit}"
        f"{f'; it cannot score the other {number(left_out, 0)}' if left_out else ''}."
    )
    if words := wording.ordinal(scores):
        text += f" It has {words}."
    for other in main.result.get("comparisons") or []:
        low, high = pair(other.get("auroc_macro_ci"))
        if other.get("subset") == "all" and low is not None and high is not None:
            text += (
                f" The difference from {wording.against(main.result, other)} on the same {unit} is "
                f"{number(other.get('auroc_macro'), sign=True)} "
                f"({number(low, sign=True)} to {number(high, sign=True)})"
            )
            text += "." if low > 0 or high < 0 else ", an interval that includes zero."
    return f'<p class="lead">{escape(text)}</p>'


def _progress(run: Run) -> str:
    """Return how far an unfinished run has got."""
    epoch, num_epochs = max([*run.train, *run.val], default=0), run.config.get("num_epochs")
    text = f"epoch {epoch} of at most {num_epochs}" if isinstance(num_epochs, int) else f"epoch {epoch}"
    name, values = run.selecting
    best = min if name == "loss" else max
    return text + (f", best validation {name} so far {number(best(values.values()))}" if values else "")


def _problems(runs: list[Run]) -> str:
    items = "".join(f"<li>{escape(problem)}</li>" for run in runs for problem in run.problems)
    return f'<div class="notice"><strong>Some files are damaged.</strong><ul>{items}</ul></div>' if items else ""


# Sections


def _task_section(task: str, runs: list[Run], is_titled: bool) -> str:
    heading = f"Results: {task_name(task)}" if is_titled else "Results"
    content = notices.of_other_data(runs) + tables.results(task, runs) + tables.differences(runs) + _overlays(runs)
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def _overlays(runs: list[Run]) -> str:
    """Draw the mean curves of one task's runs that score all records; '' if there are fewer than two."""
    comparable = [run for run in _main_first(runs) if run.predictions and read_fields.scores_all(run.result)]
    shown = comparable[:_MAX_OVERLAID]
    if len(shown) < 2:
        return ""
    curves = [(run.name, run.color, run.predictions["labels"], run.predictions["scores"]) for run in shown]
    suffix = ", mean of the labels" if shown[0].predictions["labels"].shape[1] > 1 else ""
    suffix += f", all test {wording.unit(shown[0].task)}"
    suffix += f"; the first {len(shown)} runs" if len(shown) < len(comparable) else ""
    charts = [
        html.figure(plots.overlay(kind, curves), name + suffix)
        for kind, name in (("ROC", "ROC"), ("PR", "Precision\u2013recall"))
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _run_section(run: Run, runs: list[Run], is_open: bool) -> str:
    scores = run.scores()
    value = f"AUROC {number(scores.get('auroc_macro'))}" if scores else _progress(run)
    what = f"{task_name(run.task)}, {'pre-training' if run.is_pretraining else 'main run'}"
    return (
        f'<details class="run"{" open" if is_open else ""}><summary>{tables.dot(run)}'
        f'<strong>{escape(run.name)}</strong><span class="soft">{escape(what)}</span>'
        f'<span class="soft">{escape(value)}</span></summary>'
        f"{_run_charts(run)}{tables.operating_points(run)}{tables.labels(run, runs)}{tables.label_types(run)}"
        f"{tables.subgroups(run)}{robustness(run)}{attention(run)}{_provenance(run)}</details>"
    )


def _run_charts(run: Run) -> str:
    loss_train, loss_val = series(run.train, "train_loss"), series(run.val, "val_loss")
    name, values = run.selecting
    best = (run.best_epoch, run.color, "chosen" if run.result else "best so far")
    charts = []
    if loss_train or loss_val:
        charts.append(html.figure(plots.loss_curves(loss_train, loss_val, *best), "Loss by epoch"))
    if values and name != "loss":  # which is drawn already
        caption = f"{name[0].upper()}{name[1:]} on the validation set by epoch"
        charts.append(html.figure(plots.auroc_curve(values, *best), caption))
    charts += _modalities_alone(run, best)
    if run.predictions:
        args = (run.predictions["labels"], run.predictions["scores"], run.color)
        charts.append(html.figure(plots.curves("ROC", *args), "ROC on the test set"))
        charts.append(html.figure(plots.curves("PR", *args), "Precision\u2013recall on the test set"))
    if reliability := plots.reliability(section(run.result or {}, "calibration").get("curve"), run.color):
        charts.append(html.figure(reliability, "Reliability on the test set, all labels together"))
    for entry in read_fields.subgroups(run.result):
        if entry.get("by") == HOUR and (chart := plots.by_hour(entry["groups"], run.color)):
            charts.append(html.figure(chart, "Score on the test set by hour of the stay"))
    return f'<div class="charts">{"".join(charts)}</div>{tables.calibration(run)}' if charts else ""


def _modalities_alone(run: Run, best: tuple) -> list[str]:
    """Return charts of loss and score by epoch of both modalities and of each alone; [] if they were not logged."""
    charts = []
    for field, title in (("val_auroc", "AUROC"), ("val_loss", "Loss")):
        by_name = {name: series(run.val, f"{field}_{key}") for key, name in _INPUTS.items()}
        if shown := {name: values for name, values in by_name.items() if values}:
            caption = f"{title} on the validation stays with both modalities, and with one of them alone"
            charts.append(html.figure(plots.modality_curves(shown, *best), caption))
    return charts


def _provenance(run: Run) -> str:
    result = run.result or {}
    params = result.get("num_params")
    facts = {
        "Folder": run.folder,
        "Finished": f"{run.finished_at:%Y-%m-%d %H:%M %Z}" if run.finished_at else "not yet",
        "Seed": result.get("seed", run.config.get("seed")),
        "Parameters": f"{params:,}" if isinstance(params, int) else None,
        "Best epoch": run.best_epoch,
        "Selected by": result.get("selected_by"),
        **_flat(section(result, "data"), "data"),
        **_flat(section(result, "environment")),
    }
    config = json.dumps(run.config, indent=2, sort_keys=True)
    return (
        '<details class="more"><summary>Provenance and config</summary>'
        f"{tables.facts(facts)}<h4>config.json</h4><pre tabindex=0>{escape(config)}</pre></details>"
    )


def _flat(content: dict, prefix: str = "") -> dict:
    """Flatten a nested dict, joining its keys with dots."""
    flat = {}
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        flat |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return flat
