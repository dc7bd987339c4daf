"""Small trees of raw tables and X-rays, and what a build makes of them; its fixtures are in conftest.py."""

import sys
from pathlib import Path

from raw_tables import at, chart, image, lab, stay, write_mimic_cxr, write_mimic_iv

from medfuse_jax import records, schema

HEART_RATE = 220045
SECRET = "Mr Smith of 12 High Street"
SURNAME = "SMITH"  # of characters that codes have, too
ROOT = Path(__file__).parent.parent


def write_tree(root):
    """12 stays of 20 h to 6 days, heart rates every hour, 11 X-rays of which 6 pair; secrets in the free text."""
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
    """A tree of one stay with a heart rate every hour."""
    charts = [chart(0, h, HEART_RATE, "61") for h in range(1, 60)]
    iv = write_mimic_iv(root / "iv", [stay(0)], charts, **options)
    return iv, write_mimic_cxr(root / "cxr", images, size=(32, 32)) if images else None


def read_all(out, task):
    """Every record of a dataset, by split."""
    return {split: list(records.open_split(out, task, split)) for split in schema.SPLITS}


def file_contents(out):
    """Every file of a build that is its output: path -> bytes."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.relative_to(out).parts[0] in (*schema.TASKS, "audit.html", "audit.json")
    }


def command(raw_tree, out, id_lists, *more):
    """The command line that builds a tree at hourly steps."""
    named = [f"--{name}={path}" for name, path in id_lists.items()]
    args = [f"--mimic_iv={raw_tree[0]}", f"--mimic_cxr={raw_tree[1]}", f"--out={out}", "--timestep_h=1", *named, *more]
    return [sys.executable, "-m", "data_prep.build", *args]
