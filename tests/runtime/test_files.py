"""files: whole or not there."""

import errno
import hashlib
import os

import pytest

from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.written_whole(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["result.json"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.locked(tmp_path / "run" / ".lock", "--workdir", "busy"):
        (tmp_path / "run" / "result.json").touch()
    said = capsys.readouterr().err
    assert said.startswith(f"warning: the filesystem of {tmp_path / 'run'} has no locks ({os.strerror(number)})")
    assert said.count("\n") == 1


def test_only_the_lock_itself_says_that_another_process_is_at_work(tmp_path):
    lock = (tmp_path / ".lock", "--workdir", "busy")
    with files.locked(*lock), pytest.raises(UserError, match="busy"), files.locked(*lock):
        pass
    with pytest.raises(BlockingIOError), files.locked(*lock):
        raise BlockingIOError


def test_sha256_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
