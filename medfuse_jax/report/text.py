"""Results as a table for the terminal. Needs neither jax nor matplotlib."""

import textwrap

from medfuse_jax.report import workdirs
from medfuse_jax.report.workdirs import METHOD_NAMES, OUTSIDE_ITS_CI, SUBSETS, TASK_NAMES, number, pair, section

_WIDTH = 100
_SUBSET_WORDS = {
    "paired": "with film",
    "unpaired": "no film",
    "film_only": "film only",
    "had_both": "had both",
}


def table(results: list[dict]) -> str:
    """Results (the content of result.json each) as lines of at most 100 columns, methods beside one another."""
    blocks = []
    for task in dict.fromkeys(str(result.get("task")) for result in results):
        group = [result for result in results if str(result.get("task")) == task]
        synthetic = any(section(result, "data").get("synthetic") for result in group)
        title = f"{TASK_NAMES.get(task, task)}, {group[0].get('split', 'test')} split"
        kind = "films" if workdirs.films_only(task) else "stays"
        rows = [("method", kind, "", "AUROC [95 % CI]", "AUPRC [95 % CI]")]
        for subset in SUBSETS:
            for result in group:
                rows += _result_rows(result, subset)
        differences = [row for result in group for row in _difference_rows(result)]
        if differences:
            rows += [("difference, paired bootstrap", "", "", "", ""), *differences]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:<{widths[3]}}  {e:<{widths[4]}}".rstrip()
            for a, b, c, d, e in rows
        ]
        notice = ["synthetic patients: says nothing about real ones"] if synthetic else []
        shown = [scores for result in group for scores in workdirs.subsets(result).values()]
        odd = textwrap.wrap(OUTSIDE_ITS_CI, _WIDTH) if any(map(workdirs.outside_its_ci, shown)) else []
        blocks.append("\n".join([title, *notice, *lines, *odd]))
    return "\n\n".join(blocks)


def _result_rows(result: dict, subset: str) -> list[tuple[str, ...]]:
    scores = workdirs.subsets(result).get(subset)
    if not scores:
        return []
    method = _short(METHOD_NAMES.get(result.get("method"), str(result.get("method"))))
    values = (_bracketed(scores, name) for name in ("auroc_macro", "auprc_macro"))
    return [(method, _SUBSET_WORDS.get(subset, subset), str(scores.get("num_samples", "")), *values)]


def _difference_rows(result: dict) -> list[tuple[str, ...]]:
    method = METHOD_NAMES.get(result.get("method"), str(result.get("method")))
    rows = []
    for scores in workdirs.comparisons(result):
        against = METHOD_NAMES.get(scores.get("against"), str(scores.get("against")))
        values = (_bracketed(scores, name, sign=True) for name in ("auroc_macro", "auprc_macro"))
        subset = scores["subset"]
        rows.append((_short(f"{method} − {against}"), _SUBSET_WORDS.get(subset, subset), "", *values))
    return rows


def _bracketed(scores: dict, name: str, sign: bool = False) -> str:
    low, high = pair(scores.get(f"{name}_ci"))
    return f"{number(scores.get(name), 3, sign)} [{number(low, 3, sign)}, {number(high, 3, sign)}]"


def _short(text: str, width: int = 32) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
