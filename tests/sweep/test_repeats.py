"""A sweep for each seed and fold: its folders, its table, and what it refuses."""

import csv
import dataclasses
import json
import time

import numpy as np
import pytest
from example_runs import simulate, write_run
from refusals import refused
from sweep_cases import CONFIG_FILE, RATES

from medfuse_jax import config as config_lib
from medfuse_jax.report import read_runs
from medfuse_jax.runs import sources
from medfuse_jax.runtime import files
from medfuse_jax.sweep import command, repeats, results


def test_seeds_and_folds_are_crossed_from_the_first_seed_on():
    assert [r.name for r in repeats.plan(3, 2, 0)] == ["seed3", "seed4"]
    names = [r.name for r in repeats.plan(0, 2, 3)]
    assert names[:3] == ["seed0_fold0of3", "seed0_fold1of3", "seed0_fold2of3"] and len(set(names)) == 6
    with refused(field="--folds", value=1):
        repeats.plan(0, 1, 1)


def test_every_fold_is_a_sweep_of_its_own_and_tests_its_own_patients(ehr_config, tmp_path):
    ehr_config.num_epochs = 1
    request = command.Request(ehr_config, CONFIG_FILE, tmp_path, RATES, num_trials=1)
    started = []

    def sweep(config, folder):
        started.append((config.seed, config.data.fold, config.data.folds))
        command.run(dataclasses.replace(request, config=config, workdir=folder), time.perf_counter())

    of = repeats.plan(0, 1, 2)
    repeats.run(of, tmp_path, ehr_config, sweep)
    assert started == [(0, 0, 2), (0, 1, 2)] and ehr_config.data.folds == 0
    tested, values = [], []
    for repeat in of:
        chosen = results.chosen_dir(tmp_path / repeat.name)
        with np.load(chosen / "predictions_test.npz") as predictions:
            tested.append(set(predictions["subject_id"].tolist()))
        result = files.read_json(chosen / "result.json", "")
        assert result["data"]["fold"] == repeat.fold
        values.append(result["subsets"]["all"]["auroc_macro"])
    assert all(tested) and not tested[0] & tested[1]
    rows = list(csv.DictReader((tmp_path / "repeats.csv").open()))
    assert [float(row["auroc_macro"]) for row in rows if row["subset"] == "all"] == values
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in (tmp_path / "repeats.html").read_text()
    assert len(read_runs.find_runs([tmp_path])) == 2
    with refused(path=tmp_path) as caught:
        sources.reopen(tmp_path)
    assert str(tmp_path / "seed0_fold0of2") in str(caught.value)

    with refused(field="config.data.folds", value=2):
        repeats.run(of, tmp_path, of[0].set(ehr_config), sweep)
    with pytest.raises(Exception, match="holds other sweeps"):
        results.claim(tmp_path, ehr_config, "digest", {"algorithm": "random", "trials": []})


def test_an_hourly_task_has_its_own_metrics_and_counts_hours(tmp_path, monkeypatch):
    of = repeats.plan(0, 2, 0)
    monkeypatch.setattr(results, "chosen_dir", lambda folder: folder / "000")
    for repeat in of:
        folder = tmp_path / repeat.name / "000"
        write_run(folder, "length_of_stay", "uni_ehr", simulate("length_of_stay", 50, seed=repeat.seed))
        result = files.read_json(folder / "result.json", "") | {"seed": repeat.seed}
        result["subsets"]["all"] |= {"kappa": 0.25 + repeat.seed / 8, "mad_h": 100.0}
        (folder / "result.json").write_text(json.dumps(result))
    assert "Kappa 0.312 ± 0.088" in repeats.write(of, tmp_path)
    rows = [row for row in csv.DictReader((tmp_path / "repeats.csv").open()) if row["subset"] == "all"]
    assert [(float(row["kappa"]), float(row["mad_h"])) for row in rows] == [(0.25, 100.0), (0.375, 100.0)]
    page = (tmp_path / "repeats.html").read_text()
    assert page.count(">Test hours<") == page.count(">Kappa<") == 2 and ">0.375<" in page and "stays<" not in page


def test_the_others_go_on_after_a_sweep_without_a_finished_trial(ehr_config, tmp_path, monkeypatch):
    written, started = [], []
    monkeypatch.setattr(repeats, "write", lambda of, workdir: written.append(of) or "")

    def sweep(config, folder):
        started.append(config.data.fold)
        if config.data.fold == 0:
            raise results.NoneFinished("no trial finished")

    of = repeats.plan(0, 1, 3)
    with pytest.raises(results.NoneFinished):
        repeats.run(of, tmp_path, ehr_config, sweep)
    assert started == [0, 1, 2] and written == [of[1:]]


def test_a_fold_without_patients_is_refused_before_any_sweep(ehr_config, tmp_path):
    started = []
    with refused(field="config.data.folds", value=1000):
        repeats.run(repeats.plan(0, 1, 1000), tmp_path, ehr_config, lambda *of: started.append(of))
    assert not started


@pytest.mark.parametrize("name", ["config.json", "sweep.json"])
def test_a_folder_of_a_run_or_sweep_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with refused(field="--workdir", path=tmp_path):
        repeats.run([], tmp_path, config_lib.default(), lambda config, folder: None)
