"""Score stays with a trained run: `python -m medfuse_jax.predict --workdir=DIR --data=SHARDS --out=FILE`.

The run's own shards are not needed: its workdir holds its labels, channels and statistics (runs/inputs.py). The shards
to score may be any build of the run's task with the same time step. A dataset without X-rays can be scored by every
method that does not need them.

Shapes: N scored records, K labels.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, parallel, records, schema
from medfuse_jax import run as run_lib
from medfuse_jax.data import cxr_features as features_lib
from medfuse_jax.data import folds
from medfuse_jax.data.modalities import loading
from medfuse_jax.data.shards import Shards
from medfuse_jax.runs import builds, calibration, inputs
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import command_line, compilation, files
from medfuse_jax.runtime.errors import UserError, check_choice
from medfuse_jax.sweep import results as sweep_results

ALL = "all"
# Columns of a CSV before the labels.
_FACTS = ("split", "stay_id", "subject_id", "dicom_id", "hour", "has_ehr", "has_cxr")


def predict(
    workdir: Path | str,
    data_dir: Path | str,
    split: str = "test",
    devices: list[jax.Device] | None = None,
    cxr_features: Path | str = "",
    calibrated: bool = False,
) -> dict[str, np.ndarray]:
    """Score the records of a dataset with a run's best checkpoint; return arrays in record order.

    workdir: of a run, or of a sweep, which stands for its chosen trial. data_dir: the folder that holds the run's task.
    split: train, val or test, or 'all' for the three after one another. devices: by default all of this process.
    cxr_features: a file with the features of the X-rays that are scored, for a run on precomputed features; by default
    the run's own file. calibrated: whether to scale the scores by the run's temperature (docs/evaluation.md).

    Returns a dict of arrays:
        scores float32 [N, K]: probabilities; label_names str [K]
        stay_id, subject_id int64 [N]; split str [N]; labels int8 [N, K] as in the shards; age float32 [N]
        hour, remaining_h float32 [N], in an hourly task, whose N counts the hours of all stays
        has_ehr, has_cxr bool [N]; dicom_id str [N], for a task on X-rays alone
    Records that the method cannot score, such as stays without an X-ray for uni_cxr, are left out.
    Raises UserError if the shards' labels, channels or time step are not the run's, if no record can be scored, or if
    calibrated scores are asked of a run without a temperature.
    """
    check_choice("--split", split, (*schema.SPLITS, ALL))
    folder = Path(workdir)
    workdir_lib.check_has_weights(folder)
    folder = sweep_results.chosen_dir(folder) if workdir_lib.is_sweep(folder) else folder
    scored = schema.SPLITS if split == ALL else (split,)
    run = _open_run(folder, Path(data_dir), devices or parallel.devices(), scored, cxr_features)
    splits = [s for s in schema.SPLITS if run.dataset.usable(s).any()] if split == ALL else [split]
    if not splits:
        place = Path(data_dir) / run.config.task
        message = f"{place} has no record that the method {run.config.method} can score"
        raise UserError(message, field="--data", path=place)
    state, progress = evaluate.restore(run, folder)
    temperature = _temperature(run, folder, int(state.step), progress) if calibrated else None
    parts = [_score(run, state, s) for s in splits]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if temperature is not None:
        found["scores"] = calibration.scale(found["scores"], temperature).astype(np.float32)
    return found | {"label_names": np.array(run.dataset.labels)}


def _temperature(run: run_lib.Run, workdir: Path, step: int, progress: Progress) -> float:
    """Return the run's temperature; raise UserError if it has none."""
    found = evaluate.temperature(workdir, step, progress)
    if found is not None:
        return found
    if run.dataset.task.exclusive:
        why = f"the labels of {run.config.task} exclude one another: leave --calibrated out"
    else:
        why = f"medfuse_jax.evaluate --workdir={workdir} --split=val fits it, if a label has both classes there"
    raise UserError(f"{workdir} has no temperature: {why}", field="--calibrated", path=workdir)


def _open_run(
    workdir: Path, data_dir: Path, on: list[jax.Device], splits: Sequence[str], cxr_features: Path | str = ""
) -> run_lib.Run:
    """Return the run with other shards and its own statistics. splits: those that are scored."""
    config = config_lib.load(workdir / "config.json")
    config_lib.check_devices(config, len(on))
    expected = inputs.read(workdir)
    modalities = _modalities(config.model.modalities)
    # Of the run's own shards, the run's fold: their own test split holds patients that it was trained on.
    if config.data.folds and expected.get("shards") != records.digest(data_dir, config.task):
        what = (
            f"{data_dir} is not the build that {workdir} was trained on: its own splits are scored, not those of fold "
        )
        what += f"{config.data.fold} of {config.data.folds}; any of them may hold patients that the run was trained on"
        print(f"warning: {what}", flush=True)
        config.data.folds = config.data.fold = 0
    workdir_lib.check_reads_features(workdir, config, cxr_features)
    features = None
    if config_lib.reads_features(config):
        features = _features(config, data_dir, splits, expected["cxr_features"], cxr_features)
    config.data.dir = str(data_dir)
    statistics = (expected["mean"], expected["std"])
    dataset = run_lib.open_data(config, features=features, statistics=statistics, to_train=False)
    inputs.check(expected, dataset, data_dir / config.task)
    _say_of_data(workdir, expected, data_dir, dataset.manifest)
    # What stands for the train split's index: its categories.
    train = {name: np.array(values) for name, values in expected["categories"].items()}
    extra = {m.name: {s: m.table(part, train) for s, part in dataset.index.items()} for m in modalities}
    dataset = dataclasses.replace(dataset, extra=extra)
    return run_lib.Run(config, dataset, run_lib.step_options(config, dataset, modalities, on), on)


def _say_of_data(workdir: Path, expected: dict, data_dir: Path, manifest: dict) -> None:
    """Print what a user of the scores should know of the shards, and of those that the run was trained on."""
    ours, theirs = expected.get("profile"), manifest.get("profile")
    if None not in (ours, theirs) and ours != theirs:
        what = f"{workdir} was trained on values of the profile {ours}, and {data_dir} has those of {theirs}, which "
        print(f"warning: {what}cleans them by other rules (python -m data_prep.build --explain)", flush=True)
    for folder, described in ((workdir, expected), (data_dir, manifest)):
        if note := builds.note(described):
            print(f"{folder}: {note}", flush=True)


def _features(
    config: ConfigDict, data_dir: Path, splits: Sequence[str], statistics: features_lib.Statistics, given: Path | str
) -> features_lib.Table:
    """Return the features in the given file, or in the run's own; read neither if the splits have no X-rays."""
    index = Shards(data_dir, config.task, folds.of_config(config)).index
    if not any(index[split]["has_cxr"].any() for split in splits):
        table = features_lib.nothing(len(statistics.mean_E))
    else:
        table = features_lib.read(given, "--cxr_features") if given else features_lib.read(config.data.cxr_features)
    return dataclasses.replace(table, statistics=statistics, splits=splits)


def _modalities(names: str) -> tuple[loading.Modality, ...]:
    if own := [name for name in loading.listed(names) if name != "static"]:
        message = (
            f"the run reads {own[0]} (config.model.modalities), whose values depend on the run's own shards: "
            "use medfuse_jax.evaluate"
        )
        raise UserError(message, field="--workdir", value=own[0])
    return loading.load(names)


def _score(run: run_lib.Run, state, split: str) -> dict[str, np.ndarray]:
    include_N = run.dataset.usable(split)
    scored, _ = evaluate.score(run, state, split, include_N)
    scored["split"] = np.full(len(scored["scores"]), split)
    if run.dataset.task.cxr_only:
        scored["dicom_id"] = _dicom_ids(run, split, np.flatnonzero(include_N))
    return scored


def _dicom_ids(run: run_lib.Run, split: str, record_N: np.ndarray) -> np.ndarray:
    """Return the X-rays' names, which only the records have."""
    config = run.config
    opened = Shards(config.data.dir, config.task, folds.of_config(config)).open(("dicom_id",))[split]
    return np.array([opened[i]["dicom_id"] for i in record_N.tolist()])


def check_out(path: Path) -> None:
    """Raise UserError unless `write` can write the file, before hours of scoring."""
    if path.suffix not in (".npz", ".csv") or path.is_dir():
        raise UserError(f"--out={path}: give a file that ends in .npz or .csv", field="--out", path=path)


def write(path: Path, predicted: dict[str, np.ndarray]) -> None:
    """Write what `predict` returned as .npz, or as .csv: a row per record (or hour), a column per label's score."""
    with files.must_write(f"--out={path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.written_whole(path) as unfinished:
            if path.suffix == ".npz":
                np.savez(unfinished, **predicted)
                return
            facts = [name for name in _FACTS if name in predicted]
            with unfinished.open("w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow([*facts, *predicted["label_names"].tolist()])
                columns = [predicted[name].tolist() for name in facts]
                for i, score_K in enumerate(predicted["scores"]):
                    rows.writerow([*(column[i] for column in columns), *map(str, score_K)])


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    out = Path(options.out)
    check_out(out)
    compilation.configure()
    more = {"cxr_features": options.cxr_features, "calibrated": options.calibrated}
    predicted = predict(options.workdir, options.data, options.split, **more)
    write(out, predicted)
    num_labels = len(predicted["label_names"])
    rows = "hours" if "hour" in predicted else "records"
    print(f"written: {out}, {len(predicted['scores'])} {rows}, {num_labels} label{'s'[: num_labels != 1]}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a finished run, or of a sweep: its chosen trial.", required=True)
    flags.DEFINE_string("data", None, "Folder of the shards to score, as data_prep.build wrote it.", required=True)
    flags.DEFINE_string("out", None, "File to write: .npz or .csv.", required=True)
    flags.DEFINE_string("cxr_features", "", "Precomputed features of these X-rays; default: the file of the run.")
    flags.DEFINE_string("split", ALL, "train, val, test, or all of them.")
    flags.DEFINE_bool("calibrated", False, "Scale the scores by the run's temperature (docs/evaluation.md).")
    command_line.run(main)
