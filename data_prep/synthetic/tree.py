"""A made-up MIMIC-IV and MIMIC-CXR, with a planted signal of known strength.

python -m data_prep.synthetic --out=DIR [--stays=1000] [--seed=0] [--cxr_fraction=0.19]

DIR then holds
    mimic-iv/{hosp,icu}/*.csv.gz     as MIMIC-IV 2.2 publishes them
    mimic-cxr/                       X-rays and tables as MIMIC-CXR-JPG 2.0.0 publishes them
    best_auroc.json                  the best AUROC any model can expect, with and without X-rays
    truth.csv.gz                     a row a stay that counts: its X-ray flags, true label probabilities (p_<CCS>,
                                     p_mortality) and latents (vital_*, image_*)
    truth_images.csv.gz               a row an X-ray: its latents
The build reads neither of the truth files. What depends on what: `synthetic_signal.py`.
"""

import gzip
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
from absl import flags

from data_prep.synthetic import cohort, cxr, signal
from medfuse_jax import schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

FEWEST_STAYS = 10
VERSION = 2  # of the bytes that the same arguments give
REPORT = "best_auroc.json"
MORTALITY_WINDOW_H = schema.TASKS["mortality"].window_h


def _settings(num_stays: int, seed: int, cxr_fraction: float, images_per_stay: float) -> dict:
    """What decides the cohort; UserError where a value is out of range."""
    if not FEWEST_STAYS <= num_stays <= 100_000:
        raise UserError(f"--stays is {num_stays}; it must be from {FEWEST_STAYS} to 100,000")
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be 0 or more")
    if not 0 <= cxr_fraction <= 1:
        raise UserError(f"--cxr_fraction is {cxr_fraction}; it is the share of stays with an X-ray, from 0 to 1")
    if not 0 <= images_per_stay <= 100:
        raise UserError(f"--images_per_stay is {images_per_stay}; it must be from 0 to 100")
    return {
        "version": VERSION,
        "num_stays": num_stays,
        "seed": seed,
        "cxr_fraction": cxr_fraction,
        "images_per_stay": images_per_stay,
    }


def _written_before(out_dir: Path, settings: dict) -> dict | None:
    """The report of the same cohort where `out_dir` holds it; UserError where it holds anything else."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    try:
        report = json.loads((out_dir / REPORT).read_text())
    except (OSError, ValueError):
        report = {}
    if any(report.get(name) != value for name, value in settings.items()):
        raise UserError(f"{out_dir} holds something else already; give another --out, or remove it first")
    return report


def _write_table(frame: pl.DataFrame, path: Path) -> None:
    """Writes a .csv.gz with the same bytes every time: no name and no time in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=1, mtime=0) as packed,
    ):
        for part, rows in enumerate(frame.iter_slices(1_000_000)):  # the whole text of a large table is gigabytes
            text = io.BytesIO()
            rows.write_csv(text, include_header=part == 0, datetime_format="%Y-%m-%d %H:%M:%S")
            packed.write(text.getbuffer())


def _image_flags(stays: pl.DataFrame, planned: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Which stays [N] have an AP X-ray in them, and which in their first 48 h."""
    in_stay = planned.filter((pl.col("view") == "AP") & (pl.col("row") >= 0) & (pl.col("hours") >= 0))
    row, hours = in_stay["row"].to_numpy(), in_stay["hours"].to_numpy()
    los_h = stays["los_h"].to_numpy()
    whole, early = np.zeros(len(stays), bool), np.zeros(len(stays), bool)
    whole[row[hours <= los_h[row]]] = True
    early[row[(hours <= los_h[row]) & (hours <= MORTALITY_WINDOW_H)]] = True
    return whole, early


def _report(stays: pl.DataFrame, planted: dict, planned: pl.DataFrame) -> dict:
    """The best AUROC to expect for each task, on the stays that its cohort rules leave."""
    whole, early = _image_flags(stays, planned)
    kept = (stays["kind"] == "kept").to_numpy()
    long_enough = (stays["los_h"] >= MORTALITY_WINDOW_H).to_numpy()
    report = {}
    for task, rows, has_cxr in (("pheno", kept, whole), ("mortality", kept & long_enough, early)):
        given = {name: probability[rows] for name, probability in planted[task].items()}
        report[task] = signal.best_auroc(task, given, has_cxr[rows])
        report[task]["prevalence"] = planted[f"{task}_label"][rows].mean(axis=0).tolist()
    return report


def _truth(stays: pl.DataFrame, planted: dict, planned: pl.DataFrame) -> pl.DataFrame:
    whole, early = _image_flags(stays, planned)
    columns = {"kind": stays["kind"], "stay_id": stays["stay_id"], "subject_id": stays["subject_id"]}
    columns |= {"cxr_in_stay": whole, "cxr_in_48h": early}
    columns |= {f"p_{p.ccs}": planted["pheno"]["both"][:, k] for k, p in enumerate(schema.PHENOTYPES)}
    columns["p_mortality"] = planted["mortality"]["both"][:, 0]
    columns |= {f"vital_{name}": planted["vitals"][:, i] for i, name in enumerate(signal.VITAL_LATENTS)}
    columns |= {f"image_{name}": planted["cxr"][:, i] for i, name in enumerate(signal.IMAGE_LATENTS)}
    return pl.DataFrame(columns).filter(pl.col("kind") == "kept").drop("kind").sort("stay_id")


def _write_all(folder: Path, settings: dict, workers: int) -> dict:
    num_stays, seed = settings["num_stays"], settings["seed"]
    rng = np.random.default_rng((seed, 1))
    stays, planted = cohort.draw_stays(rng, num_stays)
    for name, frame in cohort.tables(rng, stays, planted).items():
        _write_table(frame, folder / "mimic-iv" / f"{name}.csv.gz")
    rng = np.random.default_rng((seed, 2))
    num_images = round(settings["images_per_stay"] * num_stays)
    planned = cxr.plan(rng, stays, planted["cxr"], settings["cxr_fraction"], num_images)
    for name, frame in cxr.tables(rng, planned).items():
        _write_table(frame, folder / "mimic-cxr" / f"{name}.csv.gz")
    cxr.write_images(folder / "mimic-cxr", planned, seed, workers)
    _write_table(_truth(stays, planted, planned), folder / "truth.csv.gz")
    latents = [f"image_{name}" for name in signal.IMAGE_LATENTS]
    _write_table(planned.select("dicom_id", "subject_id", *latents), folder / "truth_images.csv.gz")
    report = {**settings, "num_images": len(planned), **_report(stays, planted, planned)}
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def write(
    out_dir: str | Path,
    num_stays: int = 1000,
    seed: int = 0,
    cxr_fraction: float = 0.19,
    images_per_stay: float = 1.5,
    workers: int | None = None,
) -> dict:
    """Writes the synthetic cohort to `out_dir`, a new or empty folder; returns its report.

    num_stays: ICU stays the cohort rules leave (others are written to be dropped); cxr_fraction: share of
    them with an AP X-ray in the stay; images_per_stay: X-rays written for each stay, those of patients without a stay
    included; workers: threads. The same arguments give the same bytes, whatever `workers` is; where `out_dir` holds
    that cohort already, nothing is written. UserError for values out of range and a folder that holds anything else.
    The report (also best_auroc.json): the settings, and by task `signal.best_auroc` and the prevalence of the
    drawn labels.
    """
    out_dir = Path(out_dir).resolve()
    settings = _settings(num_stays, seed, cxr_fraction, images_per_stay)
    if report := _written_before(out_dir, settings):
        return report
    workers = workers or min(8, os.cpu_count() or 1)
    partial = out_dir.with_name(f"{out_dir.name}.partial-{os.getpid()}")  # a stopped run leaves no whole-looking folder
    try:
        with files.must_write(f"--out={out_dir}"):
            partial.mkdir(parents=True)
            report = _write_all(partial, settings, workers)
            partial.replace(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


FLAGS = flags.FLAGS
