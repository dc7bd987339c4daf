"""Processes that train one run together: wrong flags, and one that fails. See tests/test_distributed.py too."""

import signal
import socket
import sys

import pytest
from sweep_commands import free_port, start

from medfuse_jax.runtime import hosts
from medfuse_jax.runtime.errors import UserError

_TWO_PROCESSES = """
import sys, time
from medfuse_jax.runtime import command_line, errors, hosts

process = int(sys.argv.pop())

def work():
    print("at work", file=sys.stderr, flush=True)
    if process == 1:
        {statement}
    time.sleep(600)

def main(argv):
    hosts.start_training("localhost:{port}", 2, process, detect=False)
    hosts.run(work)

command_line.run(main)
"""


@pytest.mark.parametrize(
    ("statement", "sent", "status", "printed"),
    [
        pytest.param("pass", signal.SIGINT, 1, "interrupted", marks=pytest.mark.nightly),
        pytest.param("raise KeyError('a bug')", None, 1, "KeyError: 'a bug'", marks=pytest.mark.nightly),
        pytest.param("raise OSError('No space left on device')", None, 1, "error: the disk", marks=pytest.mark.nightly),
        pytest.param(
            "import jax; raise jax.errors.JaxRuntimeError('UNKNOWN: Gloo AllGather failed: Connection closed by peer')",
            None,
            1,
            "another process of this training has ended",
            marks=pytest.mark.nightly,
        ),
        ("raise errors.UserError('a wrong field')", None, 2, "a wrong field"),
    ],
)
def test_a_process_that_fails_exits_at_once(statement, sent, status, printed):
    """It does not wait for the other process, which waits for it."""
    script = _TWO_PROCESSES.format(statement=statement, port=free_port())
    both = [start([sys.executable, "-c", script, str(process)]) for process in range(2)]
    try:
        assert all("at work\n" in process.stdout for process in both)  # each is read up to that line
        if sent:
            both[1].send_signal(sent)
        assert both[1].wait(timeout=30) == status and both[0].poll() is None
        text = both[1].stdout.read()
        assert printed in text and ("Traceback" in text) == ("a bug" in printed)
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_process_that_hangs_ends_those_that_wait_for_it():
    statement = "hosts.ANSWER_LIMIT_S = 4.0; time.sleep(1)"
    script = _TWO_PROCESSES.format(statement="time.sleep(600)", port=free_port())
    script = script.replace("    time.sleep(600)\n\ndef", f"    {statement}; hosts.wait('here')\n\ndef")
    both = [start([sys.executable, "-c", script, str(process)]) for process in range(2)]
    try:
        printed = both[0].communicate(timeout=60)[0]
        assert both[0].returncode == 1 and "no answer from the other processes" in printed.splitlines()[-1], printed
        assert "Traceback" not in printed
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("coordinator", "num_processes", "process", "field"),
    [
        ("host:1", 0, 0, "--num_processes"),
        ("host:1", 2, 2, "--process"),
        ("host", 2, 0, "--coordinator"),
        ("host:65536", 2, 0, "--coordinator"),
        ("host:0", 2, 1, "--coordinator"),
        ("host:1", None, 0, "--coordinator"),
    ],
)
def test_invalid_flags_of_processes_are_refused(coordinator, num_processes, process, field):
    with pytest.raises(UserError) as error:
        hosts.start_training(coordinator, num_processes, process, detect=False)
    assert error.value.field == field


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as used:
        coordinator = f"localhost:{used.getsockname()[1]}"
        with pytest.raises(UserError) as error:
            hosts.start_training(coordinator, 2, 0, detect=False)
    assert (error.value.field, error.value.value) == ("--coordinator", coordinator)
