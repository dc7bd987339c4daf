"""Tables 1 to 5 and A1 to A3 of Hayat et al. 2022, from the results of its tasks."""

import itertools
import math
from collections.abc import Iterable

import numpy as np

from medfuse_jax import schema
from medfuse_jax.paper import published, scores
from medfuse_jax.paper.cells import (
    BOTH,
    BOTH_HEADS,
    DIFFERENCE_HEADS,
    KINDS,
    METRICS,
    ON_PAIRED,
    TASK_NAMES,
    Maker,
    Table,
    Value,
    macro_differences,
    macro_values,
)
from medfuse_jax.paper.scores import Scores, TaskResults, auroc
from medfuse_jax.report import withheld
from medfuse_jax.runs import subgroups

OPT_TITLE = "MedFuse (OPTIMAL)"
_TABLE_2 = ("M1", "M2", "M3", "M4", "M5", "M6", "M7", "M8", "M9")
_TABLE_3 = ("M2", "M4", "M9")
_TABLE_A1 = ("E2", "E1", "M2", "M1", "M4", "M3", "M5", "M6", "M7", "M8", "M9")
_TABLE_A2 = ("A2_joint_zeros", "A2_joint_learnt", "A2_early_zeros", "A2_early_learnt")


def table_1(make: Maker) -> Table:
    rows = (
        ("lstm_paired", "LSTM", "EHR, paired", "paired", "E2"),
        ("lstm_partial", "LSTM", "EHR, partial", "paired", "E1"),
        ("medfuse_ehr", f"{OPT_TITLE}, no X-ray", "partial", "dropped", "OPT"),
        ("medfuse", OPT_TITLE, "partial", "paired", "OPT"),
        ("lstm_all", "LSTM", "EHR, partial", "all", "E1"),
        ("medfuse_all", OPT_TITLE, "partial", "all", "OPT"),
    )
    body = []
    for row, name, trained, on, id in rows:
        shown = "paired" if on == "dropped" else on
        if cells := make.row(make.test(id, on), "table1", row):
            body.append([name, trained, shown, *cells])
        if cells := make.row(_chosen_on_paired(make, id, on), "table1", row):
            body.append([f"{name}, {ON_PAIRED}", trained, shown, *cells])
    for on in ("paired", "all"):
        if cells := make.differences(make.test("OPT", on), make.test("E1", on)):
            body.append([f"{OPT_TITLE} − LSTM", "partial", on, *cells])
    notes = make.missing() + make.gaps("paired", "all") + _shares(make) + _by_loss(make, ("E2", "E1", "OPT"))
    title = "Table 1. One modality and two, on the test stays with an X-ray (paired) and on all"
    return Table("table_1", title, ["Model", "Training set", "Test set", *make.heads()], body, notes)


def table_2(make: Maker) -> Table:
    title = "Table 2. All methods on the test stays with an X-ray"
    return _methods(make, "table_2", title, _TABLE_2, "paired")


def table_3(make: Maker) -> Table:
    title = "Table 3. Methods trained on all stays, on all test stays"
    return _methods(make, "table_3", title, _TABLE_3, "all")


def _methods(make: Maker, name: str, title: str, ids: tuple[str, ...], on: str) -> Table:
    """Return one row per method, MedFuse (OPTIMAL) under both choices, and the differences from it."""
    paper, body, differences = name.replace("_", ""), [], []
    optimal = make.test("OPT", on)
    for id in ids:
        of_tasks = make.test(id, on)
        if cells := make.row(of_tasks, paper, id):
            body.append([make.title(id), *cells])
        if cells := make.row(_chosen_on_paired(make, id, on), paper, id):
            body.append([f"{make.title(id)}, {ON_PAIRED}", *cells])
        if cells := make.differences(optimal, of_tasks):
            differences.append([f"{OPT_TITLE} − {make.title(id)}", *cells])
    if cells := make.row(optimal, paper, "OPT"):
        body.append([OPT_TITLE, *cells])
    if cells := make.row(_chosen_on_paired(make, "OPT", on), paper, "OPT"):
        body.append([f"{OPT_TITLE}, {ON_PAIRED}", *cells])
    notes = make.missing() + make.gaps(on) + _shares(make) + _by_loss(make, (*ids, "OPT"))
    return Table(name, title, ["Method", *make.heads()], body + differences, notes)


def _shares(make: Maker) -> list[str]:
    """Return notes on how MedFuse (OPTIMAL) was chosen."""
    return [
        f"{TASK_NAMES[r.task]}: {OPT_TITLE} trained with {r.models[id].choice}."
        for r in make.tasks
        for id in ("OPT", "OPT_paired")
        if id in r.models
    ]


def _chosen_on_paired(make: Maker, id: str, on: str) -> list[Scores | None]:
    """Return the test scores of the runs that the validation stays with an X-ray choose, where they are others."""
    tested = make.test(f"{id}_paired", on)
    return [test if test and _differs(r, id) else None for r, test in zip(make.tasks, tested)]


def _differs(r: TaskResults, id: str) -> bool:
    return id in r.models and r.models[f"{id}_paired"].folder != r.models[id].folder


def table_4(make: Maker) -> Table:
    title = "Table 4. Each phenotype on the test stays with an X-ray: LSTM (partial) and MedFuse (OPTIMAL)"
    head = ["Phenotype", "Type", "Prevalence, train", "Prevalence, test", *BOTH_HEADS, "MedFuse is better in"]
    head += DIFFERENCE_HEADS
    notes = make.gaps("paired", tasks=("pheno",)) + make.by_loss("E1", "OPT", tasks=("pheno",))
    table, found = Table("table_4", title, head, [], notes), make.both("pheno")
    if found is None:
        return table
    r, tested = found
    both = [make.evaluation.metrics(part) for part in tested]
    table.notes.append(f"The p-values are not corrected for {len(r.labels)} comparisons.")
    change = make.evaluation.difference(tested[1], tested[0])
    in_test = scores.prevalence(tested[0].labels)
    if np.isnan([r.train_prevalence, in_test]).any():
        why = f"fewer than {schema.FEWEST_SHOWN} stays have, or lack, the label"
        table.notes.append(f"A prevalence is withheld where {why}.")

    def paper(row: str, metric: str) -> published.Number | None:
        return published.number("table4", "pheno", row, metric)

    for k, label in enumerate(r.labels):
        prevalence = [
            Value(float(r.train_prevalence[k]), paper=paper(label, "prevalence_train")),
            Value(float(in_test[k]), paper=paper(label, "prevalence_test")),
        ]
        values = [
            Value(float(of[m][k]), of[f"{m}_ci"][k], paper(label, f"{m}_{name}"))
            for of, name in zip(both, BOTH)
            for m in METRICS
        ]
        changes = [Value(change[m][k], change[f"{m}_ci"][k], p=change[f"{m}_p"][k], is_change=True) for m in METRICS]
        table.rows.append([label, KINDS.get(label, ""), *prevalence, *values, _better(values), *changes])
    means = [v for of, name in zip(both, BOTH) for v in macro_values(of, ("table4", "pheno", "Average"), f"_{name}")]
    table.rows.append(["Average", "", "", "", *means, _better(means), *macro_differences(change)])
    return table


def _better(values: list[Value]) -> str:
    """Return the metrics in which the second model is better. values: the first model's, then the second's."""
    return ", ".join(m.upper() for m, a, b in zip(METRICS, values[:2], values[2:]) if b.ours > a.ours)


def table_5(make: Maker) -> Table:
    title = "Table 5. Mortality by age, on the test stays with an X-ray: LSTM (partial) and MedFuse (OPTIMAL)"
    notes = make.gaps("paired", tasks=("mortality",)) + make.by_loss("E1", "OPT", tasks=("mortality",))
    head = ["Age", "Deaths / stays", *BOTH_HEADS, *DIFFERENCE_HEADS]
    table, found = Table("table_5", title, head, [], notes), make.both("mortality")
    if found is None:
        return table
    _, tested = found
    groups = [[part.part((part.age >= low) & (part.age < high)) for part in tested] for low, high in schema.AGE_GROUPS]
    withheld = []
    for (low, high), parts, counts in zip(schema.AGE_GROUPS, groups, _deaths([lstm for lstm, _ in groups])):
        name = f"{low}-{high}" if math.isfinite(high) else f"> {low}"
        if subgroups.is_small({"labels": parts[0].labels}):
            withheld.append(name)
            parts = [part.part(np.zeros(len(part.stay_id), bool)) for part in parts]
        was = [published.number("table5", "mortality", name, what) for what in ("deaths", "stays")]
        paper = f" (paper {was[0].value:.0f} / {was[1].value:.0f})" if was[0] and was[1] else ""
        table.rows.append([name, counts + paper, *make.macros_of_both(parts, ("table5", "mortality", name))])
    if withheld:
        few = f"fewer than {schema.FEWEST_SHOWN} died or survived"
        table.notes.append(f"Age {', '.join(withheld)}: {few}, so the numbers are withheld.")
    return table


def _deaths(groups: list[Scores]) -> list[str]:
    """Return each group's deaths and stays as text; no count of deaths or survivors below 10 can be told from them."""
    deaths, stays = [int(of.labels.sum()) for of in groups], [len(of.labels) for of in groups]
    if all(n - died >= schema.FEWEST_SHOWN for n, died in zip(stays, deaths)):
        deaths_shown = withheld.cells({str(k): died for k, died in enumerate(deaths)}).values()
        return [f"{died} / {n}" for died, n in zip(deaths_shown, stays)]
    few, enough = withheld.FEW, withheld.ENOUGH
    coarse = [[few if n < schema.FEWEST_SHOWN else enough for n in counts] for counts in (deaths, stays)]
    return [f"{died} / {n}" for died, n in zip(*coarse)]


def table_a1(make: Maker) -> Table:
    title = "Table A1. Learning rates, and the validation AUROC that they reached"
    head, body = ["Training"], []
    for r in make.tasks:
        columns = ("learning rate", "validation AUROC, all stays", "validation AUROC, paired stays")
        head += [f"{TASK_NAMES[r.task]}, {column}" for column in columns]
    for id in itertools.chain.from_iterable((first, f"{first}_paired") for first in _TABLE_A1):
        cells = []
        for r in make.tasks:
            if model := r.models.get(id):
                paper = published.number("table_a1", r.task, id.removesuffix("_paired"), "rate")
                rate = Value(model.rate, paper=paper, digits=None)
                cells += [rate, Value(auroc(model.val)), Value(auroc(model.val.paired))]
            else:
                cells += [""] * 3
        if any(cells):
            also = f", {ON_PAIRED}" if id.endswith("_paired") else ""
            body.append([make.title(id) + also, *cells])
    notes = ["Each model is chosen on the kind of validation stays that it is trained on, paired or all (partial)."]
    if any(id.endswith("_paired") for r in make.tasks for id in r.models):
        notes.append(f"A rate searched on all stays is also {ON_PAIRED}, as the released code does.")
    return Table("table_a1", title, head, body, notes + _by_loss(make, _TABLE_A1))


def _by_loss(make: Maker, ids: Iterable[str]) -> list[str]:
    """Return the notes of `Maker.by_loss` on these models, each under both choices."""
    return make.by_loss(*(f"{id}{choice}" for id in ids for choice in ("", "_paired")))


def table_a2(make: Maker) -> Table:
    title = "Table A2. A missing X-ray as zeros or as a learnt vector, on all test stays; learning rate 1e-4"
    body = []
    for id in _TABLE_A2:
        if cells := make.row(make.test(id, "all"), "table_a2", id):
            body.append([make.title(id), *cells])
    for kind in ("joint", "early"):
        learnt, zeros = (make.test(f"A2_{kind}_{vector}", "all") for vector in ("learnt", "zeros"))
        if cells := make.differences(learnt, zeros):
            body.append([f"{kind.title()}, learnt vector − zeros", *cells])
    return Table("table_a2", title, ["Method", *make.heads()], body, make.gaps("all") + _by_loss(make, _TABLE_A2))


def table_a3(make: Maker) -> Table:
    optimal, lstm = make.test("OPT", "all"), make.test("E1", "all")
    ensemble = [a and b and scores.combine(b, a, a.has_cxr) for a, b in zip(optimal, lstm)]
    body = []
    for row, name, of_tasks in (("ensemble", "Ensemble", ensemble), ("OPT", OPT_TITLE, optimal)):
        if cells := make.row(of_tasks, "table_a3", row):
            body.append([name, *cells])
    if cells := make.differences(optimal, ensemble):
        body.append([f"{OPT_TITLE} − Ensemble", *cells])
    notes = ["The ensemble takes MedFuse's score where there is an X-ray and the LSTM's where there is none."]
    notes += make.gaps("all") + make.by_loss("E1", "OPT")
    title = f"Table A3. {OPT_TITLE} and an ensemble, on all test stays"
    return Table("table_a3", title, ["Model", *make.heads()], body, notes)
