"""Results as a table for the terminal. Never imports jax or matplotlib."""

import textwrap

from medfuse_jax.report import notices, read_fields, wording
from medfuse_jax.report.read_fields import SUBSETS, pair, section
from medfuse_jax.report.wording import OUTSIDE_ITS_CI, number
from medfuse_jax.runs import builds

_WIDTH = 100
_METRICS = ("AUROC", "AUPRC")
_SUBSET_NAMES = {
    "all": "all",
    "paired": "with X-ray",
    "unpaired": "no X-ray",
    "cxr_only": "X-ray only",
    "had_both": "had both",
}


def table(results: list[dict], names: list[str] | None = None) -> str:
    """Format results (contents of result.json files) in lines of at most 100 columns, one block per task.

    names: one per result; by default its method and fold, which is ambiguous if two runs share a method.
    """
    names = names or [wording.title(result) + wording.of_fold(result) for result in results]
    blocks = {}
    for name, result in zip(names, results):
        blocks.setdefault(str(result.get("task")), []).append((name, result))
    return "\n\n".join(_block(task, named) for task, named in blocks.items())


def _block(task: str, named: list[tuple[str, dict]]) -> str:
    results = [(name, result, read_fields.comparable_subsets(result)) for name, result in named]
    split = named[0][1].get("split", "test")
    lines = [f"{wording.task_name(task)}, {split} split"]
    if any(section(result, "data").get("synthetic") for _, result in named):
        lines.append("synthetic patients: says nothing about real ones")
    lines += _pairing_lines([(name, section(result, "data")) for name, result in named])
    rows: list[tuple[str, ...]] = [("method", wording.unit(task), "", "AUROC [95 % CI]", "AUPRC [95 % CI]")]
    for subset in SUBSETS:
        for name, _, subsets in results:
            if scores := subsets.get(subset):
                rows.append((name, _SUBSET_NAMES[subset], str(scores.get("num_samples", "")), *_values(scores)))
    differences = [
        (f"{name} − {wording.against(result, scores)}", _SUBSET_NAMES[scores["subset"]], "", *_values(scores, True))
        for name, result in named
        for scores in read_fields.comparisons(result)
    ]
    if differences:
        rows += [("difference, paired bootstrap", "", "", "", ""), *differences]
    lines += _align(rows)
    for name, _, subsets in results:
        if words := wording.ordinal(subsets.get("all", {})):
            lines += textwrap.wrap(f"{name}: {words}", _WIDTH)
    resampled = wording.resampled([result for _, result in named], wording.unit(task), split)
    lines += textwrap.wrap(f"CI: bootstrap resamples of {resampled}", _WIDTH)
    for sentence in notices.one_class([result for _, result in named]):
        lines += textwrap.wrap(sentence, _WIDTH)
    if any(read_fields.is_outside_its_ci(scores) for *_, subsets in results for scores in subsets.values()):
        lines += textwrap.wrap(OUTSIDE_ITS_CI, _WIDTH)
    return "\n".join(lines)


def _pairing_lines(named: list[tuple[str, dict]]) -> list[str]:
    """Say which results are of unusually paired data. named: (name, what `builds.note` reads)."""
    marked = [(name, note) for name, described in named if (note := builds.note(described))]
    if not marked:
        return []
    whose = f"{', '.join(name for name, _ in marked)}: " if len(marked) < len(named) else ""
    return textwrap.wrap(whose + marked[0][1], _WIDTH)


def differences(compared: dict) -> str:
    """Format what `medfuse_jax.compare` found in lines of at most 100 columns: means by subset, then each label."""
    a, b = (compared[name]["run"] for name in ("a", "b"))
    task, split = compared["task"], compared["split"]
    rows: list[tuple[str, ...]] = [("b − a", wording.unit(task), "n/pos.", *[f"{n} [95 % CI] p" for n in _METRICS])]
    for part in compared["differences"]:
        rows.append(("mean", _SUBSET_NAMES[part["subset"]], str(part["num_samples"]), *_values_p(part, "_macro")))
    whole = next((part for part in compared["differences"] if part["subset"] == "all"), {})
    if len(compared["labels"]) > 1:
        columns = ("auroc", "auprc", *(f"{name}_{of}" for name in ("auroc", "auprc") for of in ("ci", "p")))
        for k, label in enumerate(compared["labels"]):
            scores = {name: whole[name][k] for name in columns}
            rows.append((label, "", str(whole["num_positive"][k]), *_values_p(scores, "")))
    ordered = [(_SUBSET_NAMES[part["subset"]], wording.ordinal(part, sign=True)) for part in compared["differences"]]
    resampled = wording.resampled([compared], wording.unit(task), split)
    notes = f"Paired bootstrap: the same resamples of {resampled} for both; p two-sided, for one comparison."
    lines = [f"{wording.task_name(task)}, {split} split", f"a: {a}", f"b: {b}"]
    lines += [*_pairing_lines([("a", compared["a"]), ("b", compared["b"])]), *_align(rows)]
    lines += [line for subset, words in ordered if words for line in textwrap.wrap(f"{subset}: {words}", _WIDTH)]
    return "\n".join([*lines, *textwrap.wrap(notes, _WIDTH)])


def _values_p(scores: dict, of: str) -> list[str]:
    """Format differences of AUROC and AUPRC with their intervals and p-values. of: '_macro' or ''."""
    values = []
    for name in ("auroc", "auprc"):
        low, high = pair(scores[f"{name}{of}_ci"])
        ends = f"[{number(low, 3, True)}, {number(high, 3, True)}]"
        values.append(f"{number(scores[f'{name}{of}'], 3, True)} {ends} {number(scores[f'{name}{of}_p'], 3)}")
    return values


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """Align rows in columns. A name too long for its column goes on its own line above the rest of its row."""
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    widths[0] = min(widths[0], _WIDTH - sum(widths[1:]) - 2 * 4)
    lines = []
    for name, subset, count, auroc, auprc in rows:
        if len(name) > widths[0]:
            lines.append(name if len(name) <= _WIDTH else name[: _WIDTH - 1] + "…")
            name = ""
        columns = f"{name:<{widths[0]}}  {subset:<{widths[1]}}  {count:>{widths[2]}}  {auroc:<{widths[3]}}  {auprc}"
        lines.append(columns.rstrip())
    return lines


def _values(scores: dict, sign: bool = False) -> list[str]:
    """Format AUROC and AUPRC with their intervals."""
    values = []
    for name in ("auroc_macro", "auprc_macro"):
        low, high = pair(scores.get(f"{name}_ci"))
        values.append(f"{number(scores.get(name), 3, sign)} [{number(low, 3, sign)}, {number(high, 3, sign)}]")
    return values
