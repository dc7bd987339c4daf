"""What the tests of sweeps share: a sweep of a small config, stopped or not, and the run alone beside a trial."""

import csv
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax import experiment, parallel, train
from medfuse_jax.runs import checkpoints
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.sweep import command, processes, results, trial_store

CONFIG_FILE = Path(__file__).parent.parent / "configs" / "pheno.py"  # lists no trials of its own

RATES = ["lr:loguniform(1e-3,1e-2)"]
PRETRAIN = {"ehr": {"method": "uni_ehr"}, "cxr": {"method": "uni_cxr", "task": "radiology"}}


def sweep(config, workdir, specs, num_trials=3, lanes=None, process=None, **more):
    request = command.Request(
        config.copy_and_resolve_references(),
        CONFIG_FILE,
        workdir,
        specs,
        num_trials,
        lanes=lanes,
        **more,
    )
    command.run(request, process or processes.Process(), time.perf_counter())
    with (workdir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def stop_at_save(monkeypatch, number, keeper_kind=trial_store.WholeKeeper) -> list:
    """Interrupts a sweep right after its so many-th save of a trial; returns a list of the keepers that saved."""
    save, saved = keeper_kind.save, []

    def stop(keeper, *args):
        save(keeper, *args)
        saved.append(keeper)
        if len(saved) == number:
            keeper.finish()
            raise KeyboardInterrupt

    monkeypatch.setattr(keeper_kind, "save", stop)
    return saved


def assert_goes_on_as_whole(config, tmp_path, monkeypatch, specs, lanes, keeper_kind=trial_store.WholeKeeper):
    """Stopped between two trials' saves in the second epoch (one is then an epoch ahead), a sweep ends the same."""
    config.num_epochs = 3
    whole = sweep(config, tmp_path / "whole", specs, lanes=lanes)
    with monkeypatch.context() as patched:
        stop_at_save(patched, 5, keeper_kind)
        with pytest.raises(KeyboardInterrupt):
            sweep(config, tmp_path / "stopped", specs, lanes=lanes)
    assert not (tmp_path / "stopped" / "sweep.csv").exists()
    assert sweep(config, tmp_path / "stopped", specs, lanes=lanes) == whole
    for number in range(3):
        assert len(read_lines(results.trial_dir(tmp_path / "stopped", number))) == 6


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_alone(config, workdir, encoders=None):
    run = experiment.open_experiment(config)
    workdir_lib.claim(workdir, run)
    train.train(run, workdir, encoders)


def best_state(workdir):
    config = config_lib.load(workdir / "config.json")
    return checkpoints.restore_best(workdir, experiment.open_experiment(config).abstract_state())


def difference(a, b) -> float:
    """The largest difference of two states' parameters, statistics and means of gradients."""
    trees = [(s.params, s.batch_stats, s.opt_state) for s in (a, b)]
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *trees)))


def assert_as_alone(trial_dir, alone_dir, monkeypatch, tolerance):
    """The trial's own config, run by train.train on one device, gives its numbers."""
    config = config_lib.load(trial_dir / "config.json")
    encoders = {name: (Path(path), workdir_lib.open_run(Path(path))) for name, path in config.init.items() if path}
    with monkeypatch.context() as patched:
        patched.setattr(parallel, "devices", lambda num=None: jax.local_devices()[:1])
        train_alone(config, alone_dir, encoders)
    assert difference(best_state(trial_dir), best_state(alone_dir)) < tolerance
    for mine, theirs in zip(read_lines(trial_dir), read_lines(alone_dir), strict=True):
        for field in theirs.keys() - {"phase", "time_s", "samples_per_s"}:
            assert mine[field] == pytest.approx(theirs[field], rel=1e-4), field
