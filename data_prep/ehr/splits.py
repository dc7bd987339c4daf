"""Assign each patient to a split, by lists or by a hash.

Increment cohort.VERSION when the same patients get other splits.
"""

import csv
import hashlib
import re
from pathlib import Path

import polars as pl

from data_prep import progress
from medfuse_jax.runtime.errors import UserError

SPLIT_SHARES = {"test": 0.2, "val": 0.1}  # of the patients; the rest are for training (paper, section 4.1.2)


def assign(
    subjects: pl.Series, val_ids: str | Path | None = None, test_ids: str | Path | None = None, seed: int = 0
) -> dict[int, str]:
    """Map subject_id to 'train', 'val' or 'test': by the lists if given, else by a seeded hash."""
    subjects = sorted(set(subjects.to_list()))
    if (val_ids is None) != (test_ids is None):
        missing = "--val_ids" if val_ids is None else "--test_ids"
        raise UserError(f"{missing} is missing; give both --val_ids and --test_ids, or neither", field=missing)
    if val_ids is None:
        return {subject: _hashed_split(subject, seed) for subject in subjects}
    val, test = read_id_list(val_ids), read_id_list(test_ids)
    if both := val & test:
        message = f"{len(both)} patients are in both {val_ids} and {test_ids}; a patient belongs to one split"
        raise UserError(message, path=val_ids, value=min(both))
    for path, members in ((val_ids, val), (test_ids, test)):
        if not members & set(subjects):
            progress.say(f"warning: none of the {len(members)} patients in {path} is in the cohort")
    if not (val | test) & set(subjects):
        raise UserError(
            f"{val_ids} and {test_ids} name no patient of the cohort; are they lists of subject_id?", path=val_ids
        )
    return dict.fromkeys(subjects, "train") | dict.fromkeys(val, "val") | dict.fromkeys(test, "test")


def _hashed_split(subject_id: int, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{subject_id}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < SPLIT_SHARES["test"]:
        return "test"
    return "val" if position < SPLIT_SHARES["test"] + SPLIT_SHARES["val"] else "train"


def read_id_list(path: str | Path) -> set[int]:
    """Read a list of patients: rows `subject_id` or `subject_id,0/1` (1: in the split), with or without a header.

    With a header, the index column of pandas or R may precede them. Raises UserError, which quotes no row.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = getattr(error, "strerror", None) or "it is not a CSV file in UTF-8"
        raise UserError(f"the list {path} cannot be read ({problem})", path=path) from None
    first = next((i for i, row in enumerate(rows) if any(row)), 0)
    header = [cell.lower() for cell in rows[first]] if rows else []
    start = header.index("subject_id") if "subject_id" in header else 0
    members = set()
    for i, row in enumerate(rows):
        if not any(row) or (i == first and "subject_id" in header):
            continue
        # pandas may write 1.0
        match = re.fullmatch(r"([0-9]+)(?:\.0*)?(?:,([01])(?:\.0*)?)?", ",".join(row[start:]))
        if not match:
            message = (
                f"{path} row {i + 1} is not subject_id or subject_id,0/1; remove other columns, or put them before "
                "subject_id and add a header"
            )
            raise UserError(message, path=path, row=i + 1, value=",".join(row))
        if match[2] != "0":
            members.add(int(match[1]))
    return members
