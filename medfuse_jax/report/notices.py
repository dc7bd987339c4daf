"""What pages and printed tables say of the data behind their numbers. Never imports jax. Text from files is escaped."""

from html import escape

from medfuse_jax.report import html
from medfuse_jax.report.read_runs import Run, section
from medfuse_jax.runs import builds


def of_data(runs: list[Run]) -> str:
    """Return what a page says of its runs' data: synthetic patients, X-rays from after the window."""
    synthetic = html.synthetic_notice(sum(run.is_synthetic for run in runs), len(runs))
    marked = [note for run in runs if (note := run.pairing_note)]
    return synthetic + html.pairing_notice(len(marked), len(runs), "".join(marked[:1]))


def of_other_data(runs: list[Run]) -> str:
    """Return a notice on the runs of a task's tables whose data differ; '' if none do."""
    items = "".join(f"<li>{escape(sentence)}.</li>" for sentence in other_data(runs))
    return f'<div class="notice"><strong>Runs of different data.</strong><ul>{items}</ul></div>' if items else ""


def other_data(runs: list[Run]) -> list[str]:
    """Return sentences on the scored runs of one task whose data differ, and on ensembles of such runs."""
    scored = [run for run in runs if run.result]
    found = builds.differing([(run.name, builds.of(run.result or {}, run.data)) for run in scored])
    for run in scored:
        of_members = section(run.result or {}, "data").get("other_data")
        found += [f"{run.name}: {sentence}" for sentence in of_members] if isinstance(of_members, list) else []
    return found
