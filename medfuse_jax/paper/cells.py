"""What tables are made of: numbers of ours beside the paper's, and how to make a row of them.

A cell is text or a Value. Every format (HTML, Markdown, CSV, LaTeX, JSON) is written from these cells.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from medfuse_jax import schema
from medfuse_jax.paper import published
from medfuse_jax.paper.scores import Evaluation, Scores, TaskResults

METRICS = ("auroc", "auprc")
BOTH = ("lstm", "medfuse")  # the two models of Tables 4 and 5 and Figure 4, as published.csv names them
BOTH_HEADS = [f"{model}, {m.upper()}" for model in ("LSTM", "MedFuse") for m in METRICS]
DIFFERENCE_HEADS = [f"MedFuse − LSTM, {m.upper()}" for m in METRICS]
ON_PAIRED = "chosen on paired validation stays"  # after the title of a model: its second choice
KINDS = {p.name: p.kind for p in schema.PHENOTYPES}
TASK_NAMES = {"pheno": "Phenotyping", "mortality": "Mortality"}


@dataclasses.dataclass(frozen=True)
class Value:
    """One number of ours, with its 95 % interval and the paper's number, where there are any.

    p: of a difference. digits: after the point; None for scientific notation. is_change: whether it is a difference.
    spread: the standard deviation over seeds and folds, if the number is a mean over them.
    """

    ours: float
    ci: Sequence[float] = (math.nan, math.nan)
    paper: published.Number | None = None
    p: float = math.nan
    digits: int | None = 3
    is_change: bool = False
    spread: float = math.nan

    @property
    def low(self) -> float:
        return float(self.ci[0])

    @property
    def high(self) -> float:
        return float(self.ci[1])

    @property
    def drawn(self) -> tuple[float, float]:
        """The ends of the band around it in a chart."""
        return (self.low, self.high) if math.isnan(self.spread) else (self.ours - self.spread, self.ours + self.spread)

    @property
    def is_outside(self) -> bool:
        """Whether our number, if there is one, lies outside the paper's interval."""
        return self.paper is not None and not math.isnan(self.ours) and self.paper.excludes(self.ours)


@dataclasses.dataclass
class Table:
    """A table, or the data of a figure. rows: one cell per column."""

    name: str
    title: str
    head: list[str]
    rows: list[list]
    notes: list[str] = dataclasses.field(default_factory=list)


class Maker:
    """Makes rows with AUROC and AUPRC for each task."""

    def __init__(self, tasks: list[TaskResults], evaluation: Evaluation):
        self.tasks = tasks
        self.evaluation = evaluation

    def both(self, task: str) -> tuple[TaskResults, list[Scores]] | None:
        """Return a task with the scores of E1 and OPT on its paired test stays; None without one of the two."""
        r = next((r for r in self.tasks if r.task == task), None)
        if r is None or not {"E1", "OPT"} <= r.models.keys():
            return None
        return r, [r.models[id].test.paired for id in ("E1", "OPT")]

    def heads(self) -> list[str]:
        return [f"{TASK_NAMES[r.task]}, {m.upper()}" for r in self.tasks for m in METRICS]

    def test(self, id: str, on: str) -> list[Scores | None]:
        """Return a model's test scores for each task.

        on: 'all' stays, those 'paired' with an X-ray, or these with the X-rays 'dropped'.
        """
        models = [r.models.get(id) for r in self.tasks]
        if on == "dropped":
            return [model.without_cxr.paired if model and model.without_cxr else None for model in models]
        tested = [model.test if model else None for model in models]
        return [test and test.paired for test in tested] if on == "paired" else tested

    def title(self, id: str) -> str:
        """Return a model's title. Where the tasks chose other depths, it names each: DAFT, layer 3 (mortality), ..."""
        by_task = {TASK_NAMES[r.task].lower(): r.models[id].title for r in self.tasks if id in r.models}
        titles = list(by_task.values())
        if len(set(titles)) == 1:
            return titles[0]
        name = titles[0].partition(", ")[0]
        return ", ".join([name, *(f"{title.partition(', ')[2]} ({task})" for task, title in by_task.items())])

    def row(self, of_tasks: Sequence[Scores | None], table: str = "", row: str = "") -> list:
        """Return the cells of one row; [] if no task has scores. table, row: where the paper's numbers are.

        A task whose scores are of no stay has NaN, which is shown as a dash; see `gaps`.
        """
        cells = []
        for r, part in zip(self.tasks, of_tasks):
            cells += [""] * len(METRICS) if part is None else self.macro(part, (table, r.task, row))
        return cells if any(cells) else []

    def macro(self, part: Scores, paper: tuple[str, str, str] = ("", "", ""), suffix: str = "") -> list[Value]:
        """Return the means over labels. paper: table, task and row of its numbers; suffix: of the metric's name."""
        return macro_values(self.evaluation.metrics(part), paper, suffix)

    def macros_of_both(self, parts: list[Scores], paper: tuple[str, str, str]) -> list[Value]:
        """Return the means over labels of the LSTM and of MedFuse, and their differences. parts: E1's, OPT's."""
        lstm, medfuse = parts
        values = [value for part, name in zip(parts, BOTH) for value in self.macro(part, paper, f"_{name}")]
        return values + macro_differences(self.evaluation.difference(medfuse, lstm))

    def differences(self, ours: Sequence[Scores | None], others: Sequence[Scores | None]) -> list:
        """Return the cells of one row of paired differences, ours minus the other's; [] if no task has both."""
        cells: list = []
        for a, b in zip(ours, others):
            if a is None or b is None:
                cells += [""] * len(METRICS)
            else:
                cells += macro_differences(self.evaluation.difference(a, b))
        return cells if any(cells) else []

    def gaps(self, *on: str, tasks: Sequence[str] = tuple(TASK_NAMES)) -> list[str]:
        """Return notes on the test stays of these tasks that leave dashes. on: 'all', 'paired' or both."""
        found = [(r, words, _tested(r, words)) for r in self.tasks if r.task in tasks and r.models for words in on]
        return [f"{TASK_NAMES[r.task]}: {said}." for r, words, labels in found if (said := _gap(labels, words))]

    def by_loss(self, *ids: str, tasks: Sequence[str] = tuple(TASK_NAMES)) -> list[str]:
        """Return notes on those of these models of these tasks that the validation loss chose."""
        return [
            f"{TASK_NAMES[r.task]}: no label of the validation stays{' with an X-ray' if on_paired else ''} has both "
            f"classes, so the loss chose {'; '.join(titles)}."
            for r in self.tasks
            for on_paired in (False, True)
            if r.task in tasks and (titles := _titles_by_loss(r, ids, on_paired))
        ]

    def missing(self) -> list[str]:
        """Return a note for every model that there is not."""
        return [f"{TASK_NAMES[r.task]}: no {id} ({why})." for r in self.tasks for id, why in r.missing.items()]


def _titles_by_loss(r: TaskResults, ids: Sequence[str], on_paired: bool) -> list[str]:
    models = {id: r.models[id] for id in ids if id in r.models}
    return [
        model.title + (f", {ON_PAIRED}" if id.endswith("_paired") else "")
        for id, model in models.items()
        if model.is_by_loss and model.on_paired == on_paired
    ]


def _tested(r: TaskResults, on: str) -> np.ndarray:
    """Return the labels [N, K] of a task's test stays, all or those with an X-ray."""
    tested = max((model.test for model in r.models.values()), key=lambda test: len(test.stay_id))
    return (tested.paired if on == "paired" else tested).labels


def _gap(labels_NK: np.ndarray, on: str) -> str:
    """Say which metrics of test stays with these labels are missing, and why; '' if none are."""
    if not len(labels_NK):
        return "no test stay has an X-ray" if on == "paired" else "there are no test stays"
    stays = f"the test stays{' with an X-ray' if on == 'paired' else ''}"
    num_constant = int((labels_NK.min(0) == labels_NK.max(0)).sum())
    if num_constant == labels_NK.shape[1]:
        return f"no label of {stays} has both classes, so there is no AUROC or AUPRC"
    if num_constant:
        return f"the means leave out {num_constant} of {labels_NK.shape[1]} labels: one class only among {stays}"
    return ""


def macro_values(evaluated: dict, paper: tuple[str, str, str], suffix: str = "") -> list[Value]:
    return [
        Value(evaluated[f"{m}_macro"], evaluated[f"{m}_macro_ci"], published.number(*paper, f"{m}{suffix}"))
        for m in METRICS
    ]


def macro_differences(compared: dict) -> list[Value]:
    """Return the differences of the means over labels. compared: as from `Evaluation.difference`."""
    return [
        Value(compared[f"{m}_macro"], compared[f"{m}_macro_ci"], p=compared[f"{m}_macro_p"], is_change=True)
        for m in METRICS
    ]
