"""The EHR encoder's recurrence alone, forward and backward: ours, its other forms, the plain scan, and torch's.

Shapes: B rows, T time, F EHR channel, D LSTM width.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import schema
from medfuse_jax.bench import clock, cohort, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.models import ehr_encoder
from medfuse_jax.runtime import compilation

_PLAIN = "plain_scan"
# From the plain scan, beyond which a form is not the same recurrence. In bfloat16 the chunks are 0.011 from it, as they
# round at other places; in float32 a GPU rounds products to TF32, which is 0.001 to one factor.
_FARTHEST = {"float32": 0.02, "bfloat16": 0.05}


def measure(case: Case, data=None, say=lambda text, end="": None) -> list[dict]:
    """One record a contender, on batches sampled from an epoch of the plan. data is not read."""
    data = cohort.dataset(case)
    length_N = data.lengths("train")
    whole = cohort.train_plan(case, data)
    batches = cohort.collate_all(data, cohort.sample(whole, length_N, case.num_batches), 1)
    width = dict(case.sizes).get("ehr_hidden", 256)
    weights = _weights(width)
    placed = [(jnp.asarray(batch["ehr"][0]), jnp.asarray(batch["length"][0])) for batch in batches]
    runs, facts = _runs(case, weights, placed, say)
    runs |= _torch_runs(case, batches, width, data)
    seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    samples = int(sum(batch["valid"].sum() for batch in batches))
    rows = []
    for name, taken in seconds.items():
        row = {"contender": name} | clock.summary(taken)
        row |= {"batches_per_repeat": len(batches), "samples_per_s": round(samples / row["seconds"], 2)}
        row |= facts.get(name, {})
        if name == step.OURS:
            row |= step.padding_facts(whole, length_N)
        else:
            row["time_over_ours"] = clock.ratio(taken, seconds[step.OURS])
        rows.append(row)
    # A run's own: every bucket of the epoch's plan, not only those of the sampled batches.
    rows[0]["buckets_in_epoch"] = len(np.unique(whole.padded_length_S))
    return rows


def _weights(width: int) -> list[dict]:
    """Both layers' weights."""
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return jnp.asarray(rng.uniform(-1, 1, shape) * width**-0.5, jnp.float32)

    return [
        {"input_kernel": kernel(n, 4 * width), "recurrent_kernel": kernel(width, 4 * width), "bias": kernel(4 * width)}
        for n in (len(schema.CHANNELS), width)
    ]


def _plain(weights: dict, x_BTF, length_B, dtype):
    """The reference: the plain scan over the whole bucket."""
    return ehr_encoder.masked_lstm(weights, x_BTF, ehr_encoder.valid_steps(length_B, x_BTF.shape[1]), dtype)


def _runs(case: Case, weights, placed, say) -> tuple[dict, dict]:
    """(name -> a pass over the batches, name -> what compiling it took and how near to the plain scan it is)."""
    recurrences = {step.OURS: ehr_encoder.lstm, _PLAIN: _plain}
    if jax.default_backend() == "gpu":  # where the default is one form of several
        recurrences |= {
            form: functools.partial(ehr_encoder.lstm, form=form) for form in ehr_encoder.FORMS if form != "chunks"
        }
    runs, facts, gradients = {}, {}, {}
    for name, recurrence in recurrences.items():
        say(f"{name}: compiling")
        gradient = _gradient(recurrence, jnp.dtype(case.precision))
        try:
            with compilation.counted() as compiled:
                gradients[name] = [jax.block_until_ready(gradient(weights, *batch)) for batch in placed]
        except (RuntimeError, ValueError) as error:  # of a compiler
            if name in (step.OURS, _PLAIN):
                raise
            # A kernel that this GPU or its driver does not take is no reason to measure nothing.
            say(f"{name}: left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", end="\n")
            continue
        runs[name] = functools.partial(_pass, gradient, weights, placed)
        facts[name] = {"compilations": compiled.number, "compile_s": round(compiled.seconds, 2)}
    for name in gradients:
        difference = _difference(gradients[name], gradients[_PLAIN])
        facts[name]["difference_from_plain_scan"] = difference
        if not difference <= _FARTHEST[case.precision]:  # NaN is not
            said = f"its gradients are {difference:g} from the plain scan's"
            if name in (step.OURS, _PLAIN):
                raise AssertionError(f"{name}: {said}")
            say(f"{name}: left out: {said}", end="\n")
            del runs[name]
    return runs, facts


def _gradient(recurrence, dtype):
    """(weights, series, lengths) -> the gradient of both layers' weights."""

    def loss(weights, x_BTF, length_B):
        hidden_BTD, _ = recurrence(weights[0], x_BTF, length_B, dtype)
        return recurrence(weights[1], hidden_BTD, length_B, dtype)[1].sum()

    return jax.jit(jax.grad(loss))


def _pass(gradient, weights, placed) -> None:
    for batch in placed:
        out = gradient(weights, *batch)
    jax.block_until_ready(out)


def _difference(gradients, expected) -> float:
    """The largest of any element, relative to the largest element of its array; nan where one is."""
    differences = jax.tree.map(lambda x, y: jnp.abs(x - y).max() / jnp.abs(y).max(), gradients, expected)
    return float(f"{np.max(jax.tree.leaves(differences)):.2g}")


def _torch_runs(case: Case, batches: list[dict], width: int, data) -> dict:
    if not case.peers or importlib.util.find_spec("torch") is None:
        return {}
    from medfuse_jax.bench import torch_peer

    runs = {}
    for name in case.peers:
        variant = torch_peer.VARIANTS[name]
        no_cxr = [{key: x for key, x in batch.items() if key != "image_row"} for batch in batches]
        placed = [torch_peer.batch_for(variant, batch, None, data.mean_F, data.std_F) for batch in no_cxr]
        runs[name] = torch_peer.lstm_runner(variant, len(schema.CHANNELS), width, placed, case.precision)
    return runs
