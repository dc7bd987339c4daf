"""Score each included record of a split exactly once.

Shapes: M models, N records, K labels, D devices, B rows per device, R = D * B rows of a batch, T time steps.
`run` is a run.Run.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from medfuse_jax.data import plan as plan_lib
from medfuse_jax.runtime import hosts, watchdog


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Scores of the included records of a split, in record order, and their mean loss."""

    record_N: np.ndarray
    score_NK: np.ndarray
    label_NK: np.ndarray
    loss: float


def predict(run, eval_fn: Callable, state, split: str, include_N: np.ndarray) -> Predictions:
    """Score the records with one model. Raise UserError if no record is included."""

    def eval_one(batch):
        return jax.tree.map(lambda x: x[None], eval_fn(state, batch))

    return predict_each(run, eval_one, 1, split, include_N)[0]


def predict_each(run, eval_fn: Callable, num_models: int, split: str, include_N: np.ndarray) -> list[Predictions]:
    """Score the records with several models, reading each batch once.

    eval_fn: batch -> (scores [M, D, B, K], loss of each row [M, D, B]).
    """
    label_NK = run.dataset.index[split]["label"]
    score_MNK = np.full((num_models, *label_NK.shape), np.nan, np.float32)
    loss_MN = np.full((num_models, len(include_N)), np.nan)
    for record_R, real_R, (score_MDBK, loss_MDB) in _outputs(run, eval_fn, split, include_N):
        score_MNK[:, record_R] = np.asarray(score_MDBK).reshape(num_models, len(real_R), -1)[:, real_R]
        loss_MN[:, record_R] = np.asarray(loss_MDB).reshape(num_models, -1)[:, real_R]
    record_N = np.flatnonzero(include_N)
    predictions = []
    for score_NK, loss_N in zip(score_MNK, loss_MN):
        is_complete = np.array_equal(record_N, np.flatnonzero(~np.isnan(loss_N)))
        assert is_complete or not np.isfinite(score_NK[record_N]).all()
        predictions.append(
            Predictions(record_N, score_NK[record_N], label_NK[record_N], float(loss_N[record_N].mean()))
        )
    return predictions


def attention_weights(run, weights_fn: Callable, state, split: str, include_N: np.ndarray) -> dict:
    """Return the attention weights of the included records, in record order; {} for a method without attention.

    time_weights float16 [N, T], 0 beyond a stay's length; modality_weights float32 [N, M], 0 for a missing modality;
    modalities str [M]; length int [N]. This is a separate pass, so that scoring after each epoch need not return them.
    weights_fn: (state, batch) -> {name: weights [D, B, ...]}.
    """
    names = getattr(run.options.model, "token_names", ())
    if not names:
        return {}
    length_N = run.dataset.lengths(split)
    weights = {
        "time_weights": np.zeros((len(include_N), int(length_N[include_N].max(initial=0))), np.float16),
        "modality_weights": np.zeros((len(include_N), len(names)), np.float32),
    }
    for record_R, real_R, outputs in _outputs(run, lambda batch: weights_fn(state, batch), split, include_N):
        for name, weight_DBX in outputs.items():
            width = min(weight_DBX.shape[-1], weights[name].shape[1])  # a batch may be padded beyond its longest stay
            weights[name][record_R, :width] = np.asarray(weight_DBX).reshape(len(real_R), -1)[real_R, :width]
    weights["length"] = length_N
    return {name: values_N[include_N] for name, values_N in weights.items()} | {"modalities": np.array(names)}


def _outputs(run, batch_fn: Callable, split: str, include_N: np.ndarray) -> Iterator[tuple]:
    """Yield (numbers of the real records, mask [R] of their rows, output of batch_fn) for each batch.

    The next batch is dispatched before an output is yielded, so that reading the output does not idle the device. Raise
    Stopped if a signal arrives meanwhile.
    """
    for plan in run.eval_plans(split, include_N):
        pending: tuple = ()
        for batch in run.batches(split, plan):
            dispatched = (hosts.to_host(batch["record"]), hosts.to_host(batch_fn(batch)))
            if hosts.must_stop():
                raise watchdog.Stopped
            if pending:
                yield _real_rows(*pending)
            pending = dispatched
        yield _real_rows(*pending)


def _real_rows(record_DB, output) -> tuple:
    record_R = np.asarray(record_DB).reshape(-1)
    real_R = record_R != plan_lib.PADDING
    return record_R[real_R], real_R, output
