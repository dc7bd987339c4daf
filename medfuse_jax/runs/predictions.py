"""Score each included record of a split exactly once.

Shapes: M models, N records, K labels, D devices, B rows a device, R = D * B rows of a batch, T time steps.
`run` is an experiment.Experiment.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from medfuse_jax.data import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Scores of the included records of a split, in record order, and their mean loss."""

    record_N: np.ndarray
    score_NK: np.ndarray
    label_NK: np.ndarray
    loss: float


def predict(run, eval_fn: Callable, state, split: str, include_N: np.ndarray) -> Predictions:
    """Scores with one model. Raises UserError if no record is included."""

    def eval_one(batch):
        return jax.tree.map(lambda x: x[None], eval_fn(state, batch))

    return predict_each(run, eval_one, 1, split, include_N)[0]


def predict_each(run, eval_fn: Callable, num_models: int, split: str, include_N: np.ndarray) -> list[Predictions]:
    """Scores with several models, reading each batch once.

    eval_fn: batch -> (scores [M, D, B, K], loss of each row [M, D, B]).
    """
    score_MNK = np.full((num_models, len(include_N), len(run.dataset.labels)), np.nan, np.float32)
    loss_MN = np.full((num_models, len(include_N)), np.nan)
    for plan in run.eval_plans(split, include_N):
        pending: tuple = ()
        for batch in run.batches(split, plan):
            dispatched = (batch["record"], *eval_fn(batch))
            if pending:  # fetched while the next batch runs
                _store(pending, score_MNK, loss_MN)
            pending = dispatched
        _store(pending, score_MNK, loss_MN)
    record_N = np.flatnonzero(include_N)
    label_NK = run.dataset.index[split]["label"][record_N]
    predictions = []
    for score_NK, loss_N in zip(score_MNK, loss_MN):
        is_complete = np.array_equal(record_N, np.flatnonzero(~np.isnan(loss_N)))
        assert is_complete or not np.isfinite(score_NK[record_N]).all()
        predictions.append(Predictions(record_N, score_NK[record_N], label_NK, float(loss_N[record_N].mean())))
    return predictions


def _store(outputs: tuple, score_MNK: np.ndarray, loss_MN: np.ndarray) -> None:
    record_DB, score_MDBK, loss_MDB = outputs
    record_R = np.asarray(record_DB).reshape(-1)
    real_R = record_R != plan_lib.PADDING
    num_models, num_labels = len(score_MNK), score_MNK.shape[-1]
    score_MRK = np.asarray(score_MDBK).reshape(num_models, len(record_R), num_labels)
    score_MNK[:, record_R[real_R]] = score_MRK[:, real_R]
    loss_MN[:, record_R[real_R]] = np.asarray(loss_MDB).reshape(num_models, -1)[:, real_R]


def attention_weights(run, weights_fn: Callable, state, split: str, include_N: np.ndarray) -> dict:
    """Returns the attention weights of the included records, in record order; {} for a method without attention.

    time_weights float16 [N, T], 0 beyond a stay's length; modality_weights float32 [N, M], 0 for a missing modality;
    modalities str [M]; length int [N]. A pass of its own, so that scoring, done each epoch, need not return them.
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
    for plan in run.eval_plans(split, include_N):
        for batch in run.batches(split, plan):
            record_R = np.asarray(batch["record"]).reshape(-1)
            real_R = record_R != plan_lib.PADDING
            for name, weight_DBX in weights_fn(state, batch).items():
                width = min(weight_DBX.shape[-1], weights[name].shape[1])  # a bucket may be longer than its stays
                weight_RX = np.asarray(weight_DBX).reshape(len(record_R), -1)
                weights[name][record_R[real_R], :width] = weight_RX[real_R, :width]
    weights["length"] = length_N
    return {name: values_N[include_N] for name, values_N in weights.items()} | {"modalities": np.array(names)}
