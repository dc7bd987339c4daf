"""A run: an opened config, with its dataset, model, optimiser and devices.

Shapes: N records of a split.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from medfuse_jax import augment, losses, optim, parallel, records, schema
from medfuse_jax import config as config_lib
from medfuse_jax import step as step_lib
from medfuse_jax.config import ConfigDict
from medfuse_jax.data import batches, cxr_features, folds, missing
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.dataset import CXR_LABEL, Dataset, open_dataset, with_cxr_dataset
from medfuse_jax.data.modalities import loading
from medfuse_jax.models import precision, registry, resnet
from medfuse_jax.models.model import Model
from medfuse_jax.models.recurrence import supported
from medfuse_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, as training and evaluation need it. held: the splits in the devices' memory (feed.Held), by name."""

    config: ConfigDict
    dataset: Dataset
    options: step_lib.StepOptions
    devices: list[jax.Device]
    held: dict = dataclasses.field(default_factory=dict)

    def selects(self, split: str) -> np.ndarray:
        """Return bool [N]: the records of train or val that the run uses, by config.data.<split>_stays."""
        include_N = self.dataset.usable(split)
        if self.config.data[f"{split}_stays"] == "paired":
            has_stay_N = (self.dataset.index[split]["length"] > 0) | self.dataset.task.cxr_only
            include_N = include_N & self.dataset.index[split]["has_cxr"] & has_stay_N
        return include_N

    @property
    def selected_by_loss(self) -> bool:
        """Whether the validation loss selects the model, because no label of the validation stays has both classes."""
        label_NK = self.dataset.labels_of("val", self.selects("val"))
        return bool((label_NK == label_NK[:1]).all())

    def train_plan(self, epoch: int) -> plan_lib.Plan | plan_lib.Alternating:
        """Return the training batches of one epoch, alternating with batches of X-rays if there is a cxr_dataset."""
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
            packing=self.dataset.packing("train"),
            **drawn,
        )
        cxr = self.dataset.cxr_dataset
        if cxr is None:
            return stays
        of_cxr = (cxr.lengths("train"), cxr.paired("train"), cxr.usable("train"))
        return plan_lib.alternate(stays, plan_lib.train_plan(*of_cxr, buckets=cxr.buckets, **drawn))

    def profiled_steps(self) -> tuple[int, int]:
        """Return the first and last step to profile, or (0, 0) for none; raise UserError if the run has fewer steps."""
        config = self.config
        first, last = config_lib.parse_profile_steps(config)
        if last and last > (num_steps := len(self.train_plan(epoch=1)) * config.num_epochs):
            what = f"config.profile_steps is {config.profile_steps}, and {config.name} has {num_steps} steps"
            raise UserError(what, field="config.profile_steps", value=config.profile_steps)
        return first, last

    def eval_plans(self, split: str, include_N: np.ndarray) -> list[plan_lib.Plan]:
        """Return batches that hold every included record of a split once; raise UserError if there is none."""
        self.check_any(split, include_N)
        return plan_lib.eval_plans(
            self.dataset.lengths(split),
            self.dataset.paired(split),
            include_N,
            batch_size=self.config.eval.batch_size,
            buckets=self.dataset.buckets,
            packing=self.dataset.packing(split),
        )

    def check_any(self, split: str, include_N: np.ndarray) -> None:
        """Raise UserError if no record of the split is included."""
        if not include_N.any():
            field = "" if split == "test" else f"config.data.{split}_stays"
            choice = f"{field}={self.config.data[f'{split}_stays']}, " if field else ""
            path = Path(self.config.data.dir) / self.config.task
            raise UserError(
                f"the {split} split of {path} has no record that the run uses ({choice}method {self.config.method})",
                field=field,
                path=path,
            )

    def batches(self, split: str, plan: plan_lib.Plan | plan_lib.Alternating, start: int = 0) -> Iterator[dict]:
        """Return the plan's batches from step `start` on: gathered on the devices, or sent to them ahead of use."""
        if split in self.held:
            return self.held[split].batches(plan, start)
        part, readers = parallel.own_part(self.devices), self.config.data.readers
        layout = {"num_devices": len(self.devices), "part": part, "readers": readers}
        return parallel.prefetch(batches.batches(self.dataset, split, plan, start=start, **layout), self.devices)

    def fresh_state(self) -> step_lib.TrainState:
        """Return a newly initialised state, by the config's seed."""
        return next(self.fresh_states([self.config.seed]))

    def fresh_states(self, seeds: list[int]) -> Iterator[step_lib.TrainState]:
        """Yield a newly initialised state per seed, all from one compiled program."""
        make = self.state_maker(run_once=True)
        for seed in seeds:
            # rbg: jax's default generator is compiled once per parameter, which takes 30 s for a ResNet on a CPU.
            yield make(jax.random.key(seed, impl="rbg"), self.config.learning_rate)

    def state_maker(self, run_once: bool = False) -> Callable[[jax.Array, float], step_lib.TrainState]:
        """Return (key, learning rate) -> a newly initialised state. run_once: see `step.state_maker`."""
        shapes = tuple((name, (1, *of["train"].shape[1:])) for name, of in self.dataset.extra.items())
        return step_lib.state_maker(self.options, shapes, run_once)

    def abstract_state(self) -> step_lib.TrainState:
        """Return the shapes and types of a state, without computing one."""
        return jax.eval_shape(self.state_maker(), jax.random.key(0, impl="rbg"), 0.0)


def open_run(config: ConfigDict, on: list[jax.Device] | None = None) -> Run:
    """Open a validated config; raise UserError if its data or the devices do not fit it.

    on: the devices to divide each batch over; default: all of this process.
    """
    on = on or parallel.devices()
    config_lib.check_devices(config, len(on))
    modalities = loading.load(config.model.modalities)
    dataset = _open_dataset(config, modalities)
    run = Run(config, dataset, step_options(config, dataset, modalities, on), on)
    _check_batches(run)
    return run


def step_options(
    config: ConfigDict, dataset: Dataset, modalities: tuple[loading.Modality, ...], on: list[jax.Device]
) -> step_lib.StepOptions:
    """Return what a run's steps are compiled for on these devices, or on devices of this kind."""
    return step_lib.StepOptions(
        model=_build_model(config, dataset, modalities, on),
        optimizer=optim.adam(config.beta2),
        image=augment.ImageOptions(**config.image.to_dict()),
        weights=losses.Weights(**config.loss.to_dict(), mean_hours=dataset.mean_hours),
        mean_F=tuple(dataset.mean_F.tolist()),
        std_F=tuple(dataset.std_F.tolist()),
        exclusive=dataset.task.exclusive,
    )


def open_data(config: ConfigDict, **options) -> Dataset:
    """Open what a config's method reads of its shards. options: of `open_dataset`."""
    method, data = registry.METHODS[config.method].model_class, config.data
    return open_dataset(
        data.dir,
        config.task,
        use_ehr=method.uses_ehr,
        use_cxr=method.uses_cxr,
        needs=method.needs,
        max_buckets=data.max_buckets,
        images=data.images,
        fold=folds.of_config(config),
        **options,
    )


def _open_dataset(config: ConfigDict, modalities: tuple[loading.Modality, ...]) -> Dataset:
    method = registry.METHODS[config.method].model_class
    features = cxr_features.read(config.data.cxr_features) if config_lib.reads_features(config) else None
    dataset = open_data(config, statistics=config.data.statistics, modalities=modalities, features=features)
    if method.uses_ehr and dataset.task.cxr_only:
        raise UserError(
            f"config.method is {config.method!r}, which reads EHR; the task {config.task!r} has none: use 'uni_cxr'",
            field="config.method",
            value=config.method,
            nearest="uni_cxr",
        )
    dataset = missing.drop_modalities(dataset, config.data.drop_ehr, config.data.drop_cxr)
    for modality in modalities:
        loading.check_encoder(modality, dataset.extra[modality.name]["train"], config.model.ehr_hidden)
    if any(config.loss[head.weight] for head in method.heads if head.label == CXR_LABEL):
        dataset = with_cxr_dataset(dataset, config.data.dir, config.data.cxr_task, folds.of_config(config), features)
    return dataset


def _build_model(
    config: ConfigDict, dataset: Dataset, modalities: tuple[loading.Modality, ...], on: list[jax.Device]
) -> Model:
    options = {
        "missing": config.model.missing_cxr,
        "frozen_encoders": config.model.freeze_encoders,
        "modalities": modalities,
        "all_images": config.data.images == records.ALL_IMAGES,
    }
    options = {name: value for name, value in options.items() if value}  # otherwise the method's own defaults apply
    if any(head.label == CXR_LABEL for head in registry.METHODS[config.method].model_class.heads):
        options["num_cxr_labels"] = len(schema.TASKS[config.data.cxr_task].labels)
    return registry.build(
        config.method,
        len(dataset.labels),
        ehr_hidden=config.model.ehr_hidden,
        fusion_hidden=config.model.fusion_hidden,
        dropout=config.model.dropout,
        ehr_kind=config.model.ehr_encoder,
        cxr_kind=config.model.cxr_encoder,
        given_features=len(dataset.cxr_statistics.mean_E) if dataset.cxr_statistics else 0,
        resnet_stage_sizes=tuple(config.model.resnet_stage_sizes),
        resnet_width=config.model.resnet_width,
        frozen_stats=config.model.batch_norm == "frozen",
        dtype=precision.compute_dtype(config.precision, on[0].platform),
        recurrence=supported.choose(config, on),
        ops=resnet.ops_for(on[0].platform),
        **options,
    )


def _check_batches(run: Run) -> None:
    """Raise UserError if the records cannot fill batches as the config says."""
    config = run.config
    for split in ("train", "val"):
        run.check_any(split, run.selects(split))
    if run.dataset.cxr_dataset:
        what = f"the X-ray classifier (config.data.cxr_task={config.data.cxr_task})"
        check_unseen(run, what, run.dataset.cxr_dataset.index["train"]["subject_id"])
    include_N, paired_N = run.selects("train"), run.dataset.paired("train")
    if (include_N & paired_N).any() and (include_N & ~paired_N).any():
        if config.batch_size < 2:
            what = "config.batch_size is 1; stays with and without an X-ray need a batch of at least 2"
            raise UserError(what, field="config.batch_size", value=1)
        if config.images_per_batch == config.batch_size:
            raise UserError(
                f"config.images_per_batch is {config.images_per_batch}, the whole batch, which leaves no row for stays "
                "without an X-ray: use fewer, or config.data.train_stays=paired",
                field="config.images_per_batch",
                value=config.images_per_batch,
            )
    # Checked last, because planning an epoch takes a while.
    if config.data.ehr_only_ratio < 1 and not len(run.train_plan(epoch=1)):
        raise UserError(
            f"config.data.ehr_only_ratio is {config.data.ehr_only_ratio}, which leaves no record of "
            f"{config.data.dir}/{config.task} to train {config.method} on: use a larger fraction",
            field="config.data.ehr_only_ratio",
            value=config.data.ehr_only_ratio,
        )


def check_unseen(run: Run, what: str, seen_N: np.ndarray) -> None:
    """Raise UserError if `what` was trained on patients (ids seen_N) of the run's val or test split."""
    held_out = np.concatenate([run.dataset.index[split]["subject_id"] for split in ("val", "test")])
    if leaked := len(np.intersect1d(held_out, seen_N)):
        raise UserError(
            f"{what} was trained on {leaked} patients of the val and test splits of {run.config.data.dir}/"
            f"{run.config.task}: build both tasks with the same --seed, or the same --val_ids and --test_ids, and "
            "train on the same config.data.fold of the same config.data.folds",
            path=run.config.data.dir,
        )
