"""main: stages in order, and on from where they were; what cannot work is refused before any of it."""

import json
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from medfuse_jax import experiment, main, starts, train
from medfuse_jax.errors import UserError


@pytest.fixture
def fusion_config(tiny_config):
    tiny_config.num_epochs = 1
    tiny_config.pretrain.ehr = ConfigDict({"method": "uni_ehr"})
    tiny_config.pretrain.cxr = ConfigDict({"method": "uni_cxr", "task": "radiology"})
    return tiny_config


@pytest.fixture
def run_main(monkeypatch):
    def run(config, folder):
        given = SimpleNamespace(config=config.copy_and_resolve_references(), workdir=str(folder))
        monkeypatch.setattr(main, "flags", SimpleNamespace(FLAGS=given))
        main.main([])

    return run


def test_a_stopped_command_goes_on_and_ends_in_results_and_a_report(
    fusion_config, run_main, tmp_path, monkeypatch, capsys
):
    folder, trained, train_one = tmp_path / "run", [], train.train

    def stop_at_the_second(run, workdir, encoders=None):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(workdir.name)
        train_one(run, workdir, encoders)

    monkeypatch.setattr(train, "train", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_main(fusion_config, folder)
    monkeypatch.setattr(train, "train", train_one)
    assert trained == ["pretrain_cxr"] and not (folder / "result.json").exists()
    before = (folder / "pretrain_cxr" / "metrics.jsonl").read_bytes()
    run_main(fusion_config, folder)
    assert (folder / "pretrain_cxr" / "metrics.jsonl").read_bytes() == before
    methods = {
        name: json.loads((folder / name / "result.json").read_text())["method"]
        for name in (".", "pretrain_ehr", "pretrain_cxr")
    }
    assert methods == {".": "medfuse", "pretrain_ehr": "uni_ehr", "pretrain_cxr": "uni_cxr"}
    printed = capsys.readouterr().out
    assert "MedFuse − EHR only (LSTM)" in printed and (folder / "report" / "index.html").exists()

    # A finished encoder that is given takes the place of its pre-training.
    fusion_config.init.cxr = str(folder / "pretrain_cxr")
    given, stages = starts.find(experiment.open_experiment(fusion_config), tmp_path / "given")
    assert set(given) == {"cxr"} and set(stages) == {"ehr"}
    with pytest.raises(UserError, match="holds another run"):
        run_main(fusion_config, folder)


@pytest.mark.parametrize(
    ("method", "wanted"), [("medfuse", {"ehr", "cxr"}), ("daft3", {"ehr", "cxr"}), ("uni_ehr", set())]
)
def test_stages_that_the_method_does_not_need_are_left_out(fusion_config, tmp_path, method, wanted):
    fusion_config.method = method
    assert set(starts.find(experiment.open_experiment(fusion_config), tmp_path)[1]) == wanted


@pytest.mark.parametrize("changes", [{"method": "early"}, {"model.freeze_encoders": True}])
def test_a_frozen_encoder_that_nothing_trains_is_refused(fusion_config, tmp_path, changes):
    fusion_config.update_from_flattened_dict(changes)
    assert set(starts.find(experiment.open_experiment(fusion_config), tmp_path)[1]) == {"ehr", "cxr"}
    del fusion_config.pretrain.cxr
    with pytest.raises(UserError, match=r"the cxr encoder is frozen .*it would stay random: give config\.pretrain"):
        starts.find(experiment.open_experiment(fusion_config), tmp_path)
    fusion_config.encoders = "random"
    with pytest.raises(UserError, match="the ehr encoder is frozen"):
        starts.find(experiment.open_experiment(fusion_config), tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init.cxr": "nowhere"}, "nowhere/config.json is missing"),
        ({"method": "uni_cxr", "task": "pheno", "init.ehr": "nowhere"}, "nowhere/config.json is missing"),
        ({"data.dir": "nowhere"}, "no data folder nowhere"),
        ({"batch_size": 3}, "not a multiple of the 2 devices"),
        ({"films_per_batch": 32}, "which leaves no row for the stays without a film"),
        ({"learning_rate": 2.0}, "config.learning_rate is 2.0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(fusion_config, run_main, tmp_path, changes, said):
    fusion_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=said):
        run_main(fusion_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
