"""The training step fed as in a run: end to end, its input alone, and the step alone on batches on the device."""

import importlib.util
from collections.abc import Callable, Iterator

import jax

from medfuse_jax import config as config_lib
from medfuse_jax import feed as feed_lib
from medfuse_jax import parallel
from medfuse_jax import run as run_lib
from medfuse_jax.bench import clock, cohort, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.data import batches as batches_lib
from medfuse_jax.data.dataset import Dataset


def measure(case: Case, data: Dataset | None = None, say=lambda text: None) -> list[dict]:
    """Return the records of 'ours' (the step alone), 'end_to_end' and 'input'.

    data: opened shards, or None to make up a dataset.
    """
    say("reading")
    sample = cohort.sample(case, data)
    trainer = step.Trainer(case, sample, say)
    end_to_end = _from_device(trainer, case, sample) if case.placement == "device" else _streamed(trainer, case, sample)
    runs = {clock.OURS: trainer.run, "end_to_end": end_to_end, "input": lambda: list(_batches(case, sample))}
    rows = step.records(case, sample, trainer, clock.interleave(runs, case.warm_up, case.repeats, say))
    reader = "grain" if importlib.util.find_spec("grain") else "threads"
    return [row | {"reader": reader} for row in rows]


def _streamed(trainer: step.Trainer, case: Case, sample: cohort.Sample) -> Callable[[], None]:
    """Return a function that trains one pass as with config.placement=stream: it reads and sends the batches."""

    def run() -> None:
        trainer.train(parallel.prefetch(_batches(case, sample), trainer.on))

    return run


def _from_device(trainer: step.Trainer, case: Case, sample: cohort.Sample) -> Callable[[], None]:
    """Return a function that trains one pass as with config.placement=device: it gathers batches on the device."""
    config = config_lib.default()
    config.parallel, config.placement = case.parallel, "device"
    run = run_lib.Run(config, sample.data, trainer.options, trainer.on)
    feed = feed_lib.open_feed(feed_lib.place(run, ("train",)))

    def train() -> None:
        for state_and_losses in feed(trainer.state, sample.plan, 0, [len(sample.plan)], trainer.key):
            trainer.state = state_and_losses[0]
        jax.block_until_ready(state_and_losses)

    return train


def _batches(case: Case, sample: cohort.Sample) -> Iterator[dict]:
    """Read the batches as a run does."""
    return batches_lib.batches(sample.data, "train", sample.plan, num_devices=case.num_devices)
