"""Which X-ray belongs to which stay."""

import datetime

import polars as pl


def within(stays: pl.DataFrame, images: pl.DataFrame, window_h: float | None) -> pl.DataFrame:
    """Every AP X-ray taken between `intime` and the end of what a task may see, by stay and time.

    stays: stay_id, subject_id, intime, outtime. X-rays: dicom_id, subject_id, view, time.
    window_h: hours from `intime` that X-rays may come from, or None for up to `outtime`.
    Returns stay_id, dicom_id, cxr_time. X-rays of one time are in the order of dicom_id.
    """
    end = pl.col("outtime")
    if window_h is not None:
        end = pl.min_horizontal(end, pl.col("intime") + datetime.timedelta(hours=window_h))
    candidates = stays.select("stay_id", "subject_id", "intime", end.alias("end")).join(
        images.filter(pl.col("view") == "AP").select("dicom_id", "subject_id", "time"), on="subject_id"
    )
    inside = candidates.filter(pl.col("time").is_between("intime", "end")).sort("stay_id", "time", "dicom_id")
    return inside.select("stay_id", "dicom_id", cxr_time="time")


def pair(stays: pl.DataFrame, images: pl.DataFrame, window_h: float | None) -> pl.DataFrame:
    """The last X-ray of each stay that `within` finds one for."""
    return within(stays, images, window_h).group_by("stay_id", maintain_order=True).last()
