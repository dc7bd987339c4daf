"""Helpers for tests that run the sweep's command in processes of their own, on a small config."""

import csv
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
    config.update({fields!r})
    return config
"""
PRETRAINED = {
    "method": "medfuse",
    "early_stop_epochs": 100,
    "pretrain": {
        "cxr": {"method": "uni_cxr", "task": "radiology", "num_epochs": 12},
        "ehr": {"method": "uni_ehr", "num_epochs": 12},
    },
}


def command(tmp_path, shards, workdir, *more, num_epochs=2, trials=4, fields=()):
    """Return the command of a sweep. fields: further changes of the config; more: flags."""
    config = write_config(tmp_path, shards, num_epochs, fields)
    flags = [f"--config={config}", f"--workdir={tmp_path / workdir}", f"--trials={trials}", "--lanes=1"]
    return [sys.executable, "-m", "medfuse_jax.sweep", *flags, "--search=lr:loguniform(1e-3,1e-2)", *more]


def write_config(folder, shards, num_epochs=2, fields=()):
    """Write a small config; return its path."""
    path = folder / "small.py"
    path.write_text(_CONFIG.format(data_dir=str(shards), num_epochs=num_epochs, fields=dict(fields)))
    return path


def run(command, **more):
    """Run a command, which must succeed, and return what it printed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(command, **more):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def start_together(num_processes, *args, **more):
    """Start the processes of one sweep. args, more: of `command`."""
    return [start(command(*args, **more)) for _ in range(num_processes)]


def as_other_host(command):
    """Return a sweep's command as if it ran on a host of its own: others know that it ended by its silence alone."""
    python, _, module, *flags = command
    changed = "from medfuse_jax.sweep import leases; leases._kernel = lambda: ''; leases.STALE_S = 25"
    script = f"import runpy; {changed}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [python, "-c", script, *flags]


def outputs(running):
    """Wait for processes, all of which must succeed, and return what each printed."""
    texts = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), texts
    return texts


def table(workdir):
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
