"""Leases: one owner at a time, whoever dies, sleeps or starts at the same moment."""

import contextlib
import json
import os
import threading
import time

import pytest

from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import leases as leases_lib
from medfuse_jax.sweep.leases import Leases


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(leases_lib, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(leases_lib, "STALE_S", 0.5)
    monkeypatch.setattr(leases_lib, "POLL_S", 0.02)


@pytest.fixture
def open_leases(tmp_path, fast):
    """A function that opens the leases of one more process in the same folder."""
    with contextlib.ExitStack() as closing:
        yield lambda: closing.enter_context(Leases(tmp_path / "leases"))


def _elsewhere(monkeypatch):
    """Let processes look as if each were on a host of its own, where a lock says nothing about the others."""
    monkeypatch.setattr(leases_lib, "_kernel", lambda: "")


def _die(leases):
    """Do what SIGKILL does: the heartbeats end and the system closes the files, whose content stays."""
    leases._ended.set()
    for name in list(leases._held):
        leases._close(name)


def _until(is_true, timeout_s=10):
    end_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end_s, "not in time"
        time.sleep(0.02)


def test_one_process_holds_a_lease_until_it_gives_it_back(open_leases):
    ours, theirs = open_leases(), open_leases()
    assert ours.is_free("trial_000") and ours.claim("trial_000") and ours.holds("trial_000")
    assert not theirs.is_free("trial_000") and not theirs.claim("trial_000") and not ours.claim("trial_000")
    assert theirs.claim("trial_001"), "another name"
    ours.release("trial_000")
    assert not ours.holds("trial_000") and theirs.claim("trial_000")
    ours.release("trial_000")  # not ours: nothing happens
    assert theirs.holds("trial_000") and not ours.is_free("trial_000")


def test_heartbeats_keep_a_lease_for_longer_than_the_limit(open_leases, monkeypatch):
    _elsewhere(monkeypatch)
    ours, theirs = open_leases(), open_leases()
    assert ours.claim("trial_000")
    end_s = time.monotonic() + 3 * leases_lib.STALE_S
    while time.monotonic() < end_s:
        assert not theirs.is_free("trial_000")
        time.sleep(0.02)
    assert ours.holds("trial_000")


def test_a_silent_lease_is_taken_over_after_the_limit_and_not_before(open_leases, monkeypatch, capsys):
    _elsewhere(monkeypatch)
    ours, theirs = open_leases(), open_leases()
    ours.claim("trial_000")
    _die(ours)
    first_s = time.monotonic()
    assert not theirs.is_free("trial_000"), "the first look starts the watch"
    _until(lambda: theirs.claim("trial_000"))
    assert time.monotonic() - first_s >= leases_lib.STALE_S
    line = [line for line in capsys.readouterr().out.splitlines() if "taking over" in line]
    assert len(line) == 1 and f"process {os.getpid()}" in line[0]


def test_a_dead_process_of_the_same_machine_is_replaced_at_once(open_leases, monkeypatch):
    monkeypatch.setattr(leases_lib, "STALE_S", 1e9)
    ours, theirs = open_leases(), open_leases()
    ours.claim("trial_000")
    assert not theirs.is_free("trial_000"), "alive: its file is locked"
    _die(ours)
    assert theirs.claim("trial_000")


@pytest.mark.parametrize("change", [{"kernel": "of another host"}, {"is_locked": False}])
def test_a_lock_counts_only_where_it_is_reliable(open_leases, tmp_path, monkeypatch, change):
    """Not on another host, nor where the owner could not lock its file."""
    monkeypatch.setattr(leases_lib, "STALE_S", 1e9)
    ours, theirs = open_leases(), open_leases()
    ours.claim("trial_000")
    _die(ours)
    path = tmp_path / "leases" / "trial_000.0"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert not theirs.claim("trial_000")


def test_one_of_many_takes_over(open_leases, monkeypatch):
    """All have found the lease stale before any claims it."""
    _elsewhere(monkeypatch)
    ours, others = open_leases(), [open_leases() for _ in range(8)]
    ours.claim("trial_000")
    _die(ours)
    _until(lambda: all([other.is_free("trial_000") for other in others]))
    together, taken = threading.Barrier(len(others)), []

    def take(other):
        together.wait()
        if other.claim("trial_000"):
            taken.append(other)

    threads = [threading.Thread(target=take, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and [other for other in others if other.holds("trial_000")] == taken


def test_a_slow_claimer_does_not_remove_its_rivals_new_lease(open_leases, monkeypatch):
    """It judged the lease before its rival took it over, and acts after."""
    _elsewhere(monkeypatch)
    ours, slow, rival = open_leases(), open_leases(), open_leases()
    ours.claim("trial_000")
    _die(ours)
    _until(lambda: slow.is_free("trial_000"))
    judged = slow._latest("trial_000")
    _until(lambda: rival.claim("trial_000"))
    monkeypatch.setattr(slow, "_latest", lambda name: judged)
    assert not slow.claim("trial_000") and rival.holds("trial_000")


def test_a_suspended_owner_learns_that_it_was_replaced(open_leases, tmp_path, monkeypatch, capsys):
    """Its heartbeats go to its own file, so that they neither keep nor spoil the new owner's."""
    _elsewhere(monkeypatch)
    ours, theirs = open_leases(), open_leases()
    ours.claim("trial_000")
    with ours._lock:  # its heartbeats wait
        _until(lambda: theirs.claim("trial_000"))
    before = json.loads((tmp_path / "leases" / "trial_000.0").read_text())["beat"]
    _until(lambda: json.loads((tmp_path / "leases" / "trial_000.0").read_text())["beat"] > before)
    assert theirs.holds("trial_000") and not ours.holds("trial_000")
    assert "another process has taken over trial_000" in capsys.readouterr().out
    ours.release("trial_000")
    assert theirs.holds("trial_000") and not ours.claim("trial_000")


def test_the_hosts_clocks_do_not_matter(open_leases, tmp_path, monkeypatch):
    """The file's time may be hours off: only a change counts."""
    _elsewhere(monkeypatch)
    ours, theirs = open_leases(), open_leases()
    ours.claim("trial_000")
    path = tmp_path / "leases" / "trial_000.0"
    for shift_s in (-36000, 36000):
        os.utime(path, (time.time() + shift_s,) * 2)
        assert not theirs.is_free("trial_000")
    _die(ours)
    assert not theirs.is_free("trial_000"), "not yet"
    _until(lambda: theirs.is_free("trial_000"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": 1}', b"\xff\x00"])
def test_a_damaged_lease_is_taken_over_when_it_is_stale(open_leases, tmp_path, content):
    ours = open_leases()
    (tmp_path / "leases" / "trial_000.0").write_bytes(content)
    assert not ours.claim("trial_000")
    _until(lambda: ours.claim("trial_000"))


def test_idle_processes_are_counted_while_they_live(open_leases):
    ours, theirs = open_leases(), open_leases()
    assert ours.num_idle() == theirs.num_idle() == 2
    with ours.busy():
        assert ours.num_idle() == theirs.num_idle() == 1
    assert theirs.num_idle() == 2
    _die(theirs)
    assert ours.num_idle() == 1


def test_the_end_of_a_process_gives_everything_back(tmp_path, fast):
    with Leases(tmp_path) as ours:
        ours.claim("trial_000")
    with Leases(tmp_path) as theirs:
        assert theirs.num_idle() == 1 and theirs.claim("trial_000")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial_000.0", "trial_000.1"]


def test_work_is_claimed_until_all_is_done(open_leases, capsys):
    """This process waits for work that another has, and does it if the other gives it back."""
    ours, theirs = open_leases(), open_leases()
    done, undone = [], ["a", "b", "c"]
    theirs.claim("b")

    def claim():
        return next((name for name in undone if name not in done and ours.claim(name)), "")

    def missing():
        return [name for name in undone if name not in done]

    threading.Timer(0.3, theirs.release, ["b"]).start()
    for name in ours.claimed(claim, missing, "letters"):
        done.append(name)
    assert done == ["a", "c", "b"]
    assert capsys.readouterr().out.count("waiting for letters of other processes") == 1


def test_two_processes_hold_a_lease_one_after_the_other(open_leases):
    inside, most = [], []

    def work(leases):
        with leases.held("results"):
            inside.append(leases)
            most.append(len(inside))
            time.sleep(0.1)
            inside.remove(leases)

    threads = [threading.Thread(target=work, args=(open_leases(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "leases").write_text("a file")
    with pytest.raises(UserError) as error, Leases(tmp_path / "leases"):
        pass
    assert error.value.path == tmp_path / "leases" and "\n" not in str(error.value)
