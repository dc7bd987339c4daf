"""Helpers for tests of sweeps: run a sweep of a small config, stop it, and compare a trial with a single run."""

import csv
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax import parallel, train
from medfuse_jax import run as run_lib
from medfuse_jax.runs import checkpoints, sources
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.sweep import command, results, trial_store

CONFIG_FILE = Path(__file__).parent.parent / "configs" / "pheno.py"  # lists no trials

RATES = ["lr:loguniform(1e-3,1e-2)"]
PRETRAIN = {"ehr": {"method": "uni_ehr"}, "cxr": {"method": "uni_cxr", "task": "radiology"}}


def sweep(config, workdir, specs, num_trials=3, lanes=None, **more):
    """Run a sweep; return the rows of its table."""
    config = config.copy_and_resolve_references()
    request = command.Request(config, CONFIG_FILE, workdir, specs, num_trials, lanes=lanes, **more)
    command.run(request, time.perf_counter())
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def stop_at_save(monkeypatch, number, store_class=trial_store.CheckpointStore) -> list:
    """Interrupt a sweep after the given number of saves; return a list that collects the stores of all saves."""
    save, saved = store_class.save, []

    def stop(store, *args, **kwargs):
        save(store, *args, **kwargs)
        saved.append(store)
        if len(saved) == number:
            store.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(store_class, "save", stop)
    return saved


def assert_resumes(config, tmp_path, monkeypatch, specs, lanes, num_trials, store_class=trial_store.CheckpointStore):
    """Check that a sweep stopped in its second epoch, when one trial has saved and the others not, ends the same."""
    config.num_epochs = 3
    whole = sweep(config, tmp_path / "whole", specs, num_trials, lanes)
    with monkeypatch.context() as patched:
        stop_at_save(patched, num_trials + 1, store_class)
        with pytest.raises(KeyboardInterrupt):
            sweep(config, tmp_path / "stopped", specs, num_trials, lanes)
    assert not (tmp_path / "stopped" / "sweep.csv").exists()
    assert sweep(config, tmp_path / "stopped", specs, num_trials, lanes) == whole
    for number in range(num_trials):
        lines = [read_lines(results.trial_dir(tmp_path / name, number)) for name in ("whole", "stopped")]
        losses = [[line.get("train_loss") or line["val_loss"] for line in of_run] for of_run in lines]
        assert len(losses[0]) == 6
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # trials beside fewer others round differently


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_alone(config, workdir, encoders=None):
    run = run_lib.open_run(config)
    workdir_lib.claim(workdir, run)
    train.train(run, workdir, encoders)


def best_state(workdir):
    config = config_lib.load(workdir / "config.json")
    return checkpoints.restore_best(workdir, run_lib.open_run(config).abstract_state())


def difference(a, b) -> float:
    """Return the largest difference between two states' parameters, statistics and Adam moments."""
    trees = [(s.params, s.batch_stats, s.opt_state) for s in (a, b)]
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *trees)))


def assert_as_alone(trial_dir, alone_dir, monkeypatch, tolerance):
    """Check that a single run with the trial's config on one device has the trial's results."""
    config = config_lib.load(trial_dir / "config.json")
    encoders = {name: (Path(path), sources.reopen(Path(path))) for name, path in config.init.items() if path}
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "devices", lambda num=None: jax.local_devices()[:1])
        train_alone(config, alone_dir, encoders)
    assert difference(best_state(trial_dir), best_state(alone_dir)) < tolerance
    for of_trial, alone in zip(read_lines(trial_dir), read_lines(alone_dir), strict=True):
        for field in alone.keys() - {"phase", "time_s", "samples_per_s", "seal"}:
            assert of_trial[field] == pytest.approx(alone[field], rel=1e-4), field
