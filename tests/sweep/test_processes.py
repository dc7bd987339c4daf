"""The sweep's command in processes of its own: several at once, killed at any moment, and with wrong flags."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from sweep_commands import PRETRAINED, ROOT, as_other_host, command, outputs, run, start, start_together, table

from medfuse_jax import config as config_lib
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import search

_RESUMABLE = "interrupted; rerun the command to resume"


@pytest.mark.slow
def test_processes_share_the_trials(tmp_path, shards):
    printed = outputs(start_together(2, tmp_path, shards, "together"))
    assert sum(int(re.search(r"once for (\d) trials", text)[1]) for text in printed) >= 4
    rows = table(tmp_path / "together")
    assert [row["status"] for row in rows] == ["finished"] * 4 and (tmp_path / "together" / "sweep.html").exists()
    run(command(tmp_path, shards, "alone"))
    assert table(tmp_path / "alone") == rows


@pytest.mark.nightly
def test_killed_processes_are_replaced(tmp_path, shards):
    """Two of four, each with a trial that it has saved and not ended, on hosts of their own: their leases go stale."""
    swept = command(tmp_path, shards, "killed", num_epochs=8)
    running = [start(as_other_host(swept)) for _ in range(4)]
    killed, end_s = {}, time.monotonic() + 240
    try:
        while len(killed) < 2 and time.monotonic() < end_s:
            time.sleep(0.01)
            for number, owner in _owners_of_saved(tmp_path / "killed"):
                victim = next((process for process in running if process.pid == owner), None)
                if victim and len(killed) < 2 and owner not in killed:
                    victim.send_signal(signal.SIGKILL)
                    killed[owner] = number
        texts = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert sorted(process.returncode for process in running) == [-signal.SIGKILL] * 2 + [0] * 2, texts
    assert all(f"taking over trial_{number:03d}" in "".join(texts) for number in killed.values()), texts
    run(command(tmp_path, shards, "alone", num_epochs=8))
    assert table(tmp_path / "alone") == table(tmp_path / "killed")


def _owners_of_saved(workdir):
    """Return (trial, process) of the trials that have a checkpoint and have not ended."""
    owners = []
    for folder in workdir.glob("trials/*"):
        if any(folder.glob("checkpoints/*[0-9]")) and not (folder / "trial.json").exists():
            latest = max((workdir / "leases").glob(f"trial_{folder.name}.*"))
            with contextlib.suppress(ValueError):  # it is just being claimed
                owners.append((int(folder.name), json.loads(latest.read_text()).get("process")))
    return owners


@pytest.mark.nightly
def test_rounds_use_the_results_of_all_processes(tmp_path, shards):
    pytest.importorskip("optuna")
    flags = ["--algorithm=optuna", "--round=2", "--seed=5"]
    outputs(start_together(2, tmp_path, shards, "rounds", *flags, num_epochs=1))
    assert [row["status"] for row in table(tmp_path / "rounds")] == ["finished"] * 4
    assert len(list((tmp_path / "rounds" / "rounds").iterdir())) == 2
    run(command(tmp_path, shards, "alone", *flags, num_epochs=1))
    assert table(tmp_path / "alone") == table(tmp_path / "rounds")


@pytest.mark.nightly
def test_processes_export_trials_on_encoders_that_either_trained(tmp_path, shards):
    fields = PRETRAINED | {"method": "early"}
    outputs(start_together(2, tmp_path, shards, "frozen", "--export=0,1", num_epochs=1, trials=2, fields=fields))
    rows = {int(row["trial"]): row for row in table(tmp_path / "frozen")}
    for number in range(2):
        folder = tmp_path / "frozen" / "trials" / f"{number:03d}"
        run([sys.executable, "-m", "medfuse_jax.evaluate", f"--workdir={folder}", "--split=val"])
        auroc = json.loads((folder / "result_val.json").read_text())["subsets"]["all"]["auroc_macro"]
        assert auroc == pytest.approx(float(rows[number]["val_auroc"]), abs=1e-6)


@pytest.mark.slow
def test_the_command_passes_its_flags_on(tmp_path, shards):
    printed = run(command(tmp_path, shards, "swept", "--seed=3", "--export=1", num_epochs=1, trials=2))
    drawn = search.draw(search.parse(["lr:loguniform(1e-3,1e-2)"], config_lib.default()), 2, seed=3)
    rows = {int(row["trial"]): float(row["lr"]) for row in table(tmp_path / "swept")}
    assert rows == {trial.number: trial.values["learning_rate"] for trial in drawn}
    assert f"--export=1: written to {tmp_path / 'swept' / 'trials' / '001' / 'checkpoints'}" in printed


@pytest.mark.nightly
def test_a_sweep_stopped_in_pretraining_resumes(tmp_path, shards):
    """SIGTERM within each stage, then two processes to the end; the table is that of an uninterrupted sweep."""
    settings = {"num_epochs": 1, "trials": 2, "fields": PRETRAINED}
    for stage in ("cxr", "ehr"):
        process = start(command(tmp_path, shards, "stopped", **settings))
        folder, end_s = tmp_path / "stopped" / f"pretrain_{stage}", time.monotonic() + 240
        while not any(folder.glob("checkpoints/*[0-9]")) and time.monotonic() < end_s and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == 1 and _RESUMABLE in printed, printed
        validated = (folder / "metrics.jsonl").read_text().count('"val"')
        assert 1 <= validated < 12 and not (folder / "trained.json").exists()
    outputs(start_together(2, tmp_path, shards, "stopped", **settings))
    run(command(tmp_path, shards, "whole", **settings))
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")
    for stage in ("cxr", "ehr"):
        logs = [(tmp_path / name / f"pretrain_{stage}" / "metrics.jsonl").read_text() for name in ("stopped", "whole")]
        assert [log.count('"val"') for log in logs] == [12, 12]


@pytest.mark.nightly
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
    """So that a job is retried if a killed process still holds the lock."""
    lock = (tmp_path / ".lock", "--workdir", "busy")
    with files.locked(*lock), pytest.raises(UserError) as busy, files.locked(*lock):
        pass
    errors = [UserError(""), busy.value, KeyboardInterrupt(), KeyError()]
    assert [command_line.status(error) for error in errors] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("flag", "problem"), [("--trials=0", "--trials"), ("--export=0,x", "'x' is not a trial number")]
)
def test_a_wrong_flag_is_one_line(tmp_path, flag, problem):
    wrong = [sys.executable, "-m", "medfuse_jax.sweep", "--config=configs/pheno.py", f"--workdir={tmp_path}", flag]
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and problem in lines[0]
