"""predict: the scores of an evaluation, from a checkpoint and any shards that fit; others are refused."""

import contextlib
import csv
import json
import shutil

import damage
import feature_cases
import jax
import numpy as np
import pytest

from data_prep import build
from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, predict, records
from medfuse_jax import run as run_lib
from medfuse_jax.runs import calibration, checkpoints, workdir
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runs.result import Scored
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results


def _save(config, folder):
    """Write a finished run with random weights, and return it."""
    run = run_lib.open_run(config)
    workdir.claim(folder, run)
    # Perturbed, because some weights start at zero.
    state = run.fresh_state()
    leaves, tree = jax.tree.flatten(state.params)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
    with contextlib.closing(checkpoints.open_manager(folder)) as manager:
        checkpoints.save(manager, state.replace(params=params), Progress(epoch=1, best_epoch=1), is_best=True)
    return run


def _lose_shards(folder):
    """Let the run's config name shards that are gone."""
    config = config_lib.load(folder / "config.json")
    config.data.dir = str(folder / "gone")
    config_lib.save(config, folder / "config.json")


@pytest.fixture(scope="module")
def others(shards, tmp_path_factory):
    """The same stays without X-rays, split otherwise: most patients test, so that the statistics differ."""
    folder = tmp_path_factory.mktemp("others")
    patients = np.concatenate([records.index(shards, "pheno", s)["subject_id"] for s in ("train", "val", "test")])
    lists = {}
    for name, chosen in (("val_ids", patients[:5]), ("test_ids", patients[5:-40])):
        lists[name] = folder / f"{name}.csv"
        lists[name].write_text("\n".join(map(str, sorted(set(chosen.tolist())))))
    build.build(shards.parent / "raw" / "mimic-iv", None, folder / "shards", tasks=["pheno"], **lists)
    return folder / "shards"


@pytest.mark.parametrize("method", ["medfuse", "medfuse_attention"])
def test_the_scores_are_those_of_an_evaluation_and_need_no_shards_of_the_run(tiny_config, tmp_path, shards, method):
    tiny_config.method = method
    if method == "medfuse_attention":
        tiny_config.model.modalities = "static"
    _save(tiny_config, tmp_path)
    evaluate.evaluate(tmp_path)
    _lose_shards(tmp_path)
    found = predict.predict(tmp_path, shards)
    with np.load(tmp_path / "predictions_test.npz") as stored:
        assert np.ptp(stored["scores"]) > 0.01
        for name in ("stay_id", "subject_id", "labels", "has_ehr", "has_cxr", "age"):
            np.testing.assert_array_equal(found[name], stored[name])
        np.testing.assert_allclose(found["scores"], stored["scores"], rtol=0, atol=1e-6)
    assert found["label_names"].tolist() == list(records.manifest(shards, "pheno")["labels"])
    assert set(found["split"]) == {"test"} and "dicom_id" not in found


def test_shards_of_another_split_without_x_rays_are_scored_with_the_runs_statistics(
    tiny_config, tmp_path, shards, others
):
    run = _save(tiny_config, tmp_path)
    own = predict.predict(tmp_path, shards, "all")
    found = predict.predict(tmp_path, others, "all")
    assert set(own["split"]) == set(found["split"]) == {"train", "val", "test"}
    assert own["has_cxr"].any() and not found["has_cxr"].any()
    means = np.array([records.manifest(folder, "pheno")["train_mean"] for folder in (shards, others)])
    assert np.abs(means[1] - means[0]).max() > 0.1
    _, ours, theirs = np.intersect1d(own["stay_id"], found["stay_id"], return_indices=True)
    assert len(ours) == len(own["stay_id"]) == sum(len(part["stay_id"]) for part in run.dataset.index.values())
    no_cxr_N = ~own["has_cxr"][ours]
    scores = own["scores"][ours], found["scores"][theirs]
    np.testing.assert_allclose(scores[1][no_cxr_N], scores[0][no_cxr_N], rtol=0, atol=1e-5)
    assert np.abs(scores[1] - scores[0])[~no_cxr_N].max() > 1e-3  # the X-ray counted
    # With the other shards' own statistics, the scores would differ.
    path = tmp_path / "data.json"
    manifest = records.manifest(others, "pheno")
    changes = {"mean": manifest["train_mean"], "std": manifest["train_std"]}
    path.write_text(json.dumps(damage.unsealed(path) | changes))
    wrong = predict.predict(tmp_path, others, "all")["scores"][theirs]
    assert np.abs(wrong - scores[0])[no_cxr_N].max() > 1e-4


def test_shards_without_x_rays_need_no_precomputed_features(tiny_config, tmp_path, shards, others):
    file = feature_cases.write(tmp_path / "f.npz", feature_cases.names(shards, "pheno"))
    tiny_config.model.cxr_encoder, tiny_config.data.cxr_features = "features", str(file)
    _save(tiny_config, tmp_path / "run")
    file.unlink()
    found = predict.predict(tmp_path / "run", others, "val")
    assert len(found["scores"]) > 0 and not found["has_cxr"].any() and np.isfinite(found["scores"]).all()


def test_static_features_keep_the_runs_categories(tiny_config, tmp_path, shards, monkeypatch):
    """Shards without one of the training categories would give each stay fewer slots."""
    tiny_config.method, tiny_config.model.modalities = "medfuse_attention", "static"
    _save(tiny_config, tmp_path)
    own = predict.predict(tmp_path, shards)
    index = records.index

    def another(data_dir, task, split):
        part = index(data_dir, task, split)
        gender = part["gender"].copy()
        if split != "test":
            gender[:] = ""  # train knows no gender
        return part | {"gender": gender}

    monkeypatch.setattr(records, "index", another)
    np.testing.assert_allclose(predict.predict(tmp_path, shards)["scores"], own["scores"], rtol=0, atol=1e-6)


def test_x_rays_are_named(tiny_config, tmp_path, shards):
    tiny_config.method, tiny_config.task = "uni_cxr", "radiology"
    _save(tiny_config, tmp_path)
    found = predict.predict(tmp_path, shards, "val")
    assert found["dicom_id"].tolist() == [r["dicom_id"] for r in records.open_split(shards, "radiology", "val")]


def test_every_hour_of_an_hourly_task_is_a_row(hourly_config, tmp_path):
    hourly_config.method = "uni_ehr"
    _save(hourly_config, tmp_path)
    found = predict.predict(tmp_path, hourly_config.data.dir, "val")
    predict.write(tmp_path / "scores.csv", found)
    with (tmp_path / "scores.csv").open() as file:
        rows = [(int(row["stay_id"]), float(row["hour"])) for row in csv.DictReader(file)]
    stored = records.open_split(hourly_config.data.dir, "decompensation", "val")
    assert rows == [(int(stay["stay_id"]), hour) for stay in stored for hour in stay["label_time_h"].tolist()]
    remaining = [stay["los_h"] - stay["label_time_h"] for stay in stored]
    np.testing.assert_allclose(found["remaining_h"], np.maximum(np.concatenate(remaining), 0), atol=1e-3)


@pytest.fixture
def finished(ehr_config, tmp_path):
    _save(ehr_config, tmp_path / "run")
    return tmp_path / "run"


def test_calibrated_scores_are_at_the_runs_temperature(finished, shards):
    """Training has fitted none, as in older versions: scoring the validation split does."""
    error = _refused(finished, shards, calibrated=True)
    assert (error.field, error.path) == ("--calibrated", finished)
    assert "scaled" not in evaluate.evaluate(finished)["calibration"]
    evaluate.evaluate(finished, Scored("val"))
    plain, found = (predict.predict(finished, shards, calibrated=calibrated) for calibrated in (False, True))
    temperature = evaluate.evaluate(finished)["calibration"]["scaled"]["temperature"]
    np.testing.assert_allclose(found["scores"], calibration.scale(plain["scores"], temperature), rtol=1e-6)
    assert found["scores"].dtype == np.float32 and np.abs(found["scores"] - plain["scores"]).max() > 0.01
    run = run_lib.open_run(config_lib.load(finished / "config.json"))
    with contextlib.closing(checkpoints.open_manager(finished)) as manager:
        progress = Progress(epoch=2, best_epoch=2, temperature=3.0)
        checkpoints.save(manager, run.fresh_state().replace(step=np.int32(5)), progress, is_best=True)
    plain, found = (predict.predict(finished, shards, calibrated=calibrated) for calibrated in (False, True))
    np.testing.assert_allclose(found["scores"], calibration.scale(plain["scores"], 3.0), rtol=1e-6)


def test_labels_that_exclude_one_another_have_no_temperature(hourly_config, tmp_path):
    hourly_config.task, hourly_config.method = "length_of_stay", "uni_ehr"
    _save(hourly_config, tmp_path)
    error = _refused(tmp_path, hourly_config.data.dir, calibrated=True)
    assert (error.field, error.path) == ("--calibrated", tmp_path) and "exclude one another" in str(error)


@pytest.mark.parametrize("name", ["new/scores.npz", "scores.csv"])
def test_files_hold_the_scores(finished, tmp_path, shards, name):
    predicted = predict.predict(finished, shards, "val")
    predict.write(tmp_path / name, predicted)
    if name.endswith(".npz"):
        with np.load(tmp_path / name) as stored:
            assert set(stored) == set(predicted)
            for field, values in predicted.items():
                np.testing.assert_array_equal(stored[field], values)
        return
    with (tmp_path / name).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["stay_id"]) for row in rows] == predicted["stay_id"].tolist()
    assert {row["split"] for row in rows} == {"val"}
    scores = [[row[label] for label in predicted["label_names"]] for row in rows]
    np.testing.assert_array_equal(np.array(scores, np.float32), predicted["scores"])


def test_a_sweep_stands_for_its_chosen_trial(finished, tmp_path, shards):
    sweep = tmp_path / "sweep"
    shutil.copytree(finished, results.trial_dir(sweep, 7))
    (sweep / "sweep.json").write_text("{}")
    (sweep / "sweep.csv").write_text("trial,chosen\n7,yes\n")
    expected = predict.predict(finished, shards)["scores"]
    np.testing.assert_array_equal(predict.predict(sweep, shards)["scores"], expected)


def test_shards_without_train_records_are_scored(finished, tmp_path, shards):
    patients = np.concatenate([records.index(shards, "pheno", s)["subject_id"] for s in ("train", "val", "test")])
    none, everyone = tmp_path / "none.csv", tmp_path / "everyone.csv"
    none.write_text("subject_id\n")
    everyone.write_text("\n".join(map(str, sorted(set(patients.tolist())))))
    raw = shards.parent / "raw" / "mimic-iv"
    build.build(raw, None, tmp_path / "shards", tasks=["pheno"], val_ids=none, test_ids=everyone)
    found = predict.predict(finished, tmp_path / "shards", "all")
    assert set(found["split"]) == {"test"} and len(found["stay_id"]) == len(patients)
    own = predict.predict(finished, shards, "all")
    order = np.argsort(own["stay_id"])
    np.testing.assert_array_equal(np.sort(found["stay_id"]), own["stay_id"][order])
    scores = found["scores"][np.argsort(found["stay_id"])]
    np.testing.assert_allclose(scores, own["scores"][order], rtol=0, atol=1e-5)


def test_the_splits_of_another_build_are_said_not_to_be_the_folds(tiny_config, others, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict.evaluate, "restore", lambda run, folder: (None, None))
    scored = []
    monkeypatch.setattr(predict, "_score", lambda run, state, split: scored.append(run) or {"stay_id": np.zeros(1)})
    tiny_config.method, tiny_config.data.folds = "uni_ehr", 5
    workdir.claim(tmp_path, run_lib.open_run(tiny_config))
    for data_dir, is_said in ((tiny_config.data.dir, False), (others, True)):
        predict.predict(tmp_path, data_dir, "test")
        assert ("not those of fold 0 of 5" in capsys.readouterr().out) == is_said
        assert bool(scored[-1].config.data.folds) != is_said


def _refused(folder, data_dir, split="test", **options):
    with pytest.raises(UserError) as error:
        predict.predict(folder, data_dir, split, **options)
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(("name", "words"), [("labels", "without 'Shock'; with 'Hiccups'"), ("channels", "Hiccups")])
def test_other_labels_or_channels_are_refused(finished, tmp_path, shards, name, words):
    shutil.copytree(shards / "pheno", tmp_path / "shards" / "pheno")
    path = tmp_path / "shards" / "pheno" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[name][-1] = "Hiccups"
    path.write_text(json.dumps(manifest | {"sha256": records.seal(manifest)}))
    error = _refused(finished, tmp_path / "shards")
    assert (error.field, error.path, error.value) == ("--data", tmp_path / "shards" / "pheno", name)
    assert words in str(error)


def test_another_time_step_is_refused(finished, tmp_path, shards):
    build.build(shards.parent / "raw" / "mimic-iv", None, tmp_path / "hourly", tasks=["pheno"], timestep_h=1)
    error = _refused(finished, tmp_path / "hourly")
    assert (error.field, error.value) == ("--data", 1.0) and "--timestep_h=2" in str(error)


def test_another_profile_is_scored_with_a_warning(finished, tmp_path, shards, capsys):
    build.build(shards.parent / "raw" / "mimic-iv", None, tmp_path / "strict", tasks=["pheno"], profile="strict")
    capsys.readouterr()
    assert len(predict.predict(finished, tmp_path / "strict", "val")["scores"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert f"{finished} was trained on values of the profile paper" in line
    assert f"{tmp_path / 'strict'} has those of strict" in line
    predict.predict(finished, shards, "val")
    assert "warning" not in capsys.readouterr().out


def test_a_run_of_an_older_version_says_what_to_do(finished, shards, ehr_config):
    path = finished / "data.json"
    path.write_text(json.dumps({"digest": json.loads(path.read_text())["digest"]}))
    error = _refused(finished, shards)
    assert (error.field, error.path) == ("--workdir", path) and "rerun the command that trained it" in str(error)
    workdir.claim(finished, run_lib.open_run(ehr_config))  # as that command does
    assert len(predict.predict(finished, shards)["scores"])


def test_damaged_statistics_are_refused(finished, shards):
    path = finished / "data.json"
    path.write_text(json.dumps(damage.unsealed(path) | {"std": [0.0] * 76}))
    assert _refused(finished, shards).value == "mean"


def test_what_cannot_be_scored_is_refused(finished, tiny_config, tmp_path, shards, others):
    assert _refused(finished, tmp_path).field == "config.task"  # no dataset there
    assert _refused(finished, shards, "tests").nearest == "test"
    assert _refused(tmp_path / "nothing", shards).path == tmp_path / "nothing" / "config.json"
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble" / "config.json").write_text(json.dumps({"rule": "average"}))
    assert _refused(tmp_path / "ensemble", shards).path == tmp_path / "ensemble"
    tiny_config.method = "uni_cxr"
    _save(tiny_config, tmp_path / "cxr")
    assert _refused(tmp_path / "cxr", others).path == others / "pheno"
    found = predict.predict(tmp_path / "cxr", shards)
    assert found["has_cxr"].all()  # the others are left out


def test_a_modality_of_the_users_own_is_refused(finished, tmp_path, shards):
    path = finished / "config.json"
    config = damage.unsealed(path)
    notes = tmp_path / "notes.py"
    notes.write_text("from medfuse_jax.data.modalities.static import Encoder, table\n")
    config["method"], config["model"]["modalities"] = "medfuse_attention", f"static,{notes}"
    path.write_text(json.dumps(config))
    assert _refused(finished, shards).value == str(notes)


@pytest.mark.parametrize("name", ["scores.txt", "scores", "folder.csv"])
def test_other_kinds_of_files_are_refused(tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError) as error:
        predict.check_out(tmp_path / name)
    assert (error.value.field, error.value.path) == ("--out", tmp_path / name)


def test_all_x_rays_of_a_stay_are_scored(images_config, shards, tmp_path):
    """By evaluate and predict alike, with attention weights; without its X-rays, a stay is one that had none."""
    images_config.method = "medfuse_attention"
    run = _save(images_config, tmp_path)
    result = evaluate.evaluate(tmp_path)
    found = predict.predict(tmp_path, images_config.data.dir, "test")
    with np.load(tmp_path / "predictions_test.npz") as stored:
        np.testing.assert_allclose(found["scores"], stored["scores"], atol=1e-6)
        scores, weight_NM, has_cxr_N = stored["scores"], stored["modality_weights"], stored["has_cxr"]
        assert stored["modalities"].tolist() == ["ehr", "cxr", "earlier_cxr"] and result["images"] == "all"
    several_N = run.dataset.num_images("test") > 1
    np.testing.assert_array_equal(weight_NM[:, 1:] > 0, np.stack([has_cxr_N, several_N], 1))
    assert several_N.any() and not several_N[has_cxr_N].all()
    evaluate.evaluate(tmp_path, Scored("test", drop_cxr=1.0))
    with np.load(Scored("test", drop_cxr=1.0).predictions_path(tmp_path)) as stored:
        assert not stored["has_cxr"].any()
        changed_N = np.abs(stored["scores"] - scores).max(1) > 1e-5
        np.testing.assert_array_equal(changed_N, has_cxr_N)
    assert "data_prep.build --images=all" in str(_refused(tmp_path, shards))
