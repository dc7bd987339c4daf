"""The sweep's command: several processes, a kill at any moment, its flags, and the job files that start it."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from medfuse_jax import config as config_lib
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import processes
from medfuse_jax.sweep import search as search_lib

_ROOT = Path(__file__).parents[2]
_CONFIG = """
from medfuse_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.dir = {data_dir!r}
    config.data.max_buckets = 1
    config.method = "uni_ehr"
    config.model.ehr_hidden = config.model.fusion_hidden = 8
    config.model.resnet_stage_sizes, config.model.resnet_width = (1, 1, 1, 1), 4
    config.image.resize_px = config.image.crop_px = 32
    config.batch_size, config.num_epochs, config.eval.num_bootstrap = 32, {num_epochs}, 20
    config.update({more!r})
    return config
"""
_PRETRAINED = {
    "method": "medfuse",
    "early_stop_epochs": 100,
    "pretrain": {
        "cxr": {"method": "uni_cxr", "task": "radiology", "num_epochs": 12},
        "ehr": {"method": "uni_ehr", "num_epochs": 12},
    },
}


def _command(tmp_path, shards, workdir, *more, num_epochs=2, trials=4, fields=()):
    config = tmp_path / "small.py"
    config.write_text(_CONFIG.format(data_dir=str(shards), num_epochs=num_epochs, more=dict(fields)))
    flags = [f"--config={config}", f"--workdir={tmp_path / workdir}", f"--trials={trials}", "--lanes=1"]
    return [sys.executable, "-m", "medfuse_jax.sweep", *flags, "--search=lr:loguniform(1e-3,1e-2)", *more]


def _start(command):
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _table(workdir):
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _start_together(num_processes, tmp_path, shards, workdir, *flags, **more):
    """The processes of one sweep, started."""
    shared = [f"--coordinator=localhost:{_free_port()}", f"--num_processes={num_processes}"]
    own = [[*shared, f"--process={i}"] for i in range(num_processes)] if num_processes > 1 else [[]]
    return [_start(_command(tmp_path, shards, workdir, *flags, *of_process, **more)) for of_process in own]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_trials(tmp_path, shards, num_processes):
    running = _start_together(num_processes, tmp_path, shards, "together")
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * num_processes, said
    assert all(f"once for {4 // num_processes} trials" in text for text in said)
    rows = _table(tmp_path / "together")
    assert [row["status"] for row in rows] == ["finished"] * 4 and (tmp_path / "together" / "sweep.html").exists()
    alone = subprocess.run(_command(tmp_path, shards, "alone"), cwd=_ROOT, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert _table(tmp_path / "alone") == rows


@pytest.mark.slow
def test_processes_draw_rounds_from_each_others_trials(tmp_path, shards):
    pytest.importorskip("optuna")
    flags = ["--algorithm=optuna", "--round=2", "--seed=5"]
    running = _start_together(2, tmp_path, shards, "rounds", *flags, num_epochs=1)
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [row["status"] for row in _table(tmp_path / "rounds")] == ["finished"] * 4
    assert len(list((tmp_path / "rounds" / "rounds").iterdir())) == 2
    alone = subprocess.run(
        _command(tmp_path, shards, "alone", *flags, num_epochs=1), cwd=_ROOT, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert _table(tmp_path / "alone") == _table(tmp_path / "rounds")


@pytest.mark.slow
def test_processes_export_heads_on_encoders_that_the_first_trained(tmp_path, shards):
    running = _start_together(
        2, tmp_path, shards, "heads", "--export=0,1", num_epochs=1, trials=2, fields=_PRETRAINED | {"method": "early"}
    )
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    rows = {int(row["trial"]): row for row in _table(tmp_path / "heads")}
    for number in range(2):
        folder = tmp_path / "heads" / "trials" / f"{number:03d}"
        command = [sys.executable, "-m", "medfuse_jax.evaluate", f"--workdir={folder}", "--split=val"]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        scored = json.loads((folder / "result_val.json").read_text())["subsets"]["all"]["auroc_macro"]
        assert scored == pytest.approx(float(rows[number]["val_auroc"]), abs=1e-6)


def test_the_command_draws_and_exports_what_its_flags_say(tmp_path, shards):
    search = "lr:loguniform(1e-3,1e-2)"
    for more in (["--seed=3"], ["--seed=3", "--export=1"]):
        done = subprocess.run(
            _command(tmp_path, shards, "swept", *more, num_epochs=1, trials=2),
            cwd=_ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    drawn = search_lib.draw(search_lib.parse([search], config_lib.default()), 2, seed=3)
    rows = {int(row["trial"]): float(row["lr"]) for row in _table(tmp_path / "swept")}
    assert rows == {trial.number: trial.values["learning_rate"] for trial in drawn}
    assert any((tmp_path / "swept" / "trials" / "001" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_sweep_stopped_while_it_pretrains_goes_on(tmp_path, shards):
    """SIGTERM within each stage, then a run to the end: the table of a sweep that nothing stopped."""
    processes = (2, 1, 2)  # at each start
    settings = {"num_epochs": 1, "trials": 2, "fields": _PRETRAINED}
    for stage, num_processes in zip(("cxr", "ehr"), processes):
        running = _start_together(num_processes, tmp_path, shards, "stopped", **settings)
        folder, end_s = tmp_path / "stopped" / f"pretrain_{stage}", time.monotonic() + 240
        while not any(folder.glob("checkpoints/*[0-9]")) and time.monotonic() < end_s and running[0].poll() is None:
            time.sleep(0.002)
        for process in running:
            process.send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[0] for process in running]
        assert [process.returncode for process in running] == [1] * num_processes, said
        assert all("interrupted; rerun the command to resume" in text for text in said)
        reached = (folder / "metrics.jsonl").read_text().count('"val"')
        assert 1 <= reached < 12 and not (folder / "trained.json").exists()
    running = _start_together(processes[-1], tmp_path, shards, "stopped", **settings)
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes[-1], said
    (whole,) = _start_together(1, tmp_path, shards, "whole", **settings)
    said = whole.communicate(timeout=240)[0]
    assert whole.returncode == 0, said
    assert _table(tmp_path / "stopped") == _table(tmp_path / "whole")
    for stage in ("cxr", "ehr"):
        logs = [(tmp_path / name / f"pretrain_{stage}" / "metrics.jsonl").read_text() for name in ("stopped", "whole")]
        assert [log.count('"val"') for log in logs] == [12, 12]


@pytest.mark.slow
def test_a_sweep_killed_again_and_again_gives_the_same_table(tmp_path, shards):
    """SIGKILL at three moments of the training, found by what is on disk."""
    whole = subprocess.run(
        _command(tmp_path, shards, "whole", num_epochs=12), cwd=_ROOT, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    command = _command(tmp_path, shards, "killed", num_epochs=12)
    for saved in (1, 10, 25):  # checkpoints seen, of 4 trials with 12 epochs
        process = _start(command)
        seen, end_s = set(), time.monotonic() + 120
        while len(seen) < saved and process.poll() is None and time.monotonic() < end_s:
            seen |= set((tmp_path / "killed").glob("trials/*/checkpoints/*"))
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it is killed before it is done"
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _table(tmp_path / "killed") == _table(tmp_path / "whole")


def test_what_may_pass_by_itself_exits_with_another_status(tmp_path):
    """A job is not given up because the lock of a killed process, or a cluster, is not there yet."""
    lock = (tmp_path / ".lock", "--workdir", "busy")
    with files.locked(*lock), pytest.raises(UserError) as busy, files.locked(*lock):
        pass
    assert [command_line.status(error) for error in (UserError(), busy.value, KeyboardInterrupt(), KeyError())] == [
        2,
        1,
        1,
        1,
    ]


_TWO = """
import sys, time
from medfuse_jax import command_line, errors
from medfuse_jax.sweep import pods

process = int(sys.argv.pop())

def work():
    print("at work", flush=True)
    if process == 1:
        {fails}
    time.sleep(600)

def main(argv):
    pods.start("localhost:{port}", 2, process, detect=False)
    pods.run(work)

command_line.run(main)
"""


@pytest.mark.parametrize(
    ("fails", "by_signal", "said"),
    [
        ("", signal.SIGTERM, "interrupted; rerun the command to resume"),
        pytest.param("", signal.SIGINT, "interrupted; rerun the command to resume", marks=pytest.mark.slow),
        pytest.param("raise KeyError('a bug')", None, "KeyError: 'a bug'", marks=pytest.mark.slow),
        pytest.param(
            "raise OSError('No space left on device')", None, "error: the disk is full", marks=pytest.mark.slow
        ),
        ("raise errors.UserError('a wrong field')", None, "error: a wrong field"),
    ],
)
def test_a_process_that_ends_early_leaves_at_once(fails, by_signal, said):
    """Not after the other process, which waits for its trials. scancel and a pod's eviction are a SIGTERM."""
    script = _TWO.format(fails=fails or "pass", port=_free_port())
    both = [_start([sys.executable, "-c", script, str(process)]) for process in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["at work\n"] * 2
        if by_signal:
            both[1].send_signal(by_signal)
        assert both[1].wait(timeout=30) == (2 if "a wrong field" in said else 1) and both[0].poll() is None
        text = both[1].stdout.read()
        assert said in text
        assert ("Traceback" in text) == ("a bug" in said)
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--trials=0", "--trials=0: give at least 1"),
        ("--search=learning_rat:uniform(0,1)", "Did you mean 'learning_rate'?"),
        ("--coordinator=localhost:1", "--num_processes and --process together"),
    ],
)
def test_a_wrong_flag_ends_the_command_in_one_line(tmp_path, flag, said):
    command = [sys.executable, "-m", "medfuse_jax.sweep", "--config=configs/pheno.py", f"--workdir={tmp_path}", flag]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and said in lines[0]


@pytest.mark.parametrize(
    ("coordinator", "num_processes", "process", "said"),
    [
        ("host:1", 2, 2, "--process=2: with --num_processes=2 give 0 to 1"),
        ("host", 2, 0, "--coordinator=host is not HOST:PORT"),
        ("host:1", None, 0, "together, or none"),
    ],
)
def test_processes_that_cannot_start_are_refused(coordinator, num_processes, process, said):
    with pytest.raises(UserError, match=re.escape(said)):
        processes.start(coordinator, num_processes, process, detect=False)


def test_a_port_in_use_is_one_line():
    with socket.create_server(("", 0)) as taken:
        coordinator = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--coordinator={coordinator}: the port is taken .* give another"):
            processes.start(coordinator, 2, 0, detect=False)


@pytest.mark.parametrize("sizes", [[10], [1] * 8, [2, 1, 4, 3]])
def test_each_trial_is_one_process_own_and_no_process_has_more_than_its_share(sizes):
    """Also where every trial is a group of its own."""
    parts, dealt = [[] for _ in range(3)], 0
    for size in sizes:
        for process, part in enumerate(parts):
            part += processes.Process(process, 3).part(list(range(dealt, dealt + size)), dealt)
        dealt += size
    assert sorted(item for part in parts for item in part) == list(range(sum(sizes)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_slurm_file_is_a_script(tmp_path):
    path = _ROOT / "jobs" / "slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    assert re.search(r"^srun .*python -m medfuse_jax\.sweep --distributed", path.read_text(), re.M)
    broken = tmp_path / "broken.sh"
    broken.write_text(path.read_text() + "\nif true; then\n")
    assert subprocess.run(["bash", "-n", broken], capture_output=True).returncode != 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_every_task_of_the_slurm_file_sees_the_gpus_of_its_node():
    """jax takes the GPU of the task's number on its node (jax/_src/clusters/cluster.py), of those that it sees."""
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (_ROOT / "jobs" / "slurm.sh").read_text(), re.M))
    assert flags["gpus-per-node"] == flags["ntasks-per-node"] and flags["gpu-bind"] == "none"
    assert "gpus-per-task" not in flags


@pytest.mark.parametrize(("seconds", "warned"), [(60, True), (0, False)])
def test_slurms_warning_before_the_time_limit_queues_the_job_again(tmp_path, seconds, warned):
    """With a stand-in for each of Slurm's commands; the job ends as its step does."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    runs = f"exec sleep {seconds}" if seconds else "exit 3"
    for name, does in {
        "srun": f'echo $$ > step.pid; echo "$@" > srun.txt; echo step; {runs}',
        "scontrol": 'echo "$@"; kill "$(cat step.pid)"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    of_slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "MEDFUSE_VENV": str(tmp_path)}
    job = subprocess.Popen(
        ["bash", _ROOT / "jobs" / "slurm.sh", "--workdir=with a space"],
        cwd=tmp_path,
        env=os.environ | of_slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "step\n"
    own, _, program = (tmp_path / "srun.txt").read_text().partition(" python ")
    assert own.split() == ["--cpus-per-task=4", "--kill-on-bad-exit=1"]
    assert program == "-m medfuse_jax.sweep --distributed --workdir=with a space\n"
    if warned:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == (128 + signal.SIGTERM if warned else 3)
    assert job.stdout.read() == ("requeue 7\n" if warned else "")


_SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""


@pytest.mark.slow
def test_the_slurm_file_runs_a_sweep_as_two_tasks(tmp_path, shards):
    """Job file, cluster detection and sweep for real; only srun is a stand-in, which starts both tasks here."""
    command = _command(tmp_path, shards, "swept", num_epochs=1, trials=2)
    scripts = {"srun": _SRUN, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n', "activate": ""}
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    of_slurm = {
        "SLURM_JOB_ID": str(os.getpid()),  # jax makes its port of this
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "MEDFUSE_VENV": str(tmp_path),
    }
    paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        ["bash", _ROOT / "jobs" / "slurm.sh", *command[3:]],
        cwd=tmp_path,
        env=os.environ | of_slurm | paths,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once for 1 trials") == 2, done.stdout
    assert [row["status"] for row in _table(tmp_path / "swept")] == ["finished"] * 2


def test_the_gke_file_starts_one_sweep_on_every_host():
    service, job = yaml.safe_load_all((_ROOT / "jobs" / "gke_tpu.yaml").read_text())
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    evicted, wrong = spec["podFailurePolicy"]["rules"]  # the first that fits decides
    assert pod["restartPolicy"] == "Never", "Kubernetes takes a policy with no other"
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    codes = wrong["onExitCodes"]
    assert wrong["action"] == "FailJob" and codes["containerName"] == container["name"]
    assert (codes["operator"], codes["values"]) == ("In", [command_line.status(UserError())])
    config = next(flag.partition("=")[2] for flag in container["command"] if flag.startswith("--config="))
    assert container["workingDir"] and (_ROOT / config).is_file(), "a path in the clone"
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert container["command"][:4] == ["python", "-m", "medfuse_jax.sweep", "--distributed"]
    known = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", (_ROOT / "medfuse_jax" / "sweep" / "__main__.py").read_text()))
    used = {re.match(r"--([\w.]+)", flag)[1].split(".")[0] for flag in container["command"][3:]}
    assert used <= known and "workdir" in used
