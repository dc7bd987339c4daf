"""Read the 14 labels of X-rays from the CheXpert table of MIMIC-CXR-JPG."""

import polars as pl

from data_prep import progress
from data_prep.raw import invalid, parse, tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

_POSITIVE = 1.0
_NUMBERS = (_POSITIVE, 0.0, -1.0)  # positive, negative, uncertain
_WORDS = {"true": _POSITIVE, "false": 0.0}  # as pandas writes a column that it was told to read as yes or no


def of_labelled_studies(raw: dict[str, tables.Table], images: pl.DataFrame) -> pl.DataFrame:
    """Return the X-rays of studies that the table lists, without their labels."""
    studies = raw["chexpert"].read("study_id").select(parse.integer("study_id"))
    return images.join(studies, on="study_id", how="semi", maintain_order="left")


def labelled(raw: dict[str, tables.Table], images: pl.DataFrame) -> pl.DataFrame:
    """Return the X-rays of studies with labels, and the labels; warn if none is positive."""
    found = images.join(read_labels(raw), on="study_id", maintain_order="left")
    if not found.select(schema.RADIOLOGY_LABELS).to_numpy().any():
        progress.say(f"warning: {raw['chexpert'].path} gives no X-ray a positive label; is the table complete?")
    return found


def read_labels(raw: dict[str, tables.Table]) -> pl.DataFrame:
    """Return study_id and the 14 labels (int8): 1 where positive; 0 where negative, uncertain (-1) or blank.

    Raises UserError for a missing column, or one of which more than 1 % of the values are anything else.
    """
    table = raw["chexpert"]
    for label in schema.RADIOLOGY_LABELS:
        if label not in table.columns:
            message = f"{table.path} has no column {label!r}, one of the 14 CheXpert labels; download it again"
            raise UserError(message, path=table.path, field=label)
    rows = table.read("study_id", *schema.RADIOLOGY_LABELS)
    parsed = rows.select(parse.integer("study_id"), *(_number(name) for name in schema.RADIOLOGY_LABELS))
    no_study = rows["study_id"].filter(parsed["study_id"].is_null())
    ids = {"study_id": (no_study, len(rows))}
    invalid.check(table.path, ids, "ids", effect="these rows are left out", remedy="they are whole numbers")
    _check(table, rows, parsed)
    positive = ((pl.col(name) == _POSITIVE).fill_null(False).cast(pl.Int8) for name in schema.RADIOLOGY_LABELS)
    labels = parsed.select("study_id", *positive)
    return labels.drop_nulls("study_id").unique("study_id", keep="first", maintain_order=True)


def _number(column: str) -> pl.Expr:
    """Parse a text column of labels, in any writing of the numbers, else null."""
    word = pl.col(column).str.strip_chars().str.to_lowercase().replace_strict(_WORDS, default=None)
    number = pl.coalesce(parse.number(column), word.cast(pl.Float64))
    return pl.when(number.is_in(_NUMBERS)).then(number).alias(column)


def _check(table: tables.Table, rows: pl.DataFrame, parsed: pl.DataFrame) -> None:
    """Warn of labels that are neither known nor missing; raise UserError if they are more than 1 % of a column."""
    columns = {}
    for name in schema.RADIOLOGY_LABELS:
        unknown = rows[name].filter(parsed[name].is_null())
        unknown = unknown.filter(~parse.missing(unknown))
        columns[name] = unknown, len(rows) - parsed[name].null_count() + len(unknown)
    remedy = "write them as MIMIC-CXR-JPG does, 1, 0, -1 or nothing"
    invalid.check(table.path, columns, "labels", effect="they count as missing", remedy=remedy)
