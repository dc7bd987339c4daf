"""Read each X-ray's patient, study, view and time from the tables of MIMIC-CXR-JPG. The labels: chexpert.py."""

import os
from pathlib import Path

import polars as pl

from data_prep import progress
from data_prep.images import views
from data_prep.raw import invalid, parse, tables, times
from medfuse_jax.runtime.errors import UserError

LAYOUTS = {
    "auto": "tree if files/ contains folders p10 to p19, or if there is no files/ and no X-ray; otherwise flat",
    "tree": "files/p10/p10000032/s50414267/<dicom_id>.jpg, as published",
    "flat": "<dicom_id>.jpg or .png, all in files/ or, if there is none, in the folder itself",
}
_DICOM_ID = r"^[A-Za-z0-9_-]{1,64}$"  # part of a path, so without '.', '/' or control characters
_IDS = invalid.Kind(
    "ids of X-rays",
    "a dicom_id has 1 to 64 letters, digits, '-' and '_', the other ids are whole numbers above 0",
    "their X-rays are left out",
    needed=True,
)


def read_metadata(raw: dict[str, tables.Table], layout: str = "auto") -> tuple[pl.DataFrame, dict]:
    """Return every X-ray with a usable metadata row, sorted by dicom_id, and counts of the rows read and dropped.

    Columns: dicom_id, subject_id, study_id, view, time, path (below the MIMIC-CXR folder). layout: see LAYOUTS.
    """
    metadata = raw["metadata"].read(*tables.MIMIC_CXR["metadata"])
    images = metadata.select(
        pl.col("dicom_id").str.strip_chars(),
        parse.integer("subject_id"),
        parse.integer("study_id"),
        view=views.view("ViewPosition"),
        time=times.study_times(metadata),
    )
    date, clock = (pl.when(~parse.missing(pl.col(name))).then(name) for name in ("StudyDate", "StudyTime"))
    given = metadata.select(pl.format("{} {}", date, clock)).to_series()
    tally = invalid.Tally(invalid.TIMES).add(given, images["time"].is_not_null())
    tally.check(raw["metadata"].path, "StudyDate, StudyTime")
    counts = {"rows of metadata": len(images)}
    images = images.filter(_has_valid_ids(raw["metadata"].path, metadata, images))
    images = images.unique("dicom_id", keep="first", maintain_order=True)
    counts["X-rays with ids"] = len(images)
    counts["X-rays without a valid time (never paired)"] = untimed = images["time"].null_count()
    if untimed:
        progress.say(
            f"warning: {untimed:,} of {len(images):,} X-rays have no valid time and are never paired with a stay"
        )
    if images.is_empty():
        path = raw["metadata"].path
        raise UserError(f"{path} has no valid row; download it again if it is incomplete", path=path)
    views.warn(raw["metadata"].path, images["view"])
    if "split" in raw:
        counts |= _count_without_metadata(raw, metadata)
    return images.with_columns(path=_path(raw["metadata"].path.parent, layout)).sort("dicom_id"), counts


def _has_valid_ids(path: Path, metadata: pl.DataFrame, images: pl.DataFrame) -> pl.Series:
    """Return which X-rays have valid ids; warn of the others, and raise UserError if they are more than 1 %.

    metadata: the table's rows as text. images: the same rows, with their ids parsed.
    """
    valid = images.select(
        pl.col("dicom_id").str.contains(_DICOM_ID), pl.col("subject_id") > 0, pl.col("study_id") > 0
    ).fill_null(False)
    invalid.check(path, {name: invalid.Tally(_IDS).add(metadata[name], valid[name]) for name in valid.columns})
    return valid.select(pl.all_horizontal(pl.all())).to_series()


def _path(root: Path, layout: str) -> pl.Expr:
    """Return the path of each X-ray below `root`, whether there is a file or not."""
    files = root / "files"
    if layout == "auto":
        layout = "tree" if next(files.glob("p*/"), None) or not (files.is_dir() or _has_pictures(root)) else "flat"
    if layout == "tree":
        subject, study = pl.col("subject_id").cast(pl.String), pl.col("study_id").cast(pl.String)
        return pl.format("files/p{}/p{}/s{}/{}.jpg", subject.str.head(2), subject, study, "dicom_id")
    folder, below = (files, "files/") if files.is_dir() else (root, "")
    present = set(os.listdir(folder))
    pngs = [
        name.removesuffix(".png") for name in present if name.endswith(".png") and f"{name[:-4]}.jpg" not in present
    ]
    ending = pl.when(pl.col("dicom_id").is_in(pngs)).then(pl.lit("png")).otherwise(pl.lit("jpg"))
    return pl.format("{}{}.{}", pl.lit(below), "dicom_id", ending)


def _has_pictures(folder: Path) -> bool:
    return any(name.lower().endswith((".jpg", ".jpeg", ".png")) for name in os.listdir(folder))


def _count_without_metadata(raw: dict[str, tables.Table], metadata: pl.DataFrame) -> dict:
    """Count the X-rays that only the split table lists, and warn about them."""
    listed = raw["split"].read("dicom_id").select(pl.col("dicom_id").str.strip_chars()).drop_nulls().unique()
    listed = listed.filter(pl.col("dicom_id").str.contains(_DICOM_ID))
    present = metadata.select(pl.col("dicom_id").str.strip_chars())
    missing = listed.join(present, on="dicom_id", how="anti")["dicom_id"].sort().to_list()
    if missing:
        progress.say(
            f"warning: dropping {len(missing)} X-ray(s) of {raw['split'].path} without a row in "
            f"{raw['metadata'].path}, listed in the manifests; download that table again if it is incomplete"
        )
    return {"X-rays without a metadata row": len(missing), "dicom_ids without a metadata row": missing[:100]}
