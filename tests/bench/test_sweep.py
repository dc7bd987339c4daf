"""The case of whole sweeps reads the costs that each sweep writes."""

import dataclasses
import json

import pytest

from medfuse_jax.bench import cases, sweep
from medfuse_jax.runtime.errors import UserError

_CASE = dataclasses.replace(cases.preset("sweeps")[0][1], repeats=3, num_trials=2)
_COSTS = {"startup_s": 8.0, "encode_s": 1.5, "compile_s": 2.0, "input_s": 0.4, "steps": 12}


def test_record_has_the_costs_of_the_median_sweep_after_the_warm_up(monkeypatch):
    commands, train_s = [], iter([9.0, 3.0, 1.0, 2.0])

    def run(module, workdir, *flags):
        commands.append(module)
        if module == "medfuse_jax.sweep":
            workdir.mkdir(parents=True)
            (workdir / "costs.json").write_text(json.dumps(_COSTS | {"train_s": next(train_s)}))

    monkeypatch.setattr(sweep, "_run", run)
    ours, one_run = sweep.measure(_CASE)
    assert (ours["num_trials"], ours["train_s"], ours["compile_cached_s"]) == (2, 2.0, 2.0)
    assert {name: ours[name] for name in ("startup_s", "encode_s", "input_s", "steps")}.items() <= _COSTS.items()
    assert one_run["contender"] == "one_run" and "time_over_ours" in one_run
    assert commands.count("medfuse_jax.sweep") == 4 and commands.count("medfuse_jax.main") == 1 + 4


def test_failed_command_names_its_folder(tmp_path):
    with pytest.raises(UserError) as error:
        sweep._run("medfuse_jax.no_such_command", tmp_path)
    assert error.value.path == tmp_path
