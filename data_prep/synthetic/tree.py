"""Write a synthetic MIMIC-IV and MIMIC-CXR with a planted signal of known strength (signal.py).

python -m data_prep.synthetic --out=DIR [--stays=1000] [--seed=0] [--cxr_fraction=0.19]
                              [--images_per_stay=1.5] [--change]

DIR then holds
    mimic-iv/{hosp,icu}/*.csv.gz   tables in the format of MIMIC-IV 2.2
    mimic-cxr/                     X-rays and tables in the format of MIMIC-CXR-JPG 2.0.0
    best_auroc.json                the best expected AUROC, with and without X-rays
    truth.csv.gz                   one row per kept stay: X-ray flags, true label probabilities (p_<CCS>, p_mortality)
                                   and latents (vital_*, image_*)
    truth_images.csv.gz            one row per X-ray: its latents
The build does not read best_auroc.json or the truth files.
"""

import gzip
import io
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.synthetic import cohort, cxr, signal
from medfuse_jax import schema
from medfuse_jax.runtime import cores, files
from medfuse_jax.runtime.errors import UserError

MIN_STAYS = 10
VERSION = 2  # increment when the same arguments give other bytes
REPORT = "best_auroc.json"
IMAGES_PER_PROCESS = 100  # or more: starting a process takes as long as drawing 40
MORTALITY_WINDOW_H = schema.TASKS["mortality"].window_h


def _check(settings: dict) -> None:
    """Raise UserError for a value out of range."""
    for name, flag, low, high in (
        ("num_stays", "--stays", MIN_STAYS, 100_000),
        ("seed", "--seed", 0, 2**63),
        ("cxr_fraction", "--cxr_fraction", 0, 1),
        ("images_per_stay", "--images_per_stay", 0, 100),
    ):
        value = settings[name]
        if not low <= value <= high:
            raise UserError(f"{flag} is {value}; it must be from {low} to {high}", field=flag, value=value)


def _written_before(out_dir: Path, settings: dict) -> dict | None:
    """Return the report if `out_dir` holds this cohort, None if it is new or empty; otherwise raise UserError."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    try:
        report = files.read_json(out_dir / REPORT, "give another --out")
    except UserError:
        report = {}
    # "change" is in the settings only when it is on.
    if any(report.get(name) != settings.get(name) for name in {*settings, "change"}):
        message = f"{out_dir} is not empty and does not hold this cohort; give another --out"
        raise UserError(message, field="--out", path=out_dir)
    return report


def _write_table(frame: pl.DataFrame, path: Path) -> None:
    """Write a reproducible .csv.gz, without name or time in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=1, mtime=0) as packed,
    ):
        for part, rows in enumerate(frame.iter_slices(1_000_000)):  # the text of a large table takes gigabytes
            text = io.BytesIO()
            rows.write_csv(text, include_header=part == 0, datetime_format="%Y-%m-%d %H:%M:%S")
            packed.write(text.getbuffer())


def _image_flags(stays: pl.DataFrame, planned: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return which stays [N] have an AP X-ray during the stay, and which in its first 48 h."""
    images = planned.filter((pl.col("view") == "AP") & (pl.col("row") >= 0) & (pl.col("hours") >= 0))
    row, hours = images["row"].to_numpy(), images["hours"].to_numpy()
    within = hours <= stays["los_h"].to_numpy()[row]
    early = within & (hours <= MORTALITY_WINDOW_H)
    return np.isin(np.arange(len(stays)), row[within]), np.isin(np.arange(len(stays)), row[early])


def _report(stays: pl.DataFrame, planted: dict, in_stay: np.ndarray, in_48h: np.ndarray) -> dict:
    """Return the best expected AUROC of each task, on the stays that pass its cohort filters."""
    kept = (stays["kind"] == "kept").to_numpy()
    long_enough = (stays["los_h"] >= MORTALITY_WINDOW_H).to_numpy()
    report = {}
    for task, rows, has_cxr in (("pheno", kept, in_stay), ("mortality", kept & long_enough, in_48h)):
        by_input = {name: probability[rows] for name, probability in planted[task].items()}
        report[task] = signal.best_auroc(task, by_input, has_cxr[rows])
        report[task]["prevalence"] = planted[f"{task}_label"][rows].mean(axis=0).tolist()
    return report


def _truth(stays: pl.DataFrame, planted: dict, in_stay: np.ndarray, in_48h: np.ndarray) -> pl.DataFrame:
    columns = {"kind": stays["kind"], "stay_id": stays["stay_id"], "subject_id": stays["subject_id"]}
    columns |= {"cxr_in_stay": in_stay, "cxr_in_48h": in_48h}
    columns |= {f"p_{p.ccs}": planted["pheno"]["both"][:, k] for k, p in enumerate(schema.PHENOTYPES)}
    columns["p_mortality"] = planted["mortality"]["both"][:, 0]
    columns |= {f"vital_{name}": planted["vitals"][:, i] for i, name in enumerate(signal.VITAL_LATENTS)}
    columns |= {f"image_{name}": planted["cxr"][:, i] for i, name in enumerate(signal.IMAGE_LATENTS)}
    return pl.DataFrame(columns).filter(pl.col("kind") == "kept").drop("kind").sort("stay_id")


def _write_all(folder: Path, settings: dict, workers: int | None) -> dict:
    num_stays, seed = settings["num_stays"], settings["seed"]
    # Each part draws from its own stream, (seed, number), so that one does not shift another's; 3 is in draw.main.
    rng = np.random.default_rng((seed, 1))
    stays, planted = cohort.draw_stays(rng, num_stays)
    grew_N = signal.plant_change(np.random.default_rng((seed, 4)), planted) if settings.get("change") else None
    image_rng = np.random.default_rng((seed, 2))
    num_images = round(settings["images_per_stay"] * num_stays)
    planned = cxr.plan(image_rng, stays, planted["cxr"], settings["cxr_fraction"], num_images, grew_N)
    workers = workers or min(cores.usable(), 1 + len(planned) // IMAGES_PER_PROCESS)
    with cxr.drawing(folder / "mimic-cxr", planned, seed, workers):
        for name, frame in cohort.tables(rng, stays, planted).items():
            _write_table(frame, folder / "mimic-iv" / f"{name}.csv.gz")
        for name, frame in cxr.tables(image_rng, planned).items():
            _write_table(frame, folder / "mimic-cxr" / f"{name}.csv.gz")
        image_flags = _image_flags(stays, planned)
        _write_table(_truth(stays, planted, *image_flags), folder / "truth.csv.gz")
        latents = [f"image_{name}" for name in signal.IMAGE_LATENTS]
        _write_table(planned.select("dicom_id", "subject_id", *latents), folder / "truth_images.csv.gz")
        report = {**settings, "num_images": len(planned), **_report(stays, planted, *image_flags)}
    files.write_json(folder / REPORT, report, sort_keys=False)
    return report


def write(
    out_dir: str | Path,
    num_stays: int = 1000,
    seed: int = 0,
    cxr_fraction: float = 0.19,
    images_per_stay: float = 1.5,
    workers: int | None = None,
    change: bool = False,
) -> dict:
    """Write the synthetic cohort to `out_dir`, a new or empty folder, and return its report.

    num_stays: ICU stays that pass the cohort filters (others are added for the filters to drop); cxr_fraction: fraction
    of them with an AP X-ray during the stay; images_per_stay: X-rays per stay, including those of patients without a
    stay; workers: processes that draw X-rays; change: give every stay with an X-ray at least two, and make one
    phenotype depend on whether the effusion grew between them (signal.py).

    The same arguments give the same bytes, whatever `workers` is. If `out_dir` already holds that cohort, write
    nothing. Raise UserError for a value out of range, or if the folder holds anything else.

    The report, also written to best_auroc.json, has the settings and, for each task, `signal.best_auroc` and the
    prevalence of each label.
    """
    out_dir = Path(out_dir).resolve()
    settings = {"num_stays": num_stays, "seed": seed, "cxr_fraction": cxr_fraction, "images_per_stay": images_per_stay}
    _check(settings)
    settings = {"version": VERSION, **settings} | ({"change": True} if change else {})
    if report := _written_before(out_dir, settings):
        return report
    partial = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")  # an interrupted run must not look complete
    try:
        with files.must_write(f"--out={out_dir}"):
            partial.mkdir(parents=True)
            report = _write_all(partial, settings, workers)
            partial.replace(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report
