"""The report page's tables. Never imports jax. What comes from a file is escaped on its way in."""

from html import escape

import numpy as np

from medfuse_jax import ranks, schema
from medfuse_jax.report import plots, read_runs
from medfuse_jax.report.read_runs import SUBSETS, Run, method_name, number, pair, section

_SUBSET_TITLES = {
    "all": "All test stays",
    "paired": "Test stays with an X-ray",
    "unpaired": "Test stays without an X-ray",
    "cxr_only": "Test X-rays without time series",
    "had_both": "Test stays with time series and X-ray, before one was dropped",
}
_AGE_GROUPS = ((18, 40), (40, 60), (60, 80), (80, np.inf))  # years, low <= age < high; paper, Table 5
_NUM_BOOTSTRAP = 1000
_MAX_BESIDE = 5  # other runs' dots in a label's bar
_CHANCE = 0.5
_SCORES = ("AUROC", "AUPRC")


def results(task: str, runs: list[Run]) -> str:
    """A row a run and subset, methods beside one another; '' where no run has a result."""
    finished = [run for run in runs if run.result]
    shown = [(run, read_runs.subsets(run.result)) for run in finished]
    rows = [(name, run, subsets[name]) for name in SUBSETS for run, subsets in shown if name in subsets]
    if not rows:
        return ""
    axis = _axis([x for *_, s in rows for x in (s.get("auroc_macro"), *pair(s.get("auroc_macro_ci")))])
    several = any(len(s.get("auroc") or []) > 1 for *_, s in rows)
    mixed = len({run.is_pretraining for run in finished}) > 1
    mean = "Mean " if several else ""
    head = _th("Method", "text") + _th(read_runs.unit(task).capitalize()) + _score_heads(axis, mean)
    released_head = _th("Method", "text") + _score_heads(None, mean)
    body, released, last = "", "", None
    for name, run, scores in rows:
        if name != last:
            group = f'<th colspan="{{}}" scope="rowgroup">{subset_title(name, task)}</th>'
            body += f'<tr class="group">{group.format(5)}</tr>'
            released += f'<tr class="group">{group.format(3)}</tr>'
            last = name
        opening = f"<tr{' class=main' if mixed and not run.is_pretraining else ''}>{_run_head(run, run.name)}"
        values = [scores.get(key) for key in ("auroc_macro", "auroc_macro_ci", "auprc_macro", "auprc_macro_ci")]
        count = f'<td class="num">{number(scores.get("num_samples"), 0)}</td>'
        body += f"{opening}{count}{_score_cells(*values, axis, run.color)}</tr>"
        values[1::2] = scores.get("auroc_macro_ci_released"), scores.get("auprc_macro_ci_released")
        released += f"{opening}{_score_cells(*values)}</tr>"
    made = _table(head, body, "Test results with 95 % confidence intervals") + _ci_note([s for *_, s in rows], several)
    averaged = _table(released_head, released, "Confidence intervals averaged over labels")
    return made + (_released_details(averaged) if several else "")


def differences(runs: list[Run]) -> str:
    """The paired comparisons that the runs' results hold; '' where there is none."""
    rows = [(run, other) for run in runs if run.result for other in read_runs.comparisons(run.result)]
    if not rows:
        return ""
    ends = [x for _, other in rows for x in (0.0, other.get("auroc_macro"), *pair(other.get("auroc_macro_ci")))]
    axis = _axis(ends, step=0.02)
    body, last = "", None
    for run, other in sorted(rows, key=lambda row: SUBSETS.index(row[1]["subset"])):
        if other["subset"] != last:
            last = other["subset"]
            body += f'<tr class="group"><th colspan="4" scope="rowgroup">{subset_title(last, run.task)}</th></tr>'
        against = method_name(other.get("against"))
        values = [other.get(key) for key in ("auroc_macro", "auroc_macro_ci", "auprc_macro", "auprc_macro_ci")]
        body += (
            f"<tr>{_run_head(run, f'{run.name} − {against}')}"
            f"{_score_cells(*values, axis, run.color, reference=0.0, sign=True)}</tr>"
        )
    head = _th("Difference", "text") + _score_heads(axis, sign=True)
    return (
        f"<h3>Differences</h3>{_table(head, body, 'Differences between methods')}"
        '<p class="note">Paired: both methods are scored on the same stays of the same resamples. '
        "An interval that leaves out zero speaks for a difference.</p>"
    )


def labels(run: Run, runs: list[Run]) -> str:
    """A row a label; other runs of the task that score as many are dots. '' where there is one label, or no result."""
    scores = section(section(run.result or {}, "subsets"), "all")
    names = run.label_names
    if len(names) < 2 or not scores:
        return ""
    others = [other for other in runs if other is not run and other.task == run.task and other.result]
    count = scores.get("num_samples")
    others = [o for o in others if section(o.result["subsets"], "all").get("num_samples") == count][:_MAX_BESIDE]
    kinds = {p.name: p.kind for p in schema.PHENOTYPES} if run.task == "pheno" else {}
    axis = _axis(scores["auroc"] + [x for bounds in scores.get("auroc_ci") or [] for x in pair(bounds)])
    body = ""
    for k, name in enumerate(names):
        values = [_at(scores, key, k) for key in ("auroc", "auroc_ci", "auprc", "auprc_ci")]
        positive = _at(scores, "num_positive", k)
        prevalence = f"{number(100 * positive / count, 1)} %" if positive is not None and count else "–"
        beside = [(_at(section(other.result["subsets"], "all"), "auroc", k), other.color) for other in others]
        kind = f'<td class="soft wide">{escape(kinds.get(name, "–"))}</td>' if kinds else ""
        body += (
            f'<tr><th scope="row" class="wrap">{escape(name)}</th>{kind}<td class="num soft">{prevalence}</td>'
            f"{_score_cells(*values, axis, run.color, beside)}</tr>"
        )
    head = f"{_th('Label', 'text')}{_th('Type', 'text wide') if kinds else ''}{_th('Prevalence')}{_score_heads(axis)}"
    key = "".join(f"<span>{dot(other)}{escape(other.name)}</span>" for other in others)
    note = f'<p class="note key">Small dots: {key}</p>' if others else ""
    return f"<h4>Each label{_of_how_many(run)}</h4>{_table(head, body, f'Labels of {run.name}')}{note}"


def ages(run: Run) -> str:
    """A row an age group, for mortality, of the stays scored and of the paired; '' where the ages are not known."""
    if run.task != "mortality" or not run.predictions or run.predictions["age"] is None:
        return ""
    paired_N = run.predictions["paired"]
    parts = [("All that it scores", np.ones(len(run.predictions["age"]), bool))]
    if paired_N is not None and paired_N.any():
        parts.append(("Those with an X-ray (the paper\u2019s Table 5)", paired_N))
    groups = [(title, _age_groups(run, include_N)) for title, include_N in parts]
    axis = _axis([x for _, rows in groups for *_, values in rows for x in (values[0], *values[1])])
    body = ""
    for title, rows in groups:
        body += f'<tr class="group"><th colspan="5" scope="rowgroup">{title}</th></tr>'
        body += "".join(
            f'<tr><th scope="row">{name}</th><td class="num soft">{number(positive, 0)} / {number(count, 0)}</td>'
            f"{_score_cells(*values, axis, run.color)}</tr>"
            for name, positive, count, values in rows
        )
    head = _th("Age in years", "text") + _th("Deaths / test stays") + _score_heads(axis)
    return f"<h4>By age</h4>{_table(head, body, 'Results by age group')}"


def plain(facts: dict) -> str:
    """Names and values, those that have one."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td class="wrap">{escape(str(value))}</td></tr>'
        for key, value in facts.items()
        if value not in (None, "")
    )
    return f'<div class="scroll"><table class="plain"><tbody>{rows}</tbody></table></div>'


def subset_title(subset: str, task: str) -> str:
    """What a subset of the test split is called in this task."""
    return _SUBSET_TITLES.get(subset, subset).replace("stays", read_runs.unit(task))


def _of_how_many(run: Run) -> str:
    """Which records a run scores, where that is not all."""
    if read_runs.scores_all(run.result):
        return ""
    scored = section(run.result["subsets"], "all").get("num_samples") or 0
    of = number(scored + run.result["num_left_out"], 0)
    return f", on the {number(scored, 0)} of {of} test {read_runs.unit(run.task)} that it can score"


def dot(run: Run) -> str:
    """The run's colour."""
    return f'<i class="dot" style="background:var(--run{run.color % plots.NUM_COLORS})"></i>'


def _table(head: str, body: str, caption: str) -> str:
    caption = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _released_details(table: str) -> str:
    return (
        '<details class="made"><summary>The same with intervals as the released code computes them</summary>'
        '<p class="note">The released MedFuse averages the 95 % intervals of the labels. That is wider than the '
        f"interval of the mean, and given to compare with published numbers.</p>{table}</details>"
    )


def _ci_note(scores: list[dict], several: bool) -> str:
    count = f"{scores[0]['num_bootstrap']:,} " if isinstance(scores[0].get("num_bootstrap"), int) else ""
    of = ", of the mean over labels" if several else ""
    odd = f" {read_runs.OUTSIDE_ITS_CI}" if any(read_runs.outside_its_ci(subset) for subset in scores) else ""
    return (
        '<p class="note">95 % CI: confidence interval, the 2.5th to 97.5th percentile of '
        f"{count}bootstrap resamples of the test set{of}.{odd}</p>"
    )


def _th(text: str, css: str = "num") -> str:
    return f'<th scope="col" class="{css}">{escape(text)}</th>'


def _run_head(run: Run, text: str) -> str:
    return f'<th scope="row" class="named">{dot(run)}{escape(text)}</th>'


def _score_heads(axis: tuple[float, float] | None, mean: str = "", sign: bool = False) -> str:
    """Heads of `_score_cells`; a bar's head is its axis."""
    bar = ""
    if axis:
        low, high = (number(end, 2, sign) for end in axis)
        bar = f'<th class="bar"><div class="axis" aria-hidden="true"><span>{low}</span><span>{high}</span></div></th>'
    auroc, auprc = (
        f'<th scope="col" class="num">{mean}{name} <span class="ci">95 % CI</span></th>' for name in _SCORES
    )
    return f"{auroc}{bar}{auprc}"


def _score_cells(
    auroc, auroc_ci, auprc, auprc_ci, axis=None, color: int = 0, beside=(), reference: float = _CHANCE, sign=False
) -> str:
    """AUROC with its confidence interval, its bar (where there is an axis), AUPRC with its interval.

    beside: (AUROC, color) of other runs, None where one has none.
    """
    bar = ""
    if axis:
        others = [(value, color) for value, color in beside if isinstance(value, int | float)]
        drawn = plots.interval(axis, auroc, pair(auroc_ci), color, others, reference) if number(auroc) != "–" else ""
        bar = f'<td class="bar">{drawn}</td>'
    cells = []
    for value, ends in ((auroc, pair(auroc_ci)), (auprc, pair(auprc_ci))):
        low, high = (number(end, 3, sign) for end in ends)
        between = f"{low}{' to ' if sign else '–'}{high}"
        ci = f' <span class="ci">{between}</span>' if (low, high) != ("–", "–") else ""
        cells.append(f'<td class="num">{number(value, 3, sign)}{ci}</td>')
    return cells[0] + bar + cells[1]


def _axis(ends: list, step: float = 0.05) -> tuple[float, float]:
    """A common axis for bars, on whole steps. ends: numbers, None among them."""
    known = [end for end in ends if number(end) != "–"]
    return (np.floor(min(known) / step) * step, np.ceil(max(known) / step) * step) if known else (0.0, 1.0)


def _at(scores: dict, field: str, k: int):
    values = scores.get(field) or []
    return values[k] if len(values) > k else None


def _age_groups(run: Run, include_N: np.ndarray) -> list[tuple[str, int, int, list]]:
    """(group, deaths, stays, [AUROC, its CI, AUPRC, its CI]) of every age group that holds an included stay."""
    rng = np.random.default_rng(0)
    groups = []
    for low, high in _AGE_GROUPS:
        rows = np.flatnonzero(include_N & (run.predictions["age"] >= low) & (run.predictions["age"] < high))
        if not len(rows):
            continue
        label_N, score_N = (run.predictions[key][rows, 0] for key in ("labels", "scores"))
        resample_NR = rng.integers(len(rows), size=(len(rows), _NUM_BOOTSTRAP))
        point = ranks.point(label_N[:, None], score_N[:, None])
        boot = ranks.point(label_N[resample_NR], score_N[resample_NR])  # a column a resample
        values = [x for key in ("auroc", "auprc") for x in (float(point[key][0]), ranks.bounds(boot[key]).tolist())]
        name = f"{low} to {high - 1}" if np.isfinite(high) else f"{low} and over"
        groups.append((name, int(label_N.sum()), len(rows), values))
    return groups
