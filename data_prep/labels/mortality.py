"""In-hospital mortality: who died during the admission, and when."""

import numpy as np
import polars as pl


def add_deaths(stays: pl.DataFrame) -> pl.DataFrame:
    """Add `died` (in the admission) and `death_h`, hours from intime to that death (null if unknown or none).

    stays: intime, admittime, dischtime, deathtime, dod.
    """

    def in_admission(column: str) -> pl.Expr:
        return pl.col(column).is_between("admittime", "dischtime").fill_null(False)

    stays = stays.with_columns(died=in_admission("deathtime") | in_admission("dod"))
    # MIMIC-IV gives many deaths a dischtime of 00:00 on that day. Then `dod` shows that the patient died in the
    # admission, and `deathtime`, hours after dischtime, shows when.
    death_h = (pl.col("deathtime") - pl.col("intime")).dt.total_seconds() / 3600.0
    return stays.with_columns(death_h=pl.when("died").then(death_h))


def labels(stays: pl.DataFrame) -> np.ndarray:
    """Return int8 [N, 1]: 1 if the patient died in the admission."""
    return stays.select(pl.col("died").cast(pl.Int8)).to_numpy()
