"""Deaths: in the admission, which is the label, and at any time, after which nothing enters a record.

The rule of docs/data.md: a patient died in an admission if `deathtime` is between its beginning and its end (an unknown
one sets no limit), or if `dod`, a date that counts as 00:00, is between them (both must be known).
"""

import numpy as np
import polars as pl


def add_deaths(stays: pl.DataFrame) -> pl.DataFrame:
    """Add `died` (in the admission) and `death_h`, the hours from intime to that death, null if unknown or none.

    stays: intime, admittime, dischtime, deathtime, dod.
    """
    after = (pl.col("deathtime") >= pl.col("admittime")).fill_null(True)
    before = (pl.col("deathtime") <= pl.col("dischtime")).fill_null(True)
    by_time = pl.col("deathtime").is_not_null() & after & before
    by_date = pl.col("dod").is_between("admittime", "dischtime").fill_null(False)
    stays = stays.with_columns(died=by_time | by_date)
    # MIMIC-IV gives many deaths a dischtime of 00:00 on that day. Then `dod` shows that the patient died in the
    # admission, and `deathtime`, hours after dischtime, shows when.
    death_h = (pl.col("deathtime") - pl.col("intime")).dt.total_seconds() / 3600.0
    return stays.with_columns(death_h=pl.when("died").then(death_h))


def alive_until(admissions: pl.DataFrame, patients: pl.DataFrame) -> pl.DataFrame:
    """Return subject_id and `alive_until`, the time of death, for each patient who is known to have died.

    This is the earliest `deathtime` of the patient's admissions, without those that precede their own admission; if
    there is none, the end of the day `dod`.
    admissions: admitted_id, admittime, deathtime. patients: subject_id, dod.
    """
    valid = (pl.col("deathtime") >= pl.col("admittime")).fill_null(True)
    first = admissions.filter(valid).group_by(subject_id="admitted_id").agg(pl.col("deathtime").min())
    return (
        patients.join(first, on="subject_id", how="left")
        .select("subject_id", alive_until=pl.coalesce("deathtime", pl.col("dod").dt.offset_by("1d")))
        .drop_nulls()
    )


def labels(stays: pl.DataFrame) -> np.ndarray:
    """Return int8 [N, 1]: 1 if the patient died in the admission."""
    return stays.select(pl.col("died").cast(pl.Int8)).to_numpy()
