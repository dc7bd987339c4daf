"""Which film belongs to which stay."""

import datetime

import polars as pl


def within(stays: pl.DataFrame, films: pl.DataFrame, window_h: float | None) -> pl.DataFrame:
    """Every AP film taken between `intime` and the end of what a task may see, by stay and time.

    stays: stay_id, subject_id, intime, outtime. films: dicom_id, subject_id, view, time.
    window_h: hours from `intime` that films may come from, or None for up to `outtime`.
    Returns stay_id, dicom_id, film_time. Films of one time are in the order of dicom_id.
    """
    end = pl.col("outtime")
    if window_h is not None:
        end = pl.min_horizontal(end, pl.col("intime") + datetime.timedelta(hours=window_h))
    candidates = stays.select("stay_id", "subject_id", "intime", end.alias("end")).join(
        films.filter(pl.col("view") == "AP").select("dicom_id", "subject_id", "time"), on="subject_id"
    )
    inside = candidates.filter(pl.col("time").is_between("intime", "end")).sort("stay_id", "time", "dicom_id")
    return inside.select("stay_id", "dicom_id", film_time="time")


def pair(stays: pl.DataFrame, films: pl.DataFrame, window_h: float | None) -> pl.DataFrame:
    """The last film of each stay that `within` finds one for."""
    return within(stays, films, window_h).group_by("stay_id", maintain_order=True).last()
