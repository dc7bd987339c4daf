"""One training over several processes: the numbers of one process, one checkpoint, and how it stops and resumes.

The processes are of this machine and talk over its loopback; each has some of four simulated devices.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sweep_commands import ROOT, free_port, write_config

_DEVICES = 4


# A machine whose devices must hold the X-rays together: each process reads and holds its part of them.
_DIVIDED = "from medfuse_jax import feed; feed.choose_parts = lambda run, splits=(): len(run.devices)"


def _start(config, workdir, num_processes, flags=(), before="pass"):
    """Start the processes of one training; flags: of each process, or of all. before: code that they run first."""
    devices = _DEVICES // num_processes
    kept = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    xla_flags = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    environment = os.environ | {"XLA_FLAGS": xla_flags, "NPROC": "16"}
    port, running = free_port(), []
    for i in range(num_processes):
        code = f"import runpy; {before}; runpy.run_module('medfuse_jax.main', run_name='__main__', alter_sys=True)"
        command = [sys.executable, "-c", code, f"--config={config}", f"--workdir={workdir}"]
        if num_processes > 1:
            command += [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}", f"--process={i}"]
        command += flags[i] if flags else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return running


def _end(running, timeout_s=300):
    """Wait for the processes; return their exit statuses, outputs and errors."""
    try:
        texts = [process.communicate(timeout=timeout_s) for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], [out for out, _ in texts], [err for _, err in texts]


def _train(config, workdir, num_processes, before="pass"):
    statuses, printed, errors = _end(_start(config, workdir, num_processes, before=before))
    assert statuses == [0] * num_processes, errors
    return printed


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _assert_same(workdir, expected):
    ours, theirs = (np.load(folder / "predictions_test.npz") for folder in (workdir, expected))
    np.testing.assert_array_equal(ours["stay_id"], theirs["stay_id"])
    np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=2e-4)
    losses = [[line["val_loss"] for line in _lines(f) if line["phase"] == "val"] for f in (workdir, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.fixture(scope="module")
def config(shards, tmp_path_factory):
    """MedFuse with a pre-trained X-ray encoder, four epochs."""
    fields = {"method": "medfuse", "pretrain": {"cxr": {"method": "uni_cxr", "task": "radiology", "num_epochs": 1}}}
    return write_config(tmp_path_factory.mktemp("config"), shards, num_epochs=4, fields=fields)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The workdir of the same training by one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    _train(config, folder, 1)
    return folder


@pytest.mark.nightly  # the signal's test compares two processes and four with one, too
@pytest.mark.parametrize(("num_processes", "before"), [(4, "pass"), (2, _DIVIDED)])
def test_several_processes_train_what_one_does(config, alone, tmp_path, num_processes, before):
    printed = _train(config, tmp_path / "run", num_processes, before)
    _assert_same(tmp_path / "run", alone)
    said = [[line for line in text.splitlines() if not line.startswith("[Gloo]")] for text in printed]
    assert "report/index.html" in said[0][-1] and not any(said[1:]), "the first alone prints"
    assert len(_lines(tmp_path / "run")) == len(_lines(alone))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["environment"]["devices"].startswith(f"{_DEVICES} x")


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all_and_the_command_resumes(config, alone, tmp_path):
    running = _start(config, tmp_path / "run", 2)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in running), _end(running)
        time.sleep(0.2)
    running[1].send_signal(signal.SIGTERM)
    statuses, _, errors = _end(running, timeout_s=120)
    assert statuses == [1, 1], errors  # the status of errors that a retry may mend
    assert all("step " in text and "is saved" in text and "Traceback" not in text for text in errors), errors
    _train(config, tmp_path / "run", 4)  # on other devices
    _assert_same(tmp_path / "run", alone)


@pytest.mark.nightly
def test_a_process_that_dies_ends_the_others(config, tmp_path):
    running = _start(config, tmp_path / "run", 2)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in running), _end(running)
        time.sleep(0.2)
    running[1].kill()
    start_s = time.monotonic()
    statuses, _, _ = _end(running, timeout_s=150)
    assert statuses[0] != 0 and time.monotonic() - start_s < 120


@pytest.mark.nightly
def test_processes_with_different_configs_are_refused(config, tmp_path):
    statuses, _, errors = _end(_start(config, tmp_path / "run", 2, [["--config.seed=0"], ["--config.seed=1"]]))
    assert statuses == [2, 2], errors
    assert all("the processes have different configs" in text for text in errors), errors
    assert not (tmp_path / "run").exists()
