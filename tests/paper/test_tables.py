"""The tables: their numbers, the paper's beside them, the self-checks, and every format."""

import csv
import dataclasses
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from example_runs import simulate

from medfuse_jax import metrics, schema
from medfuse_jax.paper import contents, figures, formats, page, published, scores, tables, trainings
from medfuse_jax.paper.cells import Maker, Table, Value
from medfuse_jax.paper.scores import Evaluation, Model, Scores, TaskResults
from medfuse_jax.paper.trainings import Settings

_COUNTS = {"pheno": {"train": (42_628, 8_056)}, "mortality": {"test": (5_243, 1_373)}}


def _scores(data, weight_cxr, rng) -> Scores:
    num_stays = len(data["age"])
    shown = np.where(data["has_cxr"][:, None], data["cxr"], 0)
    values = data["ehr"] + weight_cxr * shown + 0.2 * rng.normal(size=shown.shape)
    ids = np.arange(num_stays)
    return Scores(ids, ids // 2, data["labels"].astype(int), values, data["has_cxr"], data["age"])


def _task(task: str, seed: int) -> TaskResults:
    rng = np.random.default_rng(1)
    data = simulate(task, 400, seed)
    results = TaskResults(task, list(schema.TASKS[task].labels), scores.prevalence(data["labels"]))
    for t in trainings.plan([task], trainings.METHODS, Settings()):
        weight = 0.0 if t.id.startswith("E") else 0.5
        test = _scores(data, weight, rng)
        results.models[t.id] = Model(t.id, t.title, Path(t.id), 1e-4, test, test)
    for id in ("M5", "M6"):
        results.models[id] = results.models[f"{id}_3"]
    without = _scores(data | {"cxr": np.zeros_like(data["cxr"])}, 0.5, rng)
    test = results.models["OPT"].test
    dropped = scores.combine(test, without, test.has_cxr)
    opt = dataclasses.replace(results.models["OPT"], choice="20 % of the EHR-only stays", without_cxr=dropped)
    results.models |= {"OPT": opt, "OPT_paired": dataclasses.replace(opt, folder=Path("other"))}
    results.opt_by_share = {share: opt.test for share in (0.0, 0.1, 1.0)}
    return results


@pytest.fixture(scope="module")
def tasks():
    return [_task("pheno", 3), _task("mortality", 4)]


@pytest.fixture(scope="module")
def made(tasks):
    return contents.make_all(Maker(tasks, Evaluation(num_bootstrap=20)), _COUNTS)


def _row(table: Table, *texts: str) -> list:
    return next(row for row in table.rows if tuple(row[: len(texts)]) == texts)


def test_every_table_is_made_and_all_self_checks_hold(made):
    all_tables, checks = made
    names = "figure_1 table_1 table_2 table_3 table_4 figure_4 table_5 table_a1 figure_a1 figure_a2 figure_a3"
    assert [t.name for t in all_tables] == [*names.split(), "table_a2", "table_a3"]
    assert len(checks) == 4 * 4 + 4 and all(check.holds for check in checks)
    assert all(len(row) == len(table.head) for table in all_tables for row in table.rows)


def test_numbers_are_those_of_the_metrics_and_the_paper(made, tasks):
    by_name = {t.name: t for t in made[0]}
    paired = tasks[0].models["M3"].test.paired
    expected = metrics.evaluate(paired.labels, paired.scores, 20, 0, paired.subject_id)
    value = _row(by_name["table_2"], "Joint (paired)")[1]
    assert value.ours == expected["auroc_macro"] and tuple(value.ci) == tuple(expected["auroc_macro_ci"])
    assert value.paper == (0.747, 0.720, 0.773)
    death = _row(by_name["table_5"], "18-40")
    stays = tasks[1].models["E1"].test.paired
    young = stays.part(stays.age < 40)
    assert death[1] == f"{young.labels.sum()} / {len(young.labels)} (paper 11 / 141)"
    assert _row(by_name["table_a1"], "Unified")[1].paper.value == 2.042e-4
    assert _row(by_name["figure_1"], "Phenotyping, train")[2].paper.value == 42_628


def test_differences_are_paired_and_favour_the_better_model(made):
    table = next(t for t in made[0] if t.name == "table_1")
    difference = _row(table, f"{tables.OPT_TITLE} − LSTM", "partial", "paired")[3]
    ours, lstm = (_row(table, name, of, "paired")[3].ours for name, of in _OPT_AND_LSTM)
    assert difference.ours == pytest.approx(ours - lstm) and difference.low > 0 and difference.p < 0.1


def test_tables_of_two_models_have_their_paired_differences(made, tasks):
    by_name = {t.name: t for t in made[0]}
    lstm, optimal = (tasks[0].models[id].test.paired for id in ("E1", "OPT"))
    expected = metrics.compare(lstm.labels, lstm.scores, optimal.scores, 20, 0, lstm.subject_id)
    label = _row(by_name["table_4"], tasks[0].labels[3])[-2]
    assert (label.ours, *label.ci, label.p) == (expected["auroc"][3], *expected["auroc_ci"][3], expected["auroc_p"][3])
    mean = _row(by_name["table_4"], "Average")[-1]
    assert mean.ours == expected["auprc_macro"] and tuple(mean.ci) == tuple(expected["auprc_macro_ci"])
    of_table_1 = _row(by_name["table_1"], f"{tables.OPT_TITLE} − LSTM", "partial", "paired")[4]
    assert (mean.ours, mean.p) == (of_table_1.ours, of_table_1.p)
    for name in ("table_4", "table_5", "figure_4"):
        table = by_name[name]
        assert table.head[-2:] == ["MedFuse − LSTM, AUROC", "MedFuse − LSTM, AUPRC"]
        columns = [table.head.index(f"{model}, AUROC") for model in ("LSTM", "MedFuse")]
        for row in table.rows:
            before, after = (row[column].ours for column in columns)
            assert row[-2].is_change and row[-2].ours == pytest.approx(after - before, nan_ok=True)


@pytest.mark.parametrize(
    ("table", "name", "first", "second"),
    [
        ("table_a2", "Joint, learnt vector − zeros", "Joint, learnt vector", "Joint, zeros"),
        ("table_a2", "Early, learnt vector − zeros", "Early, learnt vector", "Early, zeros"),
        ("table_a3", f"{tables.OPT_TITLE} − Ensemble", tables.OPT_TITLE, "Ensemble"),
    ],
)
def test_the_appendix_has_paired_differences(made, table, name, first, second):
    of = next(t for t in made[0] if t.name == table)
    for difference, a, b in zip(_row(of, name)[1:], _row(of, first)[1:], _row(of, second)[1:]):
        assert difference.is_change and difference.ours == pytest.approx(a.ours - b.ours)
        assert difference.low <= difference.high and 0 < difference.p <= 1


_OPT_AND_LSTM = ((tables.OPT_TITLE, "partial"), ("LSTM", "EHR, partial"))


def test_a_larger_share_of_dropped_x_rays_includes_a_smaller_one():
    ids = np.arange(5000)
    masks = [scores.drawn(ids, share) for share in (0.0, 0.3, 0.6, 1.0)]
    assert [mask.mean() for mask in masks] == pytest.approx([0, 0.3, 0.6, 1], abs=0.02)
    assert all((small <= large).all() for small, large in itertools.pairwise(masks))


def test_numbers_that_should_be_equal_and_are_not_are_named(tasks, tmp_path):
    """One number of Table 2 is changed."""
    made, _ = contents.make_all(Maker(tasks, Evaluation(num_bootstrap=2)), _COUNTS)
    row = _row(next(t for t in made if t.name == "table_2"), tables.OPT_TITLE)
    row[1] = dataclasses.replace(row[1], ours=row[1].ours + 1e-6)
    wrong = [c for c in contents._checks({t.name: t for t in made}, Maker(tasks, Evaluation()).heads()) if not c.holds]
    assert {c.what.partition(",")[0] for c in wrong} == {"Figure A2 at 0 % and Table 2", "Figure A3 at 0 % and Table 2"}
    assert contents.describe_checks([*wrong, contents.Check("", 1, 1)]) == f"1 of {len(wrong) + 1} self-checks hold"
    text = page.write(tmp_path, made, wrong, {}, [], synthetic=True).read_text()
    assert "These should be equal" in text and "Figure A3 at 0 %" in text


def test_the_self_checks_hold_whatever_task_is_first(tasks):
    """Table 4's means were compared with Table 1's first task, which is mortality for --tasks=mortality,pheno."""
    _, checks = contents.make_all(Maker(tasks[::-1], Evaluation(num_bootstrap=2)), {})
    assert len(checks) == 4 * 4 + 4 and all(check.holds for check in checks)


def test_a_self_check_compares_the_numbers_of_one_task(tasks):
    """Phenotyping has no scores without X-rays: the check of Figure A2 is made for mortality, and called so."""
    opt = dataclasses.replace(tasks[0].models["OPT"], without_cxr=None)
    without = dataclasses.replace(tasks[0], models=tasks[0].models | {"OPT": opt})
    _, checks = contents.make_all(Maker([without, tasks[1]], Evaluation(num_bootstrap=2)), {})
    assert all(check.holds for check in checks)
    about = [check.what.partition(", ")[2] for check in checks if check.what.startswith("Figure A2 at 0 %")]
    assert about == ["Mortality, AUROC", "Mortality, AUPRC"]


def test_a_missing_model_leaves_out_its_row_and_is_named(tasks):
    r = dataclasses.replace(tasks[1], models={k: v for k, v in tasks[1].models.items() if not k.startswith("M5")})
    r.missing["M5_3"] = "the disk is full"
    table = tables.table_2(Maker([r], Evaluation(num_bootstrap=2)))
    assert not any(str(row[0]).startswith("MMTM") for row in table.rows)
    assert "Mortality: no M5_3 (the disk is full)." in table.notes
    without = dataclasses.replace(r, models={"E1": r.models["E1"]}, opt_by_share={})
    made, checks = contents.make_all(Maker([without], Evaluation(num_bootstrap=2)), {})
    assert {t.name for t in made} == {"table_1", "table_a1"} and not checks
    assert contents.describe_checks(checks) == "no self-check: no two tables have a number of the same thing"


def _with_test(r: TaskResults, change) -> TaskResults:
    """Return a task whose models are scored on other test stays. change: Scores -> Scores."""
    models = {
        id: dataclasses.replace(m, test=change(m.test), without_cxr=m.without_cxr and change(m.without_cxr))
        for id, m in r.models.items()
    }
    return dataclasses.replace(r, models=models)


def test_no_test_stay_with_an_x_ray_is_named_and_the_rest_goes_on(tasks, tmp_path):
    """One task has no such stay: its cells are dashes, and the other task keeps its numbers."""
    empty = _with_test(tasks[0], lambda of: of.part(~of.has_cxr))
    made, checks = contents.make_all(Maker([empty, tasks[1]], Evaluation(num_bootstrap=2)), _COUNTS)
    assert all(check.holds for check in checks)
    assert len(checks) == 2 * 4 + 2  # dashes are not compared: mortality's, and Figure A3 at 100 %
    by_name = {t.name: t for t in made}
    note = "Phenotyping: no test stay has an X-ray."
    assert [t.name for t in made if note in t.notes] == _ON_PAIRED
    of_pheno, _, of_mortality, _ = _row(by_name["table_2"], tables.OPT_TITLE)[1:]
    assert formats.text(of_pheno) == "–" and of_pheno.paper and of_mortality.ours > 0.5
    assert formats.text(_row(by_name["table_4"], "Average")[4]) == "–"
    assert math.isfinite(_row(by_name["table_3"], tables.OPT_TITLE)[1].ours)  # all stays
    ((_, drawn),) = figures.charts(by_name["figure_a2"])
    assert "Mortality" in drawn and "Phenotyping" not in drawn
    page.write(tmp_path, made, checks, {}, [], synthetic=True)


def test_no_test_stay_with_an_x_ray_of_mortality_leaves_dashes_by_age(tasks):
    empty = _with_test(tasks[1], lambda of: of.part(~of.has_cxr))
    made, _ = contents.make_all(Maker([empty], Evaluation(num_bootstrap=2)), {})
    by_name = {t.name: t for t in made}
    assert [formats.text(row[2]) for row in by_name["table_5"].rows] == ["–"] * 4
    assert figures.charts(by_name["figure_a2"]) == []


def test_labels_of_one_class_in_the_test_set_are_named(tasks):
    """Mortality has no death among all test stays; two phenotypes are always there among those with an X-ray."""

    def no_death(of: Scores) -> Scores:
        return dataclasses.replace(of, labels=np.zeros_like(of.labels))

    def two_constant(of: Scores) -> Scores:
        is_set = of.has_cxr[:, None] & (np.arange(of.labels.shape[1]) < 2)
        return dataclasses.replace(of, labels=np.where(is_set, 1, of.labels))

    make = Maker([_with_test(tasks[0], two_constant), _with_test(tasks[1], no_death)], Evaluation(num_bootstrap=2))
    paired, every = tables.table_2(make).notes, tables.table_3(make).notes
    left_out = "the means leave out 2 of 25 labels: one class only among the test stays with an X-ray."
    assert f"Phenotyping: {left_out}" in paired
    for notes, stays in ((paired, "test stays with an X-ray"), (every, "test stays")):
        assert f"Mortality: no label of the {stays} has both classes, so there is no AUROC or AUPRC." in notes
    assert not any(note.startswith("Phenotyping") and "class" in note for note in every)
    assert set(tables.table_1(make).notes) >= {note for note in paired + every if "class" in note}


_ON_PAIRED = ["table_1", "table_2", "table_4", "figure_4", "figure_a2", "figure_a3"]


def test_table_1_has_both_choices_of_medfuse_optimal(tasks):
    """The run chosen on paired validation stays is another one, with other scores."""
    e1, opt = tasks[0].models["E1"], tasks[0].models["OPT"]
    worse = dataclasses.replace(e1, folder=Path("other"), choice="50 % of the EHR-only stays", without_cxr=opt.test)
    r = dataclasses.replace(tasks[0], models=tasks[0].models | {"OPT_paired": worse})
    make = Maker([r], Evaluation(num_bootstrap=2))
    table, name = tables.table_1(make), f"{tables.OPT_TITLE}, chosen on paired validation stays"
    for on in ("paired", "all"):
        value = _row(table, name, "partial", on)[3]
        assert value.ours == _row(table, "LSTM", "EHR, partial", on)[3].ours
        assert value.paper is not None
        assert value.paper == _row(table, tables.OPT_TITLE, "partial", on)[3].paper
    dropped = f"{tables.OPT_TITLE}, no X-ray"
    alone = _row(table, f"{dropped}, chosen on paired validation stays", "partial", "paired")[3]
    assert alone.ours == _row(table, tables.OPT_TITLE, "partial", "paired")[3].ours  # opt.test's, as set above
    assert alone.paper and alone.paper == _row(table, dropped, "partial", "paired")[3].paper
    assert f"Phenotyping: {tables.OPT_TITLE} trained with 50 % of the EHR-only stays." in table.notes
    same = dataclasses.replace(r, models=r.models | {"OPT_paired": r.models["OPT"]})
    assert name not in [row[0] for row in tables.table_1(Maker([same], Evaluation(num_bootstrap=2))).rows]


def test_a_row_names_the_depth_of_each_task_where_they_differ(tasks):
    deeper = dataclasses.replace(tasks[1].models["M6_4"], id="M6")
    other = dataclasses.replace(tasks[1], models=tasks[1].models | {"M6": deeper})
    make = Maker([tasks[0], other], Evaluation(num_bootstrap=2))
    name = "DAFT, layer 3 (phenotyping), layer 4 (mortality)"
    for table in (tables.table_2(make), tables.table_a1(make)):
        assert [row[0] for row in table.rows if row[0].startswith("DAFT")] == [name]
        assert "MMTM, layer 3" in [row[0] for row in table.rows]
    assert any(row[0] == f"{tables.OPT_TITLE} − {name}" for row in tables.table_2(make).rows)
    assert make.title("M5") == "MMTM, layer 3" and Maker([other], Evaluation()).title("M6") == "DAFT, layer 4"


def test_counts_under_ten_are_withheld_by_age(made):
    """Of 18 patients over 80, 2 died: their deaths cannot be told from a sum either, and they have no AUROC."""
    assert not any("withheld" in note for note in next(t for t in made[0] if t.name == "table_5").notes)
    r = _task("mortality", 1)
    table = tables.table_5(Maker([r], Evaluation(num_bootstrap=2)))
    assert [row[1].partition(" (")[0] for row in table.rows] == ["≥10 / 46", "13 / 56", "14 / 45", "<10 / 18"]
    old = _row(table, "> 80")
    assert [formats.text(value) for value in old[2:]] == ["–"] * 6 and old[2].paper.value == 0.789
    assert math.isfinite(_row(table, "18-40")[2].ours)
    assert table.notes == ["Age > 80: fewer than 10 died or survived, so the numbers are withheld."]


def test_no_count_is_given_where_few_survived():
    """Of 14 patients over 80, 8 died."""
    table = tables.table_5(Maker([_task("mortality", 5)], Evaluation(num_bootstrap=2)))
    assert [row[1].partition(" (")[0] for row in table.rows] == ["≥10 / ≥10"] * 3 + ["<10 / ≥10"]


def test_figure_1_withholds_counts_under_ten():
    figure = figures.figure_1({"pheno": {"train": (60, 7), "val": (8, 3), "test": (50, 45)}})
    assert [row[2:] for row in figure.rows][1] == ["<10", "<10"]  # the paper gives none
    assert _row(figure, "Phenotyping, train")[2].ours == 60
    assert _row(figure, "Phenotyping, train")[3].startswith("<10 (paper")
    assert _row(figure, "Phenotyping, test")[3] == "≥41"


def test_table_4_withholds_the_prevalence_of_few_stays(tasks):
    def rare(of: Scores) -> Scores:
        labels = of.labels.copy()
        labels[:, 0] = np.cumsum(of.has_cxr) <= 9  # in 9 paired stays
        return dataclasses.replace(of, labels=labels)

    table = tables.table_4(Maker([_with_test(tasks[0], rare)], Evaluation(num_bootstrap=2)))
    assert formats.text(table.rows[0][3]) == "–" and math.isfinite(table.rows[0][4].ours)
    assert math.isfinite(table.rows[2][3].ours)
    assert "A prevalence is withheld where fewer than 10 stays have, or lack, the label." in table.notes
    few, many = np.zeros((100, 1), int), np.zeros((100, 1), int)
    few[:9], many[:10] = 1, 1
    assert math.isnan(scores.prevalence(few)[0]) and scores.prevalence(many)[0] == 0.1


def test_our_number_is_marked_outside_the_papers_interval_only():
    paper = published.Number(0.75, 0.72, 0.78)
    assert formats.text(Value(0.79, (0.7, 0.8), paper)) == "0.790 (0.700, 0.800)†"
    assert formats.text(Value(0.78, (0.7, 0.8), paper)) == "0.780 (0.700, 0.800)"
    assert formats.text(Value(0.9, paper=published.Number(0.75))) == "0.900"
    assert formats.text(Value(-0.01, (-0.02, 0.0), p=0.0004, is_change=True)) == "−0.010 (−0.020, +0.000), p < 0.001"
    assert formats.text(Value(math.nan)) == "–"


def test_every_format_holds_the_numbers(made, tmp_path):
    notice = "Trained in bfloat16."
    path = page.write(tmp_path, made[0], made[1], {"trainings": "293"}, [notice], synthetic=False)
    for table in made[0]:
        rows = list(csv.DictReader(io.StringIO((tmp_path / "tables" / f"{table.name}.csv").read_text())))
        assert len(rows) == len(table.rows) and all(row["notice"] == notice for row in rows)
        for suffix in ("md", "tex"):
            assert notice in (tmp_path / "tables" / f"{table.name}.{suffix}").read_text()
        for head, cell in zip(table.head, table.rows[0]):
            if isinstance(cell, Value) and not math.isnan(cell.ours):
                assert float(rows[0][head]) == pytest.approx(cell.ours, rel=1e-5)
            if isinstance(cell, Value) and cell.paper:
                assert float(rows[0][f"{head} paper"]) == cell.paper.value
    content = json.loads((tmp_path / "paper.json").read_text())
    assert content["self_checks"] == {"made": len(made[1]), "failed": []}
    assert [t["name"] for t in content["tables"]] == [t.name for t in made[0]]
    text = path.read_text()
    assert "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    assert text.count("<svg") == 5 and text.count("<table") == len(made[0])


def test_on_a_phone_a_row_is_named_in_one_cell():
    """The texts before the first number are in columns and, for phones, below the first cell."""
    change = Value(0.5, (0.1, 0.9), p=0.0123, is_change=True)
    rows = [["A", "on <all>", change, "x"], ["B", "", Value(0.25, paper=published.Number(0.5, 0.4, 0.6)), "y"]]
    text = formats.html_table(Table("t", "Title", ["name", "stays", "number", "more"], rows))
    assert text.count('class="key"') + text.count('class="key soft"') == 3  # the head and two rows, of one column
    assert text.count('<span class="keys">on &lt;all&gt;</span>') == text.count('class="keys"') == 1
    assert '+0.500 <span class="ci">(+0.100, +0.900)</span><span class="below"><span>p 0.012</span></span>' in text
    assert '0.250†<span class="below"><span>paper 0.500</span> <span>(0.400, 0.600)</span></span>' in text
    assert '<td class="num outside">' in text


def test_latex_and_markdown_escape_their_special_characters():
    table = Table(
        "t", "50 % & more_of #1", ["a|b", "c"], [["x_y > 80", Value(0.5, paper=published.Number(0.1, 0.2, 0.3))]]
    )
    latex = formats.latex(table)
    assert r"50 \% \& more\_of \#1" in latex and r"x\_y $>$ 80 & 0.500$^\dagger$ \\" in latex
    assert "| a/b | c |" in formats.markdown(table)


def test_figure_4_is_the_mean_over_the_labels_of_a_type(made, tasks):
    figure = next(t for t in made[0] if t.name == "figure_4")
    kinds = [p.kind for p in schema.PHENOTYPES]
    paired = tasks[0].models["E1"].test.paired
    aurocs = metrics.auroc(paired.labels, paired.scores)
    for kind in ("acute", "mixed", "chronic"):
        expected = np.mean([a for a, k in zip(aurocs, kinds) if k == kind])
        assert _row(figure, kind)[1].ours == pytest.approx(expected)
    drawn = figures.charts(figure)
    assert [caption.partition(",")[0] for caption, _ in drawn] == ["AUROC", "AUPRC"]
    assert all(word in chart for _, chart in drawn for word in ("acute", "chronic", "LSTM", "MedFuse", "paper"))
