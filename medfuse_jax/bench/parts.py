"""Where the time of a training step goes: the whole step and its parts, each compiled and timed separately.

Shapes: P X-rays, C pixels a side; a batch as in `data.batches`.
"""

from collections.abc import Callable

import jax
import numpy as np

from medfuse_jax import augment, optim
from medfuse_jax import step as step_lib
from medfuse_jax.bench import clock, cohort, step
from medfuse_jax.bench.cases import Case

# The X-ray encoder is timed up to three depths: its stem, half of its stages, all of its stages.
PARTS = ("augment", "cxr_stem", "cxr_half", "cxr_encoder", "ehr_encoder", "update")


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return a record of the whole step ('ours') and one of each part.

    data: opened shards, or None to make up a dataset.
    """
    sample = cohort.sample(case, data)
    trainer = step.Trainer(case, sample, say)
    runs = {clock.OURS: trainer.run}
    batches = [with_prepared_images(batch, case) for batch in sample.batches]
    for name, part in part_fns(trainer.options).items():
        say(f"{name}: compiling")
        runs[name] = _pass(part, step.fresh_state(trainer.options), batches)
    counts = sample.counts()
    rows = clock.records(clock.interleave(runs, case.warm_up, case.repeats, say))
    return [row | counts for row in rows.values()]


def with_prepared_images(batch: dict, case: Case) -> dict:
    """Return a one-device batch without its device axis, plus 'prepared' [P, C, C, 2], the X-ray encoder's input."""
    one_device = {key: x[0] for key, x in batch.items()}
    return one_device | {"prepared": np.ones((len(one_device["image"]), case.crop_px, case.crop_px, 2), np.float32)}


def part_fns(options: step_lib.StepOptions) -> dict[str, Callable]:
    """Return {name: function of a state and a batch}: forward and backward, with gradients of parameters only.

    State and batch are arguments, so that the compiler cannot evaluate a part in advance.
    """
    model, key = options.model, jax.random.key(0)

    def augmented(state, batch):
        return augment.prepare_augmented(key, batch["image_row"], batch["image"], options.image, model.ops)

    def gradient(encoder, forward):
        """Return a function: the gradient of the sum of forward(model, batch) by one encoder's parameters."""

        def loss(encoder_params, state, batch):
            variables = {"params": state.params | {encoder: encoder_params}, "batch_stats": state.batch_stats}
            return model.apply(variables, batch, method=forward, mutable=["batch_stats"])[0].sum()

        return lambda state, batch: jax.grad(loss)(state.params[encoder], state, batch)

    def until(last):
        def forward(model, batch):
            return model.cxr_encoder.until(last, batch["prepared"], True, batch["image_mask"])

        return gradient("cxr_encoder", forward)

    def encode(model, batch):
        return model.ehr_encoder(batch["ehr"], batch["length"])

    def update(state, batch):
        grads = optim.laid_out_as_weights(jax.tree.map(lambda p: p * batch["label"][0, 0], state.params))
        direction, opt_state = options.optimizer.update(grads, state.opt_state, state.params)
        return optim.descend(state.params, direction, state.learning_rate), opt_state

    stages = len(model.resnet_stage_sizes)
    parts = (augmented, until(0), until(stages // 2), until(stages))
    parts += (gradient("ehr_encoder", encode), update)
    return dict(zip(PARTS, parts, strict=True))


def _pass(part: Callable, state: step_lib.TrainState, batches: list[dict]) -> Callable[[], None]:
    compiled = jax.jit(part)
    state, placed = jax.device_put((state, batches))

    def run() -> None:
        for batch in placed:
            out = compiled(state, batch)
        jax.block_until_ready(out)

    return run
