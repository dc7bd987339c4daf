"""The EHR encoder's LSTM alone, forward and backward: ours, our other kernels on a GPU, the plain scan and torch.

Shapes: B rows, T time, F EHR channel, D LSTM width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import schema
from medfuse_jax.bench import clock, cohort, flops, machine, roofline, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.models import ehr_encoder, resnet
from medfuse_jax.models.recurrence import cell, scan
from medfuse_jax.runtime import compilation

_PLAIN = "plain_scan"
# Largest difference from the plain scan's gradients that rounding can explain. In bfloat16 the chunks round at other
# points (measured: 0.011); in float32 a GPU rounds one factor of each product to TF32 (measured: 0.001).
_MAX_DIFFERENCE = {"float32": 0.02, "bfloat16": 0.05}


def measure(case: Case, data=None, say=lambda text, end="": None) -> list[dict]:
    """Return one record per contender, on batches sampled from the first epoch. data is ignored."""
    sample = cohort.sample(case)
    width: int = dict(case.sizes).get("ehr_hidden", 256)
    runs, facts, left_out = _ours(case, width, sample, say)
    runs |= _peers(case, width, sample, say)
    seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    rows, counts = clock.records(seconds), sample.counts()
    for name, row in rows.items():
        row["batches_per_repeat"] = counts["batches_per_repeat"]
        row["samples_per_s"] = round(counts["samples_per_repeat"] / row["seconds"], 2)
        row |= facts.get(name, {})
    # Bytes: only the compiler's of our own programs, of which a loop's body counts once.
    valid_time_steps = sum(int(batch["length"].sum()) for batch in sample.batches)
    total = flops.lstm_flops(valid_time_steps, width)
    for name in facts:
        rows[name] |= roofline.shares(total, facts[name]["bytes"], rows[name]["seconds"], case.precision)
    if left_out:
        rows[clock.OURS]["left_out"] = left_out
    buckets = len(np.unique(sample.epoch.padded_length_S))  # in the whole epoch, not only in the sampled batches
    rows[clock.OURS] |= sample.padding() | {"buckets_in_epoch": buckets}
    return list(rows.values())


def _ours(case: Case, width: int, sample: cohort.Sample, say) -> tuple[dict, dict, dict]:
    """Return name -> a pass over the batches, its facts (such as the difference from the plain scan), why left out."""
    weights = _weights(width)
    batches = [(jnp.asarray(batch["ehr"][0]), jnp.asarray(batch["length"][0])) for batch in sample.batches]
    default = step.recurrence(case)  # as in a run
    ours = functools.partial(ehr_encoder.lstm, kernel=default, ops=resnet.ops_for(jax.default_backend()))
    recurrences: dict[str, Callable] = {clock.OURS: ours, _PLAIN: _plain}
    if jax.default_backend() == "gpu":
        others = case.kernels or [kernel for kernel in ehr_encoder.LSTM_KERNELS if kernel != default]
        recurrences |= {kernel: functools.partial(ehr_encoder.lstm, kernel=kernel) for kernel in others}
    runs, facts, gradients, left_out = {}, {}, {}, {}
    for name, recurrence in recurrences.items():
        say(f"{name}: compiling")
        gradient_fn = _gradient_fn(recurrence, jnp.dtype(case.precision))
        try:
            with compilation.counted() as compiled:
                gradients[name] = [jax.block_until_ready(gradient_fn(weights, *batch)) for batch in batches]
        except (RuntimeError, ValueError) as error:  # from the compiler
            if name in (clock.OURS, _PLAIN):
                raise
            # This GPU or driver cannot run the kernel: measure the others.
            left_out[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            say(f"{name}: left out: {left_out[name]}", end="\n")
            continue
        runs[name] = functools.partial(_run, gradient_fn, weights, batches)
        facts[name] = {"compilations": compiled.number, "compile_s": round(compiled.seconds, 2)}
        facts[name]["bytes"] = _bytes(gradient_fn, weights, batches)
        if name == clock.OURS:
            facts[name]["recurrence"] = default
    for name in gradients:
        difference = facts[name]["difference_from_plain_scan"] = _difference(gradients[name], gradients[_PLAIN])
        if difference <= _MAX_DIFFERENCE[case.precision]:  # False for NaN
            continue
        problem = f"its gradients differ from the plain scan's by {difference:g}"
        if name in (clock.OURS, _PLAIN):
            raise AssertionError(f"{name}: {problem}")
        say(f"{name}: left out: {problem}", end="\n")
        left_out[name] = problem
        del runs[name], facts[name]
    return runs, facts, left_out


def _weights(width: int) -> list[dict]:
    """Return random weights for both layers."""
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return jnp.asarray(rng.uniform(-1, 1, shape) * width**-0.5, jnp.float32)

    return [
        {"input_kernel": kernel(n, 4 * width), "recurrent_kernel": kernel(width, 4 * width), "bias": kernel(4 * width)}
        for n in (len(schema.CHANNELS), width)
    ]


def _plain(weights: dict, x_BTF, length_B, dtype):
    """Run the reference, a plain scan over the whole bucket."""
    return scan.masked_lstm(weights, x_BTF, cell.valid_time_steps(length_B, x_BTF.shape[1]), dtype)


def _gradient_fn(recurrence: Callable, dtype) -> jax.stages.Wrapped:
    """Return a compiled function: (weights, series, lengths) -> gradients of both layers' weights."""

    def loss(weights, x_BTF, length_B):
        hidden_BTD, _ = recurrence(weights[0], x_BTF, length_B, dtype)
        return recurrence(weights[1], hidden_BTD, length_B, dtype)[1].sum()

    return jax.jit(jax.grad(loss))


def _run(gradient_fn: Callable, weights, batches) -> None:
    for batch in batches:
        gradients = gradient_fn(weights, *batch)
    jax.block_until_ready(gradients)


def _bytes(gradient_fn: jax.stages.Wrapped, weights, batches) -> float | None:
    """Return the bytes that a pass moves by the compiler's figures; None if it gives none."""
    cost_of = {}
    for batch in batches:
        shape = batch[0].shape
        if shape not in cost_of:
            cost_of[shape] = flops.compiled_cost(gradient_fn.lower(weights, *batch).compile()).get("bytes accessed")
    costs = [cost_of[batch[0].shape] for batch in batches]
    return sum(costs) if all(costs) else None


def _difference(gradients, expected) -> float:
    """Return the largest difference of any element, relative to its array's largest; NaN if any element is NaN."""
    differences = jax.tree.map(lambda x, y: jnp.abs(x - y).max() / jnp.abs(y).max(), gradients, expected)
    return float(f"{np.max(jax.tree.leaves(differences)):.2g}")


def _peers(case: Case, width: int, sample: cohort.Sample, say) -> dict[str, Callable[[], None]]:
    if not case.peers:
        return {}
    if reason := machine.why_no_torch():
        say(f"without PyTorch: {reason}", end="\n")
        return {}
    from medfuse_jax.bench import torch_peer

    runs, data = {}, sample.data
    for name in case.peers:
        variant = torch_peer.VARIANTS[name]
        placed = [torch_peer.batch_for(variant, batch, None, data.mean_F, data.std_F) for batch in sample.batches]
        runs[name] = torch_peer.lstm_runner(variant, len(schema.CHANNELS), width, placed, case.precision)
    return runs
