"""The words that MIMIC-IV 1.0 to 3.1 uses in the text columns copied to the records; anything else may be free text.

A new version of MIMIC-IV may use more words: the build and the audit count unknown ones; add them to the lists.
"""

import polars as pl

from data_prep import progress
from medfuse_jax import schema

OTHER = "OTHER"  # replaces any other word
# Sources. gender: MIMIC-IV's documentation. admission_type: code system mimic-admission-type of MIMIC-IV on FHIR 1.3.0.
# first_careunit: the wards of `transfers` (2.2 has ICUs and step-down units, 3.1 also wards and PACU), from
# MIT-LCP/mimic-code issue 924 and published code for 1.0 to 3.1.
_ADMISSION_TYPES = """
    AMBULATORY OBSERVATION, DIRECT EMER., DIRECT OBSERVATION, ELECTIVE, EU OBSERVATION, EW EMER., OBSERVATION ADMIT,
    SURGICAL SAME DAY ADMISSION, URGENT
"""
_CARE_UNITS = """
    Cardiac Surgery, Cardiac Vascular Intensive Care Unit (CVICU), Cardiology, Cardiology Surgery Intermediate,
    Coronary Care Unit (CCU), Discharge Lounge, Emergency Department, Emergency Department Observation,
    Hematology/Oncology, Hematology/Oncology Intermediate, Intensive Care Unit (ICU), Labor & Delivery, Med/Surg,
    Med/Surg/GYN, Med/Surg/Trauma, Medical Intensive Care Unit (MICU), Medical/Surgical (Gynecology),
    Medical/Surgical Intensive Care Unit (MICU/SICU), Medicine, Medicine/Cardiology, Medicine/Cardiology Intermediate,
    Neonatal Intensive Care Unit (NICU), Neuro Intermediate, Neuro Stepdown,
    Neuro Surgical Intensive Care Unit (Neuro SICU), Neurology, Nursery, Nursery - Well Babies, Observation,
    Obstetrics (Postpartum & Antepartum), Obstetrics Antepartum, Obstetrics Postpartum, Oncology, PACU, Psychiatry,
    Special Care Nursery (SCN), Surgery, Surgery/Pancreatic/Biliary/Bariatric, Surgery/Trauma,
    Surgery/Vascular/Intermediate, Surgical Intensive Care Unit (SICU), Surgical Intermediate, Thoracic Surgery,
    Transplant, Trauma SICU (TSICU), Unknown, Vascular
"""


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


WORDS = {"gender": ("F", "M"), "admission_type": _split(_ADMISSION_TYPES), "first_careunit": _split(_CARE_UNITS)}


def word(column: str) -> pl.Expr:
    """Return a text column with unknown words replaced by 'OTHER' and missing ones by ''."""
    text = pl.col(column).fill_null("").str.strip_chars()
    return pl.when(text.is_in(["", *WORDS[column]])).then(text).otherwise(pl.lit(OTHER)).alias(column)


# How the values of MIMIC-IV's race (ethnicity in 1.0) begin. South Americans and Portuguese, which it lists apart, more
# than one race, and any other text are 'Other'.
_RACE_STARTS = (("WHITE", "White"), ("BLACK", "Black"), ("HISPANIC", "Hispanic or Latino"), ("ASIAN", "Asian"))
_RACE_UNKNOWN = ("", "UNKNOWN", "UNABLE TO OBTAIN", "PATIENT DECLINED TO ANSWER")


def race(column: str) -> pl.Expr:
    """Return the groups of schema.RACES of a text column."""
    text = pl.col(column).fill_null("").str.strip_chars().str.to_uppercase()
    *_, other, unknown = schema.RACES
    group = pl.when(text.is_in(_RACE_UNKNOWN)).then(pl.lit(unknown))
    for start, name in _RACE_STARTS:
        group = group.when(text.str.starts_with(start)).then(pl.lit(name))
    return group.otherwise(pl.lit(other)).alias("race")


def warn_of_others(frame: pl.DataFrame) -> None:
    """Warn how many rows have an unknown word, by column, without printing the words."""
    for column in WORDS:
        others = int((frame[column] == OTHER).sum())
        if others:
            progress.say(f"warning: {others:,} stays have an unknown {column}, replaced by {OTHER!r}")
