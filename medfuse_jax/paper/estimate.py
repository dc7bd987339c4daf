"""How long a plan takes on this machine, from the time of its own first steps."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import parallel
from medfuse_jax import run as run_lib
from medfuse_jax.data import folds
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.shards import Shards
from medfuse_jax.paper.trainings import Training

_STEPS = 5  # timed, after one that compiles
_FROZEN = 1 / 3  # of an encoder's cost: its forward pass alone
_STARTS = 2  # of a command, in the time until a first step has ended: it also compiles evaluation, scores and reports


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The seconds that a plan takes.

    steps_s: at most, of all training steps, one training after another. start_s: what its commands need besides.
    ehr_s, image_s: of a step, for a batch's series and for each X-ray slot.
    """

    steps_s: float
    start_s: float
    ehr_s: float
    image_s: float


def estimate(trainings: list[Training], config_of: Callable[[Training], ConfigDict], trials: int) -> Estimate:
    """Return how long the trainings take here. Early stopping, trials side by side and several devices shorten it.

    config_of: the config of a training, with any learning rate.
    """
    ehr_s, image_s, first_s = _measure(config_of, next(t.task for t in trainings if t.task != "radiology"))
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
    return Estimate(total_s, _STARTS * first_s * len(trainings), ehr_s, image_s)


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
    has_cxr_N = Shards(data_dir, task, fold).index["train"]["has_cxr"]
    return len(has_cxr_N), int(has_cxr_N.sum())


def _measure(config_of: Callable[[Training], ConfigDict], task: str) -> tuple[float, float, float]:
    """Return the seconds of a step on a batch's series, those that an X-ray slot adds, and those until a first step."""
    series = Training("", task, "", {"method": "uni_ehr"}, rate=1e-4)
    fused = Training("", task, "", {"method": "joint", "encoders": "random"}, rate=1e-4)
    ehr_s, _, _ = _step_s(config_of(series))
    fused_s, slots, first_s = _step_s(config_of(fused))
    return ehr_s, max(fused_s - ehr_s, 0.0) / max(slots, 1), first_s


def _step_s(config: ConfigDict) -> tuple[float, int, float]:
    """Return the median seconds of a training step, the batch's slots for X-rays, and the seconds until the first."""
    begun_s = time.perf_counter()
    run = run_lib.open_run(config)
    state = parallel.replicate(run.fresh_state(), run.devices)
    train_fn = parallel.compile_train(run.options, config.parallel, run.devices)
    batch = next(run.batches("train", run.train_plan(1)))
    key = parallel.replicate(jax.random.key(0), run.devices)
    taken_s, first_s = [], 0.0
    for _ in range(_STEPS + 1):
        start_s = time.perf_counter()
        state, metrics = train_fn(state, batch, key)
        jax.block_until_ready(metrics)
        taken_s.append(time.perf_counter() - start_s)
        first_s = first_s or time.perf_counter() - begun_s
    slots = batch["image"].shape[0] * batch["image"].shape[1] if "image" in batch else 0
    return float(np.median(taken_s[1:])), slots, first_s
