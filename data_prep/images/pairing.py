"""Pair X-rays with stays by time."""

import datetime

import polars as pl

from data_prep.images import views


def within(stays: pl.DataFrame, images: pl.DataFrame, window_h: float | None) -> pl.DataFrame:
    """Return each stay's AP X-rays taken from `intime` to the end of its window, sorted by stay and time.

    stays: stay_id, subject_id, intime, outtime. images: dicom_id, subject_id, view, time.
    window_h: hours after `intime`, at most to `outtime`; None: to `outtime`.
    Columns: stay_id, dicom_id, cxr_time. X-rays taken at the same time are sorted by dicom_id.
    """
    end = pl.col("outtime")
    if window_h is not None:
        end = pl.min_horizontal(end, pl.col("intime") + datetime.timedelta(hours=window_h))
    candidates = stays.select("stay_id", "subject_id", "intime", end.alias("end")).join(
        images.filter(views.is_paired()).select("dicom_id", "subject_id", "time"), on="subject_id"
    )
    inside = candidates.filter(pl.col("time").is_between("intime", "end")).sort("stay_id", "time", "dicom_id")
    return inside.select("stay_id", "dicom_id", cxr_time="time")


def pair(stays: pl.DataFrame, images: pl.DataFrame, window_h: float | None) -> pl.DataFrame:
    """Return the last X-ray of each stay that has one in its window."""
    return within(stays, images, window_h).group_by("stay_id", maintain_order=True).last()
