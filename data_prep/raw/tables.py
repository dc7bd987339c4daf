"""Find and read the raw tables, in any published layout.

MIMIC-IV 1.0 keeps `patients` and `admissions` in `core/`, later versions in `hosp/`. Any table may be `.csv.gz`,
`.csv`, `.csv.zst` or `.parquet`, with column names in any case. Columns are read as text; the code that uses a value
parses it. Only known column names are kept and printed: those of a table without a header line are a patient's data.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl

from data_prep import progress
from data_prep.raw import invalid, parse, times
from medfuse_jax import schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

# Table -> the folders it may be in, its required columns.
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
# Columns that some versions lack.
_OPTIONAL = (
    *("admit_provider_id", "anchor_year_group", "ethnicity", "hospital_expire_flag", "race", "storetime"),
    *schema.RADIOLOGY_LABELS,
)
_KNOWN = {
    name.lower(): name
    for name in (*_OPTIONAL, *(n for _, names in MIMIC_IV.values() for n in names), *sum(MIMIC_CXR.values(), ()))
}
_LONG_ROW_BYTES = 1000  # the longest row of the demo's chartevents has 380
_ENDINGS = (".csv.gz", ".csv", ".csv.zst", ".parquet")  # the first that exists is read
_TIMES = {
    "icustays": ("intime", "outtime"),
    "admissions": ("admittime", "dischtime", "deathtime"),
    "patients": ("dod",),
}
# Rows of diagnoses_icd in the whole of 3.1, which has 3.0's layout but lacks two patients' rows (release notes; count
# from mimic-code's buildmimic/mysql/validate.sql).
DIAGNOSES_OF_3_1 = 6_364_488


@dataclasses.dataclass(frozen=True)
class Table:
    """One raw table; `name` is its path below the root, for messages and the manifest.

    names: known column -> its name in the file.
    """

    path: Path
    name: str
    names: dict[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """The known columns that the table has."""
        return tuple(self.names)

    def scan(self, *columns: str, with_is_long: bool = False) -> pl.LazyFrame:
        """Scan `columns` lazily, as text. Collect inside `reading(path)`.

        with_is_long: add the column `is_long`: whether the row may hide others, see `check_hidden_rows`. This parses
            every column, which nearly doubles the time for labevents; only then does polars miss no row between quotes.
        """
        frame = _scan(self.path)
        types = frame.collect_schema() if self.path.suffix == ".parquet" else {}
        for name in columns:
            dtype = types.get(self.names[name])
            rounds = dtype == pl.Float16 or (dtype == pl.Float32 and name != "itemid")  # itemids have 6 digits
            if name.endswith("id") and rounds:
                what = f"{self.path}: column {name!r} is of type {dtype}, which rounds ids of 8 digits"
                raise UserError(f"{what}: write it as integers", path=self.path, value=name)
        selected = [_as_text(self.names[name], types.get(self.names[name])).alias(name) for name in columns]
        if with_is_long:
            is_long = pl.lit(False) if types else pl.sum_horizontal(pl.all().str.len_bytes()) > _LONG_ROW_BYTES
            selected.append(is_long.alias("is_long"))
        return frame.select(selected)

    def read(self, *columns: str) -> pl.DataFrame:
        """Read `columns` as text, without the rows that are blank in all; raise UserError if the file is damaged."""
        with reading(self.path):
            frame = self.scan(*columns, with_is_long=True).collect(engine="streaming")
        if frame["is_long"].any():
            self.check_hidden_rows()
        return without_blank_rows(frame.drop("is_long"))

    def check_hidden_rows(self) -> None:
        """Raise UserError if a cell holds rows: of two quotes in cells that are not quoted, all that is between them.

        A row has as many commas as the table, and no space in its first three cells, except before a clock time; lines
        of free text have spaces.
        """
        frame = _scan(self.path)
        num_commas = len(frame.collect_schema().names()) - 1
        first = r"[^\n, ]*(?: \d\d?:[^\n, ]*)?,"  # the third cell of admissions is a time
        row = rf"\n(?:{first}){{{min(3, num_commas)}}}(?:[^\n,]*,){{{max(0, num_commas - 3)}}}"
        progress.say(f"looking for rows between quotes in {self.name}")
        with reading(self.path):
            hidden = frame.select(pl.all().str.count_matches(row)).sum().collect(engine="streaming")
        if num_hidden := hidden.fill_null(0).sum_horizontal().item():
            message = (
                f"{self.path}: {num_hidden:,} rows would be lost, because they are between two quotes in cells without "
                'quotes around them, such as 3" long: write the table again with its text in quotes'
            )
            raise UserError(message, path=self.path, value=num_hidden)


def without_blank_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """Drop the rows of which no column (text) has a value, such as a spreadsheet leaves below a table."""
    candidates = parse.missing(frame.to_series(0))
    if not candidates.any():  # the fast path: tables as downloaded
        return frame
    return frame.filter(~pl.all_horizontal(parse.missing(pl.col(name)) for name in frame.columns))


def fingerprints(tables: Iterable[Table], cache: Path) -> list[dict]:
    """Return each table's name, size and SHA-256.

    Hashing gigabytes at every build would be slow, so `cache` (a JSON file) keeps each hash with the file's size,
    mtime, ctime (which cannot be set back) and inode; a table is hashed again if any of them changed. Builds compare
    hashes only, so moving, copying or touching a table triggers no rebuild.
    """
    try:
        known = files.read_json(cache, "hash the tables again")
    except UserError:
        known = {}
    current, result = {}, []
    for table in tables:
        with reading(table.path):
            entry = files.remembered_sha256(table.path, known)
        current[str(table.path.resolve())] = entry
        result.append({"file": table.name, "size_bytes": entry["seen"][0], "sha256": entry["sha256"]})
    if any(known.get(path) != entry for path, entry in current.items()):
        files.write_json(cache, known | current)
    return result


def _as_text(column: str, dtype: pl.DataType | None) -> pl.Expr:
    if isinstance(dtype, pl.Datetime):
        return pl.col(column).dt.to_string("%Y-%m-%d %H:%M:%S%.f" + ("%z" if dtype.time_zone else ""))
    if isinstance(dtype, pl.Duration):  # a clock time, as pandas may hold StudyTime
        clock = pl.col(column).dt.total_nanoseconds().cast(pl.Time, strict=False).cast(pl.String)
        return clock.fill_null(pl.col(column).dt.to_string("polars"))  # 1d 6h: not a clock time, and so unreadable
    return pl.col(column).cast(pl.String)


def _scan(path: Path) -> pl.LazyFrame:
    if path.suffix == ".parquet":
        return pl.scan_parquet(path)
    # Lossy: one byte that is not UTF-8, for example in a comment, must not make the table unreadable.
    return pl.scan_csv(path, infer_schema=False, truncate_ragged_lines=True, encoding="utf8-lossy")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors while reading `path` into a UserError that quotes none of its content."""
    try:
        yield
    except pl.exceptions.NoDataError:
        raise UserError(f"{path} is empty; download it again", path=path) from None
    except PermissionError:
        raise UserError(f"{path} may not be read; change its permissions", path=path) from None
    except (OSError, pl.exceptions.PolarsError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "CSV"
        is_cut = "unexpected end" in str(error)
        what = "it is truncated" if is_cut else f"it is not a complete {kind} file"
        if kind == "CSV" and not is_cut:
            what += ", or a quote in it is not closed"
        raise UserError(
            f"{path} cannot be read: {what}; download it again and compare its SHA-256", path=path
        ) from None


def _open(path: Path, root: Path, required: tuple[str, ...]) -> Table:
    with reading(path):
        present = _scan(path).collect_schema().names()
    names: dict[str, str] = {}
    for name in present:
        if known := _KNOWN.get(name.strip().lower()):
            names.setdefault(known, name)
    missing = [column for column in required if column not in names]
    if missing:
        has = ", ".join(column for column in required if column in names) or "none"
        message = (
            f"{path} has no column {missing[0]!r} (of those needed it has: {has}); is it the right table, "
            "downloaded completely, in UTF-8, with commas between its columns, all quotes closed, and a header first?"
        )
        raise UserError(message, path=path, field=missing[0])
    return Table(path, str(path.relative_to(root)), names)


def _folder(root: str | Path, flag: str) -> Path:
    if not Path(root).is_dir():
        raise UserError(f"--{flag}={root} is not a folder", field=f"--{flag}", path=root)
    return Path(root)


def mimic_iv(root: str | Path) -> dict[str, Table]:
    """Open the MIMIC-IV tables under `root`; raise UserError for a missing table or column."""
    root = _folder(root, "mimic_iv")
    found: dict[str, Table] = {}
    copies: list[tuple[Path, Path]] = []
    for name, (folders, required) in MIMIC_IV.items():
        candidates = [root / folder / f"{name}{end}" for folder in folders for end in _ENDINGS]
        paths = [path for path in candidates if path.is_file()]
        if not paths:
            if folder := next((path for path in candidates if path.is_dir()), None):
                raise UserError(f"{folder} is a folder; write the table to one file", field="--mimic_iv", path=folder)
            message = (
                f"{root} has no {folders[0]}/{name}.csv.gz (or .csv, .csv.zst, .parquet); --mimic_iv must be the "
                "folder that contains icu/ and hosp/, with all tables of MIMIC-IV"
            )
            raise UserError(message, field="--mimic_iv", path=candidates[0])
        found[name] = _open(paths[0], root, required)
        copies += [(paths[0], copy) for copy in paths[1:]]
    _warn_of_copies(copies)
    return found


def _warn_of_copies(copies: list[tuple[Path, Path]]) -> None:
    """Warn of tables that are there twice. copies: the file that is read, and one that is not."""
    if copies:
        read, unread = copies[0]
        more = f" ({len(copies) - 1} more such files are not read)" if len(copies) > 1 else ""
        progress.say(f"warning: {read} is read, not {unread}{more}")


def mimic_iv_version(tables: dict[str, Table]) -> str:
    """Return the version in the folder's name if the files agree with it, else the versions the files allow."""
    possible = _possible_versions(tables)
    # PhysioNet's folders: mimiciv/3.1 (wget), mimic-iv-3.1 (zip), mimic-iv-demo-2.2 (the demo).
    names = "/".join(tables["patients"].path.resolve().parts[-6:])
    named = re.findall(r"mimic-?iv(?:-clinical-database)?(-demo)?[-/](\d\.\d)(?=/)", names)
    if named and named[-1][1] in possible:
        demo, version = named[-1]
        return f"{version} (demo)" if demo else version
    return " or ".join(possible)


def _possible_versions(tables: dict[str, Table]) -> list[str]:
    """Return the versions that the files allow.

    By the release notes, 1.0 has core/, 2.2 adds the admitting provider, and 3.0 adds the patients of 2020 to 2022.
    """
    patients = tables["patients"]
    if patients.name.startswith("core"):
        return ["1.0"]
    if "admit_provider_id" not in tables["admissions"].columns:
        return ["2.0", "2.1"]
    if "anchor_year_group" in patients.columns:
        groups = patients.read("anchor_year_group")["anchor_year_group"]
        if groups.str.starts_with("2020").any():
            complete = len(tables["diagnoses_icd"].read("icd_version")) == DIAGNOSES_OF_3_1
            return ["3.1"] if complete else ["3.0", "3.1"]
    return ["2.2"]


def mimic_cxr(root: str | Path) -> dict[str, Table]:
    """Open the MIMIC-CXR-JPG tables under `root`: 'metadata', 'chexpert' and, if present, 'split'."""
    root = _folder(root, "mimic_cxr")
    found: dict[str, Table] = {}
    copies: list[tuple[Path, Path]] = []
    for name, required in MIMIC_CXR.items():
        paths = [p for end in _ENDINGS for p in sorted(root.glob(f"mimic-cxr-[0-9]*-{name}{end}"), reverse=True)]
        paths = [p for p in paths if p.is_file()]
        if paths:
            found[name] = _open(paths[0], root, required)
            copies += [(paths[0], copy) for copy in paths[1:]]
        elif name != "split":
            path = root / f"mimic-cxr-2.0.0-{name}.csv.gz"
            message = (
                f"{root} has no {path.name} (or .csv, .csv.zst, .parquet); --mimic_cxr must be the MIMIC-CXR-JPG "
                "folder, with its tables and files/"
            )
            raise UserError(message, field="--mimic_cxr", path=path)
    _warn_of_copies(copies)
    return found


def mimic_cxr_version(tables: dict[str, Table]) -> str:
    """Return the MIMIC-CXR-JPG version, or the versions that the files allow.

    2.1.0 has the tables and X-rays of 2.0.0, and adds IMAGE_FILENAMES and a labelled test set (release notes). README
    and LICENSE.txt are ignored: a copy of 2.1.0 may have those of 2.0.0.
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


def count_unreadable_times(raw: dict[str, Table]) -> dict[str, int]:
    """Count the unreadable times of stays, admissions and deaths by 'table.column', warn of them, and refuse above 1 %.

    Raises UserError. Times of events are counted where events are read (ehr/events.py).
    """
    counts = {}
    for name, columns in _TIMES.items():
        table = raw[name].read(*columns)
        for column in columns:
            tally = invalid.Tally(invalid.TIMES).add(table[column], times.read(table[column]).is_not_null())
            counts[f"{name}.{column}"] = tally.check(raw[name].path, column)
    return counts
