"""A config made real: the dataset opened, the model built, the devices chosen."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import augment, losses, optim, parallel, schema
from medfuse_jax import config as config_lib
from medfuse_jax import step as step_lib
from medfuse_jax.data import batches, missing
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import CXR_LABEL, Dataset, open_dataset, with_cxr_dataset
from medfuse_jax.data.modalities import loading
from medfuse_jax.models import registry
from medfuse_jax.models.recurrence import pallas
from medfuse_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training and evaluation both need of a run."""

    config: ConfigDict
    dataset: Dataset
    options: step_lib.StepOptions
    devices: list[jax.Device]

    def selects(self, split: str) -> np.ndarray:
        """Which records of train or val the run uses, by config.data.<split>_stays; bool [N]."""
        include_N = self.dataset.usable(split)
        if self.config.data[f"{split}_stays"] == "paired":
            has_stay_N = (self.dataset.index[split]["length"] > 0) | self.dataset.task.cxr_only
            include_N = include_N & self.dataset.index[split]["has_cxr"] & has_stay_N
        return include_N

    def has_encoder(self, name: str) -> bool:
        """Whether the method has an encoder for 'ehr' or 'cxr'."""
        return {"ehr": self.options.model.uses_ehr, "cxr": self.options.model.uses_cxr}[name]

    def train_plan(self, epoch: int) -> plan_lib.Plan | plan_lib.Alternating:
        """The training batches of one epoch, those of X-rays with their own labels in turn with the stays'."""
        seed = self.config.seed if self.config.data.order_seed < 0 else self.config.data.order_seed
        drawn = {"batch_size": self.config.batch_size, "seed": seed, "epoch": epoch}
        stays = plan_lib.train_plan(
            self.dataset.lengths("train"),
            self.dataset.paired("train"),
            self.selects("train"),
            buckets=self.dataset.buckets,
            num_images=self.config.images_per_batch or None,
            ehr_only_ratio=self.config.data.ehr_only_ratio,
            ehr_only_N=~self.dataset.index["train"]["has_cxr"],
            **drawn,
        )
        cxr = self.dataset.cxr_dataset
        if cxr is None:
            return stays
        of_cxr = (cxr.lengths("train"), cxr.paired("train"), cxr.usable("train"))
        return plan_lib.alternate(stays, plan_lib.train_plan(*of_cxr, buckets=cxr.buckets, **drawn))

    def eval_plans(self, split: str, include_N: np.ndarray) -> list[plan_lib.Plan]:
        """Batches in which every included record of a split stands exactly once; UserError where there is none."""
        self.check_any(split, include_N)
        return plan_lib.eval_plans(
            self.dataset.lengths(split),
            self.dataset.paired(split),
            include_N,
            batch_size=self.config.eval.batch_size,
            buckets=self.dataset.buckets,
        )

    def check_any(self, split: str, include_N: np.ndarray) -> None:
        """Raises UserError where no record of the split is included."""
        if not include_N.any():
            choice = f"config.data.{split}_stays={self.config.data[f'{split}_stays']}, " if split != "test" else ""
            raise UserError(
                f"the {split} split of {self.config.data.dir}/{self.config.task} has no record that the run uses "
                f"({choice}method {self.config.method})"
            )

    def batches(self, split: str, plan: plan_lib.Plan, start: int = 0) -> Iterator[dict]:
        """The plan's batches from step `start` on, on the devices ahead of use."""
        read = batches.batches(self.dataset, split, plan, num_devices=len(self.devices), start=start)
        return parallel.prefetch(read, self.devices)

    def fresh_state(self) -> step_lib.TrainState:
        """A newly initialised state, from the config's seed."""
        return next(self.fresh_states([self.config.seed]))

    def fresh_states(self, seeds: list[int]) -> Iterator[step_lib.TrainState]:
        """A newly initialised state a seed, by one compiled program."""
        make = self.state_maker()
        for seed in seeds:
            # rbg: jax's default generator is compiled anew for every parameter, half a minute for a ResNet on CPU.
            yield make(jax.random.key(seed, impl="rbg"), self.config.learning_rate)

    def state_maker(self) -> Callable[[jax.Array, float], step_lib.TrainState]:
        """(key, learning rate) -> a newly initialised state, by a program compiled once."""
        shapes = tuple((name, (1, *of["train"].shape[1:])) for name, of in self.dataset.extra.items())
        return step_lib.state_maker(self.options, shapes)

    def abstract_state(self) -> step_lib.TrainState:
        """The shapes and types of a state, without computing one."""
        return jax.eval_shape(self.fresh_state)


def open_experiment(config: ConfigDict, on: list[jax.Device] | None = None) -> Experiment:
    """Opens what a validated config names; UserError where data or devices do not fit it.

    on: the devices to divide each batch over, by default all of this process.
    """
    method = registry.METHODS[config.method].model_class
    modalities = loading.load(config.model.modalities)
    dataset = open_dataset(
        config.data.dir,
        config.task,
        use_ehr=method.uses_ehr,
        use_cxr=method.uses_cxr,
        needs=method.needs,
        statistics=config.data.statistics,
        max_buckets=config.data.max_buckets,
        modalities=modalities,
    )
    dataset = missing.drop_modalities(dataset, config.data.drop_ehr, config.data.drop_cxr)
    for modality in modalities:
        loading.check_encoder(modality, dataset.extra[modality.name]["train"], config.model.ehr_hidden)
    cxr_heads = [head for head in method.heads if head.label == CXR_LABEL]
    if any(config.loss[head.weight] for head in cxr_heads):
        dataset = with_cxr_dataset(dataset, config.data.dir, config.data.cxr_task)
    if method.uses_ehr and dataset.task.cxr_only:
        raise UserError(f"the method {config.method!r} reads EHR, and the task {config.task!r} has none: use 'uni_cxr'")
    own = {"num_cxr_labels": len(schema.TASKS[config.data.cxr_task].labels)} if cxr_heads else {}
    if config.model.missing_cxr:
        own["missing"] = config.model.missing_cxr
    if config.model.freeze_encoders:
        own["frozen_encoders"] = True
    if modalities:
        own["modalities"] = modalities
    on = on or parallel.devices()
    config_lib.check_devices(config, len(on))
    options = step_lib.StepOptions(
        model=registry.build(
            config.method,
            len(dataset.labels),
            ehr_hidden=config.model.ehr_hidden,
            fusion_hidden=config.model.fusion_hidden,
            dropout=config.model.dropout,
            resnet_stage_sizes=tuple(config.model.resnet_stage_sizes),
            resnet_width=config.model.resnet_width,
            frozen_stats=config.model.batch_norm == "frozen",
            dtype=_compute_dtype(config.precision),
            recurrence="chunks" if why_in_chunks(config, on) else config.recurrence,
            **own,
        ),
        optimizer=optim.adam(config.beta2),
        image=augment.ImageOptions(**config.image.to_dict()),
        mean_F=tuple(dataset.mean_F.tolist()),
        std_F=tuple(dataset.std_F.tolist()),
        weights=losses.Weights(**config.loss.to_dict()),
    )
    run = Experiment(config, dataset, options, on)
    _check_batches(run)
    return run


def _check_batches(run: Experiment) -> None:
    """Raises UserError where the records do not fill batches of the config's form."""
    config = run.config
    for split in ("train", "val"):
        run.check_any(split, run.selects(split))
    if run.dataset.cxr_dataset:
        what = f"the classifier of X-rays (config.data.cxr_task={config.data.cxr_task})"
        check_unseen(run, what, run.dataset.cxr_dataset.index["train"]["subject_id"])
    include_N, paired_N = run.selects("train"), run.dataset.paired("train")
    if (include_N & paired_N).any() and (include_N & ~paired_N).any():
        if config.batch_size < 2:
            raise UserError("config.batch_size is 1; stays with and without an X-ray need a batch of at least 2")
        if config.images_per_batch == config.batch_size:
            raise UserError(
                f"config.images_per_batch is {config.images_per_batch}, the whole batch, which leaves no row for the "
                "stays without an X-ray: choose fewer, or config.data.train_stays=paired"
            )
    # Only then: a plan takes a while, and a whole one holds what was counted above.
    if config.data.ehr_only_ratio < 1 and not len(run.train_plan(epoch=1)):
        raise UserError(
            f"config.data.ehr_only_ratio is {config.data.ehr_only_ratio}, which leaves no record of "
            f"{config.data.dir}/{config.task} to train {config.method} on: choose a larger part"
        )


def check_unseen(run: Experiment, what: str, seen_N: np.ndarray) -> None:
    """Raises UserError where `what` was trained on patients (ids seen_N) whom the run is validated or tested on."""
    held_out = np.concatenate([run.dataset.index[split]["subject_id"] for split in ("val", "test")])
    if leaked := len(np.intersect1d(held_out, seen_N)):
        raise UserError(
            f"{what} was trained on {leaked} patients of the val and test splits of {run.config.data.dir}/"
            f"{run.config.task}: build both tasks with the same --seed, or the same --val_ids and --test_ids"
        )


def num_params(state: step_lib.TrainState) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.params))


def why_in_chunks(config: ConfigDict, on: list[jax.Device]) -> str:
    """Why these devices do not compute the recurrence as the config says, but in chunks; '' where they do."""
    form, device, units = config.recurrence, on[0], config.model.ehr_hidden
    if form == "chunks":
        return ""
    if device.platform != "gpu":
        return "there is no GPU"
    most = pallas.most_units(device.compute_capability)
    if most == 0:
        return f"a GPU of compute capability {device.compute_capability} does not run it (8.0 at least)"
    if form == "pallas" and units > most:
        return (
            f"a GPU of compute capability {device.compute_capability} has room for {most} units, not for the {units} "
            "of config.model.ehr_hidden"
        )
    if len(on) > 1 and config.parallel == "jit":
        return f"config.parallel=jit cannot divide it over {len(on)} devices, as pmap can"
    return ""


def check_recurrence(run: Experiment) -> None:
    """Raises UserError where a GPU is asked for a form that it cannot run; elsewhere training says what it does."""
    reason = why_in_chunks(run.config, run.devices)
    if reason and run.dataset.use_ehr and run.devices[0].platform == "gpu":
        raise UserError(f"config.recurrence is {run.config.recurrence!r}, and {reason}: take config.recurrence=chunks")


def _compute_dtype(precision: str):
    if precision == "auto":  # bfloat16 gains nothing on CPU
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)
