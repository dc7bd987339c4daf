"""The audit: that its numbers are the build's, that nobody can be read from it, and that its checks bite."""

import json
import re

import numpy as np
import pytest
from raw_tables import at, chart, film, stay, write_mimic_cxr, write_mimic_iv

from data_prep import audit, build, describe, published
from medfuse_jax import records, tasks

HEART_RATE = 220045
ALL = tuple(tasks.TASKS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """60 stays of 30 h to 89 h; the first 25 have a film; 20 have a heart rate that is clipped."""
    root = tmp_path_factory.mktemp("audit")
    stays, charts, codes, films = [], [], [], []
    for n in range(60):
        los_h = 30 + n
        died = {"deathtime": at(los_h)} if n % 4 == 0 else {}
        stays.append(stay(n, outtime=at(los_h), dischtime=at(los_h + 9), los=str(los_h / 24), **died))
        charts += [
            chart(n, h + 0.5, HEART_RATE, "360" if n < 20 and h == 5 else str(60 + n)) for h in range(2, los_h - 1)
        ]
        codes += [(n, "4019", 9)] * (n < 33) + [(n, "I2510", 10)] * (n < 12) + [(n, "U9999", 10)] * (n < 15)
        codes += [(n, "U8888", 10)] * (n < 3)
        if n < 25:
            films += [film(n, 10), film(n, 20, k=1)]
    stays += [stay(100 + n, first_careunit="CCU") for n in range(11)]
    iv = write_mimic_iv(root / "iv", stays, charts, (), codes)
    cxr = write_mimic_cxr(root / "cxr", films, size=(16, 16))
    val, test = root / "val.csv", root / "test.csv"
    val.write_text("".join(f"{10_000_000 + n}\n" for n in range(0, 60, 4)))
    test.write_text("".join(f"{10_000_000 + n}\n" for n in range(1, 60, 4)))
    build.build(iv, cxr, root / "out", timestep_h=1, tasks=ALL, val_ids=val, test_ids=test)
    return root / "out"


@pytest.fixture(scope="module")
def found(built):
    return json.loads((built / "audit.json").read_text())


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


def test_variables_lengths_and_raw_rows(found, built):
    pheno = found["tasks"]["pheno"]
    rate = next(row for row in pheno["variables"] if row["variable"] == "Heart Rate")
    assert rate["stays_observed"] == "≥51"
    steps = np.concatenate([r["ehr"] for split in tasks.SPLITS for r in records.open_split(built, "pheno", split)])
    seen = steps[:, tasks.CHANNELS.index("mask->Heart Rate")] > 0
    assert rate["steps_observed_share"] == round(float(seen.mean()), 4)
    values = steps[seen, tasks.CHANNELS.index("Heart Rate")]
    assert rate["percentiles"]["50"] == pytest.approx(np.percentile(values, 50), abs=0.6)
    assert rate["percentiles"]["5"] == pytest.approx(np.percentile(values, 5), abs=0.6)
    assert pheno["event_rows"]["Heart Rate"]["of the kept, clipped"] == 20
    assert pheno["event_rows"]["Heart Rate"]["kept"] == len(values)
    missing = next(row for row in pheno["variables"] if row["variable"] == "pH")
    assert missing["stays_observed"] == "<10" and set(missing["percentiles"].values()) == {None}
    assert pheno["length_h"]["24-36"] == "<10" and pheno["length_h"]["48-72"] == 24


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
        assert check["films"] == (None if hidden else {"pheno": 25}.get(name, 50))
    assert found["tasks"]["mortality"]["time_check"]["films"] is None
    assert found["patients"]["groups"] == [
        {"tasks": list(ALL), "by_split": {"train": 30, "val": 15, "test": 15}, "in_two_splits": 0}
    ]


def test_nobody_can_be_read_from_it(built):
    """No id, no small count, no path, no script, nothing from elsewhere."""
    text, page = (built / "audit.json").read_text(), (built / "audit.html").read_text()
    for content in (text, page):
        assert not re.search(r"[123]00000\d\d|50000\d\d\d|film-\d{4}", content)
        assert "U8888" not in content and str(built.parent) not in content
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)", page)
    audit_of_counts = json.loads(text)
    for content in audit_of_counts["tasks"].values():
        for part in ("splits", "labels", "cohort", "length_h", "event_rows", "films"):
            small = [n for n in _counts(content.get(part, {})) if 0 < n < 10]
            assert not small, part
    assert (built / "audit.json").stat().st_mode & 0o077 == 0 and (built / "audit.html").stat().st_mode & 0o077 == 0


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
    audit.write(built)
    assert (built / "audit.html").stat().st_mtime_ns == before


def test_a_patient_in_two_splits_fails(built, monkeypatch):
    index = records.index

    def leaking(out, name, split):
        fields = index(out, name, split)
        return fields | {"subject_id": np.append(fields["subject_id"], 10_000_001)} if name == "radiology" else fields

    monkeypatch.setattr(records, "index", leaking)
    with pytest.raises(AssertionError, match="in two splits"):
        audit.gather(built)


@pytest.mark.parametrize(("fewer", "shown"), [(0, True), (1, False), (9, False), (10, True)])
def test_a_task_of_nearly_the_same_stays_is_left_out(built, monkeypatch, fewer, shown):
    index = records.index

    def without_some(out, name, split):
        fields = index(out, name, split)
        lost = fewer if (name, split) == ("length_of_stay", "train") else 0
        return {field: values[lost:] for field, values in fields.items()}

    monkeypatch.setattr(records, "index", without_some)
    found = audit.gather(built)
    assert ("length_of_stay" in found["tasks"]) == shown and {"pheno", "mortality"} <= set(found["tasks"])
    if not shown:
        assert "those of pheno but for fewer than 10" in found["not_audited"]["length_of_stay"]


def test_a_dataset_of_another_version_is_named_and_left_out(built, monkeypatch):
    monkeypatch.setattr(audit, "FACTS_VERSION", describe.VERSION + 1)
    found = audit.gather(built)
    assert not found["tasks"] and set(found["not_audited"]) == set(ALL)
    assert "build it again" in audit.__dict__["gather"](built)["not_audited"]["pheno"]
