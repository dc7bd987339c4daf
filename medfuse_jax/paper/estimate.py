"""How long a plan takes on this machine, from the time of its own first steps."""

import functools
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import parallel
from medfuse_jax import run as run_lib
from medfuse_jax.data import dataset, folds
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.paper.trainings import Training

_STEPS = 5  # timed, after one that compiles
_FROZEN = 1 / 3  # of an encoder's cost: its forward pass alone


def seconds(trainings: list[Training], config_of: Callable[[Training], ConfigDict], trials: int) -> tuple[float, str]:
    """Return an upper bound of the seconds of all trainings, one after another, and what it rests on, in words.

    config_of: the config of a training, with any learning rate. Early stopping, trials side by side and several devices
    make it shorter; evaluation is not in it.
    """
    ehr_s, image_s = _measure(config_of, next(t.task for t in trainings if t.task != "radiology"))
    total_s = 0.0
    for training in trainings:
        config = config_of(training)
        reads_ehr = config.method != "uni_cxr"
        trained = _FROZEN if config.method == "early" else 1.0
        shares = training.values or (1.0,)
        epochs = config.num_epochs * training.num_runs(trials) // len(shares)  # of each share
        for share in shares:
            steps, images = _sizes(config, share)
            total_s += epochs * steps * trained * (reads_ehr * ehr_s + images * image_s)
    what = f"{1000 * ehr_s:.0f} ms for the series of a batch and {1000 * image_s:.0f} ms for an X-ray, measured here"
    return total_s, what


def _sizes(config: ConfigDict, share: float) -> tuple[int, float]:
    """Return the steps of an epoch, and the slots for X-rays of a mean step. share: of the EHR-only stays."""
    (num_all, num_paired), size = _num_records(config.data.dir, config.task, folds.of_config(config)), config.batch_size
    if config.method == "uni_cxr" or config.data.train_stays == "paired":
        return math.ceil(num_paired / size), size
    num_stays = num_paired + round(share * (num_all - num_paired))
    steps = math.ceil(num_stays / size)
    slots = 0 if config.method == "uni_ehr" else plan_lib.images_per_batch(num_paired, num_stays, size)
    # Batches of X-rays alternate with unified's batches of stays.
    return (2 * steps, (slots + size) / 2) if config.method == "unified" else (steps, slots)


@functools.cache
def _num_records(data_dir: str, task: str, fold: folds.Fold | None) -> tuple[int, int]:
    """Return how many training records there are, and how many have an X-ray."""
    has_cxr_N = dataset.indices(data_dir, task, fold)["train"]["has_cxr"]
    return len(has_cxr_N), int(has_cxr_N.sum())


def _measure(config_of: Callable[[Training], ConfigDict], task: str) -> tuple[float, float]:
    """Return the seconds of a step on a batch's series, and those that each X-ray slot adds."""
    series = Training("", task, "", {"method": "uni_ehr"}, rate=1e-4)
    fused = Training("", task, "", {"method": "joint", "encoders": "random"}, rate=1e-4)
    ehr_s, _ = _step_s(config_of(series))
    fused_s, slots = _step_s(config_of(fused))
    return ehr_s, max(fused_s - ehr_s, 0.0) / max(slots, 1)


def _step_s(config: ConfigDict) -> tuple[float, int]:
    """Return the median seconds of a training step, and the batch's slots for X-rays."""
    run = run_lib.open_run(config)
    state = parallel.replicate(run.fresh_state(), run.devices)
    train_fn = parallel.compile_train(run.options, config.parallel, run.devices)
    batch = next(run.batches("train", run.train_plan(1)))
    key = parallel.replicate(jax.random.key(0), run.devices)
    taken_s = []
    for _ in range(_STEPS + 1):
        start_s = time.perf_counter()
        state, metrics = train_fn(state, batch, key)
        jax.block_until_ready(metrics)
        taken_s.append(time.perf_counter() - start_s)
    slots = batch["image"].shape[0] * batch["image"].shape[1] if "image" in batch else 0
    return float(np.median(taken_s[1:])), slots
