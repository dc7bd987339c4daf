"""The training step fed as in a run: end to end, its input alone, and the step alone on batches on the device."""

import collections
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax

from medfuse_jax import feed as feed_lib
from medfuse_jax import parallel
from medfuse_jax.bench import clock, cohort, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.data import batches as batches_lib
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import Dataset


def measure(case: Case, data: Dataset | None = None, say=lambda text: None) -> list[dict]:
    """Return the records of 'ours' (the step alone), 'end_to_end' and 'input'.

    data: opened shards, or None to make up a dataset.
    """
    say("reading")
    sample = cohort.sample(case, data)
    trainer = step.Trainer(case, sample, say)
    end_to_end = _from_device(trainer, case, sample) if case.placement == "device" else _streamed(trainer, case, sample)
    runs = {clock.OURS: trainer.run, "end_to_end": end_to_end, "input": lambda: _read(case, sample)}
    rows = step.records(case, sample, trainer, clock.interleave(runs, case.warm_up, case.repeats, say))
    return [row | {"reader": "grain" if _has_grain() else "threads"} for row in rows]


def _streamed(trainer: step.Trainer, case: Case, sample: cohort.Sample) -> Callable[[], None]:
    """Return a function that trains one pass as with config.placement=stream: it reads and sends the batches."""

    def run() -> None:
        trainer.train(parallel.prefetch(_batches(case, sample), trainer.on))

    return run


def _from_device(trainer: step.Trainer, case: Case, sample: cohort.Sample) -> Callable[[], None]:
    """Return a function that trains one pass as with config.placement=device: it gathers batches on the device."""
    options: dict = {"mode": case.parallel, "placement": "device"}
    feed = feed_lib.open_feed(sample.data, sample.data.usable("train"), trainer.options, trainer.on, **options)

    def run() -> None:
        for state_and_losses in feed(trainer.state, sample.plan, 0, [len(sample.plan)], trainer.key):
            trainer.state = state_and_losses[0]
        jax.block_until_ready(state_and_losses)

    return run


def _read(case: Case, sample: cohort.Sample) -> None:
    """Read and collate the batches, and discard them."""
    for _ in _batches(case, sample):
        pass


def _batches(case: Case, sample: cohort.Sample) -> Iterator[dict]:
    """Read the batches as a run does; on a machine without grain, as many threads of our own read them."""
    if _has_grain():
        yield from batches_lib.batches(sample.data, "train", sample.plan, num_devices=case.num_devices)
        return
    options, ahead = batches_lib.READ_OPTIONS, collections.deque()

    def read(number: int) -> dict:
        rows = plan_lib.deal(sample.plan, number, case.num_devices)
        return batches_lib.read(sample.data, "train", rows, int(sample.plan.padded_length_S[number]))

    with ThreadPoolExecutor(options["num_threads"]) as pool:
        for number in range(len(sample.plan)):
            ahead.append(pool.submit(read, number))
            if len(ahead) > options["prefetch_buffer_size"]:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _has_grain() -> bool:
    return importlib.util.find_spec("grain") is not None
