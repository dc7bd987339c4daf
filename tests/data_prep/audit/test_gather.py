"""The audit: its numbers are the build's, it identifies nobody, and its checks fail on planted errors."""

import json
import re
import shutil

import damage
import numpy as np
import pytest
from raw_tables import at, chart, image, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build, rebuild
from data_prep.audit import gather, page, published
from data_prep.write import describe
from medfuse_jax import records, schema

HEART_RATE, EYE = 220045, 220739
ALL = tuple(schema.TASKS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """60 stays of 30 h to 89 h; the first 25 have X-rays; 20 have a heart rate that is clipped."""
    root = tmp_path_factory.mktemp("audit")
    stays, charts, codes, images = [], [], [], []
    for n in range(60):
        los_h = 30 + n
        died = {"deathtime": at(los_h)} if n % 4 == 0 else {}
        stays.append(stay(n, outtime=at(los_h), dischtime=at(los_h + 9), los=str(los_h / 24), **died))
        charts += [
            chart(n, h + 0.5, HEART_RATE, "360" if n < 20 and h == 5 else str(60 + n)) for h in range(2, los_h - 1)
        ]
        codes += [(n, "4019", 9)] * (n < 33) + [(n, "I2510", 10)] * (n < 12) + [(n, "U9999", 10)] * (n < 15)
        codes += [(n, "U8888", 10)] * (n < 3)
        # One class is seen in few stays but in many steps.
        eyes = {"To Pain": range(3), "To Speech": range(20), "Spontaneously": range(3, 60)}
        charts += [
            chart(n, h + i, EYE, text) for h in range(3, 25, 3) for i, text in enumerate(eyes) if n in eyes[text]
        ]
        if n < 25:
            images += [image(n, 10), image(n, 20, k=1)]
    stays += [stay(100 + n, first_careunit="CCU") for n in range(11)]
    iv = write_mimic_iv(root / "iv", stays, charts, (), codes)
    cxr = write_mimic_cxr(root / "cxr", images, size=(16, 16))
    val, test = root / "val.csv", root / "test.csv"
    val.write_text("".join(f"{10_000_000 + n}\n" for n in range(0, 60, 4)))
    test.write_text("".join(f"{10_000_000 + n}\n" for n in range(1, 60, 4)))
    build.build(iv, cxr, root / "out", timestep_h=1, tasks=ALL, val_ids=val, test_ids=test)
    return root / "out"


@pytest.fixture(scope="module")
def audit(built):
    return json.loads((built / "audit.json").read_text())


def test_the_flow_counts_what_each_filter_removed(audit):
    flow = {step["filter"]: (step["stays"], step["removed"]) for step in audit["tasks"]["mortality"]["cohort"]}
    assert flow["rows of icustays"] == (71, None)
    assert audit["tasks"]["mortality"]["stays_without_a_diagnosis"] == 27
    assert flow["no transfer between units"] == (60, 11)
    assert flow["48 h or longer"] == (42, 18)


def test_splits_and_pairs_are_beside_the_published_ones(audit):
    pheno = audit["tasks"]["pheno"]["splits"]
    assert {split: row["records"] for split, row in pheno["ours"].items()} == {"train": 30, "val": 15, "test": 15}
    assert {split: row["paired"] for split, row in pheno["ours"].items()} == {"train": 12, "val": "<10", "test": "<10"}
    assert pheno["ours"]["train"]["paired_share"] == 0.4 and pheno["ours"]["val"]["paired_share"] is None
    assert pheno["published"]["paired, paper"]["train"] == 8056
    later = audit["tasks"]["mortality"]["splits"]["published"]["paired, after the fix of 2023-03"]
    assert later == {"train": 4485, "val": 488, "test": 1242}


def test_prevalence_is_beside_table_4(audit):
    rows = {row["label"]: row for row in audit["tasks"]["pheno"]["labels"]}
    row = rows["Essential hypertension"]
    assert row["train"] == {"positive": 16, "of": 30, "share": round(16 / 30, 4)}
    assert row["paper"] == {"train": 0.418, "paired test": 0.433}
    assert rows["Shock"]["train"] == {"positive": "<10", "of": 30, "share": None}
    sums = np.array(list(published.PREVALENCE["pheno"].values())).sum(0)
    np.testing.assert_allclose(sums, [4.596, 5.461], atol=1e-9)  # the columns of Table 4


def test_unreadable_times_are_counted(audit, built):
    counts = records.manifest(built, "pheno")["counts"]["unreadable_times"]
    columns = ("icustays.intime", "icustays.outtime", "admissions.admittime", "admissions.dischtime")
    columns += ("admissions.deathtime", "patients.dod", "chartevents.charttime", "labevents.charttime")
    assert counts == dict.fromkeys(columns, 0)
    assert audit["tasks"]["mortality"]["unreadable_times"] == dict.fromkeys(columns, "<10")


def test_variables_lengths_and_raw_rows(audit, built):
    pheno = audit["tasks"]["pheno"]
    rate = next(row for row in pheno["variables"] if row["variable"] == "Heart Rate")
    assert rate["stays_observed"] == "≥51"
    steps = np.concatenate([r["ehr"] for split in schema.SPLITS for r in records.open_split(built, "pheno", split)])
    observed = steps[:, schema.CHANNELS.index("mask->Heart Rate")] > 0
    assert rate["steps_observed_share"] == round(float(observed.mean()), 4)
    values = steps[observed, schema.CHANNELS.index("Heart Rate")]
    assert rate["percentiles"]["50"] == pytest.approx(np.percentile(values, 50), abs=0.6)
    assert rate["percentiles"]["5"] == pytest.approx(np.percentile(values, 5), abs=0.6)
    assert pheno["event_rows"]["Heart Rate"]["of the kept, clipped"] == 20
    assert pheno["event_rows"]["pH"]["of the kept, clipped"] == "<10"  # 0
    assert pheno["event_rows"]["Heart Rate"]["kept"] == len(values)
    assert pheno["duplicate_events"] == "<10"
    missing = next(row for row in pheno["variables"] if row["variable"] == "pH")
    assert missing["stays_observed"] == "<10" and set(missing["percentiles"].values()) == {None}
    assert pheno["length_h"]["24-36"] == "<10" and pheno["length_h"]["48-72"] == 24


def test_a_class_of_few_stays_is_hidden_however_many_steps_it_has(audit, built):
    name = "Glascow coma scale eye opening"
    fact = records.manifest(built, "pheno")["counts"]["variables"][name]
    assert fact["classes"]["To Pain"] > 10 and fact["class_stays"]["To Pain"] == 3
    assert fact["class_stays"]["Spontaneously"] == 57 and fact["class_stays"]["To Speech"] == 20
    row = next(row for row in audit["tasks"]["pheno"]["variables"] if row["variable"] == name)
    # 'To Speech', the next smallest, is hidden too: the sum is known.
    assert row["classes"] | {"Spontaneously": None} == dict.fromkeys(row["classes"])
    assert row["classes"]["Spontaneously"] == fact["classes"]["Spontaneously"]


def test_common_codes_without_a_category_are_listed(audit):
    codes = audit["tasks"]["pheno"]["diagnosis_codes"]
    assert codes["unmapped"] == [{"code": "U9999", "version": 10, "stays": 15}]
    assert codes["unmapped_of_few_stays"] == "<10"


def test_every_time_is_checked(audit):
    for name, images in (("pheno", 25), ("mortality", 38), ("decompensation", 50), ("length_of_stay", 50)):
        check = audit["tasks"][name]["time_check"]
        assert check["violations"] == 0
        assert check["records"] == (42 if name == "mortality" else 60)
        if name != "mortality":
            assert check["images"] == images
    assert audit["patients"]["groups"] == [
        {"tasks": list(ALL), "by_split": {"train": 30, "val": 15, "test": 15}, "in_two_splits": 0}
    ]
    assert audit["patients"]["crossings"] == []


def test_a_violation_of_the_cut_off_fails(built):
    check = records.manifest(built, "pheno")["counts"]["time_check"]
    with pytest.raises(AssertionError, match="3 events or X-rays are later"):
        gather._time_check(check | {"violations": 3})


def test_the_page_shows_tasks_built_with_different_options(audit):
    pheno = audit["tasks"]["pheno"] | {"profile": "released"}
    html = page.page(audit | {"tasks": {"pheno": pheno, "mortality": audit["tasks"]["mortality"]}})
    assert "released (phenotyping), paper (in-hospital mortality)" in html
    assert "without the released phenotype table" in html


def test_nobody_can_be_identified(built):
    """No id, small count, path or script, and nothing loaded from elsewhere."""
    text, page = (built / "audit.json").read_text(), (built / "audit.html").read_text()
    for content in (text, page):
        assert not re.search(r"[123]00000\d\d|50000\d\d\d|image-\d{4}", content)
        assert "U8888" not in content and str(built.parent) not in content
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", page)
    for content in json.loads(text)["tasks"].values():
        for part in ("splits", "labels", "cohort", "length_h", "event_rows", "images"):
            assert not [n for n in _counts(content.get(part, {})) if 0 < n < 10], part
    assert (built / "audit.json").stat().st_mode & 0o077 == 0 and (built / "audit.html").stat().st_mode & 0o077 == 0


def _counts(node):
    if isinstance(node, dict):
        return [n for value in node.values() for n in _counts(value)]
    if isinstance(node, list):
        return [n for value in node for n in _counts(value)]
    return [node] if isinstance(node, int) else []


@pytest.mark.parametrize("split_sizes", [(60, 20, 31), (60, 5, 40), (60, 9, 9)])
@pytest.mark.parametrize("paired", [0, 4, 25])
@pytest.mark.parametrize("positives", [3, 12, 15])
def test_no_small_count_follows_by_subtraction_within_a_table(split_sizes, paired, positives):
    index = {}
    for split, n in zip(schema.SPLITS, split_sizes, strict=True):
        label = np.zeros((n, 1), np.int8)
        label[:positives] = 1
        index[split] = {"stay_id": np.arange(n), "has_cxr": np.arange(n) < paired, "label": label}
    ours = gather._splits("mortality", index)["ours"]
    (row,) = gather._labels("mortality", ["In-hospital mortality"], index, {}, ours)
    hidden = [split for split in schema.SPLITS if isinstance(ours[split]["records"], str)]
    assert len(hidden) != 1  # the sum would give one alone away
    for split in schema.SPLITS:
        _apart(ours[split]["records"], ours[split]["paired"])
        _apart(row[split]["of"], row[split]["positive"])
        if split in hidden:
            assert row[split]["share"] is None and ours[split]["paired_share"] is None
    test, paired_test = row["test"], row["paired test"]
    _apart(test["positive"], paired_test["positive"])
    _apart(paired_test["of"], paired_test["positive"])
    if all(isinstance(cell[key], int) for cell in (test, paired_test) for key in ("of", "positive")):
        _apart(test["of"] - test["positive"], paired_test["of"] - paired_test["positive"])


def _apart(whole, part):
    """Return whether neither count is below 10 and they do not differ by 1 to 9."""
    shown = [n for n in (whole, part) if isinstance(n, int)]
    assert all(n >= 10 for n in shown) and (len(shown) < 2 or whole == part or whole - part >= 10), (whole, part)


@pytest.mark.parametrize("unreadable", [1, 9])
def test_a_few_dropped_images_cannot_be_counted(unreadable):
    counts = {"rows of metadata": 100, "X-rays with ids": 100, "X-rays with labels": 50 + unreadable}
    images = gather._images(counts | {"X-rays readable": 50, "dicom_ids without a metadata row": ["a"]}, unreadable)
    assert images == {
        "rows of metadata": 100,
        "X-rays with ids": 100,
        "X-rays with labels; X-rays readable": 50,
        "X-rays that cannot be read": "<10",
    }


def test_prediction_times_of_labels_that_exclude_each_other():
    predictions = {"times": 100, "positives": {"0-1": 60, "1-2": 36, "2-3": 4}}
    shown = gather._prediction_times(predictions, {"0-1": 12, "1-2": 11, "2-3": 3}, 30)
    assert {label: row["positive"] for label, row in shown.items()} == {"0-1": 60, "1-2": None, "2-3": None}


@pytest.mark.parametrize(("died", "shown"), [(3, False), (9, False), (10, True), (30, True), (31, False), (40, False)])
def test_prediction_times_do_not_reveal_how_few_died_or_lived(died, shown):
    """Each death gives up to 24 positive hours."""
    row = gather._prediction_times({"times": 4000, "positives": {"died": 24 * died}}, {"died": died}, 40)["died"]
    positive, share = (24 * died, round(24 * died / 4000, 4)) if shown else (None, None)
    assert row == {"positive": positive, "of": 4000, "share": share}
    few = gather._prediction_times({"times": 400, "positives": {"died": 200}}, {"died": 4}, 9)["died"]
    assert few == {"positive": None, "of": None, "share": None}


def test_prediction_times_are_those_of_the_manifest(audit, built):
    for name in ("decompensation", "length_of_stay"):
        counts = records.manifest(built, name)["counts"]["predictions"]
        for k, row in enumerate(audit["tasks"][name]["labels"]):
            for split in schema.SPLITS:
                label = records.index(built, name, split)["label"][:, k]
                few = min(label.sum(), len(label) - label.sum()) < 10
                cell = row["prediction_times"][split]
                assert cell["of"] == counts[split]["times"] and (not few or cell["positive"] is None)
                assert few or name == "length_of_stay" or cell["positive"] == counts[split]["positives"][row["label"]]


def test_the_page_shows_every_part(built):
    page = (built / "audit.html").read_text()
    for expected in (
        "Data audit",
        "Phenotyping",
        "stays left",
        "42,628",
        "4,485",
        "18.8%",
        "0 violations",
        "<svg",
        "&lt;10",
        "Several tables or tasks together may reveal more",
    ):
        assert expected in page, expected
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_an_unchanged_build_is_not_audited_again(built):
    before = (built / "audit.html").stat().st_mtime_ns
    gather.write(built)
    assert (built / "audit.html").stat().st_mtime_ns == before


def test_a_patient_in_two_splits_fails(built, monkeypatch):
    index = records.index

    def leaking(out, name, split):
        fields = index(out, name, split)
        return fields | {"subject_id": np.append(fields["subject_id"], 10_000_001)} if name == "radiology" else fields

    monkeypatch.setattr(records, "index", leaking)
    with pytest.raises(AssertionError, match="in two splits"):
        gather.gather(built)


@pytest.mark.parametrize("num_moved", [5, 12])
def test_patients_in_other_splits_of_another_source_are_counted(audit, num_moved):
    options = {"val_ids": None, "test_ids": None, "seed": 0}
    manifests = {
        name: {"options": options, "source": {"mimic_iv_files": [name]}, "profile": "paper"}
        for name in ("pheno", "radiology")
    }
    ids = {"train": np.arange(40), "val": np.arange(40, 60), "test": np.arange(60, 80)}
    moved = {split: np.roll(np.arange(80), num_moved)[values] for split, values in ids.items()}
    indexes = {
        name: {split: {"subject_id": values} for split, values in by_split.items()}
        for name, by_split in (("pheno", ids), ("radiology", moved))
    }
    patients = gather._patients(manifests, indexes)
    crossing = 3 * num_moved  # as many leave each of the three splits
    assert patients["crossings"] == [{"between": [["pheno"], ["radiology"]], "patients": crossing}]
    assert [group["tasks"] for group in patients["groups"]] == [["pheno"], ["radiology"]]
    html = page.page(audit | {"patients": patients})
    assert f"{crossing} are in one split of phenotyping and in another of radiology findings" in html


def test_a_build_from_other_tables_warns(tmp_path, monkeypatch, capsys):
    manifests = {
        tmp_path / name: {"options": {}, "source": {"mimic_iv_files": [tables]}}
        for name, tables in (("pheno", "a"), ("radiology", "b"))
    }
    monkeypatch.setattr(rebuild, "read_manifest", lambda folder: manifests.get(folder, {}))
    rebuild.warn_of_others(tmp_path, ["mortality"], {}, {"mimic_iv_files": ["b"]})
    err = capsys.readouterr().err
    assert f"warning: {tmp_path / 'pheno'} was built from other tables" in err and "other options" not in err
    assert f"{tmp_path / 'radiology'} was" not in err


def test_a_dataset_of_another_version_is_reported_and_skipped(built, monkeypatch):
    monkeypatch.setattr(gather, "FACTS_VERSION", describe.VERSION + 1)
    audit = gather.gather(built)
    assert not audit["tasks"] and set(audit["not_audited"]) == set(ALL)
    assert "build it again" in page.page(audit)


def test_a_dataset_with_a_damaged_index_or_manifest_is_reported_and_skipped(built, tmp_path):
    shutil.copytree(built, tmp_path / "out")
    damage.flip(tmp_path / "out/pheno/index_val.npz")
    (tmp_path / "out/decompensation/index_test.npz").unlink()
    damage.cut(tmp_path / "out/length_of_stay/manifest.json")
    audit = gather.gather(tmp_path / "out")
    assert set(audit["not_audited"]) == {"pheno", "decompensation", "length_of_stay"}
    assert audit["not_audited"]["pheno"] == "its index is damaged; build it again"
    assert set(audit["tasks"]) == {"mortality", "radiology"}
