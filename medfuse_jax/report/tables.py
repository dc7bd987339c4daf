"""The report page's tables. Never imports jax. Text from files is escaped.

A value list is [AUROC, its CI, AUPRC, its CI]; a CI is (low, high).
"""

from collections.abc import Callable
from html import escape

import numpy as np

from medfuse_jax import schema
from medfuse_jax.report import html, notices, plots, read_fields, wording
from medfuse_jax.report.read_fields import SUBSETS, pair, section
from medfuse_jax.report.read_runs import Run
from medfuse_jax.report.wording import number

_MAX_OTHERS = 5  # other runs' dots in a label's bar
_CHANCE = 0.5
_NET_BENEFIT_AT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # of the thresholds in a result
_POINT_COLUMNS = {"threshold": "Threshold", "sensitivity": "Sensitivity", "specificity": "Specificity", "ppv": "PPV"}
_BENEFIT_COLUMNS = {"threshold": "Threshold", "model": "Net benefit", "everyone": "Acting on everyone"}


def results(task: str, runs: list[Run]) -> str:
    """Return a table with one row per subset and run; '' if no run has a result."""
    scored = [run for run in runs if run.result]
    subsets = [(run, read_fields.comparable_subsets(run.result)) for run in scored]
    rows = [(_subset_title(s, task), run, by_name[s]) for s in SUBSETS for run, by_name in subsets if s in by_name]
    if not rows:
        return ""
    all_scores = [scores for *_, scores in rows]
    axis = _axis([x for scores in all_scores for x in (scores.get("auroc_macro"), *pair(scores.get("auroc_macro_ci")))])
    several = any(len(scores.get("auroc") or []) > 1 for scores in all_scores)
    has_both_kinds = len({run.is_pretraining for run in scored}) > 1
    mean = "Mean " if several else ""

    def opening(run: Run) -> str:
        is_main = has_both_kinds and not run.is_pretraining
        return f"<tr{' class=main' if is_main else ''}>{_run_head(run, run.name)}"

    def row(run: Run, scores: dict) -> str:
        count = f'<td class="num">{number(scores.get("num_samples"), 0)}</td>'
        return f"{opening(run)}{count}{_score_cells(_macro(scores), axis, run.color)}</tr>"

    def released_row(run: Run, scores: dict) -> str:
        return f"{opening(run)}{_score_cells(_macro(scores, '_released'))}</tr>"

    unit = wording.unit(task)
    head = _th("Method", "text") + _th(unit[0].upper() + unit[1:]) + _score_heads(axis, mean)
    lacking = notices.one_class([run.result for run in scored])
    content = "".join(f'<p class="notice">{escape(sentence)}</p>' for sentence in lacking)
    content += html.table(head, _grouped(rows, 5, row), "Test results with 95 % confidence intervals")
    content += _ci_note(all_scores, several, wording.resampled([run.result for _, run, _ in rows], unit))
    if several:
        released_head = _th("Method", "text") + _score_heads(None, mean)
        content += (
            '<details class="more"><summary>With the confidence intervals of the released code</summary>'
            '<p class="note">The released MedFuse averages the 95 % intervals of the labels. This is wider than the '
            "interval of the mean, and is given for comparison with published numbers.</p>"
            f"{html.table(released_head, _grouped(rows, 3, released_row), 'Confidence intervals averaged over labels')}"
            "</details>"
        )
    return content


def differences(runs: list[Run]) -> str:
    """Return a table of the paired comparisons in the runs' results; '' if there are none."""
    pairs = [(run, other) for run in runs if run.result for other in read_fields.comparisons(run.result)]
    if not pairs:
        return ""
    pairs.sort(key=lambda row: SUBSETS.index(row[1]["subset"]))
    axis = _axis([x for _, s in pairs for x in (0.0, s.get("auroc_macro"), *pair(s.get("auroc_macro_ci")))], step=0.02)

    def row(run: Run, other: dict) -> str:
        name = f"{run.name} − {wording.against(run.result or {}, other)}"
        cells = _score_cells(_macro(other), axis, run.color, reference=0.0, sign=True)
        return f"<tr>{_run_head(run, name)}{cells}</tr>"

    body = _grouped([(_subset_title(other["subset"], run.task), run, other) for run, other in pairs], 4, row)
    head = _th("Difference", "text") + _score_heads(axis, sign=True)
    ordered = ""
    for run, other in pairs:
        if other["subset"] == "all" and (words := wording.ordinal(other, sign=True)):
            name = f"{run.name} − {wording.against(run.result or {}, other)}"
            ordered += f'<p class="note">{escape(name)}: {escape(words)}.</p>'
    return (
        f"<h3>Differences</h3>{html.table(head, body, 'Differences between methods')}{ordered}"
        '<p class="note">Paired: both methods are scored on the same stays in the same resamples. '
        "An interval without zero indicates a difference.</p>"
    )


def labels(run: Run, runs: list[Run]) -> str:
    """Return a table with one row per label; '' for a single label or without a result.

    Dots show other runs on the same records.
    """
    scores, names = run.scores(), run.label_names
    if len(names) < 2 or not scores:
        return ""
    count = scores.get("num_samples")
    others = [o for o in runs if o is not run and o.task == run.task and o.scores()]
    others = [o for o in others if o.scores().get("num_samples") == count][:_MAX_OTHERS]
    kinds = {p.name: p.kind for p in schema.PHENOTYPES} if run.task == "pheno" else {}
    axis = _axis(scores["auroc"] + [x for bounds in scores["auroc_ci"] for x in pair(bounds)])
    body = ""
    for k, name in enumerate(names):
        values = [scores[key][k] for key in ("auroc", "auroc_ci", "auprc", "auprc_ci")]
        positive = scores["num_positive"][k]
        prevalence = f"{number(100 * positive / count, 1)} %" if positive is not None and count else "–"
        dots = [(other.scores()["auroc"][k], other.color) for other in others if k < len(other.label_names)]
        kind = f'<td class="soft wide">{escape(kinds.get(name, "–"))}</td>' if kinds else ""
        body += (
            f'<tr><th scope="row" class="wrap">{escape(name)}</th>{kind}<td class="num soft">{prevalence}</td>'
            f"{_score_cells(values, axis, run.color, dots)}</tr>"
        )
    head = f"{_th('Label', 'text')}{_th('Type', 'text wide') if kinds else ''}{_th('Prevalence')}{_score_heads(axis)}"
    legend = "".join(f"<span>{dot(other)}{escape(other.name)}</span>" for other in others)
    note = f'<p class="note legend">Small dots: {legend}</p>' if others else ""
    coverage = ""
    if not read_fields.scores_all(run.result):
        total = (count or 0) + run.result["num_left_out"]
        coverage = f", on the {number(count, 0)} of {number(total, 0)} test {wording.unit(run.task)} it can score"
    return f"<h4>Each label{coverage}</h4>{html.table(head, body, f'Labels of {run.name}')}{note}"


def label_types(run: Run) -> str:
    """Return the means over acute, mixed and chronic phenotypes, by subset; '' without any."""
    found = [
        (_subset_title(subset, run.task), kind, scores)
        for subset, of in (read_fields.comparable_subsets(run.result) if run.result else {}).items()
        for kind, scores in section(of, "label_types").items()
        if isinstance(scores, dict)
    ]
    if not found:
        return ""
    axis = _axis([x for *_, s in found for x in (s.get("auroc_macro"), *pair(s.get("auroc_macro_ci")))])

    def row(kind: str, scores: dict) -> str:
        count = f'<td class="num soft">{number(scores.get("num_labels"), 0)}</td>'
        return f'<tr><th scope="row">{escape(kind)}</th>{count}{_score_cells(_macro(scores), axis, run.color)}</tr>'

    head = _th("Type", "text") + _th("Labels") + _score_heads(axis, "Mean ")
    table = html.table(head, _grouped(found, 5, row), f"Types of labels, {run.name}")
    return f"<h4>By type of label</h4>{table}"


def subgroups(run: Run) -> str:
    """Return the metrics by group of patients, and the largest gap of each attribute; '' without any."""
    entries = read_fields.subgroups(run.result)
    shown = [group for entry in entries for group in entry["groups"] if not group.get("withheld")]
    lines = "".join(map(_gap, entries)) + "".join(map(_withheld, entries))
    lines = f"<ul class=note>{lines}</ul>" if lines else ""
    if not shown:
        return f"<h4>By group of patients</h4>{lines}" if lines else ""
    axis = _axis([x for group in shown for x in (group.get("auroc_macro"), *pair(group.get("auroc_macro_ci")))])
    rows = []
    for entry in entries:
        # Where one group's numbers are withheld, the others' counts would give its own away.
        has_counts = not any(group.get("withheld") for group in entry["groups"])
        rows += [(escape(str(entry["by"])), group, has_counts) for group in entry["groups"]]

    def row(group: dict, has_counts: bool) -> str:
        name = f'<th scope="row" class="wrap">{escape(str(group.get("name")))}</th>'
        if group.get("withheld"):
            return f'<tr>{name}<td class="soft" colspan="6">withheld: too few</td></tr>'
        counts = [number(group.get(key), 0) if has_counts else "" for key in ("num_samples", "num_positive")]
        cells = "".join(f'<td class="num soft">{text}</td>' for text in counts)
        errors = "".join(f'<td class="num wide">{number(group.get(key))}</td>' for key in ("brier", "ece"))
        return f"<tr>{name}{cells}{_score_cells(_macro(group), axis, run.color)}{errors}</tr>"

    unit = wording.unit(run.task)
    head = _th("Group", "text") + _th(unit[0].upper() + unit[1:]) + _th("Positives") + _score_heads(axis)
    head += _th("Brier", "num wide") + _th("ECE", "num wide")
    note = (
        '<p class="note">Positives are of all labels together. Groups with fewer than 10 stays, positives or negatives '
        "are withheld, and with them the counts of the others. Brier: mean squared error of the probabilities; ECE: "
        "expected calibration error; both are better if lower.</p>"
    )
    table = html.table(head, _grouped(rows, 7, row), f"Groups of patients, {run.name}")
    return f"<h4>By group of patients</h4>{table}{lines}{note}"


def _gap(entry: dict) -> str:
    """Return the largest difference between two groups as a list item."""
    gap = entry.get("gap")
    if not isinstance(gap, dict):
        return ""
    low, high = (number(end) for end in pair(gap.get("worst_ci")))
    return (
        f"<li>{escape(str(entry['by']))}: AUROC differs by up to {number(gap.get('auroc_macro'))}; lowest for "
        f"{escape(str(gap.get('worst')))} (95 % CI {low}–{high}), highest for {escape(str(gap.get('best')))}.</li>"
    )


def _withheld(entry: dict) -> str:
    """Return that all groups of an attribute are withheld, as a list item; '' if one is shown."""
    if any(not group.get("withheld") for group in entry["groups"]):
        return ""
    few = f"each group has fewer than {schema.FEWEST_SHOWN} stays, positives or negatives"
    return f"<li>{escape(str(entry['by']))}: withheld, as {few}.</li>"


def calibration(run: Run) -> str:
    """Return the calibration in a sentence; '' without any."""
    of = section(run.result or {}, "calibration")
    if "brier_macro" not in of:
        return ""
    text = f"Brier score {number(of['brier_macro'])}, expected calibration error {number(of.get('ece_macro'))}"
    scaled = section(of, "scaled")
    if scaled:
        text += (
            f"; with temperature {number(scaled.get('temperature'), 2)}, fitted on the validation set: "
            f"{number(scaled.get('brier_macro'))} and {number(scaled.get('ece_macro'))}"
        )
    return f'<p class="note">{text}.</p>'


def operating_points(run: Run) -> str:
    """Return what acting on the scores of a task with one label would bring; '' of other tasks or without it.

    Two tables: thresholds by the sensitivity that they reach, and the net benefit.
    """
    of, scores = section(run.result or {}, "calibration"), run.scores()
    if "operating_points" not in of or not scores:
        return ""
    title, num_positive = "<h4>Operating points</h4>", scores["num_positive"][0] or 0
    rarer = min(num_positive, (scores.get("num_samples") or 0) - num_positive)
    if of.get("operating_points_withheld") or rarer < schema.FEWEST_SHOWN:
        few = f"fewer than {schema.FEWEST_SHOWN} test stays are positive, or negative"
        return f'{title}<p class="note">Withheld: {few}.</p>'
    points = _plain_table(of["operating_points"], _POINT_COLUMNS, "Thresholds by sensitivity")
    at = [row for row in of.get("net_benefit") or [] if row.get("threshold") in _NET_BENEFIT_AT]
    benefit = _plain_table(at, _BENEFIT_COLUMNS, "Net benefit by threshold")
    return (
        f'{title}<div class="charts"><div>{points}</div><div>{benefit}</div></div>'
        '<p class="note">A score at or above the threshold counts as positive. The first table has the highest '
        "thresholds that reach 80, 90 and 95 % sensitivity on the test set; PPV: positive predictive value. "
        "Net benefit: true positives per record, less false positives weighed by the odds of the threshold "
        "(Vickers and Elkin 2006); acting on nobody has 0.</p>"
    )


def _plain_table(rows: list[dict], columns: dict[str, str], caption: str) -> str:
    """Return a table of numbers, a row each. columns: field -> heading; the first heads the row."""
    first, *others = columns
    body = ""
    for row in rows:
        cells = "".join(f'<td class="num">{number(row.get(field))}</td>' for field in others)
        body += f'<tr><th scope="row">{number(row.get(first))}</th>{cells}</tr>'
    head = _th(columns[first], "text") + "".join(_th(columns[field]) for field in others)
    return html.table(head, body, caption)


def facts(content: dict) -> str:
    """Return a table of names and values, without empty values."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td class="wrap">{escape(str(value))}</td></tr>'
        for key, value in content.items()
        if value not in (None, "")
    )
    return f'<div class="scroll"><table class="plain"><tbody>{rows}</tbody></table></div>'


def dot(run: Run) -> str:
    """Return a dot in the run's colour."""
    return f'<i class="dot" style="background:var(--run{run.color % plots.NUM_COLORS})"></i>'


# Rows and cells


def _subset_title(subset: str, task: str) -> str:
    return notices.SUBSET_TITLES[subset].format(unit=wording.unit(task))


def _grouped(rows: list[tuple], num_columns: int, row: Callable[..., str]) -> str:
    """Return rows under group headings. rows: (group's title, *arguments of `row`), sorted by group."""
    body, last = "", None
    for title, *arguments in rows:
        if title != last:
            body += f'<tr class="group"><th colspan="{num_columns}" scope="rowgroup">{title}</th></tr>'
            last = title
        body += row(*arguments)
    return body


def _macro(scores: dict, ci_suffix: str = "") -> list:
    """Return the value list of the means over labels."""
    return [scores.get(f"{name}_macro{ci}") for name in ("auroc", "auprc") for ci in ("", f"_ci{ci_suffix}")]


def _ci_note(scores: list[dict], several: bool, resampled: str) -> str:
    count = f"{scores[0]['num_bootstrap']:,} " if isinstance(scores[0].get("num_bootstrap"), int) else ""
    of = " of the mean over labels" if several else ""
    warning = f" {wording.OUTSIDE_ITS_CI}" if any(map(read_fields.is_outside_its_ci, scores)) else ""
    return (
        f'<p class="note">95 % CI: confidence interval{of}, the 2.5th to 97.5th percentile of '
        f"{count}bootstrap resamples of {resampled}.{warning}</p>"
    )


def _th(text: str, css: str = "num") -> str:
    return f'<th scope="col" class="{css}">{escape(text)}</th>'


def _run_head(run: Run, text: str) -> str:
    return f'<th scope="row" class="named">{dot(run)}{escape(text)}</th>'


def _score_heads(axis: tuple[float, float] | None, mean: str = "", sign: bool = False) -> str:
    """Return column heads for `_score_cells`. The head of the bars shows the ends of their axis."""
    bar = ""
    if axis:
        low, high = (number(end, 2, sign) for end in axis)
        bar = f'<th class="bar"><div class="axis" aria-hidden="true"><span>{low}</span><span>{high}</span></div></th>'
    auroc, auprc = (
        f'<th scope="col" class="num">{mean}{name} <span class="ci">95 % CI</span></th>' for name in ("AUROC", "AUPRC")
    )
    return f"{auroc}{bar}{auprc}"


def _score_cells(values: list, axis=None, color: int = 0, others=(), reference: float = _CHANCE, sign=False) -> str:
    """Return cells: AUROC with its CI, its bar (if there is an axis), AUPRC with its CI.

    others: (AUROC or None, color) of other runs.
    """
    auroc, auroc_ci, auprc, auprc_ci = values
    bar = ""
    if axis:
        dots = [(value, color) for value, color in others if isinstance(value, int | float)]
        svg = plots.interval(axis, auroc, pair(auroc_ci), color, dots, reference) if number(auroc) != "–" else ""
        bar = f'<td class="bar">{svg}</td>'
    cells = []
    for value, ends in ((auroc, pair(auroc_ci)), (auprc, pair(auprc_ci))):
        low, high = (number(end, 3, sign) for end in ends)
        ci = f' <span class="ci">{low}{" to " if sign else "–"}{high}</span>' if (low, high) != ("–", "–") else ""
        cells.append(f'<td class="num">{number(value, 3, sign)}{ci}</td>')
    return cells[0] + bar + cells[1]


def _axis(ends: list, step: float = 0.05) -> tuple[float, float]:
    """Return a common axis for bars, rounded outwards to multiples of `step`. ends: numbers or None."""
    known = [end for end in ends if number(end) != "–"]
    return (np.floor(min(known) / step) * step, np.ceil(max(known) / step) * step) if known else (0.0, 1.0)
