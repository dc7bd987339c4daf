"""Read the 14 labels of X-rays from the CheXpert table of MIMIC-CXR-JPG."""

import polars as pl

from data_prep import progress
from data_prep.raw import invalid, parse, tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

_POSITIVE = 1.0
_NUMBERS = (_POSITIVE, 0.0, -1.0)  # positive, negative, uncertain
_LABELS = invalid.Kind("labels", "write them as MIMIC-CXR-JPG does, 1, 0, -1 or nothing", "they count as missing")
_WORDS = {"true": _POSITIVE, "false": 0.0}  # as pandas writes a column that it was told to read as yes or no


def of_labelled_studies(raw: dict[str, tables.Table], images: pl.DataFrame) -> pl.DataFrame:
    """Return the X-rays of studies that the table lists, without their labels."""
    studies = raw["chexpert"].read("study_id").select(parse.integer("study_id"))
    return images.join(studies, on="study_id", how="semi", maintain_order="left")


def labelled(raw: dict[str, tables.Table], images: pl.DataFrame) -> pl.DataFrame:
    """Return the X-rays of studies with labels, and the labels; warn if many have none, or no label is positive."""
    found = images.join(read_labels(raw), on="study_id", maintain_order="left")
    unlabelled = len(images) - len(found)
    if unlabelled > invalid.MAX_SHARE * len(images):
        progress.say(
            f"warning: {raw['chexpert'].path} has no row for the studies of {unlabelled:,} of {len(images):,} X-rays, "
            "which the radiology task leaves out; is the table complete?"
        )
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
    invalid.check_ids(table.path, rows, "study_id")
    tallies = {name: invalid.Tally(_LABELS) for name in schema.RADIOLOGY_LABELS}
    for name, tally in tallies.items():
        tally.add(rows[name], parsed[name].is_not_null())
    invalid.check(table.path, tallies)
    positive = ((pl.col(name) == _POSITIVE).fill_null(False).cast(pl.Int8) for name in schema.RADIOLOGY_LABELS)
    labels = parsed.select("study_id", *positive)
    return labels.drop_nulls("study_id").unique("study_id", keep="first", maintain_order=True)


def _number(column: str) -> pl.Expr:
    """Parse a text column of labels, in any writing of the numbers, else null."""
    word = pl.col(column).str.strip_chars().str.to_lowercase().replace_strict(_WORDS, default=None)
    number = pl.coalesce(parse.number(column), word.cast(pl.Float64))
    return pl.when(number.is_in(_NUMBERS)).then(number).alias(column)
