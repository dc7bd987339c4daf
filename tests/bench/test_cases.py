"""The cases and presets of the benchmark, and the batches sampled for them."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from medfuse_jax import schema
from medfuse_jax.bench import cases, cohort
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.models import registry
from medfuse_jax.models.recurrence import chunks
from medfuse_jax.runtime.errors import UserError


@pytest.mark.parametrize("preset", cases.PRESETS)
def test_every_case_of_a_preset_can_be_planned(preset):
    chosen, _ = cases.preset(preset)
    assert len({case.name for case in chosen}) == len(chosen), "names tell cases apart"
    for case in chosen:
        assert importlib.util.find_spec(f"medfuse_jax.bench.{case.kind}")
        assert case.method in registry.METHODS and set(case.peers) <= set(cases.PEERS)
        if case.kind == "bootstrap":
            continue
        data = cohort.dataset(dataclasses.replace(case, num_stays=min(case.num_stays, 40 * case.batch_size)))
        plan = cohort.train_plan(case, data)
        assert plan.batch_size == case.batch_size and len(np.unique(plan.padded_length_S)) <= case.max_buckets
        assert len(plan) >= case.num_batches and case.batch_size % case.num_devices == 0
        assert data.use_cxr == bool(plan.images_per_batch)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError) as error:
        cases.preset("cpuu")
    assert (error.value.field, error.value.value, error.value.nearest) == ("--preset", "cpuu", "cpu")


def test_made_up_records_agree_with_their_index():
    data = cohort.dataset(cases.Case(num_stays=300, cxr_share=0.5))
    for i in (0, 7, 299):
        record = data.splits["train"][i]
        assert record["ehr"].shape == (data.index["train"]["length"][i], len(schema.CHANNELS))
        assert (record["image"] is not None) == data.index["train"]["has_cxr"][i]


def test_sampled_batches_represent_the_epoch():
    case = cases.Case(num_stays=20_000)
    data = cohort.dataset(case)
    length_N, plan = data.lengths("train"), cohort.train_plan(case, data)
    assert np.median(2 * length_N) == pytest.approx(cohort.MEDIAN_LOS_H, rel=0.05)
    assert data.index["train"]["has_cxr"].mean() == pytest.approx(0.19)

    def mean_longest(part):
        rows_SB = np.concatenate([part.paired_SP, part.unpaired_SU], 1)
        return np.where(rows_SB < 0, 0, length_N[rows_SB]).max(1).mean()

    assert mean_longest(cohort.at_quantiles(plan, length_N, 8)) == pytest.approx(mean_longest(plan), rel=0.15)


def test_padded_share_counts_the_steps_of_whole_chunks():
    plan = plan_lib.Plan(np.array([[0], [2]]), np.array([[1], [plan_lib.PADDING]]), np.array([40, 40]))
    num_run = 2 * chunks.time_steps_run(17) + 2 * chunks.time_steps_run(16)
    assert cohort.padded_share_run(plan, np.array([17, 3, 16])) == pytest.approx(1 - 36 / num_run)
    assert chunks.time_steps_run(16) == 16 < chunks.time_steps_run(17)


def test_padding_at_phenotyping_lengths_is_small_with_four_buckets():
    case = cases.Case()
    data = cohort.dataset(case)
    padding = cohort.Sample(data, cohort.train_plan(case, data), None, []).padding()
    assert 0 < padding["padded_share_run"] < 0.10 and len(data.buckets) <= 4
