"""The 25 phenotype labels, from diagnosis codes.

A route maps each code to CCS categories, which are the labels: the route `gem` (icd.py), or that of a phenotype table,
as in the released extraction.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from data_prep import progress
from data_prep.labels import icd
from data_prep.labels.icd import CCS_OF_LABEL, Route, gem_route
from data_prep.raw import invalid, parse, tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

VERSION = 4  # increment if the same codes give other labels, or known_words.py turns the same words into other texts
# A table has lost the leading zeros of its ICD-9 codes if more than this share of its rows lacks one. In the MIMIC-IV
# demo no row does; 1.6 % of them would.
_MAX_LOST_ZEROS = 0.005
_MANY_CODES = 200  # with at least so many distinct ICD-9 codes, some must begin with a zero; the demo has 740
_NUMBER = re.compile(r"\d{4,5}\.0*")
# A code of either version, without its dot. The second character is a digit, so no word matches.
CODE = r"^[A-Z0-9][0-9][A-Z0-9]{1,5}$"
_FIRST = {9: r"^[0-9EV]", 10: r"^[A-Z]"}  # what a code of each version begins with


def labels(raw: dict[str, tables.Table], stays: pl.DataFrame, table_path: str | Path | None) -> tuple[np.ndarray, dict]:
    """Return labels int8 [N, 25] of `stays` (subject_id, hadm_id), and counts of codes.

    table_path: a phenotype table; None for the route `gem`. Raises UserError for a table that lost its leading zeros.
    """
    rows, dropped = _read_codes(raw, stays)
    route = gem_route() if table_path is None else table_route(table_path)
    codes = rows.group_by("code", "version").agg(pl.col("row").n_unique()).sort("version", "code").rows()
    matches, unmapped = [], []
    for code, version, num_stays in codes:
        categories = route(code, version)
        if categories is None:
            unmapped.append([code, version, num_stays])
        else:
            matches += [(code, version, CCS_OF_LABEL.index(c)) for c in categories if c in CCS_OF_LABEL]
    label_of = pl.DataFrame(matches, {"code": pl.String, "version": pl.Int64, "label": pl.Int64}, orient="row")
    positive = rows.join(label_of, on=["code", "version"], nulls_equal=True)
    label_NK = np.zeros((len(stays), len(CCS_OF_LABEL)), np.int8)
    label_NK[positive["row"].to_numpy(), positive["label"].to_numpy()] = 1
    if not label_NK.any():
        progress.say(f"warning: {raw['diagnoses_icd'].path} gives no stay a phenotype; is the table complete?")
    return label_NK, {
        "route": "gem" if table_path is None else "table",
        **dropped,
        "distinct_codes": _count_by_version(codes),
        "distinct_codes_unmapped": _count_by_version(unmapped),
        "unmapped": unmapped,
        "stays_without_a_code": len(stays) - rows["row"].n_unique(),
    }


def _read_codes(raw: dict[str, tables.Table], stays: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the stays' diagnoses (row of `stays`, code, version), and how many rows were dropped."""
    rows = raw["diagnoses_icd"].read(*tables.MIMIC_IV["diagnoses_icd"][1])
    invalid.check_ids(raw["diagnoses_icd"].path, rows, "icd_version", texts=("icd_code",))
    admissions = stays.select("hadm_id", "subject_id").with_row_index("row")
    rows = rows.select(
        parse.integer("hadm_id"),
        parse.integer("subject_id"),
        code=pl.col("icd_code").str.strip_chars().str.to_uppercase(),
        version=parse.integer("icd_version"),
    )
    _check_leading_zeros(rows.filter(version=9)["code"], raw["diagnoses_icd"].path)
    rows = rows.with_columns(pl.col("code").str.replace_all(".", "", literal=True))
    rows = rows.join(admissions, on="hadm_id", suffix="_of_stay")
    own = rows.filter(pl.col("subject_id") == pl.col("subject_id_of_stay"))
    is_code = pl.col("code").str.contains(CODE).fill_null(False)
    _warn_of_wrong_codes(own.with_columns(is_code=is_code), raw["diagnoses_icd"].path)
    valid = own.filter(is_code)
    return valid, {"rows_of_another_patient": len(rows) - len(own), "rows_without_a_valid_code": len(own) - len(valid)}


def _warn_of_wrong_codes(rows: pl.DataFrame, path: Path) -> None:
    """Warn of invalid codes, and of codes that do not fit their version. rows: code, version and is_code."""
    starts = [pl.col("version").eq(version) & pl.col("code").str.contains(start) for version, start in _FIRST.items()]
    wrong = rows.filter(~(pl.col("is_code") & pl.any_horizontal(starts).fill_null(False)))["code"]
    if len(wrong) > invalid.MAX_SHARE * len(rows):
        progress.say(
            f"warning: {path}: {len(wrong):,} of {len(rows):,} diagnoses have no valid code of their icd_version "
            f"({invalid.form(wrong[0])}); are icd_code and icd_version of the same rows?"
        )


def _check_leading_zeros(icd9_codes: pl.Series, path: Path) -> None:
    counts = icd9_codes.drop_nulls().alias("code").value_counts(name="rows")
    # 4019.0 is a number: in codes with a dot it follows the third digit.
    is_lost = [
        bool(_NUMBER.fullmatch(code)) or icd.lost_zero(code.replace(".", "")) for code in counts["code"].to_list()
    ]
    lost = counts.filter(pl.Series(is_lost, dtype=pl.Boolean))["rows"].sum()
    numbers = counts["code"].filter(counts["code"].str.contains(r"^\d"))  # not 'ICD9:4139', which is another error
    no_zero_left = len(numbers) >= _MANY_CODES and not numbers.str.starts_with("0").any()
    if no_zero_left or lost > _MAX_LOST_ZEROS * counts["rows"].sum():
        message = (
            f"{path}: the ICD-9 codes have lost their leading zeros (0389, septicaemia, is now 389), as when pandas or "
            "a spreadsheet reads them as numbers; other codes now mean another disease. Download the table again"
        )
        raise UserError(message, path=path, field="icd_code", value=int(lost))


def _count_by_version(codes: list) -> dict[str, int]:
    return dict(sorted(Counter(f"ICD-{version}" for _, version, _ in codes).items()))


def table_route(path: str | Path) -> Route:
    """Return the route of a phenotype table.

    The table lists codes of both versions together, and the released extraction ignores a code's version. No code of
    its benchmark categories is valid in both.
    """
    category: dict[str, int] = {}
    for entry in read_table(path).values():
        for code in entry["codes"]:
            category[str(code).replace(".", "").strip()] = entry["id"]
    return lambda code, version: {category[code]} if code in category else None


def read_table(path: str | Path) -> dict[str, dict]:
    """Return a phenotype table, name -> {id (CCS), codes, ...}; raise UserError if damaged or without a phenotype."""

    def error(problem: str, value: object = None) -> UserError:
        return UserError(f"--phenotypes={path} {problem}", field="--phenotypes", path=path, value=value)

    try:
        content = yaml.load(Path(path).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as failure:
        raise error(f"cannot be read ({failure.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise error("is not a YAML file") from None
    except ValueError:  # PyYAML reads 2001-02-30 as a date
        raise error("has a date that does not exist: put codes in quotes") from None
    entries = content if isinstance(content, dict) else {}
    for i, (name, entry) in enumerate(entries.items(), start=1):
        valid = isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("codes"), list)
        if not valid:
            raise error(f"is incomplete: its entry {i} needs an id (CCS number) and a list of codes", name)
    present = {entry["id"] for entry in entries.values()}
    for phenotype in schema.PHENOTYPES:
        if phenotype.ccs not in present:
            raise error(f"has no entry with id {phenotype.ccs} ({phenotype.name!r})", phenotype.ccs)
    return entries
