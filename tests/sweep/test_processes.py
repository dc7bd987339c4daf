"""The sweep's command in processes of its own: several at once, killed at any moment, and with wrong flags."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest
from sweep_commands import PRETRAINED, ROOT, command, free_port, outputs, run, start, start_together, table

from medfuse_jax import config as config_lib
from medfuse_jax.runtime import command_line, files, hosts
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import search

_RESUMABLE = "interrupted; rerun the command to resume"


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_trials(tmp_path, shards, num_processes):
    printed = outputs(start_together(num_processes, tmp_path, shards, "together"))
    assert all(f"once for {4 // num_processes} trials" in text for text in printed)
    rows = table(tmp_path / "together")
    assert [row["status"] for row in rows] == ["finished"] * 4 and (tmp_path / "together" / "sweep.html").exists()
    run(command(tmp_path, shards, "alone"))
    assert table(tmp_path / "alone") == rows


@pytest.mark.slow
def test_rounds_use_the_results_of_all_processes(tmp_path, shards):
    pytest.importorskip("optuna")
    flags = ["--algorithm=optuna", "--round=2", "--seed=5"]
    outputs(start_together(2, tmp_path, shards, "rounds", *flags, num_epochs=1))
    assert [row["status"] for row in table(tmp_path / "rounds")] == ["finished"] * 4
    assert len(list((tmp_path / "rounds" / "rounds").iterdir())) == 2
    run(command(tmp_path, shards, "alone", *flags, num_epochs=1))
    assert table(tmp_path / "alone") == table(tmp_path / "rounds")


@pytest.mark.slow
def test_processes_export_trials_on_encoders_that_the_first_trained(tmp_path, shards):
    fields = PRETRAINED | {"method": "early"}
    outputs(start_together(2, tmp_path, shards, "frozen", "--export=0,1", num_epochs=1, trials=2, fields=fields))
    rows = {int(row["trial"]): row for row in table(tmp_path / "frozen")}
    for number in range(2):
        folder = tmp_path / "frozen" / "trials" / f"{number:03d}"
        run([sys.executable, "-m", "medfuse_jax.evaluate", f"--workdir={folder}", "--split=val"])
        auroc = json.loads((folder / "result_val.json").read_text())["subsets"]["all"]["auroc_macro"]
        assert auroc == pytest.approx(float(rows[number]["val_auroc"]), abs=1e-6)


def test_the_command_passes_its_flags_on(tmp_path, shards):
    printed = run(command(tmp_path, shards, "swept", "--seed=3", "--export=1", num_epochs=1, trials=2))
    drawn = search.draw(search.parse(["lr:loguniform(1e-3,1e-2)"], config_lib.default()), 2, seed=3)
    rows = {int(row["trial"]): float(row["lr"]) for row in table(tmp_path / "swept")}
    assert rows == {trial.number: trial.values["learning_rate"] for trial in drawn}
    assert f"--export=1: written to {tmp_path / 'swept' / 'trials' / '001' / 'checkpoints'}" in printed


@pytest.mark.slow
def test_a_sweep_stopped_in_pretraining_resumes(tmp_path, shards):
    """SIGTERM within each stage, then a run to the end; the table is that of an uninterrupted sweep."""
    numbers = (2, 1, 2)  # of processes, at each start
    settings = {"num_epochs": 1, "trials": 2, "fields": PRETRAINED}
    for stage, num_processes in zip(("cxr", "ehr"), numbers):
        running = start_together(num_processes, tmp_path, shards, "stopped", **settings)
        folder, end_s = tmp_path / "stopped" / f"pretrain_{stage}", time.monotonic() + 240
        while not any(folder.glob("checkpoints/*[0-9]")) and time.monotonic() < end_s and running[0].poll() is None:
            time.sleep(0.002)
        for process in running:
            process.send_signal(signal.SIGTERM)
        printed = [process.communicate(timeout=60)[0] for process in running]
        assert [process.returncode for process in running] == [1] * num_processes, printed
        assert all(_RESUMABLE in text for text in printed)
        validated = (folder / "metrics.jsonl").read_text().count('"val"')
        assert 1 <= validated < 12 and not (folder / "trained.json").exists()
    outputs(start_together(numbers[-1], tmp_path, shards, "stopped", **settings))
    run(command(tmp_path, shards, "whole", **settings))
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")
    for stage in ("cxr", "ehr"):
        logs = [(tmp_path / name / f"pretrain_{stage}" / "metrics.jsonl").read_text() for name in ("stopped", "whole")]
        assert [log.count('"val"') for log in logs] == [12, 12]


@pytest.mark.slow
def test_a_sweep_killed_three_times_gives_the_same_table(tmp_path, shards):
    """SIGKILL at three moments of the training, recognised by the files written."""
    run(command(tmp_path, shards, "whole", num_epochs=12))
    killed = command(tmp_path, shards, "killed", num_epochs=12)
    for num_saved in (1, 10, 25):  # of 4 trials with 12 epochs
        process = start(killed)
        saved, end_s = set(), time.monotonic() + 120
        while len(saved) < num_saved and process.poll() is None and time.monotonic() < end_s:
            saved |= set((tmp_path / "killed").glob("trials/*/checkpoints/*"))
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "killed before its end"
    run(killed)
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


def test_transient_errors_have_another_exit_status(tmp_path):
    """So that a job is retried if a killed process still holds the lock, or the cluster is not up yet."""
    lock = (tmp_path / ".lock", "--workdir", "busy")
    with files.locked(*lock), pytest.raises(UserError) as busy, files.locked(*lock):
        pass
    errors = [UserError(""), busy.value, KeyboardInterrupt(), KeyError()]
    assert [command_line.status(error) for error in errors] == [2, 1, 1, 1]


_TWO_PROCESSES = """
import sys, time
from medfuse_jax.runtime import command_line, errors, hosts

process = int(sys.argv.pop())

def work():
    print("at work", flush=True)
    if process == 1:
        {statement}
    time.sleep(600)

def main(argv):
    hosts.start("localhost:{port}", 2, process, detect=False)
    hosts.run(work)

command_line.run(main)
"""


@pytest.mark.parametrize(
    ("statement", "sent", "status", "printed"),
    [
        ("pass", signal.SIGTERM, 1, _RESUMABLE),
        pytest.param("pass", signal.SIGINT, 1, _RESUMABLE, marks=pytest.mark.slow),
        pytest.param("raise KeyError('a bug')", None, 1, "KeyError: 'a bug'", marks=pytest.mark.slow),
        pytest.param("raise OSError('No space left on device')", None, 1, "error: the disk", marks=pytest.mark.slow),
        pytest.param("raise errors.UserError('a wrong field')", None, 2, "a wrong field", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_exits_at_once(statement, sent, status, printed):
    """It does not wait for the other process, which waits for its trials. scancel and evictions send SIGTERM."""
    script = _TWO_PROCESSES.format(statement=statement, port=free_port())
    both = [start([sys.executable, "-c", script, str(process)]) for process in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["at work\n"] * 2
        if sent:
            both[1].send_signal(sent)
        assert both[1].wait(timeout=30) == status and both[0].poll() is None
        text = both[1].stdout.read()
        assert printed in text and ("Traceback" in text) == ("a bug" in printed)
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("flag", "problem"), [("--trials=0", "--trials"), ("--export=0,x", "'x' is not a trial number")]
)
def test_a_wrong_flag_is_one_line(tmp_path, flag, problem):
    wrong = [sys.executable, "-m", "medfuse_jax.sweep", "--config=configs/pheno.py", f"--workdir={tmp_path}", flag]
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and problem in lines[0]


@pytest.mark.parametrize(
    ("coordinator", "num_processes", "process", "field"),
    [
        ("host:1", 2, 2, "--process"),
        ("host", 2, 0, "--coordinator"),
        ("host:1", None, 0, "--coordinator"),
    ],
)
def test_invalid_flags_of_processes_are_refused(coordinator, num_processes, process, field):
    with pytest.raises(UserError) as error:
        hosts.start(coordinator, num_processes, process, detect=False)
    assert error.value.field == field


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as used:
        coordinator = f"localhost:{used.getsockname()[1]}"
        with pytest.raises(UserError) as error:
            hosts.start(coordinator, 2, 0, detect=False)
    assert (error.value.field, error.value.value) == ("--coordinator", coordinator)


@pytest.mark.parametrize("sizes", [[10], [1] * 8, [2, 1, 4, 3]])
def test_trials_are_dealt_evenly_whatever_the_sizes_of_the_groups(sizes):
    shares, num_dealt = [[] for _ in range(3)], 0
    for size in sizes:
        for process, share in enumerate(shares):
            share += hosts.Process(process, 3).share(list(range(num_dealt, num_dealt + size)), num_dealt)
        num_dealt += size
    assert sorted(item for share in shares for item in share) == list(range(sum(sizes)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
