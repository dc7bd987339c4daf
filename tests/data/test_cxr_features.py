"""Precomputed features of X-rays: which X-ray each is of, what is refused, and runs on them.

Shapes: E features, J X-rays.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import feature_cases
import jax
import numpy as np
import polars as pl
import pytest
from feature_cases import WIDTH
from refusals import refused
from sweep_cases import RATES, sweep

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, predict, records, schema, train
from medfuse_jax import run as run_lib
from medfuse_jax.attribution import stay
from medfuse_jax.data import batches, cxr_features, folds
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.models import registry
from medfuse_jax.models.model import variable_shapes
from medfuse_jax.runs import sources, warm_start, workdir
from medfuse_jax.runtime.errors import UserError

_PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"
_NEED_MAPS = ["mmtm3", "mmtm4", "daft3", "daft4", "metra", "healnet"]


@pytest.fixture(scope="module")
def file(shards, tmp_path_factory) -> Path:
    """The features of every X-ray of the small cohort."""
    path = tmp_path_factory.mktemp("features") / "features.npz"
    return feature_cases.write(path, feature_cases.names(shards, "pheno", "radiology"))


@pytest.fixture
def features_config(tiny_config, file):
    tiny_config.model.cxr_encoder, tiny_config.data.cxr_features = "features", str(file)
    tiny_config.num_epochs = 1
    return tiny_config


def _standardised(dicom_ids: list[str], of_train: list[str]) -> np.ndarray:
    raw_JE = np.stack([feature_cases.of(name) for name in of_train]).astype(np.float64)
    return (np.stack([feature_cases.of(name) for name in dicom_ids]) - raw_JE.mean(0)) / raw_JE.std(0)


def _check_batches(dataset, stored: dict, of_train: list[str], pick) -> int:
    """Compare the features in batches of the train split with those of the records' X-rays; return how many there are.

    pick: (record number, its X-rays' names) -> the names that are read.
    """
    plan = run_lib.plan_lib.train_plan(
        dataset.lengths("train"),
        dataset.paired("train"),
        dataset.usable("train"),
        batch_size=16,
        seed=0,
        epoch=1,
        buckets=dataset.buckets,
        packing=dataset.packing("train"),
    )
    count = 0
    for batch in batches.batches(dataset, "train", plan, num_devices=2):
        assert "image" not in batch and batch["cxr_features"].dtype == np.float32
        for d, p in np.ndindex(batch["image_mask"].shape):
            if not batch["image_mask"][d, p]:
                assert not batch["cxr_features"][d, p].any()
                continue
            number = int(batch["record"][d, batch["image_row"][d, p]])
            place = int(batch["image_of"][d, p]) if "image_of" in batch else 0
            name = pick(number, stored["train"][number]["dicom_id"].split())[place]
            expected_E = _standardised([name], of_train)[0]
            np.testing.assert_allclose(batch["cxr_features"][d, p], expected_E, rtol=1e-4, atol=1e-4)
            count += 1
    return count


@pytest.mark.parametrize("task", ["pheno", "radiology"])
def test_a_batch_holds_the_features_of_its_x_rays_and_reads_no_image(shards, file, task):
    dataset = open_dataset(shards, task, features=cxr_features.read(file))
    stored = {split: records.open_split(shards, task, split, ("dicom_id",)) for split in schema.SPLITS}
    assert "image" not in dataset.splits["train"][0]
    if task == "radiology":
        dataset = dataclasses.replace(dataset, splits={})  # no record is read
    of_train = [record["dicom_id"] for record in stored["train"] if record["dicom_id"]]
    assert _check_batches(dataset, stored, of_train, lambda i, names: names) == len(of_train) > 10


@pytest.mark.parametrize(("task", "images"), [("pheno", "last"), ("pheno", "all"), ("decompensation", "last")])
def test_of_several_x_rays_of_a_stay_those_that_are_read_have_their_features(hourly_shards, tmp_path, task, images):
    path = feature_cases.write(tmp_path / "features.npz", feature_cases.names(hourly_shards, task))
    dataset = open_dataset(hourly_shards, task, features=cxr_features.read(path), images=images)
    stored = {"train": records.open_split(hourly_shards, task, "train", ("dicom_id",))}

    def pick(i: int, names: list[str]) -> list[str]:
        return dataset.several["train"].of_record(i, np.array(names)) if dataset.several else names[-1:]

    of_train = [n for i, record in enumerate(stored["train"]) for n in pick(i, record["dicom_id"].split())]
    assert _check_batches(dataset, stored, of_train, pick) == len(of_train) > 10
    assert max(len(record["dicom_id"].split()) for record in stored["train"]) > 1


def test_a_folds_features_are_those_of_its_records(shards, file):
    fold = folds.Fold(1, 3)
    dataset = open_dataset(shards, "pheno", features=cxr_features.read(file), fold=fold)
    whole = open_dataset(shards, "pheno", features=cxr_features.read(file))
    stays = {s: dataset.index[s]["stay_id"][dataset.paired(s)] for s in schema.SPLITS}
    of_fold = {s: dataset.cxr_features[s].feature_JE[:-1] for s in schema.SPLITS}
    name_of = {}
    for split in schema.SPLITS:
        for record in records.open_split(shards, "pheno", split, ("stay_id", "dicom_id")):
            name_of[record["stay_id"]] = record["dicom_id"]
    of_train = [name_of[stay] for stay in stays["train"].tolist()]
    for split in schema.SPLITS:
        expected_JE = _standardised([name_of[stay] for stay in stays[split].tolist()], of_train)
        np.testing.assert_allclose(of_fold[split], expected_JE, rtol=1e-4, atol=1e-4)
    assert dataset.digest != whole.digest


def test_the_digest_depends_on_the_features_that_are_read_alone(shards, file, tmp_path):
    names = feature_cases.names(shards, "pheno", "radiology")
    reordered = feature_cases.write(tmp_path / "reordered.npz", ["not read", *names[::-1]])
    digest = open_dataset(shards, "pheno", features=cxr_features.read(file)).digest
    assert open_dataset(shards, "pheno", features=cxr_features.read(reordered)).digest == digest
    with np.load(file) as stored:
        np.savez(tmp_path / "other.npz", dicom_id=stored["dicom_id"], features=stored["features"] + 1)
    assert open_dataset(shards, "pheno", features=cxr_features.read(tmp_path / "other.npz")).digest != digest
    assert open_dataset(shards, "pheno").digest != digest


def test_a_table_of_columns_gives_the_same_as_arrays(file, tmp_path):
    expected = cxr_features.read(file)
    columns = {"dicom_id": expected.dicom_id_M[::-1]}
    columns |= {f"f{e}": x[::-1] for e, x in enumerate(expected.feature_ME[expected.row_M].T)}
    pl.DataFrame(columns).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame(columns).write_csv(tmp_path / "a.csv")
    for name in ("a.parquet", "a.csv"):
        found = cxr_features.read(tmp_path / name)
        np.testing.assert_array_equal(found.dicom_id_M, expected.dicom_id_M)
        np.testing.assert_array_equal(found.rows(np.array(["none", *expected.dicom_id_M[:1]]))[:1], [-1])
        rows = [table.rows(expected.dicom_id_M) for table in (found, expected)]
        np.testing.assert_allclose(found.feature_ME[rows[0]], expected.feature_ME[rows[1]], rtol=1e-6)


def test_a_table_without_x_rays_has_none():
    assert cxr_features.nothing(3).rows(np.array(["a", "b"])).tolist() == [-1, -1]


_IDS, _ROWS = ["a", "b", "c"], np.ones((3, 2))


@pytest.mark.parametrize(
    "arrays",
    [
        {"features": _ROWS},
        {"dicom_id": _IDS},
        {"dicom_id": _IDS[:2], "features": _ROWS},
        {"dicom_id": ["a", "b", "a"], "features": _ROWS},
        {"dicom_id": _IDS, "features": np.array([[1, 2], [3, np.nan], [5, 6]])},
        {"dicom_id": _IDS, "features": np.full((3, 2), 1e300)},
        {"dicom_id": _IDS, "features": np.ones(3)},
        {"dicom_id": _IDS, "features": np.ones((3, 0))},
        {"dicom_id": _IDS, "features": np.array([[1, 2], [3], [4, 5]], dtype=object)},
        {"dicom_id": np.array(_IDS, object), "features": _ROWS},
        {"dicom_id": [1, 2, 3], "features": _ROWS},
        {"dicom_id": np.array([b"a", b"\xff", b"\xfe"]), "features": _ROWS},
        {"dicom_id": _IDS, "features": np.array([["x", "y"]] * 3)},
    ],
)
def test_arrays_that_are_no_features_are_refused_in_one_line(tmp_path, arrays):
    np.savez(tmp_path / "bad.npz", **arrays)
    with refused(field="config.data.cxr_features", path=tmp_path / "bad.npz"):
        cxr_features.read(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("bad.csv", b"dicom_id,f0\nx-ray-0,1,2\nb,3\n", "same columns"),
        ("bad.csv", b"dicom_id,f0,f1\nx-ray-0,1,2\nb,3\n", "missing"),
        ("bad.csv", b"dicom_id,f0\nx-ray-0,x\nb,3\n", "no numbers in column 'f0'"),
        ("bad.csv", b"name,f0\nx-ray-0,1\nb,3\n", "no column 'dicom_id'"),
        ("bad.csv", b"dicom_id\nx-ray-0\n", "features"),
        ("bad.csv", b"dicom_id,f0\n", "no rows"),
        ("bad.csv", b"dicom_id,f0\nx-ray-0\xe9,1\n", "UTF-8"),
        ("bad.csv", b"", "empty"),
        ("bad.npz", b"not a zip file", "no zip file"),
        ("bad.npz", b"", "empty"),
        ("bad.parquet", b"not parquet", "cannot be read"),
        ("bad.pt", b"another kind", "must end in"),
        ("missing.npz", None, "does not exist"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with refused(field="config.data.cxr_features", path=tmp_path / name) as caught:
        cxr_features.read(tmp_path / name)
    assert why in str(caught.value) and "x-ray-0" not in str(caught.value)


@pytest.mark.parametrize(
    "column", ["", "Unnamed: 0", "index", "__index_level_0__", "subject_id", "study_id", "stay_id", "hadm_id"]
)
def test_a_column_of_numbers_that_is_no_feature_is_refused_by_name(tmp_path, column):
    (tmp_path / "f.csv").write_text(f"{column},dicom_id,f0\n0,a,1\n1,b,2\n")
    with refused(path=tmp_path / "f.csv") as caught:
        cxr_features.read(tmp_path / "f.csv")
    assert repr(column) in str(caught.value)


def test_a_column_whose_first_rows_are_whole_numbers_is_read(tmp_path):
    rows = [f"{i},{0.25 if i == 500 else 0}" for i in range(501)]
    (tmp_path / "f.csv").write_text("\n".join(["dicom_id,f0", *rows]))
    assert cxr_features.read(tmp_path / "f.csv").feature_ME[-1] == 0.25


@pytest.mark.parametrize("ids", [[b"a", b"\xff"], [["a"], ["b"]], [1.0, 2.0]])
def test_ids_of_a_table_that_are_no_text_are_refused(tmp_path, ids):
    pl.DataFrame({"dicom_id": ids, "f0": [1.0, 2.0]}).write_parquet(tmp_path / "f.parquet")
    with refused(path=tmp_path / "f.parquet") as caught:
        cxr_features.read(tmp_path / "f.parquet")
    assert "dicom_id" in str(caught.value)


def test_damaged_or_renamed_arrays_are_refused_in_one_line(tmp_path):
    path = tmp_path / "f.npz"
    with path.open("wb") as opened:
        np.save(opened, _ROWS)
    with refused(path=path):
        cxr_features.read(path)
    ids = [str(i) for i in range(99)]
    np.savez_compressed(path, dicom_id=ids, features=np.random.default_rng(0).normal(size=(99, 9)))
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            cxr_features.read(path)  # a byte that does not matter
        except UserError as error:
            assert error.path == path and "\n" not in str(error)


def test_the_deviation_over_chunks_of_rows_is_that_of_all(monkeypatch):
    feature_JE = np.random.default_rng(0).normal(3, [1e-3, 1, 1e3], (50, 3)).astype(np.float32)
    monkeypatch.setattr(cxr_features, "_CHUNK_ROWS", 7)
    np.testing.assert_allclose(cxr_features._statistics(feature_JE).std_E, feature_JE.std(0, dtype=float), rtol=1e-6)


def test_a_file_of_another_dataset_is_told_apart_from_an_incomplete_one(shards, tmp_path):
    path = feature_cases.write(tmp_path / "f.npz", ["a", "b"])
    with refused(path=path) as caught:
        open_dataset(shards, "pheno", features=cxr_features.read(path))
    assert "none of its dicom_id values" in str(caught.value)


def test_x_rays_that_the_file_lacks_are_counted_and_not_named(features_config, tmp_path):
    names = feature_cases.names(features_config.data.dir, "pheno")
    of_test = records.dicom_ids(features_config.data.dir, "pheno", "test")["dicom_id"][:2].tolist()
    path = feature_cases.write(tmp_path / "some.npz", [name for name in names if name not in of_test])
    features_config.data.cxr_features = str(path)
    with refused(field="config.data.cxr_features", path=path, value=2) as caught:
        run_lib.open_run(features_config)
    assert "test split" in str(caught.value) and "none of" not in str(caught.value)
    assert not any(name in str(caught.value) for name in names)
    features_config.method = "uni_ehr"
    run_lib.open_run(features_config)  # which reads no X-ray


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data.cxr_features": ""}, "data.cxr_features"),
        ({"model.cxr_encoder": "resnet34"}, "data.cxr_features"),
        ({"data.cxr_features": "gs://bucket/features.npz"}, "data.cxr_features"),
        ({"init.cxr": "runs/other"}, "init.cxr"),
        ({"model.batch_norm": "frozen"}, "model.batch_norm"),
        *(({"method": method}, "model.cxr_encoder") for method in _NEED_MAPS),
    ],
)
def test_what_does_not_go_together_with_features_is_refused(features_config, changes, field):
    features_config.update_from_flattened_dict(changes)
    with refused(field=f"config.{field}"):
        config_lib.validate(features_config)


@pytest.mark.parametrize("method", [m for m in registry.METHODS if m not in _NEED_MAPS])
def test_every_other_method_reads_features_without_an_encoder(features_config, method):
    features_config.method, features_config.model.freeze_encoders = method, False
    config_lib.validate(features_config)
    sizes = {"ehr_hidden": 8, "fusion_hidden": 8}
    model = registry.build(method, 3, **sizes, cxr_kind="features", given_features=WIDTH)
    params = variable_shapes(model)["params"]
    assert "cxr_encoder" not in params
    if method == "uni_cxr":
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == WIDTH * 3 + 3
    elif method != "uni_ehr":
        assert params["projection"]["kernel"].shape == (WIDTH, 8)


def test_the_x_ray_stage_is_left_out_and_frozen_encoders_need_only_the_ehr_stage(fusion_config, file, tmp_path):
    config = fusion_config
    config.method, config.model.cxr_encoder, config.data.cxr_features = "early", "features", str(file)
    config_lib.validate(config)
    assert warm_start.staged(config) == ["ehr"]
    run = run_lib.open_run(config)
    given, stages = sources.find(run, tmp_path)
    assert (given, list(stages)) == ({}, ["ehr"])


def test_unified_standardises_both_kinds_of_x_rays_alike(features_config):
    features_config.method = "unified"
    dataset = run_lib.open_run(features_config).dataset
    assert dataset.cxr_dataset.cxr_statistics is dataset.cxr_statistics
    name = records.dicom_ids(features_config.data.dir, "radiology", "train")["dicom_id"][3]
    raw_E = feature_cases.of(name)
    expected_E = (raw_E - dataset.cxr_statistics.mean_E) / dataset.cxr_statistics.std_E
    np.testing.assert_allclose(dataset.cxr_dataset.cxr_features["train"].of_record(3)[0], expected_E, rtol=1e-5)


def test_a_run_on_features_trains_is_scored_and_travels_with_its_file(features_config, file, tmp_path):
    """Its weights are of a linear classifier, which finds a label that is among the features."""
    config, folder = features_config, tmp_path / "run"
    config.task, config.method, config.num_epochs, config.learning_rate = "radiology", "uni_cxr", 6, 0.3
    label_of = {}
    for split in schema.SPLITS:
        label_NK = records.index(config.data.dir, "radiology", split)["label"]
        names = records.dicom_ids(config.data.dir, "radiology", split)["dicom_id"]
        label_of |= dict(zip(names.tolist(), label_NK[:, 0].tolist()))
    features = [[1e4 * label, feature_cases.of(name)[0]] for name, label in label_of.items()]
    path = tmp_path / "planted.npz"
    np.savez(path, dicom_id=list(label_of), features=features)
    config.data.cxr_features = str(path)
    run = run_lib.open_run(config)
    workdir.claim(folder, run)
    train.train(run, folder)
    result = evaluate.evaluate(folder)
    assert result["subsets"]["all"]["auroc"][0] > 0.99 and result["num_params"] == 2 * 14 + 14
    assert result["cxr_encoder"] == "features"
    with np.load(folder / "predictions_test.npz") as stored:
        scores = stored["scores"]

    with refused(field="--cxr_features", path=file):
        predict.predict(folder, config.data.dir, cxr_features=file)  # of another width
    with refused(field="config.data.cxr_features", path=file):
        sources.reopen(folder, cxr_features=str(file))
    of_test = records.dicom_ids(config.data.dir, "radiology", "test")["dicom_id"].tolist()
    kept = [i for i, name in enumerate(label_of) if name in of_test]
    part = tmp_path / "test.npz"
    np.savez(part, dicom_id=np.array(list(label_of))[kept], features=np.array(features)[kept])
    np.testing.assert_array_equal(predict.predict(folder, config.data.dir, cxr_features=part)["scores"], scores)
    with refused(field="--cxr_features", path=part):
        predict.predict(folder, config.data.dir, "all", cxr_features=part)
    moved = path.rename(tmp_path / "moved.npz")
    with refused(field="--cxr_features"):
        evaluate.evaluate(folder)
    with refused(field="config.data.cxr_features"):
        predict.predict(folder, config.data.dir)
    np.testing.assert_array_equal(predict.predict(folder, config.data.dir, cxr_features=moved)["scores"], scores)
    sources.reopen(folder, cxr_features=str(moved))
    assert sources.reopen(folder).config.data.cxr_features == str(moved)  # which knows it now
    np.savez(moved, dicom_id=list(label_of), features=np.array(features) * 2)
    with refused(path=folder / "data.json"):
        sources.reopen(folder)


def test_a_run_on_x_rays_does_not_start_from_one_on_features(features_config, tmp_path):
    source = run_lib.open_run(features_config)
    features_config.update_from_flattened_dict({"model.cxr_encoder": "resnet34", "data.cxr_features": ""})
    with refused(field="config.init.cxr", value="features") as caught:
        sources.check(run_lib.open_run(features_config), "cxr", tmp_path, source)
    assert "config.model.cxr_encoder" in str(caught.value)


def test_a_run_that_reads_no_x_ray_needs_no_features(features_config, tmp_path):
    """As the stage of series, which inherits the field."""
    features_config.method = "uni_ehr"
    workdir.claim(tmp_path, run_lib.open_run(features_config))
    config = config_lib.load(tmp_path / "config.json")
    config.data.cxr_features = str(tmp_path / "gone.npz")
    config_lib.save(config, tmp_path / "config.json")
    assert not sources.reopen(tmp_path).dataset.cxr_features
    with refused(field="--cxr_features"):
        sources.reopen(tmp_path, cxr_features="more.npz")


def test_each_command_on_a_run_passes_the_files_new_place_on(tmp_path, monkeypatch):
    passed = []

    def reopen(workdir, devices, data_dir, cxr_features):
        passed.append(cxr_features)
        raise UserError("opened")

    monkeypatch.setattr(sources, "reopen", reopen)
    for command, arguments in ((evaluate.evaluate, []), (evaluate.write_robustness, []), (stay.explain, [1])):
        with refused():
            command(tmp_path, *arguments, cxr_features="new.npz")
    assert passed == ["new.npz"] * 3


def test_a_run_on_x_rays_refuses_features(tiny_config, tmp_path, file):
    tiny_config.method = "uni_cxr"
    workdir.claim(tmp_path, run_lib.open_run(tiny_config))
    with refused(field="--cxr_features"):
        sources.reopen(tmp_path, cxr_features=str(file))
    with refused(field="--cxr_features"):
        predict.predict(tmp_path, tiny_config.data.dir, cxr_features=file)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["medfuse", "early"])
def test_trials_on_features_are_swept(fusion_config, file, tmp_path, method):
    fusion_config.model.cxr_encoder, fusion_config.data.cxr_features = "features", str(file)
    fusion_config.method = method
    rows = sweep(fusion_config, tmp_path / "sweep", RATES, num_trials=2, lanes=2)
    assert [row["status"] for row in rows] == ["finished"] * 2


def test_the_pages_script_makes_a_file_that_a_run_reads(features_config, tmp_path):
    (block,) = re.findall(r"```python\n(\"\"\"embed.py.*?)```", _PAGE.read_text(), re.DOTALL)
    command = [sys.executable, "-c", block, features_config.data.dir, str(tmp_path / "features.npz")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    features_config.data.cxr_features = str(tmp_path / "features.npz")
    dataset = run_lib.open_run(features_config).dataset
    record = next(r for r in records.open_split(features_config.data.dir, "pheno", "train") if r["has_cxr"])
    raw_E = dataset.cxr_features["train"].feature_JE[0] * dataset.cxr_statistics.std_E + dataset.cxr_statistics.mean_E
    assert raw_E.shape == (256,)
    np.testing.assert_allclose(raw_E[0], record["image"][:16, :16].mean(), atol=1e-2)
