"""The report as one HTML page: text, tables and charts of some runs. Never imports jax.

A run is shown as far as it went. What comes from a file is escaped on its way in.
"""

import datetime
import json
from html import escape
from pathlib import Path

from medfuse_jax.report import attention, html, plots, read_runs, style, tables, terminal
from medfuse_jax.report.read_runs import TASK_NAMES, Run, method_name, number, pair, section, series
from medfuse_jax.runtime import files

_MAX_TOGETHER = 5  # runs in a chart of several


def write(runs_dirs: list[str | Path], out_dir: str | Path) -> str:
    """Writes `<out_dir>/index.html` of the runs at and below `runs_dirs`; returns the text table and the page's path.

    UserError where there is no run, or the page cannot be written.
    """
    runs = read_runs.find_runs([Path(folder) for folder in runs_dirs])
    path = Path(out_dir) / "index.html"
    content = page(runs)
    with files.must_write(f"--out={out_dir}", ": give another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, content)
    scored = [run for run in runs if run.result]
    table = terminal.table([run.result for run in scored], [run.name for run in scored])
    problems = "\n".join(f"warning: {problem}" for run in runs for problem in run.problems)
    return "\n\n".join(part for part in (table, problems, f"report: {path}") if part)


def page(runs: list[Run]) -> str:
    """The whole document."""
    title = _title(runs)
    parts = [_header(runs, title), _problems(runs)]
    by_task = {task: [run for run in runs if run.task == task] for task in _tasks_in_order(runs)}
    for task, group in by_task.items():
        parts.append(_task_section(task, group, len(by_task) > 1))
    parts += [f"<section><h2>Each run</h2>{''.join(_run_section(run, runs) for run in _in_order(runs))}</section>"]
    parts.append(_footer())
    return html.document(title, "".join(parts), style.CSS)


# Order and words


def _in_order(runs: list[Run]) -> list[Run]:
    """The runs that were aimed at before those that only prepared them."""
    return sorted(runs, key=lambda run: run.is_pretraining)


def _tasks_in_order(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run.task for run in _in_order(runs)))


def _title(runs: list[Run]) -> str:
    main = [run for run in runs if not run.is_pretraining] or runs
    methods = list(dict.fromkeys(method_name(run.method) for run in main))
    names = list(dict.fromkeys(TASK_NAMES.get(run.task, run.task) for run in main))
    return f"{' and '.join(names)} {'with ' + methods[0] if len(methods) == 1 else f'by {len(methods)} methods'}"


def _header(runs: list[Run], title: str) -> str:
    main = _in_order(runs)[0]
    alone = sum(not run.is_pretraining for run in runs) <= 1
    data = {**section(main.config, "data"), **section(main.result or {}, "data")}
    facts = {
        "Data": " · ".join(
            str(x)
            for x in (
                data.get("dir"),
                data.get("profile") and f"profile {data['profile']}",
                data.get("timestep_h") and f"steps of {data['timestep_h']} h",
            )
            if x
        ),
        "Runs": "" if alone else len(runs),
        "Model chosen by": (main.result or {}).get("selected_by") if alone else "",
        "Seed": (main.result or main.config).get("seed") if alone else "",
        "Finished": f"{main.finished:%-d %B %Y, %H:%M}" if alone and main.finished else "",
    }
    shown = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v not in ("", None)
    )
    synthetic = [run for run in runs if run.is_synthetic]
    notice = ""
    if synthetic:
        which = "These results come" if len(synthetic) == len(runs) else "Some of these results come"
        notice = (
            f'<p class="notice"><strong>Synthetic patients.</strong> {which} from an invented cohort. '
            "They show that the software works, and say nothing about real patients.</p>"
        )
    lead = _lead(runs) if alone else ""
    return f'<header><h1>{escape(title)}</h1>{lead}{notice}<dl class="facts">{shown}</dl></header>'


def _lead(runs: list[Run]) -> str:
    """The result in a sentence or two, for a page of one run."""
    main = _in_order(runs)[0]
    scores = section(section(main.result or {}, "subsets"), "all")
    if not scores:
        return f'<p class="lead">{escape(f"{main.name} has no evaluation yet: {_progress(main)}.")}</p>'
    low, high = pair(scores.get("auroc_macro_ci"))
    mean = "The mean AUROC" if len(main.label_names) > 1 else "The AUROC"
    left = main.result.get("num_left_out")
    text = (
        f"{mean} of {main.name} on {number(scores.get('num_samples'), 0)} "
        f"{tables.subset_title('all', main.task)[4:]}{f' (it cannot score {number(left, 0)} others)' if left else ''} "
        f"is {number(scores.get('auroc_macro'))} "
        f"(95 % confidence interval {number(low)} to {number(high)})."
    )
    for other in main.result.get("comparisons") or []:
        low, high = pair(other.get("auroc_macro_ci"))
        if other.get("subset") == "all" and low is not None and high is not None:
            against = method_name(other.get("against"))
            text += (
                f" Its difference to {against} on the same stays is {number(other.get('auroc_macro'), sign=True)} "
                f"({number(low, sign=True)} to {number(high, sign=True)})"
            )
            text += "." if low > 0 or high < 0 else ": an interval that includes zero."
    return f'<p class="lead">{escape(text)}</p>'


def _progress(run: Run) -> str:
    """Where an unfinished run is."""
    epochs = max([*run.train, *run.val], default=0)
    of = f" of at most {run.config['num_epochs']}" if isinstance(run.config.get("num_epochs"), int) else ""
    aurocs = series(run.val, "val_auroc")
    best = f"; best validation AUROC so far {number(max(aurocs.values()))}" if aurocs else ""
    return f"{epochs} epoch{'s' * (epochs != 1)}{of} trained{best}"


def _problems(runs: list[Run]) -> str:
    items = "".join(f"<li>{escape(problem)}</li>" for run in runs for problem in run.problems)
    return f'<div class="notice"><strong>Not everything could be read.</strong><ul>{items}</ul></div>' if items else ""


def _task_section(task: str, runs: list[Run], titled: bool) -> str:
    heading = f"Results: {TASK_NAMES.get(task, task)}" if titled else "Results"
    content = tables.results(task, runs) + tables.differences(runs) + _overlays(runs)
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


# Charts


def _chart(svg: str, title: str) -> str:
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}</figure>'


def _overlays(runs: list[Run]) -> str:
    """The mean curves of runs of one task together, where there are several that score all."""
    whole = [run for run in _in_order(runs) if run.predictions and read_runs.scores_all(run.result)]
    shown = whole[:_MAX_TOGETHER]
    if len(shown) < 2:
        return ""
    curves = [(run.name, run.color, run.predictions["labels"], run.predictions["scores"]) for run in shown]
    several = shown[0].predictions["labels"].shape[1] > 1
    which = ", mean of the labels" if several else ""
    left = f"; the first {len(shown)} runs" if len(shown) < len(whole) else ""
    return (
        '<div class="charts">'
        + _chart(plots.overlay("ROC", curves), f"ROC{which}, all test stays{left}")
        + _chart(plots.overlay("PR", curves), f"Precision by recall{which}, all test stays{left}")
        + "</div>"
    )


def _run_section(run: Run, runs: list[Run]) -> str:
    is_open = " open" if run is _in_order(runs)[0] else ""
    scores = section(section(run.result or {}, "subsets"), "all")
    value = f"AUROC {number(scores.get('auroc_macro'))}" if scores else _progress(run)
    what = f"{TASK_NAMES.get(run.task, run.task)}, {'pre-training' if run.is_pretraining else 'main run'}"
    return (
        f'<details class="run"{is_open}><summary>{tables.dot(run)}<strong>{escape(run.name)}</strong>'
        f'<span class="soft">{escape(what)}</span><span class="soft">{escape(value)}</span></summary>'
        f"{_run_charts(run)}{tables.labels(run, runs)}{tables.ages(run)}{attention.shown(run)}"
        f"{_provenance(run)}</details>"
    )


def _run_charts(run: Run) -> str:
    loss_train, loss_val = series(run.train, "train_loss"), series(run.val, "val_loss")
    auroc_val = series(run.val, "val_auroc")
    chosen = run.chosen_epoch
    word = "chosen" if run.result else "best so far"
    parts = []
    if loss_train or loss_val:
        parts.append(_chart(plots.loss_curves(loss_train, loss_val, chosen, run.color, word), "Loss by epoch"))
    if auroc_val:
        chart = plots.auroc_curve(auroc_val, chosen, run.color, word)
        parts.append(_chart(chart, "AUROC on the validation set by epoch"))
    if run.predictions:
        curves = (run.predictions["labels"], run.predictions["scores"], run.color)
        parts.append(_chart(plots.roc(*curves), "ROC on the test set"))
        parts.append(_chart(plots.precision_recall(*curves), "Precision by recall on the test set"))
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


# What made it


def _provenance(run: Run) -> str:
    result = run.result or {}
    params = result.get("num_params")
    facts = {
        "Folder": run.folder,
        "Finished": f"{run.finished:%Y-%m-%d %H:%M %Z}" if run.finished else "not yet",
        "Seed": result.get("seed", run.config.get("seed")),
        "Parameters": f"{params:,}" if isinstance(params, int) else None,
        "Chosen epoch": run.chosen_epoch,
        "Chosen by": result.get("selected_by"),
        **_flat(section(result, "data"), "data"),
        **_flat(section(result, "environment")),
    }
    config = json.dumps(run.config, indent=2, sort_keys=True)
    return (
        '<details class="made"><summary>What made it</summary>'
        f"{tables.plain(facts)}<h4>config.json</h4><pre tabindex=0>{escape(config)}</pre></details>"
    )


def _flat(content: dict, prefix: str = "") -> dict:
    """A nested dict as one of dotted names."""
    out = {}
    for key, value in content.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        out |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return out


def _footer() -> str:
    now = datetime.datetime.now().astimezone()
    return f"<footer>Written by medfuse_jax.report on {now:%-d %B %Y at %H:%M %Z}.</footer>"
