"""Small trees of raw tables and X-rays, and their builds; the fixtures are in conftest.py."""

import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from raw_tables import at, chart, image, lab, stay, write_mimic_cxr, write_mimic_iv

from medfuse_jax import records, schema

HEART_RATE = 220045
SECRET = "Mr Smith of 12 High Street"
SURNAME = "SMITH"  # made of characters that occur in ICD codes
ROOT = Path(__file__).parent.parent


def write_tree(root):
    """Write 12 stays of 20 h to 6 days with hourly heart rates, 11 X-rays (7 paired), and secrets in the free text."""
    stays, charts, labs, codes, images = [], [], [], [], []
    for n in range(12):
        los_h = 20 + 11 * n
        changes = {"deathtime": at(los_h)} if n == 8 else {}
        if n in (5, 11):
            changes |= dict.fromkeys(("gender", "admission_type", "first_careunit", "last_careunit"), SECRET)
        stays.append(stay(n, outtime=at(los_h), dischtime=at(los_h + 9), los=str(los_h / 24), **changes))
        charts += [chart(n, h, HEART_RATE, str(60 + (7 * n + h) % 50), warning=SECRET) for h in range(1, los_h)]
        charts.append(chart(n, 2, 220739, SECRET))
        labs.append(lab(n, 3, 50931, SECRET, valuenum="110", comments=SECRET))
        codes += [(n, "4019", 9)] if n % 2 else [(n, "J9601", 10)]
        codes += [(n, SECRET, 9), (n, SURNAME, 10)]
        if n < 7:
            images.append(image(n, 10 + n, Edema="1.0"))
        if n == 6:
            images.append(image(n, 70, k=1))
            images.append(image(n, 71, "PA", k=2))
        if n == 7:
            images.append(image(n, -1))
    images.append(image(99, 5))
    return write_mimic_iv(root / "iv", stays, charts, labs, codes), write_mimic_cxr(root / "cxr", images)


def write_one_stay(root, images=(), **options):
    """Write a tree of one stay with hourly heart rates."""
    charts = [chart(0, h, HEART_RATE, "61") for h in range(1, 60)]
    iv = write_mimic_iv(root / "iv", [stay(0)], charts, **options)
    return iv, write_mimic_cxr(root / "cxr", images, size=(32, 32)) if images else None


def read_all(out, task):
    """Return every record of a dataset, by split."""
    return {split: list(records.open_split(out, task, split)) for split in schema.SPLITS}


def by_stay(out, task):
    """Return the records of all splits by the number of their stay (raw_tables.stay)."""
    return {row["stay_id"] - 30_000_000: row for rows in read_all(out, task).values() for row in rows}


def file_contents(out):
    """Return a build's output files: path -> bytes."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.relative_to(out).parts[0] in (*schema.TASKS, "audit.html", "audit.json")
    }


def command(raw_tree, out, id_lists, *more):
    """Return the command that builds a tree at 1 h steps."""
    named = [f"--{name}={path}" for name, path in id_lists.items()]
    args = [f"--mimic_iv={raw_tree[0]}", f"--mimic_cxr={raw_tree[1]}", f"--out={out}", "--timestep_h=1", *named, *more]
    return [sys.executable, "-m", "data_prep.build", *args]


def assert_same_as_tfds(out, task):
    """Assert that records as we decode them are those that TFDS reads."""
    builder = tfds.builder_from_directory(out / task)
    for split in builder.info.splits:
        ours, theirs = records.open_split(out, task, split), builder.as_data_source(split)
        assert len(ours) == len(theirs) > 0
        for record, expected in zip(ours, theirs, strict=True):
            images = record.pop("images", record["image"])
            record["image"] = expected["image"][:0] if images is None else np.reshape(images, expected["image"].shape)
            assert record.keys() == expected.keys()
            for name, value in expected.items():
                value = value.decode() if isinstance(value, bytes) else value
                np.testing.assert_array_equal(record[name], value)
                assert np.ndim(value) == 0 or record[name].dtype == value.dtype, name
