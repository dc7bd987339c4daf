"""Heads on frozen encoders: the encoders run once over the data, then every trial is a small head on their features.

Shapes: N records, D EHR features, J X-rays, E X-ray features, B rows, P X-rays of a batch.

An X-ray is encoded once, so it cannot be augmented anew each epoch: the trials' configs say that augmentation is
off, and `medfuse_jax.main` with such a config gives the same numbers.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import experiment as experiment_lib
from medfuse_jax import parallel
from medfuse_jax import step as step_lib
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.models.model import products
from medfuse_jax.runs import checkpoints, warm_start
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import trial_store

_ENCODERS = ("ehr_encoder", "cxr_encoder")
# Their heads read nothing of an encoder but its features. medfuse_attention reads all hours of a stay, and unified's
# classifier of X-rays other X-rays; the rest cannot freeze their encoders.
_OF_FEATURES = ("early", "joint", "joint_zeros", "joint_learnable", "medfuse")
# Changing these changes no feature; any other field is taken to.
_WITHOUT_EFFECT = (
    "method",
    "seed",
    "learning_rate",
    "beta2",
    "batch_size",
    "images_per_batch",
    "num_epochs",
    "early_stop_epochs",
    "plateau_epochs",
    "checkpoint_every_steps",
    "data.ehr_only_ratio",
    "model.dropout",
    "model.fusion_hidden",
    "model.freeze_encoders",
    "model.missing_cxr",
)
_NO_AUGMENTATION = {
    "image.flip": False,
    "image.rotation_deg": 0.0,
    "image.scale": (1.0, 1.0),
    "image.translation": 0.0,
    "image.crop": "center",
}


@dataclasses.dataclass(frozen=True)
class Features:
    """What frozen encoders make of one split. image_N: each record's place in cxr_JE, or -1."""

    ehr_ND: np.ndarray
    cxr_JE: np.ndarray
    image_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class HeadExperiment(experiment_lib.Experiment):
    """An experiment whose batches hold features in place of stays and X-rays."""

    features: dict[str, Features] = dataclasses.field(default_factory=dict)

    def batches(self, split: str, plan: plan_lib.Plan, start: int = 0) -> Iterator[dict]:
        """As Experiment.batches, with `ehr_features` [D, B, D] and `cxr_features` [D, P, E]."""
        return parallel.prefetch((self._batch(split, plan, i) for i in range(start, len(plan))), self.devices)

    def _batch(self, split: str, plan: plan_lib.Plan, step: int) -> dict[str, np.ndarray]:
        part, features = self.dataset.index[split], self.features[split]
        rows_1B, image_row_1P = plan_lib.deal(plan, step, num_devices=1)
        valid_1B = rows_1B != plan_lib.PADDING
        safe_1B = np.where(valid_1B, rows_1B, 0)
        batch = {
            "label": (part["label"][safe_1B] * valid_1B[..., None]).astype(np.float32),
            "valid": valid_1B,
            "row_id": np.arange(rows_1B.size, dtype=np.int32)[None],
            "record": rows_1B.astype(np.int32),
            "length": np.where(valid_1B, part["length"][safe_1B], 0).astype(np.int32),
            "ehr_features": features.ehr_ND[safe_1B] * valid_1B[..., None],
        }
        if image_row_1P.shape[1]:
            # An empty slot names the row after the last; its features are cleared by the model.
            record_1P = np.append(safe_1B, 0)[image_row_1P]
            batch["image_row"] = image_row_1P.astype(np.int32)
            batch["cxr_features"] = features.cxr_JE[features.image_N[record_1P]]
        for name, by_split in self.dataset.extra.items():
            batch[f"extra_{name}"] = by_split[split][safe_1B]
            batch[f"extra_{name}"][~valid_1B] = np.nan
        return batch


def can_cache(config: ConfigDict, encoders: dict) -> bool:
    """Whether a config's trials are heads on encoders that all share, of X-rays that stay as they are."""
    is_frozen = config.method in _OF_FEATURES and (config.method == "early" or config.model.freeze_encoders)
    # With an odd margin the centre crop of training lies half a pixel beside evaluation's.
    return is_frozen and set(encoders) == {"ehr", "cxr"} and (config.image.resize_px - config.image.crop_px) % 2 == 0


def check_values(values: dict, config: ConfigDict, encoders: dict) -> None:
    """Raises UserError where a trial tries a way of augmenting X-rays, and its X-rays are encoded once as they are."""
    tried = sorted(values.keys() & _NO_AUGMENTATION.keys())
    if tried and can_cache(config, encoders):
        raise UserError(
            f"{tried[0]} changes nothing where frozen encoders see each X-ray once, without augmentation: leave it out"
        )


def without_augmentation(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(_NO_AUGMENTATION)
    return config


def decides_features(config: ConfigDict) -> str:
    """All of a config that changes what the encoders make of its data."""
    return json.dumps({k: v for k, v in config_lib.flat(config).items() if k not in _WITHOUT_EFFECT}, sort_keys=True)


def with_features(run: experiment_lib.Experiment, features: dict[str, Features]) -> HeadExperiment:
    return HeadExperiment(run.config, run.dataset, run.options, run.devices, features)


def encode(run: experiment_lib.Experiment, encoders: dict) -> dict[str, Features]:
    """What the trained encoders make of the stays that training and validation use, by split."""
    state = warm_start.begin(run.fresh_state(), encoders)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    @jax.jit
    def encode_batch(variables, batch):
        return encode_step(run.options, variables, parallel.merge(batch))

    of_trained = functools.partial(encode_batch, variables)
    return {split: _encode_split(run, of_trained, split) for split in ("train", "val")}


def encode_step(options: step_lib.StepOptions, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array | None]:
    """(stays' features [B, D], X-rays' features [P, E]) of a batch, in the precision that the whole model has."""
    inputs = step_lib.model_inputs(options, batch, key=None)
    with products(options.model.dtype):
        return options.model.apply(variables, inputs, method=_encode)


def _encode(model, inputs: dict) -> tuple[jax.Array, jax.Array | None]:
    """(stays' features [B, D], X-rays' features [P, E]) as the encoders of the model leave them, before dropout."""
    ehr_BD = model.encode_ehr(inputs["ehr"], inputs["length"], False, None)
    cxr_PE = model.cxr_encoder(inputs["image"], False) if "image" in inputs else None
    return ehr_BD, cxr_PE


def _encode_split(run: experiment_lib.Experiment, encode, split: str) -> Features:
    dataset, include_N = run.dataset, run.selects(split)
    has_cxr_N = include_N & dataset.paired(split)
    image_N = np.where(has_cxr_N, np.cumsum(has_cxr_N) - 1, -1)
    model = run.options.model
    ehr_ND = np.zeros((len(include_N), model.ehr_hidden), np.float32)
    cxr_JE = np.zeros((max(1, int(has_cxr_N.sum())), model.num_cxr_features), np.float32)
    for plan in run.eval_plans(split, include_N):
        for batch in run.batches(split, plan):
            ehr_BD, cxr_PE = jax.device_get(encode(batch))
            record_B = np.asarray(batch["record"]).reshape(-1)
            ehr_ND[record_B[record_B != plan_lib.PADDING]] = ehr_BD[record_B != plan_lib.PADDING]
            if cxr_PE is not None:
                row_P = np.asarray(batch["image_row"]).reshape(-1)
                filled_P = row_P < len(record_B)
                cxr_JE[image_N[record_B[row_P[filled_P]]]] = cxr_PE[filled_P]
    return Features(ehr_ND, cxr_JE, image_N)


def fresh_heads(run: experiment_lib.Experiment, seeds: list[int]) -> list[step_lib.TrainState]:
    """The head part of each seed's first state, the very values of the whole model's."""
    make = run.state_maker()

    @jax.jit  # what is not returned is not computed: no encoder is initialised
    def params_of(key):
        return head_only(make(key, 0.0).params)

    states = {}
    for seed in dict.fromkeys(seeds):
        params = params_of(jax.random.key(seed, impl="rbg"))
        opt_state = run.options.optimizer.init(params)
        states[seed] = step_lib.TrainState(jnp.zeros((), jnp.int32), params, {}, opt_state, jnp.float32(0))
    return [states[seed] for seed in seeds]


def head_only(tree: dict) -> dict:
    return {name: part for name, part in tree.items() if name not in _ENCODERS}


def export(config: ConfigDict, workdir: Path, encoders: dict) -> None:
    """Writes the best state of a trial kept in a file as a checkpoint that `medfuse_jax.evaluate` and `main` read."""
    run, keeper = experiment_lib.open_experiment(config, jax.local_devices()[:1]), trial_store.FileKeeper(workdir)
    if can_cache(config, encoders):
        head, progress = keeper.best(jax.eval_shape(lambda: fresh_heads(run, [config.seed])[0]))
        state = _with_encoders(head, warm_start.begin(run.fresh_state(), encoders))
    else:
        state, progress = keeper.best(run.abstract_state())
    # The file is what the trial came to: checkpoints are of a start before it, as one process.
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        checkpoints.save(manager, state, progress, is_best=True)


def _with_encoders(head: step_lib.TrainState, whole: step_lib.TrainState) -> step_lib.TrainState:
    # A frozen encoder's gradients, and so Adam's means of them, are zero.
    adam = whole.opt_state._replace(
        count=head.opt_state.count,
        mu={**whole.opt_state.mu, **head.opt_state.mu},
        nu={**whole.opt_state.nu, **head.opt_state.nu},
    )
    return whole.replace(
        step=jnp.asarray(head.step),
        params={**whole.params, **head.params},
        opt_state=adam,
        learning_rate=jnp.asarray(head.learning_rate),
    )
