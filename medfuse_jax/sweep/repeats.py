"""A sweep for each seed and fold (--seeds, --folds), and the mean and spread of what they reach on their test stays.

Each is a whole sweep in a folder of its own: it trains its own encoders, on its own fold's training patients alone, and
chooses its own trial on its own validation stays.
"""

import csv
import dataclasses
import io
from collections.abc import Callable
from html import escape
from pathlib import Path

from ml_collections import ConfigDict

from medfuse_jax.data import folds, synthetic
from medfuse_jax.data.shards import Shards
from medfuse_jax.report import html, notices, read_fields, read_runs, repeats, style, wording
from medfuse_jax.report.wording import method_name, number, task_name
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results

FILE = "repeats"


@dataclasses.dataclass(frozen=True)
class Repeat:
    """One seed and fold. folds: 0 for the shards' own splits."""

    seed: int
    fold: int = 0
    folds: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"seed{self.seed}" + (f"_fold{self.fold}of{self.folds}" if self.folds else "")

    def set(self, config: ConfigDict) -> ConfigDict:
        """Return a config with this seed and fold."""
        config = config.copy_and_resolve_references()
        config.seed, config.data.folds, config.data.fold = self.seed, self.folds, self.fold
        return config


def plan(first_seed: int, seeds: int, folds: int) -> list[Repeat]:
    """Return `seeds` times `folds` repeats, or `seeds` with folds=0; seed after seed."""
    if folds == 1:
        raise UserError("--folds=1 leaves no patient to train on: give at least 2", field="--folds", value=1)
    return [Repeat(first_seed + s, fold, folds) for s in range(seeds) for fold in range(folds or 1)]


def run(of: list[Repeat], workdir: Path, config: ConfigDict, sweep: Callable[[ConfigDict, Path], None]) -> None:
    """Run or resume every repeat's sweep, then write repeats.csv and repeats.html. sweep: runs one, in a folder.

    The others go on after a sweep in which no trial finished, whose error is raised at the end.
    """
    if config.data.folds:
        message = f"config.data.folds is {config.data.folds}: leave it out, and give --folds for sweeps over folds"
        raise UserError(message, field="config.data.folds", value=config.data.folds)
    check_unused(workdir)
    synthetic.set_data_dir(config)
    for repeat in of:  # before any of them trains
        Shards(config.data.dir, config.task, folds.of_config(repeat.set(config))).check_fold()
    ended, error = [], None
    for number_of, repeat in enumerate(of, start=1):
        print(f"\n{repeat.name} ({number_of} of {len(of)})", flush=True)
        try:
            sweep(repeat.set(config), workdir / repeat.name)
            ended.append(repeat)
        except results.NoneFinished as none_finished:
            error = none_finished
            print(f"{error}; the other sweeps go on", flush=True)
    if ended:
        print("\n" + write(ended, workdir))
    if error:
        raise error


def check_unused(workdir: Path) -> None:
    """Raise UserError if the folder holds a run or a sweep of its own."""
    for name, kind in (("config.json", "a run"), ("sweep.json", "a sweep")):
        if (workdir / name).exists():
            message = f"{workdir} holds {kind} without --seeds and --folds: choose another --workdir"
            raise UserError(message, field="--workdir", path=workdir)


def write(of: list[Repeat], workdir: Path) -> str:
    """Write the table and the page; return the summary as text."""
    runs = [read_runs.read_run(results.chosen_dir(workdir / repeat.name)) for repeat in of]
    tested = [run.result or {} for run in runs]
    fields = repeats.metrics_of(tested)
    rows = [["seed", "fold", "trial", "method", "learning_rate", "subset", "num_samples", *fields]]
    for repeat, run in zip(of, runs):
        for subset, scores in read_fields.comparable_subsets(run.result or {"subsets": {}}).items():
            facts = [repeat.seed, repeat.fold if repeat.folds else "", int(run.folder.name), run.method]
            rows.append([*facts, run.config["learning_rate"], subset, scores["num_samples"], *map(scores.get, fields)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    results.write_text(workdir / f"{FILE}.csv", text.getvalue())
    title = f"{task_name(runs[0].task)} with {_methods(runs)}, {repeats.words(tested)}"
    results.write_text(workdir / f"{FILE}.html", _page(title, of, runs, tested))
    lines = [title, *dict.fromkeys(run.pairing_note for run in runs if run.pairing_note)]
    for subset, by_metric in repeats.summary(tested).items():
        numbers = (f"{repeats.TITLES[name]} {found.text()}" for name, found in by_metric.items())
        lines.append(f"  {repeats.SUBSET_WORDS[subset]:<14}{'  '.join(numbers)}")
    return "\n".join([*lines, f"written: {workdir / FILE}.csv, {workdir / FILE}.html"])


def _methods(runs: list[read_runs.Run]) -> str:
    """Return the methods of the chosen trials: several, if the sweeps search the method."""
    return " or ".join(dict.fromkeys(method_name(run.method) for run in runs))


def _page(title: str, of: list[Repeat], runs: list[read_runs.Run], tested: list[dict]) -> str:
    head = "".join(f'<th scope="col">{text}</th>' for text in ("Sweep", "Chosen"))
    fields = repeats.metrics_of(tested)
    titles = (f"Test {wording.unit(runs[0].task)}", *(repeats.TITLES[name] for name in fields))
    head += "".join(f'<th scope="col" class="num">{text}</th>' for text in titles)
    body = ""
    for repeat, run in zip(of, runs):
        scores, trial = run.scores(), int(run.folder.name)
        shown = [number(scores.get("num_samples"), 0), *(number(scores.get(name)) for name in fields)]
        cells = "".join(f'<td class="num">{text}</td>' for text in shown)
        link = f'<a href="{escape(repeat.name)}/sweep.html">{escape(repeat.name)}</a>'
        body += f'<tr><th scope="row">{link}</th><td>trial {trial}</td>{cells}</tr>'
    content = (
        f"<header><h1>{escape(title)}</h1>{notices.of_data(runs)}</header>"
        f"<section><h2>Mean and spread</h2>{repeats.table([(_methods(runs), tested)])}</section>"
        f"<section><h2>Each sweep</h2>{html.table(head, body, 'The chosen trial of each sweep')}</section>"
    )
    return html.document(title, content, style.CSS)
