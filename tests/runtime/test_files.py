"""files: written atomically; locks; JSON."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def test_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["result.json"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_filesystem_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.locked(tmp_path / "run" / ".lock", "--workdir", "busy"):
        (tmp_path / "run" / "result.json").touch()
    printed = capsys.readouterr().err
    assert printed.startswith("warning: ") and str(tmp_path / "run") in printed and printed.count("\n") == 1


def test_busy_lock_is_a_user_error_and_errors_inside_the_block_are_not(tmp_path):
    lock = (tmp_path / ".lock", "--workdir", "busy")
    with files.locked(*lock), pytest.raises(UserError, match=r"^busy$"), files.locked(*lock):
        pass
    with pytest.raises(BlockingIOError), files.locked(*lock):
        raise BlockingIOError


def test_json_from_a_pipe_or_device_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/null")):
        with pytest.raises(UserError, match="a pipe or device"):
            files.read_json(path, "give a file")


def test_json_is_written_sorted_unless_told_otherwise_and_read_back(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1.5, None], "a": "x"})
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert files.read_json(path, "") == {"a": "x", "b": [1.5, None]}
    files.write_json(path, [1, 2])
    assert files.read_json(path, "", list) == [1, 2]
    files.write_json(path, {"b": 1, "a": 2}, sort_keys=False)
    assert path.read_text().index('"b"') < path.read_text().index('"a"')


@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff"])
def test_unreadable_json_names_its_file_and_what_to_do(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r": build it again$") as caught:
        files.read_json(path, "build it again")
    assert caught.value.path == path


def test_a_sealed_object_that_was_changed_is_refused(tmp_path):
    path, content = tmp_path / "a.json", {"b": [1.5, float("inf")], "a": ("x", None)}
    files.write_json(path, files.sealed(content))
    assert files.read_json(path, "", must_be_sealed=True) == content | {"a": ["x", None]}
    path.write_text(path.read_text().replace("1.5", "1.25"))
    with pytest.raises(UserError, match="was changed"):
        files.read_json(path, "build it again")
    files.write_json(path, content)
    assert files.read_json(path, "")["b"] == content["b"]
    with pytest.raises(UserError, match="was changed"):
        files.read_json(path, "build it again", must_be_sealed=True)


def test_a_file_is_hashed_again_only_if_it_changed(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    entry = files.remembered_sha256(tmp_path / "a", {})
    known = {str(tmp_path / "a"): entry | {"sha256": "remembered"}}
    assert files.remembered_sha256(tmp_path / "a", known)["sha256"] == "remembered"
    (tmp_path / "a").write_bytes(b"abd")
    assert files.remembered_sha256(tmp_path / "a", known)["sha256"] == hashlib.sha256(b"abd").hexdigest()


def test_code_of_another_user_is_said_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / "notes.py"
    path.touch()
    files.say_code_of_another(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(files.os, "getuid", lambda: 4711)
    monkeypatch.setattr(files, "_TRUSTED", ())
    for _ in range(2):
        files.say_code_of_another(path, tmp_path)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2 and all(str(path) in line for line in printed)  # of the file, and of the folder


def test_sha256_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
