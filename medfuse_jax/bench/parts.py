"""Where the time of a training step goes: the whole step, and its parts alone, each compiled and timed by itself.

Shapes: P X-rays, C pixels a side, D LSTM width; a batch's as in `input_pipeline`.
"""

from collections.abc import Callable

import jax
import numpy as np

from medfuse_jax import augment, optim
from medfuse_jax import step as step_lib
from medfuse_jax.bench import clock, cohort, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.models import ehr_encoder, resnet

# Each with what it holds beside the one before: of the X-ray encoder the stem, the first two stages, all four.
PARTS = ("augment", "cxr_stem", "cxr_half", "cxr_encoder", "ehr_encoder", "update")


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """One record for the whole step, one for each part. data: shards to read instead of made-up records."""
    data = data or cohort.dataset(case)
    plan = cohort.sample(cohort.train_plan(case, data), data.lengths("train"), case.num_batches)
    batches = cohort.collate_all(data, plan, 1)
    options = step.step_options(case, data)
    state = step.fresh_state(options)
    trainer = step.Trainer(case, data, batches, say)
    runs = {step.OURS: trainer.run}
    alone = [_with_prepared_images(batch, case) for batch in batches]
    for name, part in _parts(options).items():
        say(f"{name}: compiling")
        runs[name] = _over(part, state, alone)
    seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    return [{"contender": name} | clock.summary(taken) | step.counts(plan, batches) for name, taken in seconds.items()]


def _with_prepared_images(batch: dict, case: Case) -> dict:
    """The batch of the one device, and 'prepared' [P, C, C, 2]: what the X-ray encoder reads."""
    alone = {key: x[0] for key, x in batch.items()}
    return alone | {"prepared": np.ones((len(alone["image"]), case.crop_px, case.crop_px, 2), np.float32)}


def _parts(options: step_lib.StepOptions) -> dict[str, Callable]:
    """name -> a function of a state and a batch: forward and backward, without gradients of X-rays and series.

    Both are arguments: of constants the compiler would compute a part itself.
    """
    model, key = options.model, jax.random.key(0)
    image = resnet.ResNet(model.resnet_stage_sizes, model.resnet_width, model.dtype)
    ehr = ehr_encoder.EhrEncoder(model.ehr_hidden, model.dropout, model.dtype, model.recurrence)

    def augmented(state, batch):
        return augment.prepare_augmented(key, batch["image_row"], batch["image"], options.image)

    def until(last):
        def loss(params, batch_stats, batch):
            there_P = batch["image_row"] < len(batch["valid"])
            variables = {"params": params, "batch_stats": batch_stats}
            given = (last, batch["prepared"], True, there_P)
            return image.apply(variables, *given, method="until", mutable=["batch_stats"])[0].sum()

        def run(state, batch):
            return jax.grad(loss)(state.params["cxr_encoder"], state.batch_stats["cxr_encoder"], batch)

        return run

    def encode(params, batch):
        return ehr.apply({"params": params}, batch["ehr"], batch["length"]).sum()

    def update(state, batch):
        grads = jax.tree.map(lambda p: p * batch["label"][0, 0], state.params)
        direction, opt_state = options.optimizer.update(grads, state.opt_state, state.params)
        return optim.descend(state.params, direction, state.learning_rate), opt_state

    stages = len(model.resnet_stage_sizes)
    parts = (augmented, until(0), until(stages // 2), until(stages))
    parts += (lambda state, batch: jax.grad(encode)(state.params["ehr_encoder"], batch), update)
    return dict(zip(PARTS, parts, strict=True))


def _over(part: Callable, state: step_lib.TrainState, batches: list[dict]) -> Callable[[], None]:
    compiled, placed = jax.jit(part), jax.device_put(batches)

    def run() -> None:
        for batch in placed:
            out = compiled(state, batch)
        jax.block_until_ready(out)

    return run
