"""Score each included record of a split exactly once; in an hourly task, each of its hours.

Shapes: M models, N records, S scores of a split (its records, or their hours), K labels, D devices, B rows per device,
R = D * B rows of a batch, H hours of a row (1 if the task is not hourly), T time steps.
`run` is a run.Run.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from medfuse_jax import metrics
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.runs import calibration
from medfuse_jax.runtime import hosts, watchdog


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Scores of the included records of a split, in record order, and their mean loss.

    In an hourly task N counts hours, and place_N is each one's place in `hours.Hours`; otherwise it is record_N.
    """

    record_N: np.ndarray
    place_N: np.ndarray
    score_NK: np.ndarray
    label_NK: np.ndarray
    loss: float


def selecting(run, predictions: Predictions) -> tuple[float, dict]:
    """Return the score that selects the model, and the scores to log: kappa if the labels are exclusive, else AUROC."""
    labels_NK, scores_NK = predictions.label_NK, predictions.score_NK
    logged = {"val_auroc": metrics.macro(metrics.auroc(labels_NK, scores_NK))}
    if run.dataset.task.exclusive:
        logged["val_kappa"] = metrics.kappa(labels_NK, scores_NK)
    return logged["val_kappa" if run.dataset.task.exclusive else "val_auroc"], logged


def temperature(run, predictions: Predictions) -> float | None:
    """Return the temperature that calibrates these scores; None if there is none to fit (docs/evaluation.md)."""
    if run.dataset.task.exclusive:  # one softmax over all labels
        return None
    return calibration.fit_temperature(predictions.label_NK, predictions.score_NK)


def predict(run, eval_fn: Callable, state, split: str, include_N: np.ndarray) -> Predictions:
    """Score the records with one model. Raise UserError if no record is included."""

    def eval_one(batch):
        return jax.tree.map(lambda x: x[None], eval_fn(state, batch))

    return predict_each(run, eval_one, 1, split, include_N)[0]


def predict_each(run, eval_fn: Callable, num_models: int, split: str, include_N: np.ndarray) -> list[Predictions]:
    """Score the records with several models, reading each batch once.

    eval_fn: batch -> (scores [M, D, B, K], loss of each row [M, D, B]), with the axes [B, H] for [B] in an hourly task.
    """
    first_N, count_N = np.arange(len(include_N)), np.ones(len(include_N), int)
    if run.dataset.hours:
        first_N, count_N = run.dataset.hours[split].first_N, run.dataset.hours[split].count_N
    label_SK = run.dataset.labels_of(split, np.ones_like(include_N))
    score_MSK = np.full((num_models, *label_SK.shape), np.nan, np.float32)
    loss_MS = np.full(score_MSK.shape[:2], np.nan)
    for record_R, real_R, (score, loss) in _outputs(run, eval_fn, split, include_N):
        loss_MRH = np.asarray(loss).reshape(num_models, len(real_R), -1)[:, real_R]
        score_MRHK = np.asarray(score).reshape(num_models, len(real_R), -1, label_SK.shape[1])[:, real_R]
        hour_H = np.arange(loss_MRH.shape[2])
        real_RH = hour_H < count_N[record_R][:, None]
        place = (first_N[record_R][:, None] + hour_H)[real_RH]
        score_MSK[:, place], loss_MS[:, place] = score_MRHK[:, real_RH], loss_MRH[:, real_RH]
    place_N = np.flatnonzero(np.repeat(include_N, count_N))
    record_N = np.repeat(np.arange(len(include_N)), count_N)[place_N]
    weight_N = 1 / count_N[record_N] if run.config.loss.weighting == "stay" else np.ones(len(record_N))
    predictions = []
    for score_SK, loss_S in zip(score_MSK, loss_MS):
        is_complete = np.array_equal(place_N, np.flatnonzero(~np.isnan(loss_S)))
        assert is_complete or not np.isfinite(score_SK[place_N]).all()
        mean_loss = float(np.average(loss_S[place_N], weights=weight_N))
        predictions.append(Predictions(record_N, place_N, score_SK[place_N], label_SK[place_N], mean_loss))
    return predictions


def attention_weights(run, weights_fn: Callable, state, split: str, include_N: np.ndarray) -> dict:
    """Return the attention weights of the included records, in record order; {} without any, and in an hourly task.

    time_weights float16 [N, T], 0 beyond a stay's length; modality_weights float32 [N, M], 0 for a missing modality;
    modalities str [M]; length int [N]. This is a separate pass, so that scoring after each epoch need not return them.
    weights_fn: (state, batch) -> {name: weights [D, B, ...]}.
    """
    names = getattr(run.options.model, "token_names", ())
    if not names or run.dataset.hours:
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
