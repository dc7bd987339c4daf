"""How the paper's models are chosen: rates on all validation stays and on paired ones, depths and shares."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from medfuse_jax import schema
from medfuse_jax.paper import contents, results, scores, tables
from medfuse_jax.paper.cells import Maker
from medfuse_jax.paper.scores import Evaluation, Model, Scores, TaskResults
from medfuse_jax.paper.trainings import SHARES, Training

_TRAINING = Training("M4", "mortality", "Joint (partial)", {})
_HAS_CXR = np.arange(40) < 16


def _scores(labels, values, has_cxr=_HAS_CXR) -> Scores:
    ids = np.arange(len(labels))
    return Scores(ids, ids, np.array(labels)[:, None], np.array(values)[:, None], has_cxr, np.full(len(ids), 50.0))


def _with_labels(of: Scores, num: int) -> Scores:
    """Repeat the one label."""
    return dataclasses.replace(of, labels=np.tile(of.labels, num), scores=np.tile(of.scores, num))


def _labels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, 40)


def _noisy(labels, noise_paired: float, noise_rest: float) -> Scores:
    noise = np.random.default_rng(1).normal(size=40) * np.where(_HAS_CXR, noise_paired, noise_rest)
    return _scores(labels, 1 / (1 + np.exp(1 - 2 * labels - noise)))


@pytest.fixture
def chosen_from(monkeypatch, tmp_path):
    """Choose among runs with these validation scores, by name."""

    def choose(by_name: dict, chooser, training=_TRAINING, first=""):
        vals = {tmp_path / name: val for name, val in by_name.items()}
        monkeypatch.setattr(results, "_val", lambda folder: vals[folder])
        monkeypatch.setattr(results, "finished_trials", lambda folder: list(vals))
        monkeypatch.setattr(
            results, "_model", lambda t, folder: Model(t.id, t.title, folder, 1e-4, vals[folder], vals[folder])
        )
        found = TaskResults("mortality", list(schema.TASKS["mortality"].labels), np.array([0.5]))
        first = tmp_path / (first or next(iter(by_name)))
        found.models = {
            id: Model(id, training.title, first, 1e-4, vals[first], vals[first]) for id in (training.id, "M9")
        }
        chooser(found, training, tmp_path)
        return found

    return choose


def test_a_rate_is_chosen_on_all_validation_stays_and_on_the_paired_ones(chosen_from):
    labels = _labels()
    by_name = {"good_on_all": _noisy(labels, 4.0, 0.1), "good_on_paired": _noisy(labels, 0.1, 4.0)}
    assert scores.auroc(by_name["good_on_all"]) > scores.auroc(by_name["good_on_paired"])
    found = chosen_from(by_name, results._choose_rate)
    assert found.models["M4"].folder.name == "good_on_all"
    assert found.models["M4_paired"].folder.name == "good_on_paired"
    assert found.models["M4_paired"].choice == "chosen on the validation stays with an X-ray"

    make = Maker([found], Evaluation(num_bootstrap=2))
    rows = {row[0]: row for row in tables.table_2(make).rows}
    assert rows["Joint (partial), chosen on paired validation stays"][1].ours > rows["Joint (partial)"][1].ours
    assert [row[0] for row in tables.table_a1(make).rows][:2] == [
        "Joint (partial)",
        "Joint (partial), chosen on paired validation stays",
    ]
    same = dataclasses.replace(found, models=found.models | {"M4_paired": found.models["M4"]})
    assert not any("chosen on" in row[0] for row in tables.table_2(Maker([same], Evaluation(2))).rows)


def test_without_a_validation_auroc_the_loss_chooses_and_is_named(chosen_from, monkeypatch):
    """The paired validation stays have no positive label: only their loss tells the trials apart."""
    labels = np.where(_HAS_CXR, 0, _labels())
    sure, unsure = (_scores(labels, np.where(_HAS_CXR, p, labels * 0.9)) for p in (0.1, 0.4))
    assert math.isnan(scores.auroc(sure.paired)) and scores.rank(sure.paired) == pytest.approx(math.log(0.9))
    for order in ((("unsure", unsure), ("sure", sure)), (("sure", sure), ("unsure", unsure))):
        found = chosen_from(dict(order), results._choose_rate)
        assert found.models["M4_paired"].folder.name == "sure"
        assert found.models["M4_paired"].choice.startswith("chosen by loss, as no label has both classes,")


@pytest.mark.parametrize("has_all", [True, False])
def test_tables_name_the_models_that_the_loss_chose(has_all):
    """No paired validation stay has a positive label, and in one case no other has: E2 is chosen on the paired ones."""
    val = _scores(np.where(_HAS_CXR, 0, _labels() * has_all), np.full(40, 0.5))
    test = _noisy(_labels(), 1, 1)
    found = TaskResults("mortality", list(schema.TASKS["mortality"].labels), np.array([0.5]))
    for id, title, on_paired in (("E1", "LSTM (partial)", False), ("E2", "LSTM (paired)", True), ("M3", "Joint", True)):
        found.models[id] = Model(id, title, Path(id), 1e-4, test, val, on_paired=on_paired)
    found.models["E1_paired"] = dataclasses.replace(found.models["E1"], on_paired=True)
    make = Maker([found], Evaluation(num_bootstrap=2))

    def said(table) -> list[str]:
        return [note.partition(": ")[2] for note in table.notes if "the loss chose" in note]

    start = "no label of the validation stays with an X-ray has both classes, so the loss chose "
    on_all = [] if has_all else ["no label of the validation stays has both classes, so the loss chose LSTM (partial)."]
    both = "LSTM (paired); LSTM (partial), chosen on paired validation stays"
    assert said(tables.table_1(make)) == [*on_all, f"{start}{both}."]
    assert said(tables.table_a1(make)) == [*on_all, f"{start}{both}; Joint."]
    assert said(tables.table_2(make)) == [f"{start}Joint."]


@pytest.mark.parametrize(("task", "own"), [("pheno", ("table_4", "figure_4")), ("mortality", ("table_5",))])
def test_every_table_and_figure_of_medfuse_optimal_names_it_if_the_loss_chose_it(task, own):
    """No validation stay has a label. A table with the choice on all validation stays alone does not name the other."""
    names = schema.TASKS[task].labels
    test, val = (_with_labels(of, len(names)) for of in (_noisy(_labels(), 1, 1), _scores([0] * 40, [0.1] * 40)))
    found = TaskResults(task, list(names), np.full(len(names), 0.5), opt_by_share={1.0: val})
    for id, title in (("E1", "LSTM (partial)"), ("OPT", tables.OPT_TITLE)):
        choice = scores.chosen_on(val, "all validation stays")
        found.models[id] = Model(id, title, Path(id), 1e-4, test, val, choice, without_cxr=test)
    found.models["OPT_paired"] = dataclasses.replace(found.models["OPT"], folder=Path("other"), on_paired=True)
    by_name = {table.name: table for table in contents.make_all(Maker([found], Evaluation(num_bootstrap=2)), {})[0]}

    def said(name: str) -> list[str]:
        parted = [note.partition("the loss chose ") for note in by_name[name].notes]
        return [models for _, is_said, models in parted if is_said]

    both = f"LSTM (partial); {tables.OPT_TITLE}."
    assert [said(name) for name in (*own, "table_a3")] == [[both]] * (len(own) + 1)
    assert said("figure_a2") == said("figure_a3") == [f"{tables.OPT_TITLE}."]
    assert said("table_1") == [both, f"{tables.OPT_TITLE}, chosen on paired validation stays."]
    assert any("chosen by loss" in note for note in by_name["figure_a1"].notes)


def test_a_model_says_on_which_validation_stays_it_was_chosen(chosen_from, monkeypatch):
    """`_model` takes it from the training; the choice on paired stays is named as such."""
    found = chosen_from({"a": _noisy(_labels(), 1, 1)}, results._choose_rate)
    assert found.models["M4_paired"].on_paired and not found.models["M4"].on_paired
    monkeypatch.undo()
    val = _noisy(_labels(), 1, 1)
    predictions = {name: getattr(val, name) for name in scores._FIELDS}
    member = SimpleNamespace(predictions=predictions)
    monkeypatch.setattr(results.members, "open_member", lambda *of: member)
    monkeypatch.setattr(results, "rate_of", lambda folder: 1e-4)
    paired = Training("E2", "mortality", "LSTM (paired)", {"data.train_stays": "paired"})
    assert results._model(paired, Path()).on_paired and not results._model(_TRAINING, Path()).on_paired


def test_the_share_of_ehr_only_stays_is_chosen_by_loss_without_an_auroc(chosen_from, monkeypatch, tmp_path):
    """It was always 0 % before, because no share had an AUROC."""
    training = Training("OPT", "mortality", "MedFuse", {}, values=SHARES, field="data.ehr_only_ratio", rate_of="M9")
    by_name = {f"{share:g}": _scores(np.zeros(40, int), np.full(40, 0.1 + abs(share - 0.3))) for share in SHARES}
    folders = {share: tmp_path / f"{share:g}" for share in SHARES}
    monkeypatch.setattr(results, "folders_by_value", lambda training, folder: dict(folders))
    dropped = dataclasses.replace(by_name["0.3"])
    evaluated = []
    monkeypatch.setattr(results.evaluate, "evaluate", lambda *of: evaluated.append(of))
    monkeypatch.setattr(scores, "read_dropped", lambda path: dropped)
    found = chosen_from(by_name | {"m9": _scores(np.zeros(40, int), np.full(40, 0.9))}, results._choose_share, training)
    for id in ("OPT", "OPT_paired"):
        assert found.models[id].folder.name == "0.3"
        assert "30 % of the EHR-only stays, chosen by loss" in found.models[id].choice
        assert found.models[id].without_cxr is dropped
    assert {(folder.name, what.drop_cxr) for folder, what in evaluated} == {("0.3", 1.0)}


def test_no_paired_validation_stay_leaves_one_choice(chosen_from):
    val = dataclasses.replace(_noisy(_labels(), 1, 1), has_cxr=np.zeros(40, bool))
    assert "M4_paired" not in chosen_from({"a": val}, results._choose_rate).models
