"""The job files that start sweeps on clusters: jobs/slurm.sh and jobs/gke_tpu.yaml."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from sweep_commands import ROOT, command, outputs, start, table

from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import UserError

_SLURM = ROOT / "jobs" / "slurm.sh"


def _write_scripts(folder, scripts):
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def test_the_slurm_file_is_a_valid_script(tmp_path):
    subprocess.run(["bash", "-n", _SLURM], check=True)
    assert re.search(r"^srun .*python -m medfuse_jax\.sweep ", _SLURM.read_text(), re.M)
    broken = tmp_path / "broken.sh"
    broken.write_text(_SLURM.read_text() + "\nif true; then\n")
    assert subprocess.run(["bash", "-n", broken], capture_output=True).returncode != 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", _SLURM], check=True)


@pytest.mark.parametrize(("seconds", "signalled"), [(60, True), (0, False)])
def test_slurm_requeues_the_job_before_the_time_limit(tmp_path, seconds, signalled):
    """With fake Slurm commands. Without the signal, the job ends with the status of its step."""
    step = f"exec sleep {seconds}" if seconds else "exit 3"
    scripts = {
        "srun": f'#!/bin/sh\necho $$ > step.pid; echo "$@" > srun.txt; echo step; {step}\n',
        "scontrol": '#!/bin/sh\necho "$@"; kill "$(cat step.pid)"\n',
        "activate": "",
    }
    _write_scripts(tmp_path / "bin", scripts)
    slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_CPUS_PER_TASK": "4"}
    job = subprocess.Popen(
        ["bash", _SLURM, "--workdir=with a space"],
        cwd=tmp_path,
        env=os.environ | slurm | {"MEDFUSE_VENV": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "step\n"
    flags, _, program = (tmp_path / "srun.txt").read_text().partition(" python ")
    assert flags.split() == ["--cpus-per-task=4"]
    assert program == "-m medfuse_jax.sweep --workdir=with a space\n"
    if signalled:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == (128 + signal.SIGTERM if signalled else 3)
    assert job.stdout.read() == ("requeue 7_2\n" if signalled else "")


@pytest.mark.slow
def test_the_slurm_file_runs_a_sweep_as_two_tasks(tmp_path, shards):
    """Only srun is fake: it starts its command."""
    sweep = command(tmp_path, shards, "swept", num_epochs=1, trials=2)
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    _write_scripts(tmp_path / "bin", {"srun": '#!/bin/sh\nshift; exec "$@"\n', "python": python, "activate": ""})
    slurm = {"SLURM_CPUS_PER_TASK": "1", "MEDFUSE_VENV": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    outputs([start(["bash", _SLURM, *sweep[3:]], env=environment) for _ in range(2)])
    assert [row["status"] for row in table(tmp_path / "swept")] == ["finished"] * 2


def test_the_gke_file_starts_one_sweep_on_all_hosts():
    job = yaml.safe_load((ROOT / "jobs" / "gke_tpu.yaml").read_text())
    spec = job["spec"]
    assert spec["completions"] == spec["parallelism"], "each pod ends when all trials have"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    eviction, user_error = spec["podFailurePolicy"]["rules"]  # the first rule that matches applies
    assert pod["restartPolicy"] == "Never", "Kubernetes requires it for a podFailurePolicy"
    assert eviction == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    codes = user_error["onExitCodes"]
    assert user_error["action"] == "FailJob" and codes["containerName"] == container["name"]
    assert (codes["operator"], codes["values"]) == ("In", [command_line.status(UserError(""))])
    config = next(flag.partition("=")[2] for flag in container["command"] if flag.startswith("--config="))
    assert container["workingDir"] and (ROOT / config).is_file(), "a path in the clone"
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == container["resources"]["limits"]["google.com/tpu"], "a slice of one host"
    assert container["command"][:3] == ["python", "-m", "medfuse_jax.sweep"]
    source = ROOT / "medfuse_jax" / "sweep" / "__main__.py"
    known = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source.read_text()))
    used = {re.match(r"--([\w.]+)", flag)[1].split(".")[0] for flag in container["command"][3:]}
    assert used <= known and "workdir" in used
