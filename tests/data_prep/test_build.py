"""The whole build: what comes out."""

import json
import os

import numpy as np
import polars as pl
import pytest
from build_cases import SECRET, SURNAME, file_contents, read_all
from raw_tables import image, image_path

from data_prep import build
from data_prep.ehr import discretize
from data_prep.images import pairing
from data_prep.images import store as image_store
from medfuse_jax import records, schema
from medfuse_jax.data.modalities import static


def test_records_index_and_manifest_agree(built):
    for task in build.DEFAULT_TASKS:
        manifest = records.manifest(built, task)
        assert manifest["channels"] == list(schema.CHANNELS) and manifest["labels"] == list(schema.TASKS[task].labels)
        for split, rows in read_all(built, task).items():
            index = records.index(built, task, split)
            assert index["stay_id"].tolist() == [row["stay_id"] for row in rows]
            assert index["length"].tolist() == [len(row["ehr"]) for row in rows]
            assert index["has_cxr"].tolist() == [row["image"] is not None for row in rows]
            assert index["label"].tolist() == [row["label"].tolist() for row in rows]
            counts = manifest["counts"]["splits"][split]
            assert (counts["records"], counts["paired"]) == (len(rows), index["has_cxr"].sum())
            assert sum(counts["positives"].values()) == index["label"].sum()


def test_stays_lengths_labels_and_images(built):
    pheno = read_all(built, "pheno")
    assert {split: [r["stay_id"] - 30_000_000 for r in rows] for split, rows in pheno.items()} == {
        "train": [0, 1, 2, 4, 7, 9, 10, 11],
        "val": [3, 5],
        "test": [6, 8],
    }
    by_stay = {r["stay_id"] - 30_000_000: r for rows in pheno.values() for r in rows}
    assert [len(by_stay[n]["ehr"]) for n in range(12)] == [20 + 11 * n for n in range(12)]
    # X-ray times are 10 + n hours; the sixth stay's later AP X-ray wins over its PA X-ray; the seventh's was too early.
    assert [by_stay[n]["dicom_id"] for n in range(9)] == [
        *(f"X-ray-000{n}-00" for n in range(6)),
        "image-0006-01",
        "",
        "",
    ]
    failure = [p.ccs for p in schema.PHENOTYPES].index(131)
    assert [by_stay[n]["label"][failure] for n in range(4)] == [1, 0, 1, 0]
    mortality = {r["stay_id"] - 30_000_000: r for rows in read_all(built, "mortality").values() for r in rows}
    assert sorted(mortality) == list(range(3, 12))
    assert {len(r["ehr"]) for r in mortality.values()} == {48}
    assert [n for n, r in sorted(mortality.items()) if r["label"][0]] == [8]
    assert mortality[6]["dicom_id"] == "image-0006-00"  # its later X-ray came after 48 h
    np.testing.assert_array_equal(mortality[6]["ehr"], by_stay[6]["ehr"][:48])


def test_images_go_where_their_patient_is(built, raw_tree):
    radiology = read_all(built, "radiology")
    assert {split: len(rows) for split, rows in radiology.items()} == {"train": 6, "val": 2, "test": 3}
    edema = schema.RADIOLOGY_LABELS.index("Edema")
    for rows in radiology.values():
        for row in rows:
            assert row["stay_id"] == -1 and row["ehr"].shape == (0, 76) and row["has_cxr"]
            assert row["label"][edema] == (row["dicom_id"].endswith("-00") and row["subject_id"] < 10_000_007)
            n, k = int(row["dicom_id"][5:9]), int(row["dicom_id"][10:])
            np.testing.assert_array_equal(
                row["image"], image_store.decode(raw_tree[1] / image_path(image(n, 0, k=k)), "squash")
            )
            assert np.isnan(row["age"]) == (n == 99)
    subjects = [
        {r["subject_id"] for task in build.DEFAULT_TASKS for r in read_all(built, task)[split]}
        for split in schema.SPLITS
    ]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])


def test_train_statistics_are_those_of_the_train_split(built):
    manifest = records.manifest(built, "pheno")
    steps = np.concatenate([r["ehr"] for r in records.open_split(built, "pheno", "train")]).astype(np.float64)
    channel = schema.CHANNELS.index("Heart Rate")
    assert manifest["train_mean"][channel] == pytest.approx(steps[:, channel].mean(), rel=1e-9)
    assert manifest["train_std"][channel] == pytest.approx(steps[:, channel].std(), rel=1e-9)
    assert manifest["train_std"][schema.CHANNELS.index("pH")] == 1


def test_no_free_text_and_for_the_owner_alone(built):
    forms = [text.encode(coding) for text in (SECRET, SURNAME) for coding in ("utf-8", "utf-32-le")]  # .npz: UTF-32
    for path in built.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.is_dir() or not any(form in path.read_bytes() for form in forms), path
    urgent = records.index(built, "pheno", "train")["admission_type"]
    assert urgent[0].encode("utf-32-le") in (built / "pheno/index_train.npz").read_bytes()  # so such texts are found


def test_texts_that_are_no_known_word_become_one_and_are_counted(built, raw_tree, tmp_path, capsys):
    by_stay = {r["stay_id"] - 30_000_000: r for rows in read_all(built, "pheno").values() for r in rows}
    for field in records.STATIC_TEXTS:
        assert {n for n, r in by_stay.items() if r[field] == "OTHER"} == {5, 11}, field
    of_images = {r["subject_id"]: r["gender"] for rows in read_all(built, "radiology").values() for r in rows}
    assert of_images[10_000_005] == "OTHER" and of_images[10_000_004] == "F" and of_images[10_000_099] == ""
    train, val = (records.index(built, "pheno", split) for split in ("train", "val"))
    assert all("OTHER" in known for known in static.categories(train).values())
    known, other = static.table(train, train)[[0, -1]]
    assert np.isfinite(other).all() and not np.array_equal(known[2:], other[2:])
    np.testing.assert_array_equal(static.table(val, train)[1][2:], other[2:])
    codes = records.manifest(built, "pheno")["counts"]["diagnosis_codes"]
    assert codes["rows_without_a_valid_code"] == 24 and codes["unmapped"] == []
    assert (
        json.loads((built / "audit.json").read_text())["tasks"]["pheno"]["diagnosis_codes"]["rows_without_a_valid_code"]
        == 24
    )
    build.build(raw_tree[0], None, tmp_path, tasks=["mortality"])
    said = capsys.readouterr().err
    assert "the gender of 2 stays is no known word" in said and "Smith" not in said


def test_workers_change_no_byte(raw_tree, id_lists, built, tmp_path):
    build.build(*raw_tree, tmp_path, timestep_h=1, workers=1, **id_lists)
    assert file_contents(tmp_path) == file_contents(built)


def test_an_event_or_image_that_is_too_late_stops_the_build(raw_tree, tmp_path, monkeypatch):
    discretized, paired = discretize.discretize, pairing.pair

    def with_longer_periods(found, first_stay, period_h, timestep_h):
        return discretized(found, first_stay, period_h + 1.0, timestep_h)

    monkeypatch.setattr(discretize, "discretize", with_longer_periods)
    with pytest.raises(AssertionError):
        build.build(*raw_tree, tmp_path / "a", tasks=["mortality"])
    monkeypatch.undo()
    monkeypatch.setattr(pairing, "pair", lambda stays, images, window_h: paired(stays, images, None))
    with pytest.raises(AssertionError):
        build.build(*raw_tree, tmp_path / "b", tasks=["mortality"])
    assert not (tmp_path / "a/mortality").exists() and not (tmp_path / "b/mortality").exists()


def test_strict_sees_nothing_after_the_prediction_time(raw_tree, id_lists, built, tmp_path):
    build.build(*raw_tree, tmp_path, profile="strict", timestep_h=1, tasks=["pheno"], **id_lists)
    strict = {r["stay_id"] - 30_000_000: r for rows in read_all(tmp_path, "pheno").values() for r in rows}
    paper = {r["stay_id"] - 30_000_000: r for rows in read_all(built, "pheno").values() for r in rows}
    assert sorted(strict) == sorted(paper)
    for n, record in strict.items():
        np.testing.assert_array_equal(record["ehr"], paper[n]["ehr"][:48])
    assert strict[6]["dicom_id"] == "image-0006-00" and paper[6]["dicom_id"] == "image-0006-01"


def test_without_images_nothing_is_paired_and_radiology_is_left_out(raw_tree, tmp_path, capsys):
    build.build(raw_tree[0], None, tmp_path, tasks=["mortality", "radiology"])
    assert not (tmp_path / "radiology").exists()
    assert not any(r["has_cxr"] for rows in read_all(tmp_path, "mortality").values() for r in rows)
    said = capsys.readouterr().err
    assert "radiology is left out" in said and "cohort: 12 of 12 ICU stays\n" in said


def test_counts_of_the_real_demo(real_data, tmp_path):
    """Stays, pairs and X-rays of the demo and its made-up X-rays, as the released pairing counts them."""
    gold = json.loads((real_data / "pipeline_gold/released_demo_subset.json").read_text())
    stay_split = {entry["stay_id"]: entry["split"] for entry in gold["stays"]}
    icu = pl.read_csv(real_data / "mimic-iv-demo-2.2/icu/icustays.csv.gz")
    for split in ("val", "test"):
        wanted = [stay_id for stay_id, name in stay_split.items() if name == split]
        subjects = icu.filter(pl.col("stay_id").is_in(wanted))["subject_id"].unique()
        (tmp_path / f"{split}.csv").write_text("".join(f"{s},1\n" for s in subjects))
    lists = {"val_ids": tmp_path / "val.csv", "test_ids": tmp_path / "test.csv"}
    tree = (real_data / "mimic-iv-demo-2.2", real_data / "mimic-cxr-fixture")
    build.build(*tree, tmp_path / "out", profile="released", timestep_h=1, **lists)
    totals = {}
    for task in build.DEFAULT_TASKS:
        index = {split: records.index(tmp_path / "out", task, split) for split in schema.SPLITS}
        totals[task] = (
            sum(len(i["stay_id"]) for i in index.values()),
            sum(int(i["has_cxr"].sum()) for i in index.values()),
        )
        for split, fields in index.items():
            assert all(stay_split.get(s, split) == split for s in fields["stay_id"].tolist())
    assert totals == {"pheno": (112, 50), "mortality": (54, 21), "radiology": (135, 135)}


def test_the_synthetic_cohort_builds(tmp_path):
    from data_prep.synthetic import tree

    tree.write(tmp_path / "raw", 40, 0)
    build.build(tmp_path / "raw/mimic-iv", tmp_path / "raw/mimic-cxr", tmp_path / "out")
    for task in build.DEFAULT_TASKS:
        assert sum(len(records.open_split(tmp_path / "out", task, split)) for split in schema.SPLITS) >= 10
    assert os.listdir(tmp_path / "out/.stages/images")
