"""watchdog: a command ends in time, whatever its threads and libraries do. tests/reliability attacks whole commands."""

import signal
import subprocess
import sys
import time

import pytest
from sweep_commands import ROOT, start

# `body` is a command's work; limits are shortened.
_COMMAND = """
import ctypes, gc, signal, sys, threading, time
from medfuse_jax.runtime import command_line, watchdog

watchdog.SIGNAL_LIMIT_S = 2.0

def ready():
    print("ready", flush=True)

def main(argv):
{body}

command_line.run(main, resumes=True)
"""
_LINE = "interrupted; rerun the command to resume"


def _command(body):
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return [sys.executable, "-c", _COMMAND.format(body=indented)]


def _signal(body, *numbers, limit_s=10):
    """Run a body, send it signals a second and a half apart once it is ready; return status, output and seconds."""
    process = start(_command(body))
    try:
        assert process.stdout.readline() == "ready\n"
        start_s = time.monotonic()
        for i, number in enumerate(numbers):
            time.sleep(1.5 if i else 0)
            process.send_signal(number)
        printed = process.communicate(timeout=limit_s)[0]
        return process.returncode, printed, time.monotonic() - start_s
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_in_one_line(number):
    assert _signal("ready()\ntime.sleep(60)", number)[:2] == (1, f"{_LINE}\n")


def test_a_signal_within_garbage_collection_is_not_lost():
    """jax collects its own garbage in such a callback, where Python swallows every exception."""
    body = """
def collect(phase, info):
    gc.callbacks.remove(collect)
    ready()
    for _ in range(10):
        time.sleep(0.1)
gc.callbacks.append(collect)
gc.collect()
time.sleep(60)
"""
    status, printed, _ = _signal("watchdog.SIGNAL_LIMIT_S = 60\n" + body, signal.SIGTERM)
    assert (status, printed) == (1, f"{_LINE}\n")


@pytest.mark.parametrize(
    "body",
    [
        # A mutex that nobody unlocks: an endless wait in a library, in which Python runs no handler.
        "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)\nlock(mutex)\nready()\n"
        "lock(mutex)",
        "with watchdog.deferred():\n    ready()\n    time.sleep(60)",
        "try:\n    ready()\n    time.sleep(60)\nfinally:\n    time.sleep(60)",
        "try:\n    ready()\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)",
    ],
)
def test_what_does_not_end_by_itself_is_ended(body):
    status, printed, seconds = _signal(body, signal.SIGTERM)
    assert (status, printed) == (1, f"{_LINE}\n") and seconds < 6


def test_an_import_is_ended_not_interrupted(tmp_path):
    """Some modules crash if an exception is raised while they begin."""
    (tmp_path / "slow_module.py").write_text("try:\n    ready()\n    time.sleep(60)\nfinally:\n    print('unwound')\n")
    body = f"import builtins\nbuiltins.ready, builtins.time = ready, time\nsys.path.append({str(tmp_path)!r})\n"
    assert _signal(f"{body}import slow_module", signal.SIGTERM)[:2] == (1, f"{_LINE}\n")


def test_threads_that_never_end_are_not_waited_for():
    body = "threading.Thread(target=time.sleep, args=(60,)).start()\nready()\ntime.sleep(60)"
    assert _signal(body, signal.SIGTERM)[2] < 1.5


def test_a_loop_saves_before_it_stops():
    body = """
with watchdog.deferred():
    ready()
    while not watchdog.received():
        time.sleep(0.05)
    time.sleep(0.5)
    raise watchdog.Stopped("step 3 is saved")
"""
    assert _signal(body, signal.SIGTERM)[:2] == (1, f"{_LINE} (step 3 is saved)\n")


def test_only_a_second_ctrl_c_ends_a_save():
    body = "watchdog.SIGNAL_LIMIT_S = 60\nwith watchdog.deferred():\n    ready()\n    time.sleep(4)"
    assert _signal(body, signal.SIGINT, signal.SIGINT)[2] < 2.5
    assert _signal(body, signal.SIGTERM, signal.SIGTERM)[2] > 3.5


def test_a_wait_that_lasts_too_long_ends_with_its_line():
    body = """
for _ in range(3):
    with watchdog.within(3, "the reader stalls"):
        time.sleep(1)
with watchdog.within(60, "outer") as renew:
    with watchdog.within(2, "the reader stalls"):
        threading.Event().wait()
"""
    start_s = time.monotonic()
    done = subprocess.run(_command(body), cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "error: the reader stalls\n")
    assert 4 < time.monotonic() - start_s < 12


def test_a_wait_that_goes_on_is_left_alone():
    body = (
        "with watchdog.within(2.5, 'stalls') as renew:\n    for _ in range(4):\n        time.sleep(1)\n        renew()"
    )
    assert subprocess.run(_command(body), cwd=ROOT, timeout=30).returncode == 0


def test_a_full_disk_in_a_thread_prints_no_traceback():
    body = """
def write():
    raise {}
class Writer:
    __del__ = lambda self: write()
Writer()
thread = threading.Thread(target=write)
thread.start()
thread.join()
raise ValueError("lost") from OSError(28, "No space left on device")
"""
    full, other = body.format("OSError(28, 'No space left on device')"), body.format("OSError(5, 'Input/output error')")
    done = subprocess.run(_command(full), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1) and "disk is full" in done.stderr
    assert "Traceback" in subprocess.run(_command(other), cwd=ROOT, capture_output=True, text=True).stderr
