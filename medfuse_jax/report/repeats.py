"""One experiment over several seeds and folds: the mean and spread of its results. Never imports jax."""

import dataclasses
import statistics
from html import escape

from medfuse_jax.report import html, wording
from medfuse_jax.report.read_fields import SUBSETS, section
from medfuse_jax.report.read_runs import Run
from medfuse_jax.report.wording import number

TITLES = {"auroc_macro": "AUROC", "auprc_macro": "AUPRC", "kappa": "Kappa", "mad_h": "Deviation, h"}
SUBSET_WORDS = {
    "all": "all",
    "paired": "with an X-ray",
    "unpaired": "without",
    "cxr_only": "X-ray alone",
    "had_both": "before one was dropped",
}


@dataclasses.dataclass(frozen=True)
class Spread:
    """The mean of some runs' values and their standard deviation, of a sample; None for a single run."""

    mean: float
    sd: float | None
    low: float
    high: float
    count: int

    def text(self, digits: int = 3) -> str:
        return number(self.mean, digits) + (f" ± {number(self.sd, digits)}" if self.sd is not None else "")


def spread(values: list[float]) -> Spread:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, min(values), max(values), len(values))


def summary(results: list[dict]) -> dict[str, dict[str, Spread]]:
    """Return subset -> metric -> spread over results (contents of result.json files), where any has a number."""
    found: dict[str, dict[str, Spread]] = {}
    for subset in SUBSETS:
        of_runs = [section(result.get("subsets") or {}, subset) for result in results]
        for name in TITLES:
            values = [scores[name] for scores in of_runs if isinstance(scores.get(name), int | float)]
            if values:
                found.setdefault(subset, {})[name] = spread(values)
    return found


def metrics_of(results: list[dict]) -> list[str]:
    """Return the metrics that any of the results has on any subset, AUROC and AUPRC always."""
    scored = {metric for by_metric in summary(results).values() for metric in by_metric}
    return [name for name in TITLES if name in scored | {"auroc_macro", "auprc_macro"}]


def place(result: dict) -> tuple[int | None, int | None]:
    """Return a result's (seed, fold); no fold where the shards' own splits are used."""
    return result.get("seed"), section(result, "data").get("fold")


def groups(runs: list[Run]) -> list[list[Run]]:
    """Return the main runs with results that are one experiment with several seeds or folds, at least two each.

    Runs belong together by task, name, method and number of folds. Several with one seed and fold, such as the trials
    of a sweep, are no repetition: these are left out.
    """
    by_key: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.result and not run.is_pretraining:
            key = (
                run.task,
                run.result.get("name"),
                wording.title(run.result),
                section(run.result, "data").get("folds"),
            )
            by_key.setdefault(key, []).append(run)
    return [of for of in by_key.values() if len(of) > 1 and len({place(run.result or {}) for run in of}) == len(of)]


def words(results: list[dict]) -> str:
    """Say what repeats: '6 runs: 2 seeds, 3 folds'."""
    seeds, folds = ({place(result)[i] for result in results} - {None} for i in (0, 1))
    parts = [f"{len(seeds)} seed{'s'[: len(seeds) != 1]}"] + ([f"{len(folds)} folds"] if folds else [])
    return f"{len(results)} runs: {', '.join(parts)}"


NOTE = "Mean ± standard deviation of the runs' test results."
OF_FOLDS = "Every fold tests other patients; training patients overlap, so the deviation is no standard error."


def table(named: list[tuple[str, list[dict]]]) -> str:
    """Return a table with a row per experiment and subset; '' without any. named: (name, its results)."""
    columns: list[str] = []
    found = [(name, results, summary(results)) for name, results in named]
    for *_, by_subset in found:
        columns += [metric for by_metric in by_subset.values() for metric in by_metric]
    if not columns:
        return ""
    columns, body = list(dict.fromkeys(columns)), ""
    units = {wording.unit(result.get("task", "")) for _, results in named for result in results}
    head = f'<th scope="col">Test {" or ".join(sorted(units))}</th>'
    head += "".join(f'<th scope="col" class="num">{TITLES[metric]}</th>' for metric in columns)
    for name, results, by_subset in found:
        group = escape(f"{name}, {words(results)}")
        body += f'<tr class="group"><th scope="rowgroup" colspan="{len(columns) + 1}">{group}</th></tr>'
        for subset, by_metric in by_subset.items():
            cells = (by_metric[metric].text() if metric in by_metric else "–" for metric in columns)
            shown = "".join(f'<td class="num">{cell}</td>' for cell in cells)
            body += f'<tr><th scope="row">{SUBSET_WORDS[subset]}</th>{shown}</tr>'
    has_folds = any(place(result)[1] is not None for _, results in named for result in results)
    note = f"{NOTE} {OF_FOLDS}" if has_folds else NOTE
    return html.table(head, body, "Results over seeds and folds") + f'<p class="note">{note}</p>'


def section_of(runs: list[Run]) -> str:
    """Return the report's section on repeated runs; '' if none is repeated."""
    named = [(wording.title(of[0].result or {}), [run.result or {} for run in of]) for of in groups(runs)]
    content = table(named)
    return f"<section><h2>Over seeds and folds</h2>{content}</section>" if content else ""
