"""The output of a whole build."""

import json

import numpy as np
import polars as pl
import pytest
from build_cases import HEART_RATE, SECRET, SURNAME, assert_same_as_tfds, by_stay, file_contents, read_all
from raw_tables import at, chart, image, image_path, stay, write_mimic_cxr, write_mimic_iv
from refusals import refused

from data_prep import build
from data_prep.ehr import discretize
from data_prep.images import decode as decoding
from data_prep.images import pairing
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
    stays = by_stay(built, "pheno")
    assert [len(stays[n]["ehr"]) for n in range(12)] == [20 + 11 * n for n in range(12)]
    # Stay 6 has a later AP and an even later PA X-ray; stay 7's was taken before it began.
    assert [stays[n]["dicom_id"] for n in range(9)] == [
        *(f"image-000{n}-00" for n in range(6)),
        "image-0006-01",
        "",
        "",
    ]
    failure = [p.ccs for p in schema.PHENOTYPES].index(131)
    assert [stays[n]["label"][failure] for n in range(4)] == [1, 0, 1, 0]
    mortality = by_stay(built, "mortality")
    assert sorted(mortality) == list(range(3, 12))
    assert {len(r["ehr"]) for r in mortality.values()} == {48}
    assert [n for n, r in sorted(mortality.items()) if r["label"][0]] == [8]
    assert mortality[6]["dicom_id"] == "image-0006-00"  # its later X-ray came after 48 h
    np.testing.assert_array_equal(mortality[6]["ehr"], stays[6]["ehr"][:48])


def test_images_are_in_the_split_of_their_patient(built, raw_tree):
    radiology = read_all(built, "radiology")
    assert {split: len(rows) for split, rows in radiology.items()} == {"train": 6, "val": 2, "test": 3}
    edema = schema.RADIOLOGY_LABELS.index("Edema")
    for rows in radiology.values():
        for row in rows:
            assert row["stay_id"] == -1 and row["ehr"].shape == (0, 76) and row["has_cxr"]
            assert row["label"][edema] == (row["dicom_id"].endswith("-00") and row["subject_id"] < 10_000_007)
            n, k = map(int, row["dicom_id"].split("-")[1:])
            np.testing.assert_array_equal(
                row["image"], decoding.decode(raw_tree[1] / image_path(image(n, 0, k=k)), "squash")
            )
            assert np.isnan(row["age"]) == (n == 99)
    subjects = [
        {r["subject_id"] for task in build.DEFAULT_TASKS for r in read_all(built, task)[split]}
        for split in schema.SPLITS
    ]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])


def test_records_may_hold_all_x_rays_of_a_stay(built, raw_tree, id_lists, tmp_path):
    build.build(*raw_tree, tmp_path, timestep_h=1, tasks=["pheno", "mortality"], images="all", **id_lists)
    for task in ("pheno", "mortality"):
        assert records.manifest(tmp_path, task)["images"] == "all" and "images" not in records.manifest(built, task)
        assert_same_as_tfds(tmp_path, task)
        before, now = by_stay(built, task), by_stay(tmp_path, task)
        assert before.keys() == now.keys()
        for n, record in now.items():
            names = record["dicom_id"].split()
            assert len(record["images"]) == len(record["cxr_time_h"]) == len(names)
            assert names[-1:] == before[n]["dicom_id"].split() and record["has_cxr"] == before[n]["has_cxr"]
            np.testing.assert_array_equal(record["image"], before[n]["image"])
            np.testing.assert_array_equal(record["ehr"], before[n]["ehr"])
        for split, rows in read_all(tmp_path, task).items():
            times = records.image_times(tmp_path, task, split)
            assert times["num_images"].tolist() == [len(row["images"]) for row in rows]
            np.testing.assert_array_equal(
                times["cxr_time_h"], np.concatenate([np.zeros(0), *(r["cxr_time_h"] for r in rows)])
            )
    pheno, mortality = by_stay(tmp_path, "pheno")[6], by_stay(tmp_path, "mortality")[6]
    assert pheno["dicom_id"] == "image-0006-00 image-0006-01" and pheno["cxr_time_h"].tolist() == [16, 70]
    assert mortality["cxr_time_h"].tolist() == [16]  # the other came after 48 h
    with refused(field="--images", value="every"):
        build.build(*raw_tree, tmp_path, images="every")


def test_train_statistics_are_over_the_train_split(built):
    manifest = records.manifest(built, "pheno")
    steps = np.concatenate([r["ehr"] for r in records.open_split(built, "pheno", "train")]).astype(np.float64)
    channel = schema.CHANNELS.index("Heart Rate")
    assert manifest["train_mean"][channel] == pytest.approx(steps[:, channel].mean(), rel=1e-9)
    assert manifest["train_std"][channel] == pytest.approx(steps[:, channel].std(), rel=1e-9)
    assert manifest["train_std"][schema.CHANNELS.index("pH")] == 1


def test_output_is_for_the_owner_only_and_has_no_free_text(built):
    forms = [text.encode(coding) for text in (SECRET, SURNAME) for coding in ("utf-8", "utf-32-le")]  # .npz: UTF-32
    for path in built.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.is_dir() or not any(form in path.read_bytes() for form in forms), path
    urgent = records.index(built, "pheno", "train")["admission_type"]
    assert (
        urgent[0].encode("utf-32-le") in (built / "pheno/index_train.npz").read_bytes()
    )  # so the search finds such texts


def test_unknown_words_become_other_and_are_counted(built, raw_tree, tmp_path, capsys):
    for field in schema.STATIC_TEXTS:
        assert {n for n, r in by_stay(built, "pheno").items() if r[field] == "OTHER"} == {5, 11}, field
    gender = {r["subject_id"]: r["gender"] for rows in read_all(built, "radiology").values() for r in rows}
    assert gender[10_000_005] == "OTHER" and gender[10_000_004] == "F" and gender[10_000_099] == ""
    train, val = (records.index(built, "pheno", split) for split in ("train", "val"))
    assert all("OTHER" in known for known in static.categories(train).values())
    known, other = static.table(train, train)[[0, -1]]
    assert np.isfinite(other).all() and not np.array_equal(known[2:], other[2:])
    np.testing.assert_array_equal(static.table(val, train)[1][2:], other[2:])
    codes = records.manifest(built, "pheno")["counts"]["diagnosis_codes"]
    assert codes["rows_without_a_valid_code"] == 24 and codes["unmapped"] == []
    audit = json.loads((built / "audit.json").read_text())["tasks"]["pheno"]
    assert audit["diagnosis_codes"]["rows_without_a_valid_code"] == 24
    build.build(raw_tree[0], None, tmp_path, tasks=["mortality"])
    printed = capsys.readouterr().err
    assert "2 stays have an unknown gender" in printed and "Smith" not in printed


def test_workers_change_no_byte(raw_tree, id_lists, built, tmp_path):
    build.build(*raw_tree, tmp_path, timestep_h=1, workers=1, **id_lists)
    assert file_contents(tmp_path) == file_contents(built)


def test_a_late_event_or_image_stops_the_build(raw_tree, tmp_path, monkeypatch):
    discretized, paired = discretize.discretize, pairing.pair

    def with_longer_periods(bucket, first_stay, period_h, timestep_h):
        return discretized(bucket, first_stay, period_h + 1.0, timestep_h)

    monkeypatch.setattr(discretize, "discretize", with_longer_periods)
    with pytest.raises(AssertionError):
        build.build(*raw_tree, tmp_path / "a", tasks=["mortality"])
    monkeypatch.undo()
    monkeypatch.setattr(pairing, "pair", lambda stays, images, window_h: paired(stays, images, None))
    with pytest.raises(AssertionError):
        build.build(*raw_tree, tmp_path / "b", tasks=["mortality"])
    assert not (tmp_path / "a/mortality").exists() and not (tmp_path / "b/mortality").exists()


def test_strict_uses_nothing_after_the_window(raw_tree, id_lists, built, tmp_path):
    build.build(*raw_tree, tmp_path, profile="strict", timestep_h=1, tasks=["pheno"], **id_lists)
    strict, paper = by_stay(tmp_path, "pheno"), by_stay(built, "pheno")
    assert sorted(strict) == sorted(paper)
    for n, record in strict.items():
        np.testing.assert_array_equal(record["ehr"], paper[n]["ehr"][:48])
    assert strict[6]["dicom_id"] == "image-0006-00" and paper[6]["dicom_id"] == "image-0006-01"


def test_pairing_until_outtime_is_marked_and_concerns_mortality_alone(raw_tree, id_lists, built, tmp_path, capsys):
    build.build(*raw_tree, tmp_path, timestep_h=1, pairing="until_outtime", **id_lists)
    assert by_stay(tmp_path, "mortality")[6]["dicom_id"] == "image-0006-01"  # taken at 70 h
    ours, usual = file_contents(tmp_path), file_contents(built)
    changed = {name.split("/")[0] for name in usual if ours[name] != usual[name] and "manifest" not in name}
    assert changed == {"mortality", "audit.html", "audit.json"}
    assert "for comparison" in capsys.readouterr().err
    audit = json.loads(ours["audit.json"])["tasks"]
    for task in build.DEFAULT_TASKS:
        pairing = "until_outtime" if task == "mortality" else "in_window"
        assert records.manifest(tmp_path, task)["pairing"] == audit[task]["pairing"] == pairing
        assert records.manifest(built, task)["pairing"] == "in_window"
    assert b"for comparison alone" in ours["audit.html"] and b"for comparison alone" not in usual["audit.html"]
    assert "of X-rays: the end of the stay" in audit["mortality"]["time_check"]["cut_off"]


def test_nothing_from_after_death_enters_a_record_except_in_released(tmp_path):
    """Stay 0 dies at 30 h of 60; it has a heart rate and an X-ray at 20 h and 40 h. The flag of stay 1 is wrong."""
    stays = [
        stay(0, outtime=at(60), los="2.5", deathtime=at(30), dod="2150-01-02", hospital_expire_flag=1),
        stay(1, hospital_expire_flag=1),
    ]
    charts = [chart(n, h, HEART_RATE, "70") for n in range(2) for h in (20, 40)]
    iv = write_mimic_iv(tmp_path / "iv", stays, charts, codes=[(0, "4019", 9), (1, "4019", 9)])
    cxr = write_mimic_cxr(tmp_path / "cxr", [image(0, 20), image(0, 40, k=1)])
    tasks = ["pheno", "mortality", "decompensation", "length_of_stay"]
    for profile, steps, dicom_id in (("paper", [19], "00"), ("strict", [19], "00"), ("released", [19, 39], "01")):
        out = tmp_path / profile
        build.build(iv, cxr, out, profile=profile, timestep_h=1, tasks=tasks)
        for task in tasks:
            found = by_stay(out, task)
            counts = records.manifest(out, task)["counts"]
            assert counts["deaths_unlike_hospital_expire_flag"] == 1
            if profile == "strict" and not schema.TASKS[task].hourly:  # its outcome is known before 48 h
                assert sorted(found) == [1]
                assert {s["filter"]: s["stays"] for s in counts["cohort"]}["alive at the end of the window"] == 1
                continue
            assert counts.get("deaths_in_the_window") == (1 if profile == "paper" and task == "mortality" else None)
            observed = found[0]["ehr"][:, schema.CHANNELS.index("mask->Heart Rate")]
            assert observed.nonzero()[0].tolist() == steps and found[0]["dicom_id"].endswith(dicom_id)
            if schema.TASKS[task].hourly and profile != "released":
                assert found[0]["label_time_h"].max() == 30


def test_without_images_no_stay_is_paired_and_radiology_is_left_out(raw_tree, tmp_path, capsys):
    build.build(raw_tree[0], None, tmp_path, tasks=["mortality", "radiology"])
    assert not (tmp_path / "radiology").exists()
    assert not any(r["has_cxr"] for rows in read_all(tmp_path, "mortality").values() for r in rows)
    printed = capsys.readouterr().err
    assert "radiology is left out" in printed and "cohort: 12 of 12 ICU stays\n" in printed


def test_counts_of_the_real_demo(real_data, tmp_path):
    """Stays, pairs and X-rays of the demo with synthetic X-rays, as the released code counts them."""
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
