"""Tiny synthetic raw trees: tests give the rows that matter, and defaults fill in the rest."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image

from medfuse_jax import schema

START = "2150-01-01 00:00:00"

HEADERS = {
    "patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,race,"
    "hospital_expire_flag",
    "icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning",
    "labevents": "labevent_id,subject_id,hadm_id,itemid,charttime,storetime,value,valuenum,valueuom,comments",
    "diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
}


def write_table(path: Path, header: str, rows: list[dict], gz: bool = True) -> None:
    """Write a CSV of `rows` (column -> value, others blank); with `gz`, add `.gz` to the name."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header.split(","), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if gz:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    else:
        path.write_text(text.getvalue())


def stay(n: int, **changes) -> dict:
    """Return the n-th stay, with its patient and admission in one dict (3 days from START, aged 60)."""
    return {
        "subject_id": 10_000_000 + n,
        "hadm_id": 20_000_000 + n,
        "stay_id": 30_000_000 + n,
        "first_careunit": "Medical Intensive Care Unit (MICU)",
        "last_careunit": "Medical Intensive Care Unit (MICU)",
        "intime": START,
        "outtime": "2150-01-04 00:00:00",
        "los": "3.0",
        "gender": "F",
        "anchor_age": 60,
        "anchor_year_group": "2011 - 2013",
        "admittime": "2149-12-31 00:00:00",
        "dischtime": "2150-01-05 00:00:00",
        "admission_type": "URGENT",
    } | changes


def chart(n: int, hour: float, itemid: int, value, **changes) -> dict:
    """Return a chart row of the n-th stay, `hour` hours after START."""
    ids = {key: stay(n)[key] for key in ("subject_id", "hadm_id", "stay_id")}
    return ids | {"charttime": at(hour), "itemid": itemid, "value": value, "valuenum": value} | changes


def lab(n: int, hour: float, itemid: int, value, **changes) -> dict:
    """Return a laboratory row of the n-th admission, `hour` hours after START."""
    ids = {key: stay(n)[key] for key in ("subject_id", "hadm_id")}
    return ids | {"charttime": at(hour), "itemid": itemid, "value": value, "valuenum": value} | changes


def at(hour: float) -> str:
    """Return START plus hours, in the tables' format."""
    moment = np.datetime64("2150-01-01T00:00:00") + np.timedelta64(round(hour * 3600), "s")
    return str(moment).replace("T", " ")


def write_mimic_iv(root: Path, stays: list[dict], charts=(), labs=(), codes=(), layout: str = "hosp", gz: bool = True):
    """Write a MIMIC-IV tree. codes: (n, icd_code, icd_version). layout: 'hosp', or 'core' of 1.0. Return `root`."""

    headers = dict(HEADERS)
    if layout == "core":
        headers["admissions"] = "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,ethnicity"

    def once(table: str, key: str) -> list[dict]:
        columns = headers[table].split(",")
        rows = {row[key]: {c: row[c] for c in columns if c in row} for row in stays}
        return list(rows.values())

    columns = headers["admissions"].split(",")
    admissions = [{c: v for c, v in row.items() if c in columns} for row in once("admissions", "hadm_id")]
    diagnoses = [
        {"subject_id": stay(n)["subject_id"], "hadm_id": stay(n)["hadm_id"], "icd_code": code, "icd_version": version}
        for n, code, version in codes
    ]
    for folder, name, rows in (
        (layout, "patients", once("patients", "subject_id")),
        (layout, "admissions", admissions),
        ("icu", "icustays", once("icustays", "stay_id")),
        ("icu", "chartevents", charts),
        ("hosp", "labevents", labs),
        ("hosp", "diagnoses_icd", diagnoses),
    ):
        write_table(root / folder / f"{name}.csv", headers[name], list(rows), gz)
    return root


def image(n: int, hour: float, view: str = "AP", k: int = 0, **changes) -> dict:
    """Return the k-th X-ray of the n-th patient, `hour` hours after START; label names as keys set labels."""
    date, clock = at(hour).split(" ")
    return {
        "dicom_id": f"image-{n:04d}-{k:02d}",
        "subject_id": 10_000_000 + n,
        "study_id": 50_000_000 + 100 * n + k,
        "ViewPosition": view,
        "StudyDate": date.replace("-", ""),
        "StudyTime": f"{int(clock.replace(':', ''))}.5",  # a float, so without leading zeros
    } | changes


def image_path(row: dict) -> str:
    """Return an X-ray's path in MIMIC-CXR-JPG."""
    subject = str(row["subject_id"])
    return f"files/p{subject[:2]}/p{subject}/s{row['study_id']}/{row['dicom_id']}.jpg"


def write_mimic_cxr(root: Path, images: list[dict], size=(80, 64), version: str = "2.0.0", gz: bool = True) -> Path:
    """Write a MIMIC-CXR-JPG tree with a small JPEG of noise (width, height) per X-ray. Return `root`."""
    header = "dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime"
    only = [{c: row[c] for c in header.split(",")} for row in images]
    write_table(root / f"mimic-cxr-{version}-metadata.csv", header, only, gz)
    split = [{c: row[c] for c in ("dicom_id", "study_id", "subject_id")} | {"split": "train"} for row in images]
    write_table(root / f"mimic-cxr-{version}-split.csv", "dicom_id,study_id,subject_id,split", split, gz)
    labels = {
        row["study_id"]: {k: row[k] for k in ("subject_id", "study_id", *schema.RADIOLOGY_LABELS) if k in row}
        for row in images
    }
    header = "subject_id,study_id," + ",".join(schema.RADIOLOGY_LABELS)
    write_table(root / f"mimic-cxr-{version}-chexpert.csv", header, list(labels.values()), gz)
    for seed, row in enumerate(images):
        path = root / image_path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8), np.uint8)
        Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(path, quality=90)
    return root
