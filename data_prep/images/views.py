"""The view of an X-ray (ViewPosition): which are known, and which is paired with stays."""

from pathlib import Path

import polars as pl

from data_prep import progress
from data_prep.raw import invalid, parse

_PAIRED = "AP"
_MAX_BLANK = 0.1  # of all X-rays; in MIMIC-CXR-JPG 4 %
# What the view code's meaning, CID 4010 of DICOM and MIMIC-CXR-JPG's ViewCodeSequence_CodeMeaning, calls a view.
_MEANINGS = {"ANTERO-POSTERIOR": "AP", "POSTERO-ANTERIOR": "PA", "LEFT LATERAL": "LL", "RIGHT LATERAL": "RL"}
# The values in MIMIC-CXR-JPG, then the defined terms of DICOM's View Position (0018,5101) that are not among them.
_KNOWN = (
    *("AP", "PA", "LATERAL", "LL", "AP AXIAL", "AP LLD", "AP RLD", "PA LLD", "PA RLD", "LAO", "LPO", "RAO"),
    *("SWIMMERS", "XTABLE LATERAL", "RL", "RLD", "LLD", "RLO", "LLO"),
)


def view(column: str) -> pl.Expr:
    """Return a text column's views, in capitals; '' where none is given."""
    text = pl.col(column).fill_null("").str.strip_chars()
    name = text.str.to_uppercase().replace(_MEANINGS)
    return pl.when(~parse.missing(text)).then(name).otherwise(pl.lit(""))


def is_paired() -> pl.Expr:
    """Return which X-rays have the view that is paired with stays (column `view`)."""
    return pl.col("view") == _PAIRED


def warn(path: Path, views: pl.Series) -> None:
    """Warn if no X-ray has the view that is paired, if more than 1 % of the views are unknown or 10 % are missing."""
    given = views.filter(views != "")
    other = given.filter(given != _PAIRED)
    unknown = given.filter(~given.is_in(_KNOWN))
    blank = len(views) - len(given)
    if len(other) == len(given):
        first = f" ({invalid.form(unknown[0])})" if len(unknown) else ""
        progress.say(
            f"warning: {path}: no X-ray has the view {_PAIRED}, so none is paired with a stay; {len(other):,} have "
            f"another ViewPosition{first} and {blank:,} have none"
        )
    elif len(unknown) > invalid.MAX_SHARE * len(given):
        progress.say(
            f"warning: {path}: {len(unknown):,} of {len(given):,} X-rays have an unknown ViewPosition "
            f"({invalid.form(unknown[0])}) and are never paired with a stay; {_PAIRED} is paired"
        )
    if len(other) < len(given) and blank > max(invalid.FEW, _MAX_BLANK * len(views)):
        progress.say(
            f"warning: {path}: {blank:,} of {len(views):,} X-rays have no ViewPosition and are never paired with a "
            "stay; is the column complete?"
        )
