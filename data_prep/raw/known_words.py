"""The words that MIMIC-IV 1.0 to 3.1 have in the columns that are copied to the records; any other may be free text.

A new version may bring new ones: they are counted (the build says so, and the audit), and belong into these lists.
"""

import polars as pl

from data_prep import progress

OTHER = "OTHER"  # a word that is none of these
# Sources: of `patients`, MIMIC-IV's documentation; of `admissions`, the code system mimic-admission-type of its FHIR
# version (1.3.0); of `icustays`, the wards of `transfers`, of which a stay's units are some (in 2.2 ICUs and step-down
# units, in 3.1 wards and PACU too): MIT-LCP/mimic-code issue 924, and published code for 1.0 to 3.1 that lists them.
WORDS = {
    "gender": ("F", "M"),
    "admission_type": (
        "AMBULATORY OBSERVATION",
        "DIRECT EMER.",
        "DIRECT OBSERVATION",
        "ELECTIVE",
        "EU OBSERVATION",
        "EW EMER.",
        "OBSERVATION ADMIT",
        "SURGICAL SAME DAY ADMISSION",
        "URGENT",
    ),
    "first_careunit": (
        "Cardiac Surgery",
        "Cardiac Vascular Intensive Care Unit (CVICU)",
        "Cardiology",
        "Cardiology Surgery Intermediate",
        "Coronary Care Unit (CCU)",
        "Discharge Lounge",
        "Emergency Department",
        "Emergency Department Observation",
        "Hematology/Oncology",
        "Hematology/Oncology Intermediate",
        "Intensive Care Unit (ICU)",
        "Labor & Delivery",
        "Med/Surg",
        "Med/Surg/GYN",
        "Med/Surg/Trauma",
        "Medical Intensive Care Unit (MICU)",
        "Medical/Surgical (Gynecology)",
        "Medical/Surgical Intensive Care Unit (MICU/SICU)",
        "Medicine",
        "Medicine/Cardiology",
        "Medicine/Cardiology Intermediate",
        "Neonatal Intensive Care Unit (NICU)",
        "Neuro Intermediate",
        "Neuro Stepdown",
        "Neuro Surgical Intensive Care Unit (Neuro SICU)",
        "Neurology",
        "Nursery",
        "Nursery - Well Babies",
        "Observation",
        "Obstetrics (Postpartum & Antepartum)",
        "Obstetrics Antepartum",
        "Obstetrics Postpartum",
        "Oncology",
        "PACU",
        "Psychiatry",
        "Special Care Nursery (SCN)",
        "Surgery",
        "Surgery/Pancreatic/Biliary/Bariatric",
        "Surgery/Trauma",
        "Surgery/Vascular/Intermediate",
        "Surgical Intensive Care Unit (SICU)",
        "Surgical Intermediate",
        "Thoracic Surgery",
        "Transplant",
        "Trauma SICU (TSICU)",
        "Unknown",
        "Vascular",
    ),
}


def word(column: str) -> pl.Expr:
    """A text column as one of its words, 'OTHER' where it is none of them, '' where there is none."""
    text = pl.col(column).fill_null("").str.strip_chars()
    return pl.when(text.is_in(["", *WORDS[column]])).then(text).otherwise(pl.lit(OTHER)).alias(column)


def report(frame: pl.DataFrame) -> None:
    """Says how many rows have a word that is not known, by column, and never which."""
    for column in WORDS:
        others = int((frame[column] == OTHER).sum())
        if others:
            progress.say(f"warning: the {column} of {others:,} stays is no known word and becomes {OTHER!r}")
