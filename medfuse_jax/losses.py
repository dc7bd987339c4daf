"""Losses: which classifiers a batch trains, on which rows.

Shapes: B rows of the batch, P images, K labels. In an hourly task, [B] stands for [B, hours].
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from medfuse_jax.models.presence import rows_with_image


@dataclasses.dataclass(frozen=True)
class Head:
    """A classifier of a model, as the loss needs it.

    logits: the key of its logits in the model's outputs. needs: the modalities ('ehr', 'cxr') that a row must have to
    train it. label: the batch's field with its labels; a batch without that field does not train it. weight: the field
    of `Weights` that its loss is multiplied by, '' for 1.
    """

    logits: str = "logits"
    needs: tuple[str, ...] = ()
    label: str = "label"
    weight: str = ""


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss that is not a classifier's, such as the distance between two features.

    rows: computes its value for each row [B] from the model's outputs and the labels [B, K]. weight: the field of
    `Weights` that it is multiplied by; 0 leaves it out. needs: the modalities that a row must have to count.
    """

    rows: Callable[[dict, jax.Array], jax.Array]
    weight: str
    needs: tuple[str, ...] = ()


def output(name: str) -> Callable[[dict, jax.Array], jax.Array]:
    """Return `rows` of a Term whose values are the model's output `name`."""
    return lambda outputs, _: outputs[name]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The fields of config.loss: weights of the losses beside the main one, in the methods that have them.

    weighting: 'hour' or 'stay', what an hourly task's loss is a mean over. mean_hours: of the training stays.
    """

    ehr_only: float
    cxr_only: float
    shared_only: float
    align: float
    divergence: float
    orthogonal: float
    ranking: float
    distance: float
    domain: float
    weighting: str = "hour"
    mean_hours: float = 1.0


def objective(
    heads: tuple[Head, ...],
    outputs: dict,
    batch: dict,
    weights: Weights,
    total: Callable,
    exclusive: bool = False,
    terms: tuple[Term, ...] = (),
) -> jax.Array:
    """Return the weighted sum of the losses of all heads that the batch has labels for, and of all terms.

    Each is a mean over the rows of the whole batch that train it, or 0 if there is none. total: a function that sums
    over devices, so that the devices' objectives, and their gradients, add up to the batch's. exclusive: see
    schema.Task.
    """
    if "hour_mask" in batch:  # one head, which every hour trains
        (head,) = heads
        mask_BH = batch["hour_mask"]
        loss_BH = jnp.where(mask_BH, row_loss(outputs[head.logits], batch[head.label], exclusive), 0)
        num_stays = jnp.maximum(total(mask_BH.any(axis=1).sum()), 1)
        if weights.weighting == "stay":
            return jnp.sum(loss_BH.sum(axis=1) / jnp.maximum(mask_BH.sum(axis=1), 1)) / num_stays
        # Not by the batch's own hours: batches hold stays of similar length, and every hour counts the same.
        return jnp.sum(loss_BH) / (num_stays * weights.mean_hours)
    present = present_rows(batch)
    trained = [head for head in heads if head.label in batch]
    added = [term for term in terms if getattr(weights, term.weight)]
    needs = [head.needs for head in trained] + [term.needs for term in added]
    trains = [functools.reduce(jnp.logical_and, [present[m] for m in each], batch["valid"]) for each in needs]
    # One sum over devices for all counts.
    counts = total(jnp.stack([jnp.sum(rows_B) for rows_B in trains]))
    loss = jnp.zeros(())
    for head, trains_B, num_rows in zip(trained, trains, counts):
        weight = getattr(weights, head.weight) if head.weight else 1.0
        loss += weight * mean_bce(outputs[head.logits], batch[head.label], trains_B, num_rows)
    for term, trains_B, num_rows in zip(added, trains[len(trained) :], counts[len(trained) :]):
        values_B = jnp.where(trains_B, term.rows(outputs, batch["label"]), 0.0)
        loss += getattr(weights, term.weight) * jnp.sum(values_B) / jnp.maximum(num_rows, 1)
    return loss


def present_rows(batch: dict) -> dict[str, jax.Array]:
    """Return {'ehr', 'cxr': bool [B]}: which rows have EHR, and which an X-ray."""
    num_rows = batch["valid"].shape[0]
    none_B = jnp.zeros(num_rows, bool)
    has_ehr_B = batch["length"] > 0 if "length" in batch else none_B
    has_cxr_B = none_B
    if "image_row" in batch:
        has_cxr_B = rows_with_image(batch["image_row"], batch["image_mask"], num_rows)
    return {"ehr": has_ehr_B, "cxr": has_cxr_B}


def row_loss(logits_BK: jax.Array, label_BK: jax.Array, exclusive: bool = False) -> jax.Array:
    """Return each row's mean binary cross-entropy over its labels [B], or its cross-entropy if they are exclusive."""
    if exclusive:
        return optax.softmax_cross_entropy(logits_BK, label_BK)
    return optax.sigmoid_binary_cross_entropy(logits_BK, label_BK).mean(-1)


def mean_bce(logits_BK: jax.Array, label_BK: jax.Array, valid_B: jax.Array, num_valid: jax.Array) -> jax.Array:
    """Return the binary cross-entropy, summed over the valid rows and divided by num_valid * K.

    num_valid counts the valid rows of all devices, so that the devices' losses add up to the batch's.
    """
    loss_BK = optax.sigmoid_binary_cross_entropy(logits_BK, label_BK)
    total = jnp.sum(jnp.where(valid_B[:, None], loss_BK, 0.0))
    return total / (jnp.maximum(num_valid, 1) * label_BK.shape[1])
