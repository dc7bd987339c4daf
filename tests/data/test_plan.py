"""Batch plans: every stay once, reproducible from the seed, X-rays in every batch, little padding."""

import numpy as np
import pytest

from medfuse_jax.data import plan as plan_lib

_N = 1003
_LENGTHS = np.clip(np.exp(np.random.default_rng(0).normal(3.4, 0.9, _N)), 1, 900).astype(int)
_PAIRED = np.random.default_rng(1).random(_N) < 0.19
_ALL = np.ones(_N, bool)
_BUCKETS = plan_lib.buckets(_LENGTHS, 4)


def _train(**changes):
    arguments = {"batch_size": 16, "seed": 0, "epoch": 1, "buckets": _BUCKETS} | changes
    return plan_lib.train_plan(_LENGTHS, _PAIRED, _ALL, **arguments)


def _records(plan):
    rows = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    return np.sort(rows[rows != plan_lib.PADDING])


def test_an_epoch_has_every_stay_once():
    np.testing.assert_array_equal(_records(_train()), np.arange(_N))


def test_no_row_is_empty_if_all_stays_are_of_one_kind():
    for paired in (np.zeros(_N, bool), _ALL):
        plan = plan_lib.train_plan(
            _LENGTHS, paired, _ALL, batch_size=16, num_images=8, seed=0, epoch=1, buckets=_BUCKETS
        )
        assert plan.images_per_batch == 16 * paired[0] and len(plan) == -(-_N // 16)
        np.testing.assert_array_equal(_records(plan), np.arange(_N))


def test_image_slots_hold_paired_stays_only():
    plan = _train()
    assert _PAIRED[plan.paired_SP[plan.paired_SP != plan_lib.PADDING]].all()
    assert not _PAIRED[plan.unpaired_SU[plan.unpaired_SU != plan_lib.PADDING]].any()


def test_every_batch_has_an_x_ray_and_few_slots_are_empty():
    plan = _train()
    assert plan.images_per_batch == 3
    images_S = (plan.paired_SP != plan_lib.PADDING).sum(1)
    assert images_S.min() >= 2
    rows = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    assert (rows == plan_lib.PADDING).mean() < 0.05


def test_a_plan_depends_on_its_seed_and_epoch():
    np.testing.assert_array_equal(_train().paired_SP, _train().paired_SP)
    assert not np.array_equal(_train().paired_SP, _train(epoch=2).paired_SP)
    assert not np.array_equal(_train().paired_SP, _train(seed=1).paired_SP)


def test_ehr_only_ratio_draws_anew_each_epoch_without_replacement():
    first, second = (_records(_train(ehr_only_ratio=0.2, epoch=e)) for e in (1, 2))
    assert len(np.unique(first)) == len(first) == _PAIRED.sum() + round(0.2 * (~_PAIRED).sum())
    assert len(first) == len(second) and not np.array_equal(first, second)
    assert np.isin(np.flatnonzero(_PAIRED), first).all()


def test_ehr_only_ratio_keeps_stays_with_an_x_ray_that_the_method_does_not_read():
    arguments = {"batch_size": 16, "seed": 0, "epoch": 1, "buckets": _BUCKETS, "ehr_only_ratio": 0.2}
    drawn = _records(plan_lib.train_plan(_LENGTHS, np.zeros(_N, bool), _ALL, ehr_only_N=~_PAIRED, **arguments))
    assert len(drawn) == _PAIRED.sum() + round(0.2 * (~_PAIRED).sum())
    assert np.isin(np.flatnonzero(_PAIRED), drawn).all()


def test_sorting_in_windows_saves_most_of_the_padding():
    sorted_share = _longest_share(_train(window=128))
    unsorted_share = _longest_share(_train(window=1))
    assert sorted_share < 0.35 < unsorted_share


def _longest_share(plan):
    rows = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    length = np.where(rows == plan_lib.PADDING, 0, _LENGTHS[rows])
    return 1 - length.sum() / (length.max(1) * rows.shape[1]).sum()


def test_each_batch_fits_its_bucket():
    plan = _train()
    rows = np.concatenate([plan.paired_SP, plan.unpaired_SU], 1)
    longest = np.where(rows == plan_lib.PADDING, 0, _LENGTHS[rows]).max(1)
    assert set(plan.padded_length_S) <= set(_BUCKETS)
    assert (plan.padded_length_S >= longest).all()
    smaller = [max((b for b in _BUCKETS if b < s), default=0) for s in plan.padded_length_S]
    assert (longest > smaller).all()


def test_buckets_are_the_best_of_all_choices():
    lengths = np.array([1, 2, 2, 3, 9, 10, 30, 31, 31, 50])

    def cost(edges):
        return sum(min(e for e in edges if e >= n) for n in lengths)

    distinct = np.unique(lengths)
    best = min(cost((a, b, 50)) for a in distinct for b in distinct if a < b < 50)
    chosen = plan_lib.buckets(lengths, 3)
    assert len(chosen) == 3 and chosen[-1] == 50
    assert cost(chosen) == best


@pytest.mark.parametrize("max_buckets", [1, 2, 7])
def test_buckets_respect_the_limit_and_hold_the_longest_stay(max_buckets):
    chosen = plan_lib.buckets(_LENGTHS, max_buckets)
    assert 1 <= len(chosen) <= max_buckets and chosen[-1] == _LENGTHS.max()
    assert plan_lib.buckets(np.array([7, 7, 7]), max_buckets) == (7,)


@pytest.mark.parametrize("paired", [_PAIRED, ~_ALL, _ALL])
def test_evaluation_scores_every_record_once(paired):
    plans = plan_lib.eval_plans(_LENGTHS, paired, _ALL, batch_size=64, buckets=_BUCKETS)
    np.testing.assert_array_equal(np.sort(np.concatenate([_records(p) for p in plans])), np.arange(_N))
    assert {p.images_per_batch for p in plans} <= {0, 64}


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
def test_dealing_keeps_every_row_and_image_on_its_device(devices):
    plan = _train()
    for step in range(0, len(plan), 7):
        rows = plan_lib.deal(plan, step, devices)
        rows_DB, image_row_DP, image_mask_DP = rows["record"], rows["image_row"], rows["image_mask"]
        expected = np.concatenate([plan.paired_SP[step], plan.unpaired_SU[step]])
        np.testing.assert_array_equal(np.sort(rows_DB.reshape(-1)), np.sort(expected))
        with_cxr = [rows_DB[d, image_row_DP[d, slot]] for d, slot in np.argwhere(image_mask_DP)]
        assert sorted(with_cxr) == sorted(r for r in plan.paired_SP[step] if r != plan_lib.PADDING)
        assert image_row_DP.shape[1] == -(-plan.images_per_batch // devices)
        # A record has the same row_id, and so the same augmentation and dropout, on any number of devices.
        np.testing.assert_array_equal(rows_DB.reshape(-1)[np.argsort(rows["row_id"].reshape(-1))], expected)


_COUNTS = np.where(_PAIRED, np.random.default_rng(2).integers(1, 6, _N), 0)


def _packed() -> plan_lib.Plan:
    padded = {bucket: int(_COUNTS[bucket >= _LENGTHS].max()) for bucket in _BUCKETS}
    return _train(packing=plan_lib.Packing(_COUNTS, padded_images=padded))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_image_of_a_stay_has_one_slot(devices):
    """A stay with five images takes five, one without none; on a device they are rounded up to a power of two."""
    plan, seen = _packed(), []
    for step in range(len(plan)):
        rows = plan_lib.deal(plan, step, devices)
        mask_DP, slot_DBM = rows["image_mask"], rows["image_slot"]
        needed_D = np.where(rows["record"] >= 0, _COUNTS[rows["record"]], 0).sum(1)
        np.testing.assert_array_equal(mask_DP.sum(1), needed_D)
        num_slots = mask_DP.shape[1]
        assert num_slots == max(-(-plan.images_per_batch // devices), needed_D.max()) or num_slots.bit_count() == 1
        assert num_slots < 2 * max(plan.images_per_batch, needed_D.max())
        for d, b in np.ndindex(rows["record"].shape):
            record, slots = int(rows["record"][d, b]), slot_DBM[d, b][slot_DBM[d, b] >= 0]
            count = _COUNTS[record] if record >= 0 else 0
            assert (slot_DBM[d, b, :count] >= 0).all() and (slot_DBM[d, b, count:] == -1).all()
            np.testing.assert_array_equal(np.flatnonzero(mask_DP[d] & (rows["image_row"][d] == b)), slots)
            assert rows["image_of"][d, slots].tolist() == list(range(count))
            seen += [(record, m) for m in range(count)]
    assert len(seen) == len(set(seen)) == _COUNTS.sum()


def test_several_images_change_no_row_of_a_plan():
    packed, plain = _packed(), _train()
    for name in ("paired_SP", "unpaired_SU", "padded_length_S"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(plain, name))
    assert not {"image_of", "image_slot"} & plan_lib.deal(plain, 0, 1).keys()
    padded = {plan_lib.deal(packed, step, 1)["image_slot"].shape[2] for step in range(len(packed))}
    assert padded <= set(packed.packing.padded_images.values())


def test_all_paired_and_none_paired_need_no_mixed_batches():
    plan = plan_lib.train_plan(_LENGTHS, _ALL, _ALL, batch_size=16, seed=0, epoch=1, buckets=_BUCKETS)
    assert plan.images_per_batch == 16 and len(_records(plan)) == _N
    plan = plan_lib.train_plan(_LENGTHS, ~_ALL, _ALL, batch_size=16, seed=0, epoch=1, buckets=_BUCKETS)
    assert plan.images_per_batch == 0 and len(_records(plan)) == _N


@pytest.mark.parametrize(("num_stays", "num_images"), [(_N, 5000), (_N, 300), (40, 16), (_N, 1)])
def test_x_ray_batches_alternate_with_stay_batches(num_stays, num_images):
    stays = plan_lib.train_plan(
        _LENGTHS[:num_stays], _PAIRED[:num_stays], _ALL[:num_stays], batch_size=16, seed=0, epoch=1, buckets=_BUCKETS
    )
    lengths, all_images = np.zeros(num_images, int), np.ones(num_images, bool)
    cxr = plan_lib.train_plan(lengths, all_images, all_images, batch_size=16, seed=0, epoch=1, buckets=(0,))
    both = plan_lib.alternate(stays, cxr)
    order = [both.at(step) for step in range(len(both))]
    for kind, expected in ((False, len(stays)), (True, min(len(stays), len(cxr)))):
        assert [i for is_cxr, i in order if is_cxr == kind] == list(range(expected))
    assert both.longest() == order.index((False, stays.padded_length_S.argmax()))
    assert stays.longest() == stays.padded_length_S.argmax()
    at = np.flatnonzero([is_cxr for is_cxr, _ in order])
    assert np.diff(at, prepend=-1).max() <= -(-len(order) // len(at))  # spread evenly
    drawn = both.cxr.paired_SP[both.cxr.paired_SP != plan_lib.PADDING]
    assert len(set(drawn)) == len(drawn) and both.batch_size == 16


def test_each_epoch_uses_other_x_rays_if_there_are_more_of_them():
    def drawn(epoch):
        stays = _train(epoch=epoch)
        lengths, all_images = np.zeros(5000, int), np.ones(5000, bool)
        images = plan_lib.train_plan(lengths, all_images, all_images, batch_size=16, seed=0, epoch=epoch, buckets=(0,))
        return set(plan_lib.alternate(stays, images).cxr.paired_SP.reshape(-1).tolist())

    assert len(drawn(1)) == 16 * len(_train()) and drawn(1) == drawn(1)
    assert len(drawn(1) & drawn(2)) < 0.5 * len(drawn(1))
