"""Scores every stay of a split once, and says how well: `python -m medfuse_jax.evaluate --workdir=DIR`.

Shapes: M models, N scored records, K labels, D devices, B rows a device.
"""

import dataclasses
import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from absl import flags

from medfuse_jax import config as config_lib
from medfuse_jax import experiment as experiment_lib
from medfuse_jax import metrics, parallel, records, schema
from medfuse_jax import step as step_lib
from medfuse_jax.data import missing
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.data.modalities import loading
from medfuse_jax.report import terminal
from medfuse_jax.runs import attention_weights, checkpoints
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime import command_line, compilation, files
from medfuse_jax.runtime.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Scores of the included records of a split, in record order; loss: the mean over them."""

    record_N: np.ndarray
    score_NK: np.ndarray
    label_NK: np.ndarray
    loss: float


def predict(
    run: experiment_lib.Experiment, eval_fn: Callable, state: step_lib.TrainState, split: str, include_N: np.ndarray
) -> Predictions:
    """Scores every included record exactly once; UserError where there is none."""

    def as_the_only_one(batch):
        return jax.tree.map(lambda x: x[None], eval_fn(state, batch))

    return predict_each(run, as_the_only_one, 1, split, include_N)[0]


def predict_each(
    run: experiment_lib.Experiment, eval_fn: Callable, num_models: int, split: str, include_N: np.ndarray
) -> list[Predictions]:
    """What `predict` does for several models at once, each batch read once.

    eval_fn: batch -> (scores [M, D, B, K], loss of each row [M, D, B]) of M models.
    """
    dataset = run.dataset
    plans = run.eval_plans(split, include_N)
    score_MNK = np.full((num_models, len(include_N), len(dataset.labels)), np.nan, np.float32)
    loss_MN = np.full((num_models, len(include_N)), np.nan)
    for plan in plans:
        waiting = None
        for batch in run.batches(split, plan):
            dispatched = (batch["record"], *eval_fn(batch))
            if waiting:  # fetched while the next batch runs
                _store(*waiting, score_MNK, loss_MN)
            waiting = dispatched
        _store(*waiting, score_MNK, loss_MN)
    record_N = np.flatnonzero(include_N)
    label_NK = dataset.index[split]["label"][record_N]
    predictions = []
    for score_NK, loss_N in zip(score_MNK, loss_MN):
        scored = np.array_equal(record_N, np.flatnonzero(~np.isnan(loss_N)))
        assert scored or not np.isfinite(score_NK[record_N]).all()
        predictions.append(Predictions(record_N, score_NK[record_N], label_NK, float(loss_N[record_N].mean())))
    return predictions


def _store(record_DB, score_MDBK, loss_MDB, score_MNK: np.ndarray, loss_MN: np.ndarray) -> None:
    record_R = np.asarray(record_DB).reshape(-1)
    real_R = record_R != plan_lib.PADDING
    num_models, num_labels = len(score_MNK), score_MNK.shape[-1]
    score_MRK = np.asarray(score_MDBK).reshape(num_models, len(record_R), num_labels)
    score_MNK[:, record_R[real_R]] = score_MRK[:, real_R]
    loss_MN[:, record_R[real_R]] = np.asarray(loss_MDB).reshape(num_models, -1)[:, real_R]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What of a run is scored, and with that the names of the files that say how well.

    head: one of the model's classifiers beside the main one, such as 'ehr_only', on the stays that it can score.
    drop_ehr, drop_cxr: the part of the stays with both that is scored without the one (withheld.py).
    """

    split: str = "test"
    head: str = ""
    drop_ehr: float = 0.0
    drop_cxr: float = 0.0

    @property
    def dropped(self) -> dict[str, float]:
        return {name: part for name, part in (("ehr", self.drop_ehr), ("cxr", self.drop_cxr)) if part}

    def predictions_path(self, workdir: Path) -> Path:
        """predictions_test.npz, predictions_val_joint_drop_cxr_0.5.npz or the like."""
        return workdir / f"predictions_{'_'.join([self.split, *self._beside()])}.npz"

    def result_path(self, workdir: Path) -> Path:
        """result.json for the test split itself; result_val_joint_drop_cxr_0.5.json or the like else."""
        name = "" if self == Scored() else "_" + "_".join([self.split, *self._beside()])
        return workdir / f"result{name}.json"

    def _beside(self) -> list[str]:
        return [self.head] * bool(self.head) + [f"drop_{name}_{part:g}" for name, part in self.dropped.items()]


def evaluate(workdir: Path, what: Scored = Scored(), on: list[jax.Device] | None = None, data_dir: str = "") -> dict:
    """Evaluates a run's best checkpoint on one split, and returns the result.

    Writes predictions_<split>.npz (stay_id, scores, labels, has_ehr, has_cxr, age; had_ehr and had_cxr where
    a modality was dropped; with attention its weights) and result.json (for test; result_<split>.json else),
    under the names that `what` gives them, both stamped with the checkpoint's step. on: the devices, by
    default all of this process. data_dir: where the run's shards were moved.
    """
    check_choice("--split", what.split, schema.SPLITS)
    run = workdir_lib.open_run(workdir, on, data_dir)
    run = dataclasses.replace(run, dataset=missing.drop_modalities(run.dataset, what.drop_ehr, what.drop_cxr))
    state, progress = checkpoints.restore_best_with_progress(workdir, run.abstract_state())
    imported = checkpoints.imported(workdir)
    if imported and not set(state.params) <= set(imported["modules"]):
        raise UserError(
            f"{workdir} holds imported weights of the {' and '.join(imported['modules'])} alone, which score nothing: "
            f"start a run from them, with --config.init.cxr={workdir}"
        )
    include_N = run.dataset.usable(what.split)
    if what.head:
        run, include_N = _for_head(run, what)
    scored, weights, loss = _score(run, state, what.split, include_N)
    config = run.config
    result = {
        **_described(run, what),
        "num_params": experiment_lib.num_params(state),
        "step": int(state.step),
        "best_epoch": progress.best_epoch,
        "selected_by": _selected_by(config, imported, progress.best_epoch),
        "loss": loss,
        "num_left_out": int((~include_N).sum()),  # records of the split that the method, or the head, cannot score
        "subsets": subsets(scored, config.eval.num_bootstrap, config.seed),
        "comparisons": [] if what.dropped else _against_pretraining(config, workdir, what.split, scored),
        "environment": environment(run.devices),
    }
    save(workdir, what, scored | weights, result)
    return result


def _score(
    run: experiment_lib.Experiment, state: step_lib.TrainState, split: str, include_N: np.ndarray
) -> tuple[dict, dict, float]:
    """(what is known of the included stays and their scores, what attention weighed, the mean loss)."""
    state = parallel.replicate(state, run.devices)
    eval_fn = parallel.compile_eval(run.options, run.config.parallel, run.devices)
    predictions = predict(run, eval_fn, state, split, include_N)
    part = {name: values[predictions.record_N] for name, values in run.dataset.index[split].items()}
    scored = {"stay_id": part["stay_id"], "scores": predictions.score_NK, "labels": predictions.label_NK}
    scored |= {"has_ehr": part["length"] > 0, "has_cxr": part["has_cxr"], "age": part["age"]}
    scored |= {name: part[name] for name in ("had_ehr", "had_cxr") if name in part}
    return scored, attention_weights.collect(run, state, split, include_N), predictions.loss


def _described(run: experiment_lib.Experiment, what: Scored) -> dict:
    """What a result says of the run and of what was scored, before any score."""
    config = run.config
    further = loading.listed(config.model.modalities)
    return {
        "name": config.name,
        "task": config.task,
        "method": config.method,
        **({"modalities": further} if further else {}),
        **({"head": what.head} if what.head else {}),
        **({"dropped": what.dropped} if what.dropped else {}),
        "split": what.split,
        "seed": config.seed,
        "data": _describe_data(config),
        "labels": list(run.dataset.labels),
    }


def _for_head(run: experiment_lib.Experiment, what: Scored) -> tuple[experiment_lib.Experiment, np.ndarray]:
    """The run with another classifier of its model scored, and which records that can score."""
    heads = {h.logits.removesuffix("_logits"): h for h in run.options.model.heads if h.label == "label"}
    heads.pop("logits", None)
    if not heads:
        raise UserError(
            f"the method {run.config.method!r} has one classifier, and none is called {what.head!r}: leave it out"
        )
    check_choice("--head", what.head, heads)
    options = dataclasses.replace(run.options, head=heads[what.head].logits)
    dataset = dataclasses.replace(run.dataset, needs=heads[what.head].needs)
    return dataclasses.replace(run, options=options, dataset=dataset), dataset.usable(what.split)


def save(workdir: Path, what: Scored, scored: dict, result: dict) -> None:
    """Writes predictions and their result to the workdir, under their names.

    Where the result has a step, the predictions get it too: a kill between the two files leaves two steps.
    """
    stamp = {"step": result["step"]} if "step" in result else {}
    with files.written_whole(what.predictions_path(workdir)) as unfinished:
        np.savez(unfinished, **scored, **stamp)
    files.write_text(what.result_path(workdir), json.dumps(metrics.to_json(result), indent=1) + "\n")


def subsets(scored: dict, num_bootstrap: int, seed: int) -> dict:
    """Metrics with bounds of all that is scored, and of its parts by modality."""
    results = {}
    for name, include_N in _masks(scored).items():
        label_NK, score_NK = scored["labels"][include_N], scored["scores"][include_N]
        results[name] = metrics.evaluate(label_NK, score_NK, num_bootstrap, seed)
        results[name]["num_samples"] = int(include_N.sum())
    return results


def compare(scored: dict, other: dict, against: str, num_bootstrap: int, seed: int) -> list[dict]:
    """Differences to another run on the stays that both score, the same resamples. against: what it is called."""
    _, mine, theirs = np.intersect1d(scored["stay_id"], other["stay_id"], assume_unique=True, return_indices=True)
    if not len(mine):
        return []
    order = np.argsort(mine)  # the order of the records: that of the bounds beside these
    mine, theirs = mine[order], theirs[order]
    common = {name: values[mine] for name, values in scored.items()}
    other_NK = other["scores"][theirs]
    comparisons = []
    for name, include_N in _masks(common).items():
        label_NK, score_NK = common["labels"][include_N], common["scores"][include_N]
        difference = metrics.compare(label_NK, other_NK[include_N], score_NK, num_bootstrap, seed)
        comparisons.append({"against": against, "subset": name, **difference})
    return comparisons


def _against_pretraining(config, workdir: Path, split: str, scored: dict) -> list[dict]:
    """This run against the pre-training run of the same task."""
    comparisons = []
    for stage in config.pretrain:
        staged = config_lib.stage(config, stage)
        path = Scored(split).predictions_path(workdir / f"pretrain_{stage}")
        if not path.exists() or staged.task != config.task:
            continue
        try:
            with np.load(path) as stored:
                other = {"stay_id": stored["stay_id"], "scores": stored["scores"]}
        except files.DAMAGED_NPZ as error:
            raise UserError(f"{path} cannot be read ({error}): run medfuse_jax.evaluate there again") from None
        comparisons += compare(scored, other, staged.method, config.eval.num_bootstrap, config.seed)
    return comparisons


def _masks(scored: dict) -> dict[str, np.ndarray]:
    """The subsets that a result is given for, those that hold any record; of a task of X-rays there is but one.

    had_both: the stays with both before a modality of some was dropped (Hayat et al. 2022, Figure A2).
    """
    has_cxr_N, has_ehr_N = scored["has_cxr"], scored["has_ehr"]
    had_cxr_N, had_ehr_N = scored.get("had_cxr", has_cxr_N), scored.get("had_ehr", has_ehr_N)
    masks = {"all": np.ones_like(has_cxr_N)}
    if not had_ehr_N.any():
        return masks
    masks |= {"paired": has_cxr_N & has_ehr_N, "unpaired": ~has_cxr_N, "cxr_only": has_cxr_N & ~has_ehr_N}
    if "had_cxr" in scored:
        masks["had_both"] = had_cxr_N & had_ehr_N
    return {name: mask for name, mask in masks.items() if mask.any()}


def _selected_by(config, imported: dict, best_epoch: int) -> str:
    if imported:
        return f"imported from {imported['file']}"
    if not best_epoch:
        return "not selected: its first epoch is not validated yet"
    which = "all" if config.data.val_stays == "partial" else "the paired"
    return f"AUROC on {which} validation {schema.TASKS[config.task].unit}"


def _describe_data(config) -> dict:
    manifest = records.manifest(config.data.dir, config.task)
    return {
        "dir": config.data.dir,
        "profile": manifest.get("profile"),
        "timestep_h": manifest.get("timestep_h"),
        "synthetic": bool(manifest.get("synthetic", False)),
    }


def environment(on: list[jax.Device]) -> dict:
    packages = ("medfuse_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "devices": f"{len(on)} x {on[0].device_kind}",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "not installed"


def main(argv: list[str]) -> None:
    workdir = Path(flags.FLAGS.workdir)
    compilation.keep()
    given = flags.FLAGS
    what = Scored(given.split, given.head, given.drop_ehr, given.drop_cxr)
    result = evaluate(workdir, what, data_dir=given.data_dir)
    print(terminal.table([result]))
    print(f"\nwritten: {what.result_path(workdir)}, {what.predictions_path(workdir)}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
    flags.DEFINE_string("split", "test", "train, val or test.")
    flags.DEFINE_string("head", "", "Another classifier of the model, such as ehr_only; by default the main one.")
    flags.DEFINE_string("data_dir", "", "Where the run's shards are, if they were moved; it is kept.")
    flags.DEFINE_float("drop_ehr", 0.0, "Fraction of the stays with EHR and X-ray to score without their EHR.")
    flags.DEFINE_float("drop_cxr", 0.0, "Fraction of the stays with EHR and X-ray to score without their X-ray.")
    command_line.run(main)
