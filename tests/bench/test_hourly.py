"""One pass over all hours of a stay is timed beside its prefixes, ours and PyTorch's, on the same samples."""

import dataclasses

import pytest

from medfuse_jax.bench import cases, clock, cohort, hourly, machine, step

_CASE = next(case for case in cases.preset("tiny")[0] if case.kind == "hourly")
_METHODS = ["uni_ehr", pytest.param("medfuse", marks=pytest.mark.nightly)]


def _case(method, **changes):
    return dataclasses.replace(_CASE, method=method, num_stays=24, repeats=2, **changes)


@pytest.mark.parametrize("method", _METHODS)
def test_every_contender_trains_an_epoch_of_the_same_hours(method, monkeypatch):
    given = []
    real = step.torch_runs
    monkeypatch.setattr(step, "torch_runs", lambda case, sample, say: given.append(sample) or real(case, sample, say))
    case = _case(method)
    data = cohort.dataset(case)
    rows = {row["contender"]: row for row in hourly.measure(case, data)}
    by_torch = set() if machine.why_no_torch() else {"torch_prefixes"}
    assert rows.keys() == {clock.OURS, "prefixes"} | by_torch

    hours, (sample,) = data.hours["train"], given
    assert sample.data.lengths("train").tolist() == hours.steps_S.tolist()  # a prefix for each hour
    ours = rows.pop(clock.OURS)
    assert ours["hours"] == hours.count_N.sum() and ours["batches_an_epoch"] == ours["scaled_from_batches"] * 3 == 6
    for row in rows.values():
        assert row["flops_over_ours"] == pytest.approx(row["gflop_a_stay"] / ours["gflop_a_stay"], rel=0.05)
        assert (row["scaled_from_batches"], row["batches_an_epoch"]) == (len(sample.plan), len(sample.epoch))
        assert row["hours"] == ours["hours"] and row["images_an_epoch"] >= ours["images_an_epoch"]
        assert row["time_over_ours"]["median"] > 0
    assert not data.use_cxr or rows["prefixes"]["images_an_epoch"] == hours.has_cxr_S.sum()


def test_seconds_are_those_of_a_whole_epoch(monkeypatch):
    monkeypatch.setattr(clock, "interleave", lambda runs, *_: {name: [1.0, 2.0] for name in runs})
    rows = hourly.measure(_case("uni_ehr", peers=()))
    assert [row["contender"] for row in rows] == [clock.OURS, "prefixes"]
    for row in rows:
        share = row["batches_an_epoch"] / row["scaled_from_batches"]
        assert row["seconds_all"] == pytest.approx([share, 2 * share])
        assert row["seconds_a_stay"] == pytest.approx(1.5 * share / row["stays"], abs=1e-6)
