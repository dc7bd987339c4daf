"""Score every stay of a split once and write the metrics: `python -m medfuse_jax.evaluate --workdir=DIR`."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags

from medfuse_jax import config as config_lib
from medfuse_jax import metrics, parallel, records, schema
from medfuse_jax import run as run_lib
from medfuse_jax import step as step_lib
from medfuse_jax.data import missing
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.data.modalities import loading
from medfuse_jax.models import registry
from medfuse_jax.report import terminal
from medfuse_jax.runs import builds, calibration, checkpoints, predictions, result, robustness, sources, subgroups
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runs.result import Scored
from medfuse_jax.runtime import command_line, compilation, files, hosts
from medfuse_jax.runtime.errors import UserError, check_choice

_TEMPERATURE = "temperature.json"  # holds the temperature of a run whose training did not fit one


def evaluate(
    workdir: Path,
    what: Scored = result.TEST,
    devices: list[jax.Device] | None = None,
    data_dir: str = "",
    resample: str = "",
    cxr_features: str = "",
) -> dict:
    """Evaluate a run's best checkpoint on one split; return the result.

    Writes two files, named by `what`, both with the checkpoint's step: the result, and the predictions (stay_id,
    subject_id, scores, labels, has_ehr, has_cxr, age, gender, admission_type, first_careunit, race; had_ehr and had_cxr
    if a modality was dropped; attention weights if the model has any). In an hourly task, each has a row for every
    hour, and also hour, remaining_h and, for exclusive labels, predicted_h (docs/hourly.md).
    devices: by default all of this process. data_dir, cxr_features: the new places of the run's shards, and of its file
    of precomputed features, if they were moved.
    resample: what the bootstrap draws, 'patient' or 'stay'; by default see `result.resample_by`.
    """
    check_choice("--split", what.split, schema.SPLITS)
    check_choice("--resample", resample, ("", *result.RESAMPLES))
    run = sources.reopen(workdir, devices, data_dir, cxr_features)
    run = dataclasses.replace(run, dataset=missing.drop_modalities(run.dataset, what.drop_ehr, what.drop_cxr))
    state, progress = restore(run, workdir)
    note = checkpoints.imported(workdir)
    include_N = run.dataset.usable(what.split)
    if what.head:
        run, include_N = _with_head(run, what)
    scored, loss = score(run, state, what.split, include_N)
    if run.dataset.task.exclusive:
        scored["predicted_h"] = _predicted_hours(run.dataset, scored["scores"])
    weights_fn = parallel.compile_eval(run.options, run.config.parallel, run.devices, step_lib.weights_step)
    on_devices = parallel.replicate(state, run.devices)
    weights = predictions.attention_weights(run, weights_fn, on_devices, what.split, include_N)
    config = run.config
    resample = result.resample_by(resample, scored)
    bootstrap = (config.eval.num_bootstrap, config.seed, resample)
    evaluated = {
        **_description(run, what),
        "num_params": sum(x.size for x in jax.tree.leaves(state.params)),
        "step": int(state.step),
        "best_epoch": progress.best_epoch,
        "selected_by": _selected_by(config, note, progress),
        "loss": loss,
        "num_left_out": int((~include_N).sum()),  # records that the method, or the head, cannot score
        "resample": resample,
        "subsets": result.subsets(scored, *bootstrap, schema.label_types(config.task, run.dataset.labels)),
        "subgroups": result.by_subgroup(scored, *bootstrap),
        "calibration": _calibration(workdir, what, scored, int(state.step), progress),
        "comparisons": [] if what.dropped else _against_pretraining(config, workdir, what.split, scored, bootstrap),
        "environment": result.environment(run.devices),
    }
    if hosts.is_first():
        result.save(workdir, what, scored | weights, evaluated)
    hosts.wait(f"evaluated {workdir}")
    return evaluated


def write_robustness(workdir: Path, data_dir: str = "", resample: str = "", cxr_features: str = "") -> list[dict]:
    """Score a run's test stays with fewer X-rays and fewer hours of EHR; write robustness.json and return its curves.

    Each curve has a 'name' ('cxr_dropped', 'ehr_only', 'ehr_hours') and 'points'; see `robustness`. Raise UserError for
    X-rays without stays. data_dir, resample, cxr_features: as for `evaluate`.
    """
    check_choice("--resample", resample, ("", *result.RESAMPLES))
    run = sources.reopen(workdir, None, data_dir, cxr_features)
    if run.dataset.task.cxr_only or run.dataset.task.hourly:
        raise UserError(
            f"--robustness needs a task with one set of labels per stay; {workdir} has the task {run.config.task}",
            field="--robustness",
            value=run.config.task,
        )
    if note := builds.note(run.dataset.manifest):
        print(note)
    state, _ = restore(run, workdir)
    scored, _ = score(run, state, "test", run.dataset.usable("test"))
    options = (run.config.eval.num_bootstrap, run.config.seed, result.resample_by(resample, scored))

    def score_with(dataset) -> dict:
        return score(dataclasses.replace(run, dataset=dataset), state, "test", dataset.usable("test"))[0]

    less = missing.drop_modalities(run.dataset, 0.0, 1.0)
    can_drop = run.dataset.use_cxr and less.usable("test").sum() == len(scored["stay_id"])
    curves = robustness.by_share(scored, score_with(less) if can_drop else None, options)
    if run.dataset.use_ehr:
        timestep_h = records.manifest(run.config.data.dir, run.config.task)["timestep_h"]
        longest_h = float(run.dataset.index["test"]["length"].max() * timestep_h)
        points = []
        for hours in [*(h for h in robustness.HOURS if timestep_h <= h < longest_h), longest_h]:
            cut = scored if hours == longest_h else score_with(missing.cut_ehr(run.dataset, int(hours / timestep_h)))
            points += robustness.point(hours, cut, np.ones(len(cut["stay_id"]), bool), options)
        curves.append({"name": "ehr_hours", "points": points})
    if hosts.is_first():
        content = {"step": int(state.step), "resample": options[-1], "curves": curves}
        files.write_json(workdir / robustness.FILE, files.sealed(metrics.to_json(content)))
    return curves


def restore(run: run_lib.Run, workdir: Path) -> tuple[step_lib.TrainState, Progress]:
    """Return the best checkpoint's state and progress; raise UserError if its weights are only part of a model."""
    state, progress = checkpoints.restore_best_with_progress(workdir, run.abstract_state())
    note = checkpoints.imported(workdir)
    if note and not set(state.params) <= set(note["modules"]):
        raise UserError(
            f"{workdir} holds imported weights of {' and '.join(note['modules'])} only, which cannot be scored: "
            f"start a run from them with --config.init.cxr={workdir}",
            field="--workdir",
            path=workdir,
            value=note["modules"],
        )
    return state, progress


def score(run: run_lib.Run, state: step_lib.TrainState, split: str, include_N: np.ndarray) -> tuple[dict, float]:
    """Return (scores and facts of the included records, mean loss)."""
    eval_fn = parallel.compile_eval(run.options, run.config.parallel, run.devices)
    predicted = predictions.predict(run, eval_fn, parallel.replicate(state, run.devices), split, include_N)
    part = {name: values[predicted.record_N] for name, values in run.dataset.index[split].items()}
    scored = {name: part[name] for name in ("stay_id", "subject_id")}
    scored |= {"scores": predicted.score_NK, "labels": predicted.label_NK}
    scored |= {"has_ehr": part["length"] > 0, "has_cxr": part["has_cxr"], "age": part["age"]}
    scored |= {name: part[name] for name in (*schema.STATIC_TEXTS, schema.RACE)}
    scored |= {name: part[name] for name in ("had_ehr", "had_cxr") if name in part}
    if run.dataset.hours:
        scored |= _of_hours(run.dataset, split, predicted, scored)
    return scored, predicted.loss


def _of_hours(dataset: Dataset, split: str, predicted: predictions.Predictions, scored: dict) -> dict:
    """Return what predictions hold of each hour. X-rays count from the first hour that sees one."""
    of, place_N = dataset.hours[split], predicted.place_N
    found = {"hour": of.time_h_S[place_N], "remaining_h": of.remaining_h_S[place_N]}
    found |= {name: scored[name] & of.has_cxr_S[place_N] for name in ("has_cxr", "had_cxr") if name in scored}
    return found


def _predicted_hours(dataset: Dataset, score_NK: np.ndarray) -> np.ndarray:
    """Return the hours that each row's likeliest bin stands for: its mean in training, as in the benchmark."""
    train = dataset.hours["train"]
    total_h_K = train.remaining_h_S @ train.label_SK.astype(np.float64)
    mean_h_K = total_h_K / np.maximum(train.label_SK.sum(0, dtype=np.int64), 1)
    return mean_h_K[score_NK.argmax(1)].astype(np.float32)


def _description(run: run_lib.Run, what: Scored) -> dict:
    """Return the part of a result that says which run was scored, and on what data."""
    config = run.config
    manifest = records.manifest(config.data.dir, config.task)
    optional = {"modalities": loading.listed(config.model.modalities), "head": what.head, "dropped": what.dropped}
    for encoder in registry.METHODS[config.method].encoders:
        name = f"{encoder}_encoder"
        if config.model[name] != config_lib.FIELDS[f"model.{name}"].default:
            optional[name] = config.model[name]
    optional["images"] = "" if config.data.images == "last" else config.data.images
    return {
        "name": config.name,
        "task": config.task,
        "method": config.method,
        **{name: value for name, value in optional.items() if value},
        "split": what.split,
        "seed": config.seed,
        "data": {
            "dir": config.data.dir,
            "profile": manifest.get("profile"),
            "timestep_h": manifest.get("timestep_h"),
            "synthetic": bool(manifest.get("synthetic", False)),
            "shards": run.dataset.shards_digest,
            **builds.unusual(manifest),
            **({"folds": config.data.folds, "fold": config.data.fold} if config.data.folds else {}),
        },
        "labels": list(run.dataset.labels),
    }


def _with_head(run: run_lib.Run, what: Scored) -> tuple[run_lib.Run, np.ndarray]:
    """Return the run set to score another head of its model, and a mask of the records that the head can score."""
    heads = {h.logits.removesuffix("_logits"): h for h in run.options.model.heads if h.label == "label"}
    heads.pop("logits", None)
    if not heads:
        raise UserError(
            f"--head={what.head}: the method {run.config.method!r} has one classifier head; leave --head out",
            field="--head",
            value=what.head,
        )
    check_choice("--head", what.head, heads)
    options = dataclasses.replace(run.options, head=heads[what.head].logits)
    dataset = dataclasses.replace(run.dataset, needs=heads[what.head].needs)
    return dataclasses.replace(run, options=options, dataset=dataset), dataset.usable(what.split)


def temperature(workdir: Path, step: int, progress: Progress) -> float | None:
    """Return the temperature of a run's best checkpoint, which has this step and progress; None if it has none.

    Training fits it. For older runs and imported weights, scoring the validation split does (`_calibration`).
    """
    if progress.temperature is not None:
        return progress.temperature
    path = workdir / _TEMPERATURE
    fitted = files.read_json(path, "delete it") if path.exists() else {}
    return fitted["temperature"] if fitted.get("step") == step else None  # otherwise of other weights


def _calibration(workdir: Path, what: Scored, scored: dict, step: int, progress: Progress) -> dict:
    """Return the scores' calibration, and that at the run's temperature, if it has one.

    Scoring the validation split as it is fits and stores the temperature of a run whose training did not.
    """
    labels_NK, scores_NK = scored["labels"], scored["scores"]
    described = calibration.describe(labels_NK, scores_NK, scored["stay_id"] if "hour" in scored else None)
    is_unfitted = progress.temperature is None and "predicted_h" not in scored  # exclusive labels share a softmax
    if what == Scored("val") and is_unfitted and hosts.is_first():
        fitted = calibration.fit_temperature(labels_NK, scores_NK)
        if fitted is not None:
            files.write_json(workdir / _TEMPERATURE, files.sealed({"step": step, "temperature": fitted}))
    found = None if what.head else temperature(workdir, step, progress)
    if found is not None:
        scaled = calibration.describe(labels_NK, calibration.scale(scores_NK, found))
        kept = {name: scaled[name] for name in ("brier_macro", "ece_macro", "curve")}
        described["scaled"] = {"temperature": found} | kept
    return described | (_operating_points(scored) if labels_NK.shape[1] == 1 else {})


def _operating_points(scored: dict) -> dict:
    """Return what acting on the scores of one label would bring; nothing of records too few to show."""
    if subgroups.is_small(scored):
        return {"operating_points": [], "net_benefit": [], "operating_points_withheld": True}
    label_N, score_N = scored["labels"][:, 0], scored["scores"][:, 0]
    points = calibration.operating_points(label_N, score_N)
    return {"operating_points": points, "net_benefit": calibration.net_benefit(label_N, score_N)}


def _against_pretraining(config, workdir: Path, split: str, scored: dict, bootstrap: tuple) -> list[dict]:
    """Compare this run with its pre-training stages of the same task."""
    comparisons = []
    for stage in config.pretrain:
        staged = config_lib.stage(config, stage)
        path = Scored(split).predictions_path(workdir / f"pretrain_{stage}")
        if path.exists() and staged.task == config.task:
            names = ("stay_id", "scores", *(name for name in ("hour", "predicted_h") if name in scored))
            other = result.read_predictions(path, names, "run medfuse_jax.evaluate there again")
            comparisons += result.compare(scored, other, staged.method, *bootstrap)
    return comparisons


def _selected_by(config, note: dict, progress: Progress) -> str:
    if note:
        return f"imported from {note['file']}"
    if not progress.best_epoch:
        return "not selected: no epoch was validated yet"
    which = "all" if config.data.val_stays == "partial" else "the paired"
    by = "loss (no label has both classes)" if progress.by_loss else schema.selected_by(config.task)
    return f"{by} on {which} validation {schema.TASKS[config.task].unit}"


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    workdir = Path(options.workdir)
    compilation.configure()
    moved = {"data_dir": options.data_dir, "cxr_features": options.cxr_features}
    if options.robustness:
        _print_robustness(workdir, write_robustness(workdir, resample=options.resample, **moved))
        return
    what = Scored(options.split, options.head, options.drop_ehr, options.drop_cxr)
    print(terminal.table([evaluate(workdir, what, resample=options.resample, **moved)]))
    print(f"\nwritten: {what.result_path(workdir)}, {what.predictions_path(workdir)}")


def _print_robustness(workdir: Path, curves: list[dict]) -> None:
    for curve in curves:
        values = "  ".join(f"{p['at']:g}: {p['auroc_macro']:.3f}" for p in curve["points"])
        print(f"{robustness.TITLES[curve['name']]}, AUROC at  {values or '(too few stays to show)'}")
    print(f"\nwritten: {workdir / robustness.FILE}; medfuse_jax.report draws it")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
    flags.DEFINE_string("split", "test", "train, val or test.")
    flags.DEFINE_string("head", "", "Classifier head to score, such as ehr_only; by default the model's main head.")
    flags.DEFINE_string("data_dir", "", "New folder of the run's shards, if they were moved; saved in its config.")
    flags.DEFINE_string("cxr_features", "", "New place of the run's precomputed features; saved in its config.")
    flags.DEFINE_float("drop_ehr", 0.0, "Fraction of paired stays scored without their EHR.")
    flags.DEFINE_float("drop_cxr", 0.0, "Fraction of paired stays scored without their X-ray.")
    flags.DEFINE_bool("robustness", False, "Score the test stays with fewer X-rays and fewer hours of EHR instead.")
    flags.DEFINE_string("resample", "", "What intervals resample: patient or stay; default: see docs/evaluation.md.")
    command_line.run(main)
