"""AUROC and average precision with bootstrap bounds, for all labels and resamples at once.

Shape suffixes: N samples, K labels, R resamples, G groups of samples (the patients, whose stays are samples); a rank is
a position in a label's order of descending scores. Values equal scikit-learn's `roc_auc_score` and
`average_precision_score`, ties included.

Point values are numpy float64 (ranks.py). The bootstrap runs on the device: a resample is a vector of N counts, and one
walk down the ranks serves every label and resample, because ties do not depend on the resample. The host ranks the
scores, so that they tie exactly as in scikit-learn, whatever their dtype. With groups, a resample is a vector of G
counts, and the ranks hold group numbers instead of sample numbers: nothing is larger than without.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import ranks
from medfuse_jax.runtime.errors import UserError

_BLOCK = 128  # ranks summed plainly between compensated sums
_UNROLL = 4  # ranks per loop step; divides _BLOCK
_MIN_ROWS = 1024  # smaller sets share one compiled size; the walk skips rows beyond the samples
_DRAW_TOGETHER = 50  # resamples drawn at once: faster on a CPU than one at a time or all at once
_COUNTS_BYTES = 2**24  # size of one chunk of resamples: fits a CPU's last-level cache


def evaluate(labels, scores, num_bootstrap: int = 1000, seed: int = 0, groups=None, label_types=None) -> dict:
    """Return AUROC and average precision per label and macro, with 95 % percentile bootstrap bounds.

    labels [N, K] of 0 and 1; scores [N, K], finite, higher for more likely. A resample draws N samples with
    replacement, the same for all labels. groups [N]: an id per sample, such as its patient's; a resample then draws as
    many groups as there are, each with all of its samples. A label with only one class is NaN and is left out of the
    macro mean, of the samples and of each resample. label_types: name -> the places of its labels, to add their means.

    Returns a dict:
        auroc, auprc [K] and their bounds auroc_ci, auprc_ci [K, 2]
        auroc_macro, auprc_macro: means over the labels
        auroc_macro_ci, auprc_macro_ci (low, high): bounds of the macro mean over the resamples
        auroc_macro_ci_released, auprc_macro_ci_released (low, high): means of the labels' bounds, as the released
            MedFuse reports them
        num_samples, num_positive [K], num_bootstrap, num_bootstrap_used [K] (resamples with both classes of a label)
        num_groups, if there are groups; label_types, if given: name -> num_labels, and the macro means of these labels
            with their bounds, over the same resamples
    Raises UserError for shapes that differ, labels other than 0 and 1, scores that are not finite, or no samples.
    """
    labels_NK, scores_NK = ranks.check(labels, scores)
    group_N = _group_numbers(groups, len(labels_NK))
    (boot,) = _bootstrap(labels_NK, [scores_NK], num_bootstrap, seed, group_N)
    result = {
        "num_samples": len(labels_NK),
        **({} if groups is None else {"num_groups": int(group_N.max()) + 1}),
        "num_positive": labels_NK.sum(0),
        "num_bootstrap": num_bootstrap,
        "num_bootstrap_used": np.isfinite(boot["auroc"]).sum(0),
    }
    for name, point_K in ranks.point(labels_NK, scores_NK).items():
        result[name] = point_K
        result[f"{name}_ci"] = np.stack([ranks.bounds(boot_R) for boot_R in boot[name].T])
        result[f"{name}_macro"] = macro(point_K)
        result[f"{name}_macro_ci"] = ranks.bounds(ranks.nanmean(boot[name]))
        # MedFuse (trainers/trainer.py) reports the mean of the labels' bounds instead.
        result[f"{name}_macro_ci_released"] = ranks.nanmean(result[f"{name}_ci"].T)
    if label_types:
        result["label_types"] = {kind: _part(result, boot, columns) for kind, columns in label_types.items()}
    return result


def _part(result: dict, boot: dict, columns) -> dict:
    """Return the number of some labels, and their macro means with bounds. boot: values [R, K] on the resamples."""
    part = {"num_labels": len(columns)}
    for name, boot_RK in boot.items():
        part[f"{name}_macro"] = macro(result[name][columns])
        part[f"{name}_macro_ci"] = ranks.bounds(ranks.nanmean(boot_RK[:, columns]))
    return part


def auroc(labels, scores) -> np.ndarray:
    """Return AUROC per label [K] of labels [N, K] and scores [N, K]; NaN for a label with one class."""
    return ranks.point(*ranks.check(labels, scores))["auroc"]


def auprc(labels, scores) -> np.ndarray:
    """Return average precision per label [K] of labels [N, K] and scores [N, K]; NaN for a label with one class."""
    return ranks.point(*ranks.check(labels, scores))["auprc"]


def kappa(labels, scores) -> float:
    """Return Cohen's linearly weighted kappa of each row's highest score; labels [N, K] one-hot, of ordered bins."""
    labels_NK, scores_NK = ranks.check(labels, scores)
    cells = labels_NK.argmax(1) * labels_NK.shape[1] + scores_NK.argmax(1)
    return float(_kappa(np.bincount(cells, minlength=labels_NK.shape[1] ** 2)[None])[0])


def ordinal(labels, scores, errors, num_bootstrap: int = 1000, seed: int = 0, groups=None) -> dict:
    """Return the metrics of labels that are ordered bins, on the resamples that `evaluate` draws for these groups.

    labels [N, K] one-hot; scores [N, K]; errors [N]: how far, in hours, each row's likeliest bin is from the truth.
    Returns a dict: kappa (see `kappa`), mad_h (the mean of the errors), and their bounds kappa_ci, mad_h_ci.
    """
    result = {}
    for name, (point, boot_R) in _ordinal(labels, scores, errors, num_bootstrap, seed, groups).items():
        result |= {name: point, f"{name}_ci": ranks.bounds(boot_R)}
    return result


def compare_ordinal(labels, a, b, num_bootstrap: int = 1000, seed: int = 0, groups=None) -> dict:
    """Return `ordinal`'s metrics of b minus those of a, with paired bootstrap bounds and p-values.

    a, b: (scores, errors) of the same samples in the same order; the rest is as for `ordinal`.
    Returns a dict: kappa, mad_h, and their _ci (low, high) and _p, two-sided.
    """
    of_a, of_b = (_ordinal(labels, x, errors, num_bootstrap, seed, groups) for x, errors in (a, b))
    result = {}
    for name, (point, boot_R) in of_b.items():
        difference_R = boot_R - of_a[name][1]
        result |= {name: point - of_a[name][0], f"{name}_ci": ranks.bounds(difference_R)}
        result[f"{name}_p"] = _p_value(difference_R)
    return result


def _ordinal(labels, scores, errors, num_bootstrap: int, seed: int, groups) -> dict[str, tuple[float, np.ndarray]]:
    """Return kappa and mad_h, each with its values [R] on the resamples; arguments as for `ordinal`."""
    labels_NK, scores_NK = ranks.check(labels, scores)
    num_labels = labels_NK.shape[1]
    group_N = _group_numbers(groups, len(labels_NK))
    num_groups, cells_N = int(group_N.max()) + 1, labels_NK.argmax(1) * num_labels + scores_NK.argmax(1)
    # What a group adds to a resample: its row of counts of (truth, chosen) cells, and the sum of its errors.
    sums = np.bincount(group_N * num_labels**2 + cells_N, minlength=num_groups * num_labels**2)
    table = np.column_stack([sums.reshape(num_groups, -1), np.bincount(group_N, errors, num_groups)])
    counts = [np.asarray(c[:num_groups], np.float64).T @ table for c in _counts(num_groups, num_bootstrap, seed)]
    whole, drawn = table.sum(0, keepdims=True), np.concatenate(counts)
    of = {"kappa": lambda x: _kappa(x[:, :-1]), "mad_h": lambda x: x[:, -1] / x[:, :-1].sum(1)}
    return {name: (float(value(whole)[0]), value(drawn)) for name, value in of.items()}


def _kappa(cells_RC: np.ndarray) -> np.ndarray:
    """Return the linearly weighted kappa [R] of tables of counts, truth by choice, [R, K * K]; NaN of one bin."""
    num_labels = math.isqrt(cells_RC.shape[1])
    count_RKK = np.asarray(cells_RC, np.float64).reshape(-1, num_labels, num_labels)
    distance_KK = np.abs(np.subtract.outer(np.arange(num_labels), np.arange(num_labels)))
    by_chance_RKK = count_RKK.sum(2)[:, :, None] * count_RKK.sum(1)[:, None] / count_RKK.sum((1, 2), keepdims=True)
    observed_R, expected_R = ((x * distance_KK).sum((1, 2)) for x in (count_RKK, by_chance_RKK))
    return 1 - np.divide(observed_R, expected_R, out=np.full(len(expected_R), np.nan), where=expected_R > 0)


def macro(values_K) -> float:
    """Return the mean over the labels, ignoring NaN; NaN if all are NaN."""
    return float(ranks.nanmean(values_K))


def compare(labels, scores_a, scores_b, num_bootstrap: int = 1000, seed: int = 0, groups=None) -> dict:
    """Return AUROC and average precision of b minus those of a, with paired bootstrap bounds and p-values.

    labels, scores_a, scores_b [N, K]: the same samples in the same order. Both models are compared on the resamples
    that `evaluate` draws for this seed and these groups.

    Returns a dict:
        auroc, auprc [K]: the differences; auroc_ci, auprc_ci [K, 2]; auroc_p, auprc_p [K], two-sided (see `_p_value`)
        auroc_macro, auprc_macro and their _ci (low, high) and _p: of the means over the labels
        num_samples, num_positive [K], num_bootstrap; num_groups, if there are groups
    """
    labels_NK, a_NK = ranks.check(labels, scores_a, "scores_a")
    _, b_NK = ranks.check(labels, scores_b, "scores_b")
    group_N = _group_numbers(groups, len(labels_NK))
    boot_a, boot_b = _bootstrap(labels_NK, [a_NK, b_NK], num_bootstrap, seed, group_N)
    point_a, point_b = (ranks.point(labels_NK, s_NK) for s_NK in (a_NK, b_NK))
    result = {
        "num_samples": len(labels_NK),
        **({} if groups is None else {"num_groups": int(group_N.max()) + 1}),
        "num_positive": labels_NK.sum(0),
        "num_bootstrap": num_bootstrap,
    }
    for name in ("auroc", "auprc"):
        boot_RK = boot_b[name] - boot_a[name]
        macro_R = ranks.nanmean(boot_b[name]) - ranks.nanmean(boot_a[name])
        result[name] = point_b[name] - point_a[name]
        result[f"{name}_ci"] = np.stack([ranks.bounds(boot_R) for boot_R in boot_RK.T])
        result[f"{name}_p"] = np.array([_p_value(boot_R) for boot_R in boot_RK.T])
        result[f"{name}_macro"] = macro(point_b[name]) - macro(point_a[name])
        result[f"{name}_macro_ci"] = ranks.bounds(macro_R)
        result[f"{name}_macro_p"] = _p_value(macro_R)
    return result


def _p_value(difference_R: np.ndarray) -> float:
    """Return the two-sided p-value of no difference: twice the smaller share of resamples on one side of zero.

    It is below 0.05 where the 95 % percentile bounds exclude zero. The sample itself counts as one more resample, so
    that no p-value is 0 (Davison and Hinkley 1997, section 4.2). NaN without a finite resample.
    """
    known = difference_R[np.isfinite(difference_R)]
    if not len(known):
        return math.nan
    smaller = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1, 2 * (smaller + 1) / (len(known) + 1)))


def to_json(result):
    """Convert a result for JSON: arrays to lists, NaN to None."""
    if isinstance(result, dict):
        return {key: to_json(value) for key, value in result.items()}
    if isinstance(result, np.ndarray | np.generic):
        return to_json(result.tolist())
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def _padded(num_samples: int) -> int:
    """Return the number of rows to pad to: one of four sizes per power of two, so that few programs are compiled."""
    quantum = max(_MIN_ROWS, 1 << max(0, (num_samples - 1).bit_length() - 3))
    return -(-num_samples // quantum) * quantum


def _group_numbers(groups, num_samples: int) -> np.ndarray:
    """Return the number of each sample's group, int [N], from 0 in order of first appearance.

    Without groups each sample is its own, and so are groups of one sample each: both have the same resamples.
    """
    if groups is None:
        return np.arange(num_samples)
    groups = np.asarray(groups)
    if groups.shape != (num_samples,):
        message = f"groups have shape {groups.shape}; they must be [samples], here {(num_samples,)}"
        raise UserError(message, field="groups", value=groups.shape)
    if groups.dtype.kind == "f" and not np.isfinite(groups).all():
        row = int(np.argmin(np.isfinite(groups)))
        raise UserError(f"row {row} of groups is {groups[row]}; it must be an id", field="groups", value=row)
    _, first_G, sorted_N = np.unique(groups, return_index=True, return_inverse=True)
    number_G = np.empty(len(first_G), int)
    number_G[np.argsort(first_G)] = np.arange(len(first_G))
    return number_G[sorted_N]


def _keys(num_bootstrap: int, seed: int) -> jax.Array:
    for name, value in (("num_bootstrap", num_bootstrap), ("seed", seed)):
        if not isinstance(value, int | np.integer) or not -(2**63) <= value < 2**63:
            raise UserError(f"{name} is {value!r}; it must be a whole number of 64 bits", field=name, value=value)
    num_bootstrap = int(num_bootstrap)  # also True, which jax would refuse
    if num_bootstrap < 1:
        raise UserError(
            f"num_bootstrap is {num_bootstrap}; it must be at least 1", field="num_bootstrap", value=num_bootstrap
        )
    fold_in = functools.partial(jax.random.fold_in, jax.random.key(seed))
    return jax.vmap(fold_in)(jnp.arange(num_bootstrap))  # a resample does not depend on how many are drawn


@functools.partial(jax.jit, static_argnames="num_rows")
def _draw_counts(keys_R: jax.Array, num_samples, num_rows: int) -> jax.Array:
    """Return how often each resample draws each sample, uint8 [rows, R]; rows beyond `num_samples` are zero.

    uint8, because the walk reads every count once per label. More than 255 draws of one sample have a probability
    below 1e-500.
    """

    def one(key):
        row = jax.random.randint(key, (num_rows,), 0, num_samples, jnp.int32)
        row = jnp.where(jnp.arange(num_rows) < num_samples, row, num_rows)  # num_samples draws, then padding
        return jnp.zeros(num_rows, jnp.int32).at[row].add(1, mode="drop").astype(jnp.uint8)

    return jax.lax.map(one, keys_R, batch_size=_DRAW_TOGETHER).T


def _counts(num_samples: int, num_bootstrap: int, seed: int) -> Iterator[jax.Array]:
    """Yield the counts of all resamples of the samples or groups, uint8 [rows, R], in chunks that limit memory."""
    num_rows = _padded(num_samples)
    keys_R = _keys(num_bootstrap, seed)
    num_chunks = -(-num_bootstrap * num_rows // _COUNTS_BYTES)
    size = -(-num_bootstrap // num_chunks)
    for start in range(0, num_bootstrap, size):
        yield _draw_counts(keys_R[start : start + size], num_samples, num_rows=num_rows)


def _bootstrap(
    labels_NK: np.ndarray, models: list[np.ndarray], num_bootstrap: int, seed: int, group_N: np.ndarray
) -> list[dict]:
    """Return AUROC and average precision [R, K] per model (scores [N, K]) on the same resamples; NaN for one class.

    group_N: the number of each sample's group, drawn whole.
    """
    num_samples, num_groups = len(labels_NK), int(group_N.max()) + 1
    # Ranks beyond the samples need a row of counts that is zero. Where groups fill their rows, there is none.
    spare = int(num_groups == _padded(num_groups) and num_samples < _padded(num_samples))
    zero_row = _padded(num_groups) - 1 + spare
    model_ranks = [_device_ranks(labels_NK, scores_NK, group_N, zero_row) for scores_NK in models]
    num_blocks = -(-num_samples // _BLOCK)
    chunks = []
    for counts in _counts(num_groups, num_bootstrap, seed):
        counts = jnp.pad(counts, ((0, spare), (0, 0))) if spare else counts
        chunks.append([jax.device_get(_walk(counts, *ranks_of_one, num_blocks)) for ranks_of_one in model_ranks])
    values = [np.concatenate(of_one, axis=2).astype(np.float64) for of_one in zip(*chunks, strict=True)]
    return [{"auroc": auroc_KR.T, "auprc": auprc_KR.T} for auroc_KR, auprc_KR in values]


def _device_ranks(
    labels_NK: np.ndarray, scores_NK: np.ndarray, group_N: np.ndarray, zero_row: int
) -> tuple[jax.Array, ...]:
    """Return `ranks.ranked` on the device, with groups for samples, padded to one of few sizes by `zero_row`."""
    num_samples = len(labels_NK)
    order, positive, is_end = ranks.ranked(labels_NK, scores_NK)
    padding = ((0, _padded(num_samples) - num_samples), (0, 0))
    order = np.pad(group_N[order].astype(np.int32), padding, constant_values=zero_row)
    return jax.device_put((order, np.pad(positive, padding), np.pad(is_end, padding)))


@jax.jit
def _walk(counts_NR, order, positive, is_end, num_blocks):
    """Return AUROC and average precision [2, K, R] from one walk down the ranks.

    counts_NR: rows of samples or groups; order (numbers of rows), positive, is_end: [rank, K].

    Counts are float32, exact up to 2**24. Sums of many terms are not exact: blocks of 128 ranks are summed plainly and
    added with Kahan's compensation, which leaves an error of about 1e-7. Plain sums alone err by more than 1e-6, and
    compensating every rank takes 2.5 times as long.
    """
    shape = (order.shape[1], counts_NR.shape[1])
    zero = jnp.zeros(shape, jnp.float32)

    def rank_step(rank, carry):
        (seen, true, seen_before, true_before), pairs, precision = carry
        count = counts_NR.at[order[rank]].get(mode="promise_in_bounds").astype(jnp.float32)
        end = is_end[rank][:, None]
        seen, true = seen + count, true + count * positive[rank][:, None]
        new_true = jnp.where(end, true - true_before, 0)
        new_false = jnp.where(end, seen - seen_before, 0) - new_true
        pairs = pairs + new_false * (true_before + new_true / 2)
        precision = precision + new_true * (true / jnp.maximum(seen, 1))
        return (seen, true, jnp.where(end, seen, seen_before), jnp.where(end, true, true_before)), pairs, precision

    def unrolled_step(step, carry):
        for i in range(_UNROLL):
            carry = rank_step(step * _UNROLL + i, carry)
        return carry

    def block_step(block, carry):
        running, pairs, precision = carry
        first = block * (_BLOCK // _UNROLL)
        steps = (first, first + _BLOCK // _UNROLL)
        running, block_pairs, block_precision = jax.lax.fori_loop(*steps, unrolled_step, (running, zero, zero))
        return running, _kahan(pairs, block_pairs), _kahan(precision, block_precision)

    start = ((zero,) * 4, (zero, zero), (zero, zero))
    (seen, true, _, _), (pairs, _), (precision, _) = jax.lax.fori_loop(0, num_blocks, block_step, start)
    both_classes = (true > 0) & (true < seen)
    return jnp.where(both_classes, jnp.stack([pairs / true / (seen - true), precision / true]), jnp.nan)


def _kahan(total_and_error, term):
    """Return (sum, rounding error) after one step of Kahan's compensated sum."""
    total, error = total_and_error
    term = term - error
    new_total = total + term
    return new_total, (new_total - total) - term
