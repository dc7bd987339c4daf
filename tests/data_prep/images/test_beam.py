"""Decoding with Beam: the same files, byte for byte, as the build writes."""

import subprocess
import sys

import pytest
from absl import flags
from build_cases import ROOT
from raw_tables import chart, image, image_path, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.images import beam, store
from data_prep.images import decode as decoding
from medfuse_jax.runtime.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_IMAGES", 10)
    monkeypatch.setattr(store, "MAX_UNREADABLE", 0.1)
    images = [image(n, 1) for n in range(23)]
    write_mimic_cxr(tmp_path / "cxr", images, size=(16, 16))
    (tmp_path / "cxr" / image_path(images[7])).write_bytes(b"broken")
    return tmp_path / "cxr"


def _decode_chunks(root, folder):
    """Decode every chunk into `folder`, and return how many X-rays were readable in each."""
    folder.mkdir(parents=True, exist_ok=True)
    return [beam.decode_chunk(chunk, str(folder), str(root), "squash") for chunk in beam.chunk_list(root)]


def _contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_build_uses_and_keeps_every_chunk_that_beam_decoded(root, tmp_path, monkeypatch):
    folder = tmp_path / "out/.cache/images"
    assert _decode_chunks(root, folder) == [9, 10, 3]
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    before = _contents(folder)
    iv = write_mimic_iv(tmp_path / "iv", [stay(n) for n in range(3)], [chart(n, 3, 220045, "70") for n in range(3)])
    build.build(iv, root, tmp_path / "alone", tasks=["radiology"])
    assert _contents(tmp_path / "alone/.cache/images") == before
    monkeypatch.setattr(decoding, "decode", lambda *a: pytest.fail("an X-ray was decoded again"))
    assert _decode_chunks(root, folder) == [9, 10, 3]
    for task in ("pheno", "radiology"):  # a few of the X-rays, then all
        build.build(iv, root, tmp_path / "out", tasks=[task])
        assert _contents(folder) == before


def test_the_pipeline_writes_the_same_bytes(root, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install '.[beam]'")
    options = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    beam.run(root, tmp_path / "beam", "paper", options)
    _decode_chunks(root, tmp_path / "alone")
    assert _contents(tmp_path / "beam/.cache/images") == _contents(tmp_path / "alone")


def test_a_missing_apache_beam_is_reported(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install '\.\[beam\]'"):
        beam.run(root, tmp_path, "paper", [])


def _main(arguments, monkeypatch):
    """Return the arguments of `run` for a command line."""
    values, calls = flags.FlagValues(), []
    beam.define_flags(values)
    monkeypatch.setattr(beam.flags, "FLAGS", values)
    monkeypatch.setattr(beam, "run", lambda *a: calls.append(a))
    beam.main(values(["beam", *arguments], known_only=True))
    return calls[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mimic_cxr=a", "--out=b", "--runner=DataflowRunner", "--num_workers=4", "--project=c"],
        ["--mimic_cxr", "a", "--out", "b", "--runner", "DataflowRunner", "--num_workers=4", "--project=c"],
        ["--num_workers=4", "--project=c", "--out=b", "--runner=DataflowRunner", "--mimic_cxr=a"],
    ],
)
def test_our_flags_take_both_forms_and_beam_gets_the_others(arguments, monkeypatch):
    mimic_cxr, out, profile, options = _main(arguments, monkeypatch)
    assert (str(mimic_cxr), str(out), profile) == ("a", "b", "paper")
    assert options == ["--runner=DataflowRunner", "--num_workers=4", "--project=c"]


def test_values_of_beams_options_may_be_separate_arguments(monkeypatch):
    arguments = ["--project", "c", "--out", "b", "--runner=FlinkRunner", "--mimic_cxr=a", "--region", "d"]
    assert _main(arguments, monkeypatch)[-1] == ["--runner=FlinkRunner", "--project", "c", "--region", "d"]


def test_the_direct_runner_uses_several_processes(monkeypatch):
    options = _main(["--mimic_cxr=a", "--out=b", "--workers=3"], monkeypatch)[-1]
    assert options == ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=3"]


@pytest.mark.parametrize(
    ("arguments", "field", "nearest"),
    [
        (["--profle=released"], "--profle=released", "--profile"),
        (["--profle", "released"], "--profle", "--profile"),
        (["--worker=2"], "--worker=2", "--workers"),
        (["--runer=FlinkRunner"], "--runer=FlinkRunner", "--runner"),
        (["--out=gs://bucket/out"], "--out", ""),
        (["--mimic_cxr="], "--mimic_cxr", ""),
    ],
)
def test_misspelt_and_invalid_flags_are_reported(arguments, field, nearest, monkeypatch):
    with pytest.raises(UserError) as raised:
        _main(["--mimic_cxr=a", "--out=b", *arguments], monkeypatch)
    assert (raised.value.field, raised.value.nearest) == (field, nearest)


def test_the_command_reports_a_missing_flag_in_one_line(tmp_path):
    command = [sys.executable, "-m", "data_prep.images.beam", "--project=c", "--mimic_cxr", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --out=DIR is missing\n")
