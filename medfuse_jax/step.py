"""The training and evaluation steps, written once.

Pure functions of (state, batch, key). With axis=None they run on one device; with an axis name, under pmap or shard_map
(parallel.py), where every sum over the batch is summed over the devices too. Batches are described in data/batches.py.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from medfuse_jax import augment, losses, optim
from medfuse_jax.models.model import init_variables
from medfuse_jax.models.precision import matmul_precision
from medfuse_jax.runtime import compilation

_MAX_IMAGES = 2**16  # of a stay; only tells the images of two stays apart


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes, and the learning rate, which the epoch loop sets."""

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    learning_rate: jax.Array


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step is compiled for.

    mean_F and std_F standardise the EHR channels. weights: of the losses beside the main one.
    head: the model's output that is scored. exclusive: see schema.Task.
    """

    model: flax.linen.Module
    optimizer: optax.GradientTransformation
    image: augment.ImageOptions
    mean_F: tuple[float, ...]
    std_F: tuple[float, ...]
    weights: losses.Weights
    head: str = "logits"
    exclusive: bool = False


@functools.lru_cache(maxsize=8)  # a run asks for its state's shapes several times: the model is traced once
def state_maker(
    options: StepOptions, extra_shapes: tuple[tuple[str, tuple[int, ...]], ...] = (), run_once: bool = False
) -> Callable[[jax.Array, float], TrainState]:
    """Return a function (key, learning rate) -> a fresh state; one program draws all weights.

    extra_shapes: of the values of further modalities, by name (see `model.init_variables`). run_once: minimise
    compile time rather than run time; only for calls outside other traced functions.
    """
    init = jax.jit(_init_fn(options.model, extra_shapes), compiler_options=compilation.RUN_ONCE if run_once else None)

    def make(key, learning_rate):
        variables = init(key)
        params = variables["params"]
        # Adam starts from zeros; made on the host, they need no compilation.
        opt_shapes = jax.eval_shape(options.optimizer.init, params)
        return TrainState(
            step=jnp.asarray(np.zeros((), np.int32)),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), opt_shapes),
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
        )

    return make


@functools.lru_cache(maxsize=8)  # one function, so that a state and its shapes are traced once
def _init_fn(model: flax.linen.Module, extra_shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Callable:
    extra = {name: np.zeros(shape) for name, shape in extra_shapes}
    return lambda key: init_variables(model, key, extra)


def model_inputs(options: StepOptions, batch: dict, key: jax.Array | None) -> dict:
    """Standardise the series and prepare the images, augmented if a key is given (training)."""
    num_rows = batch["valid"].shape[0]
    inputs = {"length": batch.get("length", jnp.zeros(num_rows, jnp.int32))}
    if "ehr" in batch:
        inputs["ehr"] = (batch["ehr"] - jnp.asarray(options.mean_F)) / jnp.asarray(options.std_F)
    if "image" in batch and key is None:
        inputs["image"] = augment.prepare(batch["image"], options.image)
    elif "image" in batch:
        image_id_P = batch["row_id"][batch["image_row"]]
        if "image_of" in batch:  # a stay's images are turned each by its own angle
            image_id_P = image_id_P * _MAX_IMAGES + batch["image_of"]
        inputs["image"] = augment.prepare_augmented(key, image_id_P, batch["image"], options.image, options.model.ops)
    # The features are those of frozen encoders in a sweep.
    listed = ("image_row", "image_mask", "image_slot", "image_time_h", "image_hour")
    for name in (*listed, "hour_step", "ehr_features", "cxr_features"):
        if name in batch:
            inputs[name] = batch[name]
    if extra := {name.removeprefix("extra_"): x for name, x in batch.items() if name.startswith("extra_")}:
        inputs["extra"] = extra
    return inputs


def train_step(
    options: StepOptions,
    state: TrainState,
    batch: dict,
    key: jax.Array,
    axis: str | None = None,
    dropout: jax.Array | None = None,
) -> tuple[TrainState, dict]:
    """Update the weights once; return the new state and {'loss'} of the whole batch.

    key: the run's. The step number is folded into it, and each row's row_id into the step's keys, so that a resumed run
    and any layout over devices draw the same numbers. axis: the name of the device axis. dropout: a rate that replaces
    the model's (in a sweep's trial).
    """
    model = options.model if dropout is None else options.model.clone(dropout=dropout)
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    inputs = model_inputs(options, batch, augment_key)

    def loss_fn(params):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            **inputs,
            train=True,
            dropout_rows=batch["row_id"],
            axis_name=axis,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        total = functools.partial(_sum_over, axis=axis)
        parts = (model.heads, outputs, batch, options.weights, total, options.exclusive, model.terms)
        loss = losses.objective(*parts)
        return loss, updated.get("batch_stats", state.batch_stats)

    with matmul_precision(model.dtype):  # for the gradients; the model sets its own
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    loss, grads = _sum_over((loss, grads), axis)
    grads = optim.laid_out_as_weights(grads)
    direction, opt_state = options.optimizer.update(grads, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optim.descend(state.params, direction, state.learning_rate),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, {"loss": loss}


def eval_step(options: StepOptions, state: TrainState, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Return scores [B, K] in 0..1 of options.head and each row's mean loss [B], 0 in padded rows.

    In an hourly task, both have the axes [B, H] for [B].
    """
    inputs = model_inputs(options, batch, key=None)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits_BK = options.model.apply(variables, **inputs, train=False)[options.head]
    loss_B = losses.row_loss(logits_BK, batch["label"], options.exclusive)
    score_BK = jax.nn.softmax(logits_BK) if options.exclusive else jax.nn.sigmoid(logits_BK)
    return score_BK, jnp.where(batch.get("hour_mask", batch["valid"]), loss_B, 0.0)


def weights_step(options: StepOptions, state: TrainState, batch: dict) -> dict:
    """Return the attention weights by name: time_weights [B, T], modality_weights [B, M]."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    inputs = model_inputs(options, batch, key=None)
    _, sown = options.model.apply(variables, **inputs, train=False, mutable=["intermediates"])
    return dict(sown["intermediates"])


def _sum_over(tree, axis: str | None):
    return tree if axis is None else jax.lax.psum(tree, axis)
