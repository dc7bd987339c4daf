"""How many trials run together: measured once, kept, and fewer where the memory is short."""

import weakref

import jax
import numpy as np
import pytest

from medfuse_jax import experiment
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import groups as run_lib
from medfuse_jax.sweep import lanes, search, stacked_step
from medfuse_jax.sweep.costs import Costs


@pytest.mark.parametrize(
    ("num_trials", "most", "num_devices", "expected"),
    [(10, 10, 1, 10), (9, 10, 1, 10), (8, 10, 1, 8), (5, 10, 1, 8), (1, 10, 1, 1), (10, 1, 1, 1), (10, 5, 2, 5)],
)
def test_lanes_shrink_by_powers_of_two(num_trials, most, num_devices, expected):
    assert lanes.lanes_for(num_trials, most, num_devices) == expected


@pytest.mark.parametrize(
    ("step_s", "tried"),
    [
        ({1: 5.0, 2: 4.0, 3: 3.0, 5: 2.0, 10: 1.0}, [1, 2, 3, 5, 10]),
        ({1: 5.0, 2: 4.0, 3: 4.5}, [1, 2, 3]),  # slower: no more are tried
        ({1: 5.0, 2: 4.0, 3: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")}, [1, 2]),
        ({1: MemoryError()}, []),
    ],
)
def test_numbers_of_lanes_are_tried_one_by_one_while_they_are_faster(monkeypatch, step_s, tried):
    class Stacked:
        """Stands for the trials' states in the device's memory."""

    alive = weakref.WeakSet()

    def stack_with(num_lanes):
        assert not alive, "one stack at a time"
        alive.add(stacked := Stacked())
        stacked.lanes = num_lanes
        return stacked

    def time_step(train_fn, stacked, batch, on):
        if isinstance(step_s[stacked.lanes], Exception):
            raise step_s[stacked.lanes]
        return step_s[stacked.lanes]

    monkeypatch.setattr(lanes, "_time_step", time_step)
    assert list(lanes.measure(None, stack_with, 10, {}, [])) == tried


def test_lanes_are_measured_on_trials_that_are_thrown_away(ehr_config, monkeypatch):
    run = experiment.open_experiment(ehr_config, jax.local_devices()[:1])
    states = [jax.device_get(run.fresh_state())] * 2
    before = jax.tree.map(np.copy, states)
    batch = next(run.batches("train", run.train_plan(epoch=1)))
    train_fn, on = stacked_step.compile_train(run.options, run.devices), run.devices
    train_all, made = stacked_step.train_all, []

    def counted(train_fn, stacks, batch, on):
        made.append((len(stacks), stacks[0].dropout.shape[1]))
        return train_all(train_fn, stacks, batch, on)

    monkeypatch.setattr(stacked_step, "train_all", counted)
    times_s = lanes.measure(train_fn, lambda n: stacked_step.stack(states, [0, 1], [0.1] * 2, n, on), 2, batch, on)
    assert set(times_s) == {1, 2} and min(times_s.values()) > 0
    assert made == [(2, 1)] * 6 + [(1, 2)] * 6, "of each number a step that compiles and five that count"
    jax.tree.map(np.testing.assert_array_equal, states, before)


def _steps_of_an_order_that_begins_short(config):
    """Sets the config's order to one whose first batch is not the longest; returns the lengths of its batches."""
    for config.data.order_seed in range(20):
        padded_length_S = experiment.open_experiment(config).train_plan(epoch=1).padded_length_S
        if padded_length_S[0] < padded_length_S.max():
            return padded_length_S
    raise AssertionError("no such order")


@pytest.mark.slow
def test_a_group_measures_its_lanes_once(ehr_config, tmp_path, monkeypatch):
    """On its longest batch. Later rounds, and a resumed sweep whose first trial is done, take what was measured."""
    measured = []

    def measure(train_fn, stack_with, most, batch, on):
        measured.append((most, batch["ehr"].shape[2]))
        return {1: 1.0, most: 0.5}

    monkeypatch.setattr(lanes, "measure", measure)
    ehr_config.num_epochs, ehr_config.data.max_buckets = 1, 3
    padded_length_S = _steps_of_an_order_that_begins_short(ehr_config)
    trials = [search.Trial(i, {"learning_rate": 1e-3 * (i + 1)}) for i in range(9)]
    first = run_lib.Sweep(ehr_config, tmp_path, {}, in_rounds=True)
    run_lib.train_group(first, trials[:3], Costs())
    run_lib.train_group(first, trials[3:6], Costs())
    run_lib.train_group(run_lib.Sweep(ehr_config, tmp_path, {}), trials[2:9], Costs())
    assert measured == [(2, padded_length_S.max())]


def _never():
    raise AssertionError("nothing is measured")


def test_lanes_are_those_given_else_those_kept_and_never_more_than_fit(tmp_path):
    fit = lanes.Fit(tmp_path / "lanes" / "0_0.json")
    assert lanes.choose(fit, 1, _never) == 1, "one trial a device"
    assert lanes.choose(fit, 10, lambda: {1: 1.0, 5: 0.2, 10: 0.3}) == 5
    assert lanes.choose(fit, 3, _never) == 5  # of a wave that lost trials, as before a resume
    fit.at_once = 3
    assert lanes.choose(fit, 3, _never) == 3, "out of memory: no lanes beyond the trials that fit"
    given = lanes.read(tmp_path, "of a group", given=8)
    assert [lanes.choose(given, most, _never) for most in (10, 3)] == [8, 3]


def test_out_of_memory_halves_lanes_then_trials_at_once_and_ends(tmp_path):
    """What is left of it holds in the next start too."""
    fit = lanes.read(tmp_path, "of a group", given=5)
    trials, seen = list(range(20)), []
    while True:
        wave = fit.wave(trials, num_devices=2)
        if not fit.halve(len(wave), num_devices=2):
            break
        seen.append((fit.lanes, fit.at_once))
        again = lanes.read(tmp_path, "of a group")
        assert (again.lanes, again.at_once) == seen[-1]
    assert seen == [(3, None), (2, None), (1, None), (1, 5), (1, 3), (1, 2), (1, 1)] and len(wave) == 2


@pytest.mark.parametrize(
    "content", ['{"lan', "[]", "{}", '{"lanes": "2"}', '{"lanes": 0}', '{"lanes": 2, "at_once": 1.5}']
)
def test_a_damaged_file_of_lanes_is_named(tmp_path, content):
    fit = lanes.read(tmp_path, "of a group", given=2)
    fit.keep()
    fit.path.write_text(content)
    with pytest.raises(UserError, match=r"lanes/\w+\.json cannot be read .* delete it"):
        lanes.read(tmp_path, "of a group")
