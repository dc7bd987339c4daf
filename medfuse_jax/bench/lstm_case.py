"""The EHR encoder's recurrence alone, forward and backward: ours, the plain scan, and torch's.

Shapes: B rows, T time, F EHR channel, D LSTM width.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import tasks
from medfuse_jax.bench import clock, cohort, step_case
from medfuse_jax.bench.cases import Case
from medfuse_jax.models import lstm


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """One record a contender, on batches sampled from an epoch of the plan. data is not read."""
    data = cohort.dataset(case)
    length_N = data.lengths("train")
    whole = cohort.train_plan(case, data)
    batches = cohort.collate_all(data, cohort.sample(whole, length_N, case.num_batches), 1)
    width = dict(case.sizes).get("ehr_hidden", 256)
    weights = _weights(width)
    placed = [(jnp.asarray(batch["ehr"][0]), jnp.asarray(batch["length"][0])) for batch in batches]
    runs, compiled = {}, {}
    for name, recurrence in ((step_case.OURS, lstm.lstm), ("plain_scan", _plain)):
        say(f"{name}: compiling")
        runs[name], compiled[name] = _compiled_run(recurrence, weights, placed, case)
    runs |= _torch_runs(case, batches, width, data)
    seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    samples = int(sum(batch["valid"].sum() for batch in batches))
    rows = []
    for name, taken in seconds.items():
        row = {"contender": name} | clock.summary(taken)
        row |= {"batches_per_repeat": len(batches), "samples_per_s": round(samples / row["seconds"], 2)}
        if name in compiled:
            row |= {"compilations": compiled[name].count, "compile_s": round(compiled[name].seconds, 2)}
        if name == step_case.OURS:
            row |= step_case.padding_facts(whole, length_N)
        else:
            row["time_over_ours"] = clock.ratio(taken, seconds[step_case.OURS])
        rows.append(row)
    # A run's own: every bucket of the epoch's plan, not only those of the sampled batches.
    rows[0]["buckets_in_epoch"] = len(np.unique(whole.steps_S))
    return rows


def _weights(width: int) -> list[dict]:
    """Both layers' weights."""
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return jnp.asarray(rng.uniform(-1, 1, shape) * width**-0.5, jnp.float32)

    return [
        {"input_kernel": kernel(n, 4 * width), "recurrent_kernel": kernel(width, 4 * width), "bias": kernel(4 * width)}
        for n in (len(tasks.CHANNELS), width)
    ]


def _plain(weights: dict, x_BTF, length_B, dtype):
    """The reference: the plain scan over the whole bucket."""
    return lstm.masked_lstm(weights, x_BTF, lstm.valid_steps(length_B, x_BTF.shape[1]), dtype)


def _compiled_run(recurrence, weights, placed, case: Case):
    """(a pass over the batches, what was compiled for it)."""
    dtype = jnp.dtype(case.precision)

    def loss(weights, x_BTF, length_B):
        hidden_BTD, _ = recurrence(weights[0], x_BTF, length_B, dtype)
        return recurrence(weights[1], hidden_BTD, length_B, dtype)[1].sum()

    gradient = jax.jit(jax.grad(loss))
    with clock.compilations() as compiled:
        for x_BTF, length_B in placed:
            jax.block_until_ready(gradient(weights, x_BTF, length_B))

    def run() -> None:
        for x_BTF, length_B in placed:
            out = gradient(weights, x_BTF, length_B)
        jax.block_until_ready(out)

    return run, compiled


def _torch_runs(case: Case, batches: list[dict], width: int, data) -> dict:
    if not case.peers or importlib.util.find_spec("torch") is None:
        return {}
    from medfuse_jax.bench import torch_peer

    runs = {}
    for name in case.peers:
        variant = torch_peer.VARIANTS[name]
        no_films = [{key: x for key, x in batch.items() if key != "film_row"} for batch in batches]
        placed = [torch_peer.batch_for(variant, batch, None, data.mean_F, data.std_F) for batch in no_films]
        runs[name] = torch_peer.lstm_runner(variant, len(tasks.CHANNELS), width, placed, case.precision)
    return runs
