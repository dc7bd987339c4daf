"""Results as a table for the terminal. Needs neither jax nor matplotlib."""

import textwrap

from medfuse_jax.report import read_runs
from medfuse_jax.report.read_runs import OUTSIDE_ITS_CI, SUBSETS, TASK_NAMES, method_name, number, pair, section

_WIDTH = 100
_SUBSET_WORDS = {
    "paired": "with X-ray",
    "unpaired": "no X-ray",
    "cxr_only": "X-ray only",
    "had_both": "had both",
}


def table(results: list[dict], names: list[str] | None = None) -> str:
    """Results (the content of result.json each) as lines of at most 100 columns, methods beside one another.

    names: what each is called; by default its method, which does not tell two runs of one method apart.
    """
    names = names or [read_runs.title(result) for result in results]
    blocks = []
    for task in dict.fromkeys(str(result.get("task")) for result in results):
        named = [(name, result) for name, result in zip(names, results) if str(result.get("task")) == task]
        group = [result for _, result in named]
        synthetic = any(section(result, "data").get("synthetic") for result in group)
        title = f"{TASK_NAMES.get(task, task)}, {group[0].get('split', 'test')} split"
        rows = [("method", read_runs.unit(task), "", "AUROC [95 % CI]", "AUPRC [95 % CI]")]
        for subset in SUBSETS:
            for name, result in named:
                rows += _result_rows(name, result, subset)
        differences = [row for name, result in named for row in _difference_rows(name, result)]
        if differences:
            rows += [("difference, paired bootstrap", "", "", "", ""), *differences]
        lines = _aligned(rows)
        notice = ["synthetic patients: says nothing about real ones"] if synthetic else []
        shown = [scores for result in group for scores in read_runs.subsets(result).values()]
        odd = textwrap.wrap(OUTSIDE_ITS_CI, _WIDTH) if any(map(read_runs.outside_its_ci, shown)) else []
        blocks.append("\n".join([title, *notice, *lines, *odd]))
    return "\n\n".join(blocks)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows in columns; a name too long for its column has a line of its own above the rest of its row."""
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    widths[0] = min(widths[0], _WIDTH - sum(widths[1:]) - 2 * 4)
    lines = []
    for name, which, count, auroc, auprc in rows:
        if len(name) > widths[0]:
            lines.append(_short(name, _WIDTH))
            name = ""
        columns = f"{name:<{widths[0]}}  {which:<{widths[1]}}  {count:>{widths[2]}}  {auroc:<{widths[3]}}  {auprc}"
        lines.append(columns.rstrip())
    return lines


def _result_rows(name: str, result: dict, subset: str) -> list[tuple[str, ...]]:
    scores = read_runs.subsets(result).get(subset)
    if not scores:
        return []
    values = (_bracketed(scores, score) for score in ("auroc_macro", "auprc_macro"))
    return [(name, _SUBSET_WORDS.get(subset, subset), str(scores.get("num_samples", "")), *values)]


def _difference_rows(name: str, result: dict) -> list[tuple[str, ...]]:
    rows = []
    for scores in read_runs.comparisons(result):
        against = method_name(scores.get("against"))
        values = (_bracketed(scores, score, sign=True) for score in ("auroc_macro", "auprc_macro"))
        subset = scores["subset"]
        rows.append((f"{name} − {against}", _SUBSET_WORDS.get(subset, subset), "", *values))
    return rows


def _bracketed(scores: dict, score: str, sign: bool = False) -> str:
    low, high = pair(scores.get(f"{score}_ci"))
    return f"{number(scores.get(score), 3, sign)} [{number(low, 3, sign)}, {number(high, 3, sign)}]"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
