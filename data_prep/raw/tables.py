"""Finding and reading the raw tables, in any published layout, with one clear line for what is wrong.

MIMIC-IV 1.0 keeps `patients` and `admissions` in `core/`, later versions in `hosp/`; every table
may be `.csv` or `.csv.gz`. All columns are read as text: what a row holds is judged where it is used.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl

from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

# Table -> the folders it may be in, and the columns that must be there.
MIMIC_IV = {
    "patients": (("hosp", "core"), ("subject_id", "gender", "anchor_age", "dod")),
    "admissions": (
        ("hosp", "core"),
        ("subject_id", "hadm_id", "admittime", "dischtime", "deathtime", "admission_type"),
    ),
    "diagnoses_icd": (("hosp",), ("subject_id", "hadm_id", "icd_code", "icd_version")),
    "icustays": (
        ("icu",),
        ("subject_id", "hadm_id", "stay_id", "first_careunit", "last_careunit", "intime", "outtime", "los"),
    ),
    "chartevents": (("icu",), ("subject_id", "hadm_id", "stay_id", "charttime", "itemid", "value")),
    "labevents": (("hosp",), ("subject_id", "hadm_id", "charttime", "itemid", "value", "valuenum")),
}
MIMIC_CXR = {
    "metadata": ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"),
    "chexpert": ("study_id",),
    "split": ("dicom_id",),
}
# Rows of diagnoses_icd in the whole of 3.1, whose layout is 3.0's: it left out the rows of two patients whom `patients`
# does not know (its release notes; the count is that of mimic-code's buildmimic/mysql/validate.sql).
DIAGNOSES_OF = {6_364_488: "3.1"}


@dataclasses.dataclass(frozen=True)
class Table:
    """One raw table: its file, and the name it goes by in messages and the manifest."""

    path: Path
    name: str
    columns: tuple[str, ...]

    def scan(self, *columns: str) -> pl.LazyFrame:
        """Reads `columns` lazily, as text. Collect it inside `reading(path)`."""
        return _scan(self.path).select(columns)

    def read(self, *columns: str) -> pl.DataFrame:
        """Reads `columns` as text; UserError where the file is damaged."""
        with reading(self.path):
            return self.scan(*columns).collect(engine="streaming")


def fingerprints(tables: Iterable[Table], cache: Path) -> list[dict]:
    """What tells each table from another: its name, size and the SHA-256 of its content.

    Reading every table at every build would be dear (they are gigabytes), and size and mtime alone do not tell a
    file whose mtime was set back. So `cache` (a JSON file) keeps each hash beside the file's size, mtime, ctime
    (which nobody can set back) and inode, and a table is read again where one of them is another. Hashes and not the
    times themselves are the inputs of a build: moving, copying or touching a table makes nothing anew.
    """
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    found, result = {}, []
    for table in tables:
        with reading(table.path):
            stat = table.path.stat()
            seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            before = known.get(str(table.path.resolve()), {})
            sha256 = before["sha256"] if before.get("seen") == seen else files.sha256(table.path)
        found[str(table.path.resolve())] = {"seen": seen, "sha256": sha256}
        result.append({"file": table.name, "size_bytes": stat.st_size, "sha256": sha256})
    if any(known.get(path) != entry for path, entry in found.items()):
        files.write_text(cache, json.dumps(known | found, indent=1) + "\n")
    return result


def _scan(path: Path) -> pl.LazyFrame:
    # Lossy: a byte that is no UTF-8, in a comment for example, is no reason to read none of the table.
    return pl.scan_csv(path, infer_schema=False, truncate_ragged_lines=True, encoding="utf8-lossy")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong while `path` is read into a UserError that quotes nothing of its content."""
    try:
        yield
    except pl.exceptions.NoDataError:
        raise UserError(f"{path} is empty; download it again") from None
    except PermissionError:
        raise UserError(f"{path} may not be read; change its permissions") from None
    except (OSError, pl.exceptions.ComputeError, pl.exceptions.SchemaError) as error:
        what = "it ends too early" if "unexpected end" in str(error) else "it is not a whole CSV file"
        raise UserError(f"{path} cannot be read: {what}; download it again and compare its SHA-256 sum") from None


def _open(path: Path, root: Path, required: tuple[str, ...]) -> Table:
    with reading(path):
        present = tuple(_scan(path).collect_schema().names())
    missing = [column for column in required if column not in present]
    if missing:
        if same := [column for column in present if column.lower() == missing[0]]:
            raise UserError(f"{path} has a column {same[0]!r}: write its header as MIMIC does, {missing[0]!r}")
        raise UserError(
            f"{path} has no column {missing[0]!r} (it has: {', '.join(present[:20])}); "
            "is it the right table, downloaded whole?"
        )
    return Table(path, str(path.relative_to(root)), present)


def _folder(root: str | Path, flag: str) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--{flag}={root} is not a folder")
    return root


def mimic_iv(root: str | Path) -> dict[str, Table]:
    """The MIMIC-IV tables under `root`; UserError names the table or column that is not there."""
    root = _folder(root, "mimic_iv")
    found = {}
    for name, (folders, required) in MIMIC_IV.items():
        candidates = [root / folder / f"{name}{end}" for folder in folders for end in (".csv.gz", ".csv")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(
                f"{root} holds no {folders[0]}/{name}.csv.gz (or .csv): give --mimic_iv the folder with icu/ and "
                "hosp/, with every table of MIMIC-IV downloaded"
            )
        found[name] = _open(path, root, required)
    return found


def mimic_iv_version(tables: dict[str, Table]) -> str:
    """The MIMIC-IV version: that of the folder's name as downloaded where the files agree, else what they tell."""
    candidates = _possible_versions(tables)
    patients = tables["patients"]
    # PhysioNet's folders: mimiciv/3.1 (wget) and mimic-iv-3.1 (zip); the demo's: mimic-iv-demo-2.2.
    names = "/".join(patients.path.resolve().parts[-6:])
    named = re.findall(r"mimic-?iv(?:-clinical-database)?(-demo)?[-/](\d\.\d)(?=/)", names)
    if named and named[-1][1] in candidates:
        demo, version = named[-1]
        return f"{version} (demo)" if demo else version
    return " or ".join(candidates)


def _possible_versions(tables: dict[str, Table]) -> list[str]:
    """By the release notes: 1.0 has core/, 2.2 adds the admitting provider, 3.0 the patients of 2020 to 2022.

    A whole release 3 is told by its number of diagnoses. Its texts tell nothing: none is sure to name the version.
    """
    patients = tables["patients"]
    if patients.name.startswith("core"):
        return ["1.0"]
    if "admit_provider_id" not in tables["admissions"].columns:
        return ["2.0", "2.1"]
    if "anchor_year_group" in patients.columns:
        groups = patients.read("anchor_year_group")["anchor_year_group"]
        if groups.str.starts_with("2020").any():
            rows = len(tables["diagnoses_icd"].read("icd_version"))
            return [DIAGNOSES_OF[rows]] if rows in DIAGNOSES_OF else ["3.0", "3.1"]
    return ["2.2"]


def mimic_cxr(root: str | Path) -> dict[str, Table]:
    """The MIMIC-CXR-JPG tables under `root`: 'metadata' and 'chexpert', and 'split' where there is one."""
    root = _folder(root, "mimic_cxr")
    found = {}
    for name, required in MIMIC_CXR.items():
        paths = sorted(p for p in root.glob(f"mimic-cxr-*-{name}.csv*") if p.name.endswith((".csv", ".csv.gz")))
        if paths:
            found[name] = _open(paths[-1], root, required)
        elif name != "split":
            raise UserError(
                f"{root} holds no mimic-cxr-2.0.0-{name}.csv.gz (or .csv): give --mimic_cxr the MIMIC-CXR-JPG folder "
                "with its tables and files/"
            )
    return found


def mimic_cxr_version(tables: dict[str, Table]) -> str:
    """The MIMIC-CXR-JPG version, where the folder tells it.

    2.1.0 has the tables and X-rays of 2.0.0 and adds IMAGE_FILENAMES and a labelled test set (its release notes and
    list of files). Their README and LICENSE.txt are not asked: that of 2.1.0 may be the one of 2.0.0.
    """
    metadata = tables["metadata"].path
    root = metadata.parent
    version = metadata.name.removeprefix("mimic-cxr-").split("-")[0]
    if version != "2.0.0":
        return version
    sums = root / "SHA256SUMS.txt"
    with reading(sums):
        listed = sums.read_bytes() if sums.is_file() else b""
    if any(root.glob("mimic-cxr-2.1.0-*")) or (root / "IMAGE_FILENAMES").is_file() or b"mimic-cxr-2.1.0-" in listed:
        return "2.1.0"
    # mimic-cxr-jpg/2.0.0 (wget), mimic-cxr-jpg-2.0.0.physionet.org (the bucket)
    named = re.findall(r"mimic-cxr-jpg[-/](\d\.\d\.\d)(?=[/.])", "/".join(root.resolve().parts[-5:]) + "/")
    if listed or named == ["2.0.0"]:
        return "2.0.0"
    return named[-1] if named else "2.0.0 or 2.1.0"


def integer(column: str) -> pl.Expr:
    """A text column as int64, null where it is no whole number; '20000000.0' is one, as pandas writes ids."""
    return pl.col(column).map_batches(_integers, return_dtype=pl.Int64)


def _integers(text: pl.Series) -> pl.Series:
    text = text.str.strip_chars()
    found = text.cast(pl.Int64, strict=False)
    if found.null_count() == text.null_count():  # as in every table as it was downloaded
        return found
    return found.zip_with(found.is_not_null(), text.str.extract(r"^(-?\d+)\.0*$", 1).cast(pl.Int64, strict=False))


def number(column: str) -> pl.Expr:
    """A text column as a finite float64, null where it is none."""
    value = pl.col(column).str.strip_chars().cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def time(column: str) -> pl.Expr:
    """A text column 'YYYY-MM-DD HH:MM:SS' as a datetime, null where it is none.

    A 'T' may stand between date and clock, the seconds may be missing.
    """
    return pl.col(column).map_batches(_times, return_dtype=pl.Datetime("us"))


def _times(text: pl.Series) -> pl.Series:
    whole = text.str.slice(0, 19).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)
    if whole.null_count() == text.null_count():  # as in every table as it was downloaded
        return whole
    spaced = text.str.strip_chars().str.replace("T", " ", literal=True)
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M"):
        other = spaced.str.slice(0, 19).str.to_datetime(form, time_unit="us", strict=False)
        whole = whole.zip_with(whole.is_not_null(), other)
    return whole


def date(column: str) -> pl.Expr:
    """A text column that begins 'YYYY-MM-DD' as a datetime at 00:00, null where it is none."""
    return pl.col(column).str.strip_chars().str.slice(0, 10).str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)
