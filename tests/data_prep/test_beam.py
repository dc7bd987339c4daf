"""The X-ray step as a Beam pipeline: the same files, byte for byte, as the build's own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from raw_tables import chart, image, image_path, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.images import beam
from data_prep.images import store as image_store
from medfuse_jax.runtime.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "CHUNK_IMAGES", 100)
    images = [image(n, 1) for n in range(230)]
    write_mimic_cxr(tmp_path / "cxr", images, size=(16, 16))
    (tmp_path / "cxr" / image_path(images[7])).write_bytes(b"broken")
    return tmp_path / "cxr"


def _cache(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _built(root, out):
    iv = write_mimic_iv(root.parent / "iv", [stay(0)], [chart(0, 3, 220045, "70")])
    build.build(iv, root, out, tasks=["radiology"])
    return _cache(out / ".stages/images")


def test_chunks_written_one_by_one_are_those_of_the_build(root, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    readable = [beam.decode_chunk(c, str(folder), str(root), "squash") for c in beam.chunk_list(root)]
    assert readable == [99, 100, 30]
    assert _cache(folder) == _built(root, tmp_path / "out")
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_the_build_finds_what_the_step_decoded(root, tmp_path, monkeypatch):
    (tmp_path / "out/.stages/images").mkdir(parents=True)
    for chunk in beam.chunk_list(root):
        beam.decode_chunk(chunk, str(tmp_path / "out/.stages/images"), str(root), "squash")
    monkeypatch.setattr(image_store, "decode", lambda *a: pytest.fail("an X-ray was decoded again"))
    assert len(_built(root, tmp_path / "out")) == 6


def test_a_build_of_fewer_images_uses_and_keeps_what_the_step_decoded(root, tmp_path, monkeypatch):
    folder = tmp_path / "out/.stages/images"
    folder.mkdir(parents=True)
    for chunk in beam.chunk_list(root):
        beam.decode_chunk(chunk, str(folder), str(root), "squash")
    before = _cache(folder)
    monkeypatch.setattr(image_store, "decode", lambda *a: pytest.fail("an X-ray was decoded again"))
    iv = write_mimic_iv(tmp_path / "iv", [stay(n) for n in range(3)], [chart(n, 3, 220045, "70") for n in range(3)])
    build.build(iv, root, tmp_path / "out", tasks=["pheno"])
    assert _cache(folder) == before


def test_the_pipeline_gives_the_same_bytes(root, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install '.[beam]'")
    options = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    beam.run(root, tmp_path / "beam", "paper", options)
    (tmp_path / "alone").mkdir()
    for chunk in beam.chunk_list(root):
        beam.decode_chunk(chunk, str(tmp_path / "alone"), str(root), "squash")
    assert _cache(tmp_path / "beam/.stages/images") == _cache(tmp_path / "alone")


def test_without_beam_it_says_what_to_install(root, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install '\.\[beam\]'"):
        beam.run(root, tmp_path, "paper", [])


def _main(arguments, monkeypatch):
    """What main gives to run, of a command line."""
    values, given = flags.FlagValues(), []
    beam.define_flags(values)
    monkeypatch.setattr(beam.flags, "FLAGS", values)
    monkeypatch.setattr(beam, "run", lambda *a: given.append(a))
    beam.main(values(["beam_images", *arguments], known_only=True))
    return given[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mimic_cxr=a", "--out=b", "--runner=DataflowRunner", "--num_workers=4", "--project=c"],
        ["--mimic_cxr", "a", "--out", "b", "--runner", "DataflowRunner", "--num_workers=4", "--project=c"],
        ["--num_workers=4", "--project=c", "--out=b", "--runner=DataflowRunner", "--mimic_cxr=a"],
    ],
)
def test_our_options_come_in_both_forms_and_beam_gets_the_others(arguments, monkeypatch):
    mimic_cxr, out, profile, options = _main(arguments, monkeypatch)
    assert (str(mimic_cxr), str(out), profile) == ("a", "b", "paper")
    assert options == ["--runner=DataflowRunner", "--num_workers=4", "--project=c"]


def test_the_values_of_beams_own_options_may_stand_alone_too(monkeypatch):
    arguments = ["--project", "c", "--out", "b", "--runner=FlinkRunner", "--mimic_cxr=a", "--region", "d"]
    assert _main(arguments, monkeypatch)[-1] == ["--runner=FlinkRunner", "--project", "c", "--region", "d"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profle=released"], "--profle=released is no option: did you mean --profile?"),
        (["--profle", "released"], "--profle is no option: did you mean --profile?"),
        (["--worker=2"], "--worker=2 is no option: did you mean --workers?"),
        (["--runer=FlinkRunner"], "did you mean --runner?"),
        (["--out=gs://bucket/out"], "--out=gs://bucket/out is an address"),
    ],
)
def test_what_beam_would_leave_out_without_a_word_is_named(arguments, message, monkeypatch):
    with pytest.raises(UserError, match=re.escape(message)):
        _main(["--mimic_cxr=a", "--out=b", *arguments], monkeypatch)


def test_the_command_says_in_one_line_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "data_prep.images.beam", "--project=c", "--mimic_cxr", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --out=DIR is missing\n")
