"""The audit: that its numbers are the build's, that nobody can be read from it, and that its checks bite."""

import json
import re
import shutil

import damage
import numpy as np
import pytest
from raw_tables import at, chart, image, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.audit import gather, published
from data_prep.write import describe
from medfuse_jax import records, schema

HEART_RATE, EYE = 220045, 220739
ALL = tuple(schema.TASKS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """60 stays of 30 h to 89 h; the first 25 have an X-ray; 20 have a heart rate that is clipped."""
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
        # Of the classes, one is seen in few stays but in many steps.
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
def found(built):
    return json.loads((built / "audit.json").read_text())


def test_splits_do_not_tell_how_few_a_filter_removed():
    """The records of a task with 1 to 9 stays less than a filter left: the splits must not add up to them."""
    index = {
        split: {"stay_id": np.arange(n), "has_cxr": np.arange(n) < n // 2}
        for split, n in (("train", 60), ("val", 20), ("test", 31))
    }
    rows = gather._splits("pheno", index, [140, 111])["ours"]
    assert [row["records"] for row in rows.values()] == [60, 20, 31]
    rows = gather._splits("pheno", index, [140, 112])["ours"]
    assert [row["records"] for row in rows.values()] == [60, "≥10", 31]
    assert rows["val"]["paired_share"] is None


def test_every_record_of_images_has_one():
    index = {split: {"stay_id": np.full(30, -1), "has_cxr": np.ones(30, bool)} for split in schema.SPLITS}
    rows = gather._splits("radiology", index, [])["ours"].values()
    assert [row["paired"] for row in rows] == [30] * 3


def test_the_flow_says_what_each_filter_removed(found):
    flow = {step["filter"]: (step["stays"], step["removed"]) for step in found["tasks"]["mortality"]["cohort"]}
    assert flow["rows of icustays"] == (71, None)
    assert flow["no transfer between units"] == (60, 11)
    assert flow["48 h or longer"] == (42, 18)


def test_splits_and_pairs_beside_the_published_ones(found):
    pheno = found["tasks"]["pheno"]["splits"]
    assert {split: row["records"] for split, row in pheno["ours"].items()} == {"train": 30, "val": 15, "test": 15}
    assert pheno["ours"]["train"]["paired"] == 12
    assert {pheno["ours"][split]["paired"] for split in ("val", "test")} == {"<10"}
    assert pheno["published"]["paired, paper"]["train"] == 8056
    later = found["tasks"]["mortality"]["splits"]["published"]["paired, after the fix of 2023-03"]
    assert later == {"train": 4485, "val": 488, "test": 1242}


def test_prevalence_beside_table_4(found):
    rows = {row["label"]: row for row in found["tasks"]["pheno"]["labels"]}
    row = rows["Essential hypertension"]
    assert row["train"] == {"positive": 16, "of": 30, "share": round(16 / 30, 4)}
    assert row["paper"] == {"train": 0.418, "paired test": 0.433}
    assert rows["Shock"]["train"] == {"positive": "<10", "of": 30, "share": None}
    sums = np.array(list(published.PREVALENCE["pheno"].values())).sum(0)
    np.testing.assert_allclose(sums, [4.596, 5.461], atol=1e-9)  # of Table 4's columns


def test_times_that_could_not_be_read(found, built):
    counts = records.manifest(built, "pheno")["counts"]["unreadable_times"]
    assert counts == dict.fromkeys(
        ("admissions.admittime", "admissions.dischtime", "admissions.deathtime", "patients.dod"), 0
    )
    assert found["tasks"]["mortality"]["unreadable_times"] == dict.fromkeys(counts, "<10")


def test_variables_lengths_and_raw_rows(found, built):
    pheno = found["tasks"]["pheno"]
    rate = next(row for row in pheno["variables"] if row["variable"] == "Heart Rate")
    assert rate["stays_observed"] == "≥51"
    steps = np.concatenate([r["ehr"] for split in schema.SPLITS for r in records.open_split(built, "pheno", split)])
    seen = steps[:, schema.CHANNELS.index("mask->Heart Rate")] > 0
    assert rate["steps_observed_share"] == round(float(seen.mean()), 4)
    values = steps[seen, schema.CHANNELS.index("Heart Rate")]
    assert rate["percentiles"]["50"] == pytest.approx(np.percentile(values, 50), abs=0.6)
    assert rate["percentiles"]["5"] == pytest.approx(np.percentile(values, 5), abs=0.6)
    assert pheno["event_rows"]["Heart Rate"]["of the kept, clipped"] == 20
    assert pheno["event_rows"]["pH"]["of the kept, clipped"] == "<10"  # none, which is no other than a few
    assert pheno["event_rows"]["Heart Rate"]["kept"] == len(values)
    assert pheno["events_given_twice"] == "<10"
    missing = next(row for row in pheno["variables"] if row["variable"] == "pH")
    assert missing["stays_observed"] == "<10" and set(missing["percentiles"].values()) == {None}
    assert pheno["length_h"]["24-36"] == "<10" and pheno["length_h"]["48-72"] == 24


def test_a_class_of_few_stays_is_hidden_whatever_its_steps(found, built):
    name = "Glascow coma scale eye opening"
    fact = records.manifest(built, "pheno")["counts"]["variables"][name]
    assert fact["classes"]["To Pain"] > 10 and fact["class_stays"]["To Pain"] == 3
    assert fact["class_stays"]["Spontaneously"] == 57 and fact["class_stays"]["To Speech"] == 20
    row = next(row for row in found["tasks"]["pheno"]["variables"] if row["variable"] == name)
    # Without the next smallest, the observed steps less the others would tell it.
    assert row["classes"] | {"Spontaneously": None} == dict.fromkeys(row["classes"])
    assert row["classes"]["Spontaneously"] == fact["classes"]["Spontaneously"]


def test_codes_that_map_to_nothing_and_where_the_routes_differ(found):
    codes = found["tasks"]["pheno"]["diagnosis_codes"]
    assert codes["unmapped"] == [{"code": "U9999", "version": 10, "stays": 15}]
    assert codes["unmapped_of_few_stays"] == "<10"
    other = codes["against"]["gem, last row"]
    assert other["codes"] == [{"code": "I2510", "version": 10, "stays": 12, "here": [101], "there": []}]
    assert other["stays_with_all_labels_equal"] == 48


def test_every_time_was_checked(found):
    for name in ("pheno", "mortality", "decompensation", "length_of_stay"):
        check = found["tasks"][name]["time_check"]
        assert check["violations"] == 0
        assert check["records"] == (42 if name == "mortality" else 60)
        paired = [row["paired"] for row in found["tasks"][name]["splits"]["ours"].values()]
        hidden = any(isinstance(count, str) for count in paired)
        # Beside the splits that are shown, the sum would tell what is hidden.
        assert check["images"] == (None if hidden else {"pheno": 25}.get(name, 50))
        assert (check["hours_from_cxr_to_cut_off"] is None) == hidden  # it adds up to the same
    assert found["tasks"]["mortality"]["time_check"]["images"] is None
    assert found["patients"]["groups"] == [
        {"tasks": list(ALL), "by_split": {"train": 30, "val": 15, "test": 15}, "in_two_splits": 0}
    ]
    assert found["patients"]["crossings"] == []


def test_nobody_can_be_read_from_it(built):
    """No id, no small count, no path, no script, nothing from elsewhere."""
    text, page = (built / "audit.json").read_text(), (built / "audit.html").read_text()
    for content in (text, page):
        assert not re.search(r"[123]00000\d\d|50000\d\d\d|X-ray-\d{4}", content)
        assert "U8888" not in content and str(built.parent) not in content
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", page)
    audit_of_counts = json.loads(text)
    for content in audit_of_counts["tasks"].values():
        for part in ("splits", "labels", "cohort", "length_h", "event_rows", "images"):
            small = [n for n in _counts(content.get(part, {})) if 0 < n < 10]
            assert not small, part
    assert (built / "audit.json").stat().st_mode & 0o077 == 0 and (built / "audit.html").stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Groups that differ by few: 60 stays as above, 57 patients, 3 stays without an event, 4 too short to predict at.

    Of the 30 stays in test, 25 have an X-ray; all but 3 admissions have one and the same unmapped code.
    """
    root = tmp_path_factory.mktemp("awkward")
    stays = []
    for n in range(67):
        los_h = 4 if n >= 63 else 30 + n % 30
        again = {"subject_id": 10_000_000 + n - 54} if 57 <= n < 60 else {}
        stays.append(stay(n, outtime=at(los_h), dischtime=at(los_h + 9), los=str(los_h / 24), **again))
    hours = [(n, h) for n in range(67) if not 60 <= n < 63 for h in (range(1, 4) if n >= 63 else range(2, 30))]
    charts = [chart(n, h, HEART_RATE, "80") | {"subject_id": stays[n]["subject_id"]} for n, h in hours]
    iv = write_mimic_iv(root / "iv", stays, charts, (), [(n, "U9999", 10) for n in range(64)])
    test = range(0, 60, 2)
    cxr = write_mimic_cxr(root / "cxr", [image(n, 3) for n in [*test[:25], *range(1, 40, 2)]], size=(16, 16))
    (root / "test.csv").write_text("".join(f"{10_000_000 + n}\n" for n in test))
    (root / "val.csv").write_text("".join(f"{10_000_000 + n}\n" for n in range(1, 24, 2)))
    build.build(iv, cxr, root / "out", timestep_h=1, tasks=ALL, val_ids=root / "val.csv", test_ids=root / "test.csv")
    alone = {}
    for name in ("pheno", "mortality", "decompensation", "length_of_stay"):  # beside each other, some are left out
        shutil.copytree(root / "out" / name, root / name / name)
        alone[name] = gather.gather(root / name)
    return {name: (content["tasks"][name], content["patients"]) for name, content in alone.items()}


@pytest.mark.parametrize("name", ["pheno", "mortality", "decompensation", "length_of_stay"])
def test_no_small_count_follows_by_subtraction(found, awkward, name):
    """Of all that counts stays, records, patients or X-rays of a task, and of what adds up to such a number."""
    for content, patients in ((found["tasks"][name], found["patients"]), awkward[name]):
        check, ours, labels = content["time_check"], content["splits"]["ours"], content["labels"]
        codes = content.get("diagnosis_codes", {"against": {}, "unmapped": []})
        others = codes["against"].values()
        totals = [step["stays"] for step in content["cohort"]] + [check["records"], *(o["stays"] for o in others)]
        totals += [_sum(content["length_h"]), _sum(check["hours_from_latest_event_to_cut_off"])]
        totals += [_sum({split: row["records"] for split, row in ours.items()})]
        parts = [row["stays"] for row in codes["unmapped"]] + [row["stays_observed"] for row in content["variables"]]
        for other in others:
            parts += [other["stays_with_all_labels_equal"], *(row["stays"] for row in other["codes"])]
        for part in (None, *parts):
            _apart([*totals, part])
        by_split = patients["groups"][0]["by_split"]
        for split, row in ours.items():
            _apart([row["records"], *(label[split]["of"] for label in labels), row["paired"]])
            if patients["groups"][0]["tasks"] == [name]:
                _apart([row["records"], by_split[split]])
        _apart([ours["test"]["records"], *(label["paired test"]["of"] for label in labels)])
        for label in labels:
            test, paired = label["test"], label["paired test"]
            _apart([paired["of"], paired["positive"]])
            _apart([test["positive"], paired["positive"]])
            if all(isinstance(n, int) for n in (test["of"], test["positive"], paired["of"], paired["positive"])):
                _apart([test["of"] - test["positive"], paired["of"] - paired["positive"]])
        if any(isinstance(row["paired"], str) for row in ours.values()):  # then nothing may tell what they add up to
            assert check["images"] is None and check["hours_from_cxr_to_cut_off"] is None


def _sum(shown):
    """What a group adds up to; None where a part of it is hidden."""
    return sum(shown.values()) if all(isinstance(n, int) for n in shown.values()) else None


def _apart(shown):
    """No two numbers differ by 1 to 9, and no lower bound (≥51) tells a number that does."""
    numbers = sorted({n for n in shown if isinstance(n, int)})
    numbers += [int(n[1:]) + 9 for n in shown if isinstance(n, str) and n.startswith("≥") and n != "≥10"]
    close = [(a, b) for a in numbers for b in numbers if 0 < b - a < 10]
    assert not close, close


def test_what_may_not_be_subtracted_is_hidden(awkward):
    pheno, patients = awkward["pheno"]
    assert [step["stays"] for step in pheno["cohort"]] == [64]  # 67 less 3: no step that removed so few is shown
    assert pheno["diagnosis_codes"]["against"]["gem, last row"]["stays"] == "≥10"
    assert pheno["splits"]["ours"]["test"] == {"records": 30, "paired": "≥21", "paired_share": None}
    assert {row["paired test"]["of"] for row in pheno["labels"]} == {"≥21"}
    assert patients["groups"][0]["by_split"] == {"train": 20, "val": "≥10", "test": "≥10"}
    assert awkward["length_of_stay"][0]["time_check"]["records"] == "≥10"  # 64, of which 4 are too short for it


@pytest.mark.parametrize("few", [1, 5, 9])
def test_images_that_were_left_out_cannot_be_counted(built, monkeypatch, few):
    manifest = records.manifest

    def with_some_unreadable(out, name):
        found = manifest(out, name)
        if name == "radiology":
            found["counts"]["images"] |= {"X-rays with labels": 50 + few, "X-rays readable": 50}
        return found

    monkeypatch.setattr(records, "manifest", with_some_unreadable)
    images = gather.gather(built)["tasks"]["radiology"]["images"]
    assert images["X-rays readable"] == 50 and images["X-rays with labels"] == "≥10"


def test_hours_of_labels_that_exclude_each_other(built):
    predictions = {"times": 100, "positives": {"0-1": 60, "1-2": 36, "2-3": 4}}
    shown = gather._of_times(predictions, {"0-1": 12, "1-2": 11, "2-3": 3}, 30)
    assert {label: row["positive"] for label, row in shown.items()} == {"0-1": 60, "1-2": None, "2-3": None}


@pytest.mark.parametrize(("died", "shown"), [(3, False), (9, False), (10, True), (30, True), (31, False), (40, False)])
def test_hours_do_not_tell_how_few_died_or_lived(died, shown):
    """Each death gives up to 24 positive hours: 72 of three."""
    row = gather._of_times({"times": 4000, "positives": {"died": 24 * died}}, {"died": died}, 40)["died"]
    assert (
        row == {"positive": 24 * died, "of": 4000, "share": round(24 * died / 4000, 4)}
        if shown
        else ({"positive": None, "of": 4000, "share": None})
    )
    few = gather._of_times({"times": 400, "positives": {"died": 200}}, {"died": 4}, 9)["died"]
    assert few == {"positive": None, "of": None, "share": None}


def test_hours_are_shown_where_the_stays_are(found, built):
    for name in ("decompensation", "length_of_stay"):
        counts = records.manifest(built, name)["counts"]["predictions"]
        for k, row in enumerate(found["tasks"][name]["labels"]):
            for split in schema.SPLITS:
                stays = records.index(built, name, split)["label"][:, k].sum()
                few = min(stays, len(records.index(built, name, split)["label"]) - stays) < 10
                cell = row["prediction_times"][split]
                assert cell["of"] == counts[split]["times"] and (not few or cell["positive"] is None)
                assert few or name == "length_of_stay" or cell["positive"] == counts[split]["positives"][row["label"]]


def _counts(node):
    if isinstance(node, dict):
        return [n for value in node.values() for n in _counts(value)]
    if isinstance(node, list):
        return [n for value in node for n in _counts(value)]
    return [node] if isinstance(node, int) else []


def test_the_page_shows_each_part(built):
    page = (built / "audit.html").read_text()
    for wanted in (
        "Data audit",
        "Phenotyping",
        "stays left",
        "42,628",
        "4,485",
        "18.8%",
        "0 violations",
        "<svg",
        "&lt;10",
        "does not hold between tables of two tasks",
    ):
        assert wanted in page, wanted
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_same_build_writes_nothing_anew(built):
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


def test_patients_that_cross_splits_between_sources_are_listed_and_the_build_warns(tmp_path, capsys):
    """Half of the second source's patients have no stay that counts, so that their X-rays train."""
    charts = [chart(n, 1, HEART_RATE, "60") for n in range(60)]
    moved = [stay(n, last_careunit="PACU") if n % 2 else stay(n) for n in range(60)]
    cxr = write_mimic_cxr(tmp_path / "cxr", [image(n, 3) for n in range(60)], size=(16, 16))
    build.build(write_mimic_iv(tmp_path / "a", [stay(n) for n in range(60)], charts), cxr, tmp_path, tasks=["pheno"])
    capsys.readouterr()
    build.build(write_mimic_iv(tmp_path / "b", moved, charts), cxr, tmp_path, tasks=["radiology"])
    said = capsys.readouterr().err
    assert f"warning: {tmp_path / 'pheno'} was built from other tables" in said and "other options" not in said
    crossing = set(records.index(tmp_path, "radiology", "train")["subject_id"].tolist())
    crossing -= set(records.index(tmp_path, "pheno", "train")["subject_id"].tolist())
    found = json.loads((tmp_path / "audit.json").read_text())["patients"]
    shown = len(crossing) if len(crossing) >= 10 else "<10"
    assert crossing and found["crossings"] == [{"between": [["pheno"], ["radiology"]], "patients": shown}]
    assert "Patients in two splits" in (tmp_path / "audit.html").read_text()
    build.build(tmp_path / "b", None, tmp_path, tasks=["mortality"])  # without X-rays, of the same tables as radiology
    said = capsys.readouterr().err
    assert f"{tmp_path / 'pheno'} was built from other" in said and f"{tmp_path / 'radiology'} was" not in said


@pytest.mark.parametrize(("fewer", "shown"), [(0, True), (1, False), (9, False), (10, True)])
def test_a_task_of_nearly_the_same_stays_is_left_out(built, monkeypatch, fewer, shown):
    index = records.index

    def without_some(out, name, split):
        fields = index(out, name, split)
        lost = fewer if (name, split) == ("length_of_stay", "train") else 0
        return {field: values[lost:] for field, values in fields.items()}

    monkeypatch.setattr(records, "index", without_some)
    found = gather.gather(built)
    assert ("length_of_stay" in found["tasks"]) == shown and {"pheno", "mortality"} <= set(found["tasks"])
    if not shown:
        assert "those of pheno but for fewer than 10" in found["not_audited"]["length_of_stay"]


def test_a_dataset_of_another_version_is_named_and_left_out(built, monkeypatch):
    monkeypatch.setattr(gather, "FACTS_VERSION", describe.VERSION + 1)
    found = gather.gather(built)
    assert not found["tasks"] and set(found["not_audited"]) == set(ALL)
    assert "build it again" in found["not_audited"]["pheno"]


def test_a_dataset_with_a_damaged_index_is_named_and_left_out(built, tmp_path):
    shutil.copytree(built, tmp_path / "out")
    damage.flip(tmp_path / "out/pheno/index_val.npz")
    (tmp_path / "out/decompensation/index_test.npz").unlink()
    found = gather.gather(tmp_path / "out")
    assert set(found["not_audited"]) - {"length_of_stay"} == {"pheno", "decompensation"}
    assert found["not_audited"]["pheno"] == "its index is damaged; build it again to see it here"
    assert {"mortality", "radiology"} <= set(found["tasks"])
