"""The film step as a Beam pipeline: the same files, byte for byte, as the build's own."""

import pytest
from raw_tables import chart, film, film_path, stay, write_mimic_cxr, write_mimic_iv

from data_prep import beam_films, build, cxr
from medfuse_jax.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(cxr, "CHUNK_FILMS", 100)
    films = [film(n, 1) for n in range(230)]
    write_mimic_cxr(tmp_path / "cxr", films, size=(16, 16))
    (tmp_path / "cxr" / film_path(films[7])).write_bytes(b"broken")
    return tmp_path / "cxr"


def _cache(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _built(root, out):
    iv = write_mimic_iv(root.parent / "iv", [stay(0)], [chart(0, 3, 220045, "70")])
    build.build(iv, root, out, tasks=["radiology"])
    return _cache(out / ".stages/films")


def test_chunks_written_one_by_one_are_those_of_the_build(root, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    readable = [beam_films.decode_chunk(c, str(folder), str(root), "squash") for c in beam_films.chunk_list(root)]
    assert readable == [99, 100, 30]
    assert _cache(folder) == _built(root, tmp_path / "out")
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_the_build_finds_what_the_step_decoded(root, tmp_path, monkeypatch):
    (tmp_path / "out/.stages/films").mkdir(parents=True)
    for chunk in beam_films.chunk_list(root):
        beam_films.decode_chunk(chunk, str(tmp_path / "out/.stages/films"), str(root), "squash")
    monkeypatch.setattr(cxr, "decode", lambda *a: pytest.fail("a film was decoded again"))
    assert len(_built(root, tmp_path / "out")) == 6


def test_a_build_of_fewer_films_uses_and_keeps_what_the_step_decoded(root, tmp_path, monkeypatch):
    folder = tmp_path / "out/.stages/films"
    folder.mkdir(parents=True)
    for chunk in beam_films.chunk_list(root):
        beam_films.decode_chunk(chunk, str(folder), str(root), "squash")
    before = _cache(folder)
    monkeypatch.setattr(cxr, "decode", lambda *a: pytest.fail("a film was decoded again"))
    iv = write_mimic_iv(tmp_path / "iv", [stay(n) for n in range(3)], [chart(n, 3, 220045, "70") for n in range(3)])
    build.build(iv, root, tmp_path / "out", tasks=["pheno"])
    assert _cache(folder) == before


def test_the_pipeline_gives_the_same_bytes(root, tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install '.[beam]'")
    options = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    beam_films.run(root, tmp_path / "beam", "paper", options)
    (tmp_path / "alone").mkdir()
    for chunk in beam_films.chunk_list(root):
        beam_films.decode_chunk(chunk, str(tmp_path / "alone"), str(root), "squash")
    assert _cache(tmp_path / "beam/.stages/films") == _cache(tmp_path / "alone")


def test_without_beam_it_says_what_to_install(root, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install '\.\[beam\]'"):
        beam_films.run(root, tmp_path, "paper", [])
