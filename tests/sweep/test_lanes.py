"""The number of lanes: measured once, stored, and reduced if out of memory."""

import weakref

import jax
import numpy as np
import pytest

from medfuse_jax import run as run_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import groups, lanes, stacked_step
from medfuse_jax.sweep.costs import Costs
from medfuse_jax.sweep.sweep import Sweep
from medfuse_jax.sweep.trial import Trial


@pytest.mark.parametrize(
    ("num_trials", "max_lanes", "num_devices", "expected"),
    [(10, 10, 1, 10), (9, 10, 1, 10), (8, 10, 1, 8), (5, 10, 1, 8), (1, 10, 1, 1), (10, 1, 1, 1), (10, 5, 2, 5)],
)
def test_lanes_shrink_by_powers_of_two(num_trials, max_lanes, num_devices, expected):
    assert lanes.lanes_for(num_trials, max_lanes, num_devices) == expected


@pytest.mark.parametrize(
    ("step_s", "measured"),
    [
        ({1: 5.0, 2: 4.0, 3: 3.0, 5: 2.0, 10: 1.0}, [1, 2, 3, 5, 10]),
        ({1: 5.0, 2: 4.0, 3: 4.5}, [1, 2, 3]),  # stops at the first slower number
        ({1: 5.0, 2: 4.0, 3: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")}, [1, 2]),
        ({1: MemoryError()}, []),
    ],
)
def test_more_lanes_are_measured_while_they_are_faster(step_s, measured):
    def seconds_with(num_lanes):
        if isinstance(step_s[num_lanes], Exception):
            raise step_s[num_lanes]
        return step_s[num_lanes]

    assert list(lanes.measure(seconds_with, 10)) == measured


def test_measuring_leaves_the_states_unchanged(ehr_config, tmp_path, monkeypatch):
    alone = [[device] for device in jax.local_devices()]
    program = groups.open_program(Sweep(ehr_config, tmp_path, {}), Trial(0, {}), Costs(), alone)
    states = [jax.device_get(program.run.fresh_state())] * 4
    before = jax.tree.map(np.copy, states)
    batch = next(program.run.batches("train", program.run.train_plan(epoch=1)))
    train_all, calls, stacked = stacked_step.train_all, [], []

    def counted(train_fn, stacks, batch, devices):
        calls.append((len(stacks), stacks[0].dropout.shape[1]))
        return train_all(train_fn, stacks, batch, devices)

    def seconds_with(num_lanes):
        assert all(stack() is None for stack in stacked), "only one stack at a time: each fills the device's memory"
        stacks = stacked_step.stack(states, [0, 1, 2, 3], [0.1] * 4, num_lanes, program.devices)
        stacked.append(weakref.ref(stacks[0]))
        return stacked_step.step_s(program.train_fn, stacks, batch, program.devices)

    monkeypatch.setattr(stacked_step, "train_all", counted)
    times_s = lanes.measure(seconds_with, 2)
    assert set(times_s) == {1, 2} and min(times_s.values()) > 0
    assert calls == [(2, 1)] * 6 + [(1, 2)] * 6, "one call to compile and five to time"
    jax.tree.map(np.testing.assert_array_equal, states, before)


def _shuffle_short_batch_first(config):
    """Choose an order whose first batch is not the longest; return the lengths of its batches."""
    for config.data.order_seed in range(20):
        padded_length_S = run_lib.open_run(config).train_plan(epoch=1).padded_length_S
        if padded_length_S[0] < padded_length_S.max():
            return padded_length_S
    raise AssertionError("no such order")


@pytest.mark.slow
def test_a_group_measures_its_lanes_once_on_its_longest_batch(ehr_config, tmp_path, monkeypatch):
    """Later rounds and resumed sweeps use the stored number."""
    measured = []

    def step_s(train_fn, stacks, batch, devices):
        num_lanes = stacks[0].dropout.shape[1]
        measured.append((num_lanes, batch["ehr"].shape[2]))
        return 1 / num_lanes

    monkeypatch.setattr(stacked_step, "step_s", step_s)
    ehr_config.num_epochs, ehr_config.data.max_buckets = 1, 3
    padded_length_S = _shuffle_short_batch_first(ehr_config)
    trials = [Trial(i, {"learning_rate": 1e-3 * (i + 1)}) for i in range(9)]
    sweep = Sweep(ehr_config, tmp_path, {})
    groups.train_group(sweep, trials[:3], Costs())
    groups.train_group(sweep, trials[3:6], Costs())
    groups.train_group(Sweep(ehr_config, tmp_path, {}), trials[2:9], Costs())
    assert measured == [(1, padded_length_S.max()), (2, padded_length_S.max())]


def _never():
    raise AssertionError("nothing to measure")


def test_lanes_are_the_given_or_the_stored_and_never_more_than_fit(tmp_path):
    capacity = lanes.Capacity(tmp_path / "lanes" / "0_0.json")
    assert lanes.choose(capacity, 1, _never) == 1, "one trial per device"
    assert lanes.choose(capacity, 10, lambda: {1: 1.0, 5: 0.2, 10: 0.3}) == 5
    assert lanes.choose(capacity, 3, _never) == 5, "a resumed wave with fewer trials keeps its lanes"
    capacity.at_once = 3
    assert lanes.choose(capacity, 3, _never) == 3, "not more lanes than trials in memory"
    given = lanes.read(tmp_path, "group", given=8)
    assert [lanes.choose(given, max_lanes, _never) for max_lanes in (10, 3)] == [8, 3]


def test_out_of_memory_halves_the_lanes_and_then_the_trials_at_once(tmp_path):
    """The next start reads the reduced numbers."""
    capacity = lanes.read(tmp_path, "group", given=5)
    trials, reduced = list(range(20)), []
    while True:
        wave = capacity.next_wave(trials, num_devices=2)
        if not capacity.halve(len(wave), num_devices=2):
            break
        reduced.append((capacity.lanes, capacity.at_once))
        stored = lanes.read(tmp_path, "group")
        assert (stored.lanes, stored.at_once) == reduced[-1]
    assert reduced == [(3, None), (2, None), (1, None), (1, 5), (1, 3), (1, 2), (1, 1)] and len(wave) == 2


@pytest.mark.parametrize(
    "content", ['{"lan', "[]", "{}", '{"lanes": "2"}', '{"lanes": 0}', '{"lanes": 2, "at_once": 1.5}']
)
def test_a_damaged_file_is_refused(tmp_path, content):
    capacity = lanes.read(tmp_path, "group", given=2)
    capacity.write()
    capacity.path.write_text(content)
    with pytest.raises(UserError) as error:
        lanes.read(tmp_path, "group")
    assert error.value.path == capacity.path
