"""Trials on frozen encoders. The encoders run once over the data, and each trial trains the rest on their features.

Shapes: N records, D EHR features, J X-rays, E X-ray features, B rows, P images per batch.

An image is encoded only once, so it cannot be augmented differently in each epoch. Augmentation is therefore switched
off in the trials' configs, and `medfuse_jax.main` gives the same results with such a config.
"""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import parallel
from medfuse_jax import run as run_lib
from medfuse_jax import step as step_lib
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.models.precision import matmul_precision
from medfuse_jax.runs import checkpoints, warm_start
from medfuse_jax.runtime import compilation
from medfuse_jax.sweep import caching, trial_store

_ENCODERS = ("ehr_encoder", "cxr_encoder")


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of one split. image_N: each record's row in cxr_JE, or -1."""

    ehr_ND: np.ndarray
    cxr_JE: np.ndarray
    image_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class FrozenEncoderRun(run_lib.Run):
    """A run on features, by split: its batches hold no series or images, and its states no encoders."""

    features: dict[str, Features] = dataclasses.field(default_factory=dict)

    def batches(self, split: str, plan: plan_lib.Plan, start: int = 0) -> Iterator[dict]:
        """Yield the plan's batches from step `start` on, with `ehr_features` [1, B, D] and `cxr_features` [1, P, E]."""
        return parallel.prefetch((self._batch(split, plan, i) for i in range(start, len(plan))), self.devices)

    def _batch(self, split: str, plan: plan_lib.Plan, step: int) -> dict[str, np.ndarray]:
        rows, features = plan_lib.deal(plan, step, num_devices=1), self.features[split]
        batch = batches.assemble(self.dataset.columns(split), rows)
        record_1B = np.maximum(rows["record"], 0)
        batch["ehr_features"] = features.ehr_ND[record_1B] * batch["valid"][..., None]
        if "image_row" in rows:
            image_1P = features.image_N[record_1B[0, rows["image_row"]]]
            batch["cxr_features"] = features.cxr_JE[image_1P] * rows["image_mask"][..., None]
        return batch

    def fresh_states(self, seeds: list[int]) -> Iterator[step_lib.TrainState]:
        """Yield one state per seed: the whole model's, without the encoders."""
        make = self.state_maker()

        def draw(key):
            return _without_encoders(make(key, 0.0).params)

        # XLA removes the encoders' initialisation, since nothing reads it.
        init = jax.jit(draw, compiler_options=compilation.RUN_ONCE)
        for seed in seeds:
            params = init(jax.random.key(seed, impl="rbg"))
            opt_state = self.options.optimizer.init(params)
            yield step_lib.TrainState(jnp.zeros((), jnp.int32), params, {}, opt_state, jnp.float32(0))

    def abstract_state(self) -> step_lib.TrainState:
        """Return the shapes and types of a state without the encoders."""
        whole = super().abstract_state()
        params = _without_encoders(whole.params)
        opt_state = jax.eval_shape(self.options.optimizer.init, params)
        return whole.replace(params=params, batch_stats={}, opt_state=opt_state)


def _without_encoders(params: dict) -> dict:
    return {name: part for name, part in params.items() if name not in _ENCODERS}


def with_features(run: run_lib.Run, features: dict[str, Features]) -> FrozenEncoderRun:
    return FrozenEncoderRun(run.config, run.dataset, run.options, run.devices, features=features)


def encode(run: run_lib.Run, encoders: dict) -> dict[str, Features]:
    """Compute the features of the stays that training and validation use, by split."""
    state = warm_start.begin(run.fresh_state(), encoders)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    @jax.jit
    def encode_batch(variables, batch):
        return encode_step(run.options, variables, parallel.one_device(batch))

    encode_fn = functools.partial(encode_batch, variables)
    return {split: _encode_split(run, encode_fn, split) for split in ("train", "val")}


def encode_step(options: step_lib.StepOptions, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array | None]:
    """Compute the features of a batch, stays [B, D] and X-rays [P, E], before dropout, in the model's precision."""
    inputs = step_lib.model_inputs(options, batch, key=None)

    def encode(model):
        ehr_BD = model.ehr_encoder(inputs["ehr"], inputs["length"])
        return ehr_BD, model.cxr_encoder(inputs["image"], False) if "image" in inputs else None

    with matmul_precision(options.model.dtype):
        return options.model.apply(variables, method=encode)


def _encode_split(run: run_lib.Run, encode_fn: Callable, split: str) -> Features:
    dataset, include_N = run.dataset, run.selects(split)
    has_cxr_N = include_N & dataset.paired(split)
    image_N = np.where(has_cxr_N, np.cumsum(has_cxr_N) - 1, -1)
    model = run.options.model
    ehr_ND = np.zeros((len(include_N), model.ehr_hidden), np.float32)
    cxr_JE = np.zeros((max(1, int(has_cxr_N.sum())), model.num_cxr_features), np.float32)
    for plan in run.eval_plans(split, include_N):
        for batch in run.batches(split, plan):
            ehr_BD, cxr_PE = jax.device_get(encode_fn(batch))
            record_B = np.asarray(batch["record"]).reshape(-1)
            ehr_ND[record_B[record_B != plan_lib.PADDING]] = ehr_BD[record_B != plan_lib.PADDING]
            if cxr_PE is not None:
                row_P, mask_P = (np.asarray(batch[name]).reshape(-1) for name in ("image_row", "image_mask"))
                cxr_JE[image_N[record_B[row_P[mask_P]]]] = cxr_PE[mask_P]
    return Features(ehr_ND, cxr_JE, image_N)


def export(config: ConfigDict, workdir: Path, encoders: dict) -> None:
    """Write the best state in a trial's state.npz as a checkpoint that `medfuse_jax.evaluate` and `main` read.

    A checkpoint of that state is left as it is: another process may be reading it.
    """
    run, store = run_lib.open_run(config, jax.local_devices()[:1]), trial_store.FileStore(workdir)
    is_part = caching.can_cache(config, encoders)
    state, progress = store.best((with_features(run, {}) if is_part else run).abstract_state())
    if is_part:
        state = _with_encoders(state, warm_start.begin(run.fresh_state(), encoders))
    if checkpoints.is_best(workdir, state, progress):
        return
    # Existing checkpoints come from an earlier export; state.npz may be newer.
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        checkpoints.save(manager, state, progress, is_best=True)


def _with_encoders(state: step_lib.TrainState, whole: step_lib.TrainState) -> step_lib.TrainState:
    """Insert the state of a trial on frozen encoders into a state of the whole model."""
    # The gradients of frozen encoders are zero, and so are Adam's moments.
    opt_state = whole.opt_state._replace(
        count=state.opt_state.count,
        mu={**whole.opt_state.mu, **state.opt_state.mu},
        nu={**whole.opt_state.nu, **state.opt_state.nu},
    )
    return whole.replace(
        step=jnp.asarray(state.step),
        params={**whole.params, **state.params},
        opt_state=opt_state,
        learning_rate=jnp.asarray(state.learning_rate),
    )
