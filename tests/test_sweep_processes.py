"""The sweep's command: several processes, a kill at any moment, its flags, and the job files that start it."""

import csv
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

from medfuse_jax.errors import UserError
from medfuse_jax.sweep import pods

_ROOT = Path(__file__).parent.parent
_CONFIG = """
from medfuse_jax import config as config_lib


def get_config():
    config = config_lib.default()
    config.data.dir = {data_dir!r}
    config.data.max_buckets = 1
    config.method = "uni_ehr"
    config.model.ehr_hidden = 8
    config.batch_size, config.num_epochs, config.eval.num_bootstrap = 32, {num_epochs}, 20
    return config
"""


def _command(tmp_path, shards, workdir, *more, num_epochs=2, trials=4):
    config = tmp_path / "small.py"
    config.write_text(_CONFIG.format(data_dir=str(shards), num_epochs=num_epochs))
    flags = [f"--config={config}", f"--workdir={tmp_path / workdir}", f"--trials={trials}", "--lanes=1"]
    return [sys.executable, "-m", "medfuse_jax.sweep", *flags, "--search=lr:loguniform(1e-3,1e-2)", *more]


def _start(command):
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _table(workdir):
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_trials(tmp_path, shards, num_processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}"]
    running = [_start(_command(tmp_path, shards, "together", *flags, f"--process={i}")) for i in range(num_processes)]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * num_processes, said
    assert all(f"once for {4 // num_processes} trials" in text for text in said)
    rows = _table(tmp_path / "together")
    assert [row["status"] for row in rows] == ["finished"] * 4 and (tmp_path / "together" / "sweep.html").exists()
    alone = subprocess.run(_command(tmp_path, shards, "alone"), cwd=_ROOT, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert _table(tmp_path / "alone") == rows


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


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--trials=0", "--trials=0: give at least 1"),
        ("--search=lr:loguniform(1e-3,1e-5)", "the range is upside down"),
        ("--search=learning_rat:uniform(0,1)", "Did you mean 'learning_rate'?"),
        ("--coordinator=localhost:1", "--num_processes and --process together"),
    ],
)
def test_a_wrong_flag_ends_the_command_in_one_line(tmp_path, flag, said):
    command = [sys.executable, "-m", "medfuse_jax.sweep", "--config=configs/pheno.py", f"--workdir={tmp_path}", flag]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1, done.stderr
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
        pods.start(coordinator, num_processes, process, detect=False)


def test_each_trial_is_one_process_own():
    parts = [pods.mine(list(range(10)), process, 3) for process in range(3)]
    assert (
        sorted(item for part in parts for item in part) == list(range(10))
        and max(map(len, parts)) - min(map(len, parts)) <= 1
    )


def test_the_slurm_file_is_a_script(tmp_path):
    path = _ROOT / "jobs" / "slurm.sh"
    subprocess.run(["bash", "-n", path], check=True)
    assert re.search(r"srun .*python -m medfuse_jax\.sweep --distributed", path.read_text())
    broken = tmp_path / "broken.sh"
    broken.write_text(path.read_text() + "\nif true; then\n")
    assert subprocess.run(["bash", "-n", broken], capture_output=True).returncode != 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_the_gke_file_starts_one_sweep_on_every_host():
    service, job = yaml.safe_load_all((_ROOT / "jobs" / "gke_tpu.yaml").read_text())
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert container["command"][:4] == ["python", "-m", "medfuse_jax.sweep", "--distributed"]
    known = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", (_ROOT / "medfuse_jax" / "sweep" / "__main__.py").read_text()))
    used = {re.match(r"--([\w.]+)", flag)[1].split(".")[0] for flag in container["command"][3:]}
    assert used <= known and "workdir" in used
