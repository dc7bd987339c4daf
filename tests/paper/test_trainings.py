"""The plan of trainings: how many there are, what each starts from, and that every config of it is valid."""

import pytest

from medfuse_jax import config as config_lib
from medfuse_jax import schema
from medfuse_jax.paper import published, trainings
from medfuse_jax.paper.trainings import Settings
from medfuse_jax.runtime.errors import UserError


def _plan(methods=trainings.METHODS, tasks=trainings.TASKS, **settings):
    return trainings.plan(tasks, methods, Settings(**settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 293), ({"search_e3": True}, 311), ({"rates": "published"}, 55), ({"trials": 2}, 85)],
)
def test_the_plan_has_as_many_trainings_as_the_paper(settings, expected):
    assert sum(t.num_runs(settings.get("trials", 10)) for t in _plan(**settings)) == expected


def test_a_training_comes_after_those_that_it_starts_from():
    done = set()
    for t in _plan():
        assert {(id, "radiology" if id == "E0" else t.task) for id in t.needs} <= done, t.id
        done.add((t.id, t.task))


def test_a_method_brings_what_it_starts_from_and_the_lstm():
    ids = [t.id for t in _plan(["early"], ["pheno"])]
    assert ids == ["E1", "E2", "E3", "M1", "M2"]
    assert [t.id for t in _plan(["medfuse"], ["mortality"])] == ["E0", "E1", "E2", "M8", "M9", "OPT"]


@pytest.mark.parametrize("rates", trainings.RATES)
def test_every_config_is_valid_and_trains_on_what_the_paper_says(rates, tmp_path):
    settings = Settings(rates=rates, fields={"data.dir": str(tmp_path), "image.crop": "random"})
    for t in _plan(rates=rates):
        config = trainings.config_of(t, settings, {name: str(tmp_path) for name in t.starts}, t.rate or 1e-4)
        config_lib.validate(config)
        assert config.image.crop == "random" and config.task == t.task
        assert config.data.train_stays == config.data.val_stays  # chosen on the stays of the kind it is trained on
    paired = {t.id for t in _plan(rates=rates) if t.is_paired}
    assert {"E2", "E3", "M1", "M3"} <= paired and not paired & {"E1", "M2", "M4", "M7", "M8", "M9", "OPT"}


def test_published_rates_and_depths_are_those_of_table_a1():
    by_id = {(t.task, t.id): t for t in _plan(rates="published")}
    assert by_id["pheno", "M6_3"].rate == by_id["mortality", "M6_4"].rate == 6.493e-5
    assert by_id["mortality", "M9"].rate == 1.452e-5 and by_id["mortality", "E3"].rate == 2.951e-5
    assert ("pheno", "M6_4") not in by_id and ("pheno", "M5_4") in by_id


@pytest.mark.parametrize(("names", "flag"), [((["sepsis"], ["lstm"]), "--tasks"), ((["pheno"], ["gru"]), "--methods")])
def test_unknown_names_are_refused(names, flag):
    with pytest.raises(UserError, match=flag):
        trainings.plan(*names, Settings())


def test_the_published_numbers_agree_with_each_other():
    """The paper prints some numbers twice; a slip in published.csv would show."""
    for metric in ("auroc", "auprc"):
        for name, row in (("lstm", "lstm_partial"), ("medfuse", "medfuse")):
            average = published.number("table4", "pheno", "Average", f"{metric}_{name}")
            assert average == published.number("table1", "pheno", row, metric)
            rows = [published.number("table4", "pheno", p.name, f"{metric}_{name}").value for p in schema.PHENOTYPES]
            assert sum(rows) / 25 == pytest.approx(average.value, abs=0.0016)
        for task in trainings.TASKS:
            opt = published.number("table2", task, "OPT", metric)
            assert opt == published.number("table1", task, "medfuse", metric)
            assert published.number("table3", task, "OPT", metric) == published.number("table_a3", task, "OPT", metric)
    stays = [published.number("table5", "mortality", g, "stays").value for g in ("18-40", "40-60", "60-80", "> 80")]
    assert sum(stays) == published.number("figure1", "mortality", "test", "paired").value
    for (_, _, _, metric), number in published._numbers().items():
        if metric.startswith(("auroc", "auprc")) and number.low is not None:
            assert number.low <= number.value <= number.high


def test_tasks_are_planned_once_and_in_the_order_of_the_tables():
    """Table 4 is compared with the first columns of Table 1, which are phenotyping's."""
    given = trainings.plan(["mortality", "pheno", "mortality"], trainings.METHODS, Settings())
    assert given == trainings.plan(["pheno", "mortality"], trainings.METHODS, Settings())
    assert trainings.in_order(["mortality", "pheno", "pheno"]) == ["pheno", "mortality"]
