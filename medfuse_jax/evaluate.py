"""Scores every stay of a split once, and says how well: `python -m medfuse_jax.evaluate --workdir=DIR`.

Shapes: N scored records, K labels, D devices, B rows a device.
"""

import dataclasses
import json
import platform
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from absl import flags

from medfuse_jax import checkpoints, errors, files, input_pipeline, metrics, parallel, records, tasks
from medfuse_jax import config as config_lib
from medfuse_jax import experiment as experiment_lib
from medfuse_jax import plan as plan_lib
from medfuse_jax import step as step_lib
from medfuse_jax import workdir as workdir_lib
from medfuse_jax.errors import UserError, check_choice
from medfuse_jax.report import text


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
    dataset = run.dataset
    if not include_N.any():
        raise UserError(
            f"the {split} split of {run.config.data.dir}/{run.config.task} has no stay that the run uses "
            f"(config.data.val_stays={run.config.data.val_stays}, method {run.config.method})"
        )
    plans = plan_lib.eval_plans(
        dataset.lengths(split),
        dataset.paired(split),
        include_N,
        batch_size=run.config.eval.batch_size,
        buckets=dataset.buckets,
    )
    score_NK = np.full((len(include_N), len(dataset.labels)), np.nan, np.float32)
    loss_N = np.full(len(include_N), np.nan)
    for plan in plans:
        waiting = None
        batches = input_pipeline.batches(dataset, split, plan, num_devices=len(run.devices))
        for batch in parallel.prefetch(batches, run.devices):
            dispatched = (batch["record"], *eval_fn(state, batch))
            if waiting:  # fetched while the next batch runs
                _store(*waiting, score_NK, loss_N)
            waiting = dispatched
        _store(*waiting, score_NK, loss_N)
    record_N = np.flatnonzero(include_N)
    assert np.array_equal(record_N, np.flatnonzero(~np.isnan(loss_N))) or not np.isfinite(score_NK[record_N]).all()
    return Predictions(
        record_N, score_NK[record_N], dataset.index[split]["label"][record_N], float(loss_N[record_N].mean())
    )


def _store(record_DB, score_DBK, loss_DB, score_NK: np.ndarray, loss_N: np.ndarray) -> None:
    record_R = np.asarray(record_DB).reshape(-1)
    real_R = record_R != plan_lib.PADDING
    score_NK[record_R[real_R]] = np.asarray(score_DBK).reshape(len(record_R), -1)[real_R]
    loss_N[record_R[real_R]] = np.asarray(loss_DB).reshape(-1)[real_R]


def evaluate(workdir: Path, split: str = "test") -> dict:
    """Evaluates a run's best checkpoint on one split.

    Writes predictions_<split>.npz (stay_id, scores, labels, has_cxr, age) and result.json
    (for test; result_<split>.json else), and returns the result.
    """
    check_choice("--split", split, tasks.SPLITS)
    run = workdir_lib.open_run(workdir)
    config = run.config
    state = checkpoints.restore_best(workdir, run.abstract_state())
    imported = checkpoints.imported(workdir)
    if imported and not set(state.params) <= set(imported["modules"]):
        raise UserError(
            f"{workdir} holds imported weights of the {' and '.join(imported['modules'])} alone, which score nothing: "
            f"start a run from them, with --config.init.cxr={workdir}"
        )
    best_epoch = int(state.step) // len(run.train_plan(epoch=1))
    state = parallel.replicate(state, run.devices)
    eval_fn = parallel.compile_eval(run.options, config.parallel, run.devices)
    predictions = predict(run, eval_fn, state, split, run.dataset.usable(split))

    part = {name: values[predictions.record_N] for name, values in run.dataset.index[split].items()}
    with files.written_whole(workdir / f"predictions_{split}.npz") as unfinished:
        np.savez(
            unfinished,
            stay_id=part["stay_id"],
            scores=predictions.score_NK,
            labels=predictions.label_NK,
            has_cxr=part["has_cxr"],
            age=part["age"],
        )
    result = {
        "name": config.name,
        "task": config.task,
        "method": config.method,
        "split": split,
        "seed": config.seed,
        "num_params": experiment_lib.num_params(state),
        "best_epoch": best_epoch,
        "selected_by": f"imported from {imported['file']}"
        if imported
        else f"AUROC of the {config.data.val_stays} validation stays",
        "data": _describe_data(config),
        "labels": list(run.dataset.labels),
        "loss": predictions.loss,
        "subsets": _subsets(config, part["has_cxr"], predictions),
        "comparisons": _comparisons(config, workdir, split, part["stay_id"], part["has_cxr"], predictions),
        "environment": _environment(run.devices),
    }
    path = workdir / ("result.json" if split == "test" else f"result_{split}.json")
    files.write_text(path, json.dumps(metrics.to_json(result), indent=1) + "\n")
    return result


def _subsets(config, has_cxr_N: np.ndarray, predictions: Predictions) -> dict:
    subsets = {}
    for name, include_N in _masks(has_cxr_N).items():
        label_NK, score_NK = predictions.label_NK[include_N], predictions.score_NK[include_N]
        subsets[name] = metrics.evaluate(label_NK, score_NK, config.eval.num_bootstrap, config.seed)
        subsets[name]["num_samples"] = int(include_N.sum())
    return subsets


def _comparisons(config, workdir: Path, split: str, stay_id_N, has_cxr_N, predictions: Predictions) -> list[dict]:
    """This run against the pre-training run of the same task, on the same stays and resamples."""
    comparisons = []
    for stage in config.pretrain:
        path = workdir / f"pretrain_{stage}" / f"predictions_{split}.npz"
        if not path.exists() or config_lib.stage(config, stage).task != config.task:
            continue
        try:
            with np.load(path) as other:
                other_id_N, other_NK = other["stay_id"], other["scores"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}): run medfuse_jax.evaluate there again") from None
        if not np.array_equal(other_id_N, stay_id_N):
            raise UserError(f"{path} scores other stays than {workdir}: run medfuse_jax.evaluate there again")
        for name, include_N in _masks(has_cxr_N).items():
            difference = metrics.compare(
                predictions.label_NK[include_N],
                other_NK[include_N],
                predictions.score_NK[include_N],
                config.eval.num_bootstrap,
                config.seed,
            )
            comparisons.append({"against": config_lib.stage(config, stage).method, "subset": name, **difference})
    return comparisons


def _masks(has_cxr_N: np.ndarray) -> dict[str, np.ndarray]:
    """The subsets that a result is given for, those that hold any record."""
    masks = {"all": np.ones_like(has_cxr_N)}
    if has_cxr_N.any() and not has_cxr_N.all():
        masks |= {"paired": has_cxr_N, "unpaired": ~has_cxr_N}
    return masks


def _describe_data(config) -> dict:
    manifest = records.manifest(config.data.dir, config.task)
    return {
        "dir": config.data.dir,
        "profile": manifest.get("profile"),
        "timestep_h": manifest.get("timestep_h"),
        "synthetic": bool(manifest.get("synthetic", False)),
    }


def _environment(on: list[jax.Device]) -> dict:
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
    experiment_lib.use_compilation_cache()
    result = evaluate(workdir, flags.FLAGS.split)
    print(text.table([result]))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
    flags.DEFINE_string("split", "test", "train, val or test.")
    errors.run(main)
