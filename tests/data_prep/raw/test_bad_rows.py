"""Invalid rows are dropped and counted, or have no effect."""

import gzip
import itertools
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from build_cases import HEART_RATE, ROOT, by_stay
from raw_tables import at, chart, image, lab, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.ehr import cohort
from data_prep.labels import phenotypes
from data_prep.raw import invalid, tables
from medfuse_jax import records
from medfuse_jax.runtime.errors import UserError

GLUCOSE = 50931


def _charts(stays=(0, 1)):
    return [chart(n, h, HEART_RATE, str(60 + n + h)) for n in stays for h in (1, 2, 3)]


def _build(tmp_path, stays, charts, images=None):
    """Return records by stay, and the manifest's counts."""
    iv = write_mimic_iv(tmp_path / "iv", stays, charts, codes=[(0, "4019", 9)])
    cxr = write_mimic_cxr(tmp_path / "cxr", images, size=(16, 16)) if images else None
    build.build(iv, cxr, tmp_path / "out", tasks=["pheno"])
    return by_stay(tmp_path / "out", "pheno"), records.manifest(tmp_path / "out", "pheno")["counts"]


def _assert_equal(actual, expected):
    assert sorted(actual) == sorted(expected)
    for n, record in expected.items():
        np.testing.assert_array_equal(actual[n]["ehr"], record["ehr"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The records of two stays without invalid rows."""
    return _build(tmp_path_factory.mktemp("expected"), [stay(0), stay(1)], _charts())[0]


BAD_EVENTS = [
    ({"charttime": "2150-13-45 99:00:00"}, "no valid time"),
    ({"charttime": ""}, "no valid time"),
    ({"charttime": "yesterday"}, "no valid time"),
    ({"charttime": "1850-01-01 00:00:00"}, "before or after the stay"),
    ({"charttime": "9999-01-01 00:00:00"}, "before or after the stay"),
    ({"value": "inf", "valuenum": "inf"}, "no valid value"),
    ({"value": "nan", "valuenum": ""}, "no valid value"),
    ({"value": "1e999", "valuenum": "1e999"}, "no valid value"),
    ({"value": "sixty", "valuenum": ""}, "no valid value"),
    ({"value": "-5", "valuenum": "-5"}, "impossible value"),
    ({"value": "99999", "valuenum": "99999"}, "impossible value"),
    ({"hadm_id": "12x"}, "no stay of the cohort"),
    ({"hadm_id": ""}, "no hadm_id"),
    ({"hadm_id": "99999999999999999999"}, "no stay of the cohort"),
    ({"stay_id": "30000001"}, "another stay"),
    ({"subject_id": "10000001"}, "another patient"),
    ({"subject_id": "1000000x"}, "another patient"),
    ({"stay_id": "3000000x"}, "no valid stay_id"),  # must not count as a row without a stay
]


def test_invalid_event_rows_are_counted_and_dropped(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(invalid, "MAX_SHARE", 0.2)
    # Each has its own hour and value, so that none can hide another.
    bad = [chart(0, 5 + i, HEART_RATE, str(100 + i)) | changes for i, (changes, _) in enumerate(BAD_EVENTS)]
    actual, counts = _build(tmp_path, [stay(0), stay(1)], [*_charts(), *bad])
    _assert_equal(actual, expected)
    fates = {fate: rows["Heart Rate"] for fate, rows in counts["event_rows"].items()}
    assert fates == Counter(fate for _, fate in BAD_EVENTS) + Counter(kept=6)


BAD_STAYS = [
    ({"intime": "2150-02-31 00:00:00"}, "with times and a length of stay"),
    ({"los": "-1"}, "with times and a length of stay"),
    ({"los": "inf"}, "with times and a length of stay"),
    ({"hadm_id": "x"}, "with ids"),
    ({"outtime": "2149-12-31 12:00:00"}, "with times and a length of stay"),
    ({"outtime": "2550-01-01 00:00:00", "los": "146097"}, "of at most a year"),
    ({"los": "300"}, "with a length of stay that is outtime - intime"),
    ({"anchor_age": "old"}, "with a readable age"),
]


def test_invalid_stays_are_counted_and_dropped(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(invalid, "MAX_SHARE", 0.2)
    bad = [stay(2 + i, **changes) for i, (changes, _) in enumerate(BAD_STAYS)]
    actual, counts = _build(tmp_path, [stay(0), stay(1), *bad], _charts(range(2 + len(bad))))
    _assert_equal(actual, expected)
    dropped = {b["filter"]: a["stays"] - b["stays"] for a, b in itertools.pairwise(counts["cohort"])}
    assert {name: stays for name, stays in dropped.items() if stays} == Counter(name for _, name in BAD_STAYS)


def test_stays_without_events_or_admission_are_dropped(tmp_path, expected):
    stays = [stay(0), stay(1), stay(2), stay(3)]
    iv = write_mimic_iv(tmp_path / "iv", stays, _charts((0, 1, 3)), codes=[(0, "4019", 9)])
    path = iv / "hosp/admissions.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
    path.write_bytes(gzip.compress("".join(line for line in lines if "20000003" not in line).encode()))
    build.build(iv, None, tmp_path / "out", tasks=["pheno"])
    _assert_equal(by_stay(tmp_path / "out", "pheno"), expected)
    flow = {step["filter"]: step["stays"] for step in records.manifest(tmp_path / "out", "pheno")["counts"]["cohort"]}
    assert flow["with a patient and an admission"] == 3 and flow["with an event in the task's window"] == 2


def test_duplicate_rows_change_nothing(tmp_path, expected):
    images = [image(0, 3)]
    actual, counts = _build(tmp_path, [stay(0), stay(1), stay(1)], _charts() + _charts(), images + images)
    _assert_equal(actual, expected)
    assert actual[0]["dicom_id"] == "image-0000-00" and counts["duplicate_events"] == len(_charts())
    assert (counts["images"]["rows of metadata"], counts["images"]["X-rays with ids"]) == (2, 1)
    icustays = tmp_path / "iv/icu/icustays.csv.gz"
    text = gzip.decompress(icustays.read_bytes()).decode()
    icustays.write_bytes(gzip.compress((text + text.splitlines(keepends=True)[-1]).encode()))
    build.build(tmp_path / "iv", None, tmp_path / "again", tasks=["pheno"])
    flow = records.manifest(tmp_path / "again", "pheno")["counts"]["cohort"]
    assert [step["stays"] for step in flow[:3]] == [3, 3, 2]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """MIMIC-IV and MIMIC-CXR trees of two stays with an X-ray each, and their shards."""
    root = tmp_path_factory.mktemp("clean")
    charts = [*_charts(), chart(0, 9, HEART_RATE, "80"), chart(0, 9, HEART_RATE, "90")]
    iv = write_mimic_iv(root / "iv", [stay(0), stay(1)], charts, [lab(0, 2, GLUCOSE, "110")], [(0, "4019", 9)])
    images = [image(0, 3, **{"Support Devices": "1.0"}), image(1, 4, Edema="1.0")]
    cxr = write_mimic_cxr(root / "cxr", images, size=(16, 16))
    return iv, cxr, _shards(iv, cxr, root / "out")


def _shards(iv, cxr, out):
    """Return the bytes of a build's records and indexes, without manifests, which contain the raw files' sizes."""
    build.build(iv, cxr, out, tasks=["pheno", "radiology"])
    files = sorted(p for task in ("pheno", "radiology") for p in (out / task).iterdir())
    return {p.name: p.read_bytes() for p in files if ".array_record" in p.name or p.suffix == ".npz"}


def _rewritten(tree, root, change):
    """Copy a tree, with `change` applied to the lines of its tables."""
    shutil.copytree(tree, root)
    for path in root.rglob("*.csv.gz"):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines(keepends=True)
        path.write_bytes(gzip.compress("".join(change(lines)).encode(errors="surrogateescape")))
    return root


def _carriage_returns(lines):
    return [line.replace("\n", "\r\n") for line in lines]


def _mixed_line_ends_and_a_byte_order_mark(lines):
    return ["\ufeff" + lines[0], *(line.replace("\n", "\r\n") if i % 2 else line for i, line in enumerate(lines[1:]))]


def _duplicates_and_no_final_line_end(lines):
    return [lines[0], *(line for line in lines[1:-1] for _ in range(2)), lines[-1], lines[-1].rstrip("\n")]


def _one_duplicate_within_a_minute(lines):
    return [*lines, *(line for line in lines if ",90,90," in line)]


def _duplicates_and_mixed_line_ends(lines):
    return [lines[0].replace("\n", "\r\n"), *lines[1:], *lines[1:]]


def _ids_as_floats(lines):
    return [re.sub(r"\b([1235]00000\d\d|220045|50931)(?=,)", r"\1.0", line) for line in lines]


def _invalid_utf8(lines):
    return [lines[0], *(re.sub(r",*\n$", lambda end: end[0][:-1] + ",\udcb5\n", line) for line in lines[1:])]


@pytest.mark.parametrize(
    "change",
    [
        _ids_as_floats,
        _invalid_utf8,
        _carriage_returns,
        _mixed_line_ends_and_a_byte_order_mark,
        _duplicates_and_no_final_line_end,
        _one_duplicate_within_a_minute,
        _duplicates_and_mixed_line_ends,
    ],
)
def test_line_ends_invalid_bytes_and_duplicates_change_no_byte(clean, tmp_path, change):
    iv, cxr = (_rewritten(tree, tmp_path / tree.name, change) for tree in clean[:2])
    assert _shards(iv, cxr, tmp_path / "out") == clean[2]


def test_another_value_changes_the_bytes(clean, tmp_path):
    iv = _rewritten(clean[0], tmp_path / "iv", lambda lines: [line.replace(",110,", ",111,") for line in lines])
    assert _shards(iv, clean[1], tmp_path / "out") != clean[2]


def test_a_death_without_a_valid_time_is_ignored(tmp_path):
    broken = [{"deathtime": "2150-99-01 00:00:00"}, {"deathtime": "?", "dod": "never"}, {"deathtime": at(60)}]
    iv = write_mimic_iv(tmp_path / "iv", [stay(n, **changes) for n, changes in enumerate(broken)], _charts((0, 1, 2)))
    stays, _ = cohort.read_stays(tables.mimic_iv(iv))
    assert stays["died"].to_list() == [False, False, True] and stays["death_h"].to_list() == [None, None, 60]


def test_unreadable_times_of_death_stop_the_build(tmp_path):
    with pytest.raises(UserError) as caught:
        _build(tmp_path, [stay(0, deathtime=at(60)), stay(1, deathtime="yes")], _charts())
    assert (caught.value.field, caught.value.value) == ("deathtime", 1)
    assert not (tmp_path / "out/pheno").exists()


def test_invalid_diagnoses_label_nobody(tmp_path):
    codes = [(0, "4019", 9), (1, "4019", ""), (2, "4019", "x"), (3, "", 9), (4, "NOSUCH", 9), (0, "4019", 9)]
    codes.append((5, "4019", 9))
    stays = [stay(n) for n in range(6)]
    iv = write_mimic_iv(tmp_path / "iv", stays, _charts(), codes=codes)
    path = iv / "hosp/diagnoses_icd.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"10000005,", b"10000000,")))
    raw = tables.mimic_iv(iv)
    label_NK, counts = phenotypes.labels(raw, cohort.read_stays(raw)[0], None)
    assert label_NK.sum(1).tolist() == [1, 0, 0, 0, 0, 0] and counts["rows_of_another_patient"] == 1


def test_the_raw_folder_may_be_the_current_folder(tmp_path, expected, monkeypatch):
    iv = write_mimic_iv(tmp_path / "iv", [stay(0), stay(1)], _charts(), codes=[(0, "4019", 9)])
    monkeypatch.chdir(iv)
    build.build(".", None, tmp_path / "out", tasks=["pheno"])
    _assert_equal(by_stay(tmp_path / "out", "pheno"), expected)


@pytest.mark.slow
def test_a_build_resumes_after_a_full_disk(tmp_path, expected):
    """A limit on file sizes simulates the full disk."""
    iv = write_mimic_iv(tmp_path / "iv", [stay(0), stay(1)], _charts(), codes=[(0, "4019", 9)])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep.build", f"--mimic_iv={iv}", f"--out={out}", "--tasks=pheno"]

    def small_files():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: no space left under --out={out}")
    assert not (out / "pheno").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _assert_equal(by_stay(out, "pheno"), expected)
