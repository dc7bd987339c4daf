"""What pages and printed tables say of the data behind their numbers. Never imports jax. Text from files is escaped."""

from html import escape

from medfuse_jax import schema
from medfuse_jax.report import html, read_fields, wording
from medfuse_jax.report.read_fields import section
from medfuse_jax.report.read_runs import Run
from medfuse_jax.runs import builds

SUBSET_TITLES = {
    "all": "All test {unit}",
    "paired": "Test {unit} with an X-ray",
    "unpaired": "Test {unit} without an X-ray",
    "cxr_only": "Test X-rays without time series",
    "had_both": "Test {unit} with time series and X-ray before one was dropped",
}


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


def one_class(results: list[dict]) -> list[str]:
    """Return a sentence on each test set, or part of one, that has no AUROC because no label has both classes."""
    found = []
    for result in results:
        for subset, scores in read_fields.comparable_subsets(result).items():
            if why := _lacks(scores):
                title = SUBSET_TITLES[subset].format(unit=wording.unit(str(result.get("task"))))
                split = str(result.get("split", "test"))
                title = title.replace("test", split).replace("Test", split.capitalize())
                found.append(f"{title}: {why}, so there is no AUROC and no AUPRC.")
                if subset == "all":
                    break  # its parts have no more classes
    return list(dict.fromkeys(found))


def _lacks(scores: dict) -> str:
    """Return which class is missing, in words; '' if a label has both. Of few records it does not say which."""
    count, positives = scores.get("num_samples"), scores.get("num_positive")
    if not count or positives is None or any(p is None or 0 < p < count for p in positives):
        return ""
    if count < schema.FEWEST_SHOWN:
        return f"fewer than {schema.FEWEST_SHOWN}, and no label has both classes"
    if len(positives) > 1:
        return f"no label has both classes among {count:,}"
    return f"none of {count:,} is {'negative' if positives[0] else 'positive'}"
