"""Precomputed features of X-rays (config.data.cxr_features), which are read instead of their pixels.

Shapes: M X-rays of the file, N records of a split, J X-rays that are read, of all records together, E features; of a
batch: D devices, B rows, P images.
"""

import dataclasses
import functools
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medfuse_jax import schema
from medfuse_jax.data.images import StayImages
from medfuse_jax.runtime.errors import UserError

FIELD = "config.data.cxr_features"
SUFFIXES = (".npz", ".parquet", ".csv")
_ID = "dicom_id"
# Numbers of a table that are no features: ids, and the index that pandas writes unless told not to.
_NOT_FEATURES = ("", "index", "level_0", "subject_id", "study_id", "stay_id", "hadm_id")
_PANDAS_INDEX = ("Unnamed: ", "__index_level_")  # and a number
_NOT_UTF8 = f"has a {_ID} that is not UTF-8 text"
_CHUNK_ROWS = 4096
# What numpy, zipfile and zlib raise for damaged files.
_DAMAGED = (AttributeError, EOFError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError)
_DAMAGED += (struct.error, zipfile.BadZipFile, zlib.error)
_HOW = "docs/encoders.md shows how to make the file"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What features are standardised by: mean and deviation [E], of the train split's X-rays that are read."""

    mean_E: np.ndarray
    std_E: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of features, and how a run reads it.

    dicom_id_M is sorted; row_M is the row of each in feature_ME, which is as in the file.
    given_by: the config field or flag that names the file, for messages. statistics: those of a trained run, to
    standardise by; None for those of the train split. splits: those whose X-rays the file must have.
    """

    path: Path
    dicom_id_M: np.ndarray
    row_M: np.ndarray
    feature_ME: np.ndarray
    given_by: str = FIELD
    statistics: Statistics | None = None
    splits: Sequence[str] = schema.SPLITS

    def rows(self, dicom_id_J: np.ndarray) -> np.ndarray:
        """Return the row of each X-ray in the file, -1 for one that it lacks."""
        if not len(dicom_id_J) or not len(self.dicom_id_M):
            return np.full(len(dicom_id_J), -1)
        place_J = np.minimum(np.searchsorted(self.dicom_id_M, dicom_id_J), len(self.dicom_id_M) - 1)
        return np.where(self.dicom_id_M[place_J] == dicom_id_J, self.row_M[place_J], -1)


@dataclasses.dataclass(frozen=True)
class CxrFeatures:
    """The standardised features of a split's X-rays, and a last row of zeros.

    first_N, count_N: each record's X-rays, as places in the J, in order of time.
    """

    feature_JE: np.ndarray
    first_N: np.ndarray
    count_N: np.ndarray

    def of_record(self, i: int) -> list[np.ndarray]:
        """Return the features [E] of each of a record's X-rays."""
        return list(self.feature_JE[self.first_N[i] : self.first_N[i] + self.count_N[i]])

    def of_batch(self, record_DB: np.ndarray, rows: dict) -> np.ndarray:
        """Return the features [D, P, E] of the X-rays of a batch, zeros in empty slots. rows: from `plan.deal`."""
        first_DP = np.take_along_axis(self.first_N[np.maximum(record_DB, 0)], rows["image_row"], axis=-1)
        place_DP = first_DP + rows["image_of"] if "image_of" in rows else first_DP
        return self.feature_JE[np.where(rows["image_mask"], place_DP, -1)]


def read(path: str | Path, given_by: str = FIELD) -> Table:
    """Read a file of features; raise UserError unless it has one row of finite numbers for each dicom_id.

    .npz: arrays dicom_id str [M] and features [M, E]. .parquet, .csv: a column dicom_id, and E columns of numbers.
    given_by: the config field or flag that names the file.
    """
    path = Path(path)
    try:
        return dataclasses.replace(_read_once(path, _stamp(path)), given_by=given_by)
    except _Refused as error:
        raise _user_error(given_by, path, str(error)) from None


def nothing(width: int) -> Table:
    """Return a table without X-rays, for a dataset that has none."""
    return Table(Path(), np.zeros(0, str), np.zeros(0, int), np.zeros((0, width), np.float32))


class _Refused(Exception):
    """What is wrong with a file."""


@functools.lru_cache(maxsize=1)  # the trials of a sweep read the same file
def _read_once(path: Path, stamp: tuple) -> Table:
    return _read(path)


def _stamp(path: Path) -> tuple:
    """Return what changes if a file does."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path) -> Table:
    if path.suffix not in SUFFIXES:
        raise _Refused(f"must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise _Refused("does not exist")
    if not path.stat().st_size:
        raise _Refused("is empty")
    dicom_id_M, feature_ME = _read_npz(path) if path.suffix == ".npz" else _read_columns(path)
    if dicom_id_M.dtype.kind not in "SU" or dicom_id_M.ndim != 1:
        raise _Refused(f"{_ID} must be a 1-D array of strings, not {_shape(dicom_id_M)}")
    if dicom_id_M.dtype.kind == "S":
        try:
            dicom_id_M = np.char.decode(dicom_id_M, "utf-8")
        except UnicodeDecodeError:
            raise _Refused(_NOT_UTF8) from None
    if feature_ME.dtype.kind not in "fiu" or feature_ME.ndim != 2 or not feature_ME.size:
        raise _Refused(f"features must be a 2-D array of numbers, [X-rays, width], not {_shape(feature_ME)}")
    if len(dicom_id_M) != len(feature_ME):
        raise _Refused(f"has {len(dicom_id_M)} values of {_ID} for {len(feature_ME)} rows of features")
    with np.errstate(over="ignore"):
        feature_ME = feature_ME.astype(np.float32, copy=False)  # overflow becomes infinite and is refused below
    if broken := int((~np.isfinite(feature_ME)).any(1).sum()):
        raise _Refused(f"has missing, NaN or infinite numbers in {broken} of {len(feature_ME)} rows")
    row_M = np.argsort(dicom_id_M, kind="stable")
    dicom_id_M = dicom_id_M[row_M]
    if twice := int((dicom_id_M[1:] == dicom_id_M[:-1]).sum()):
        raise _Refused(f"has {twice} duplicate {_ID}{'s'[: twice != 1]}")
    return Table(path, dicom_id_M, row_M, feature_ME)


def of_splits(
    table: Table,
    names: Mapping[str, dict],
    several: Mapping[str, StayImages],
    where: str,
) -> tuple[dict[str, CxrFeatures], Statistics, str]:
    """Return the features of each split's X-rays, what they are standardised by, and a hash of those that are read.

    names: by split, what `records.dicom_ids` reads. several: which X-rays of a record are read, by split, if not its
    last alone. where: the dataset, for messages. Raise UserError if the file lacks an X-ray, or has another width than
    the run.
    """
    width, statistics = table.feature_ME.shape[1], table.statistics
    if statistics and len(statistics.mean_E) != width:
        what = f"has {width} features an X-ray, and the run was trained on {len(statistics.mean_E)}"
        raise _user_error(table.given_by, table.path, what)
    taken = {}
    for split in table.splits:
        taken[split], lacking = _taken(table, names[split], several.get(split))
        if lacking:
            what = f"lacks {lacking} of the {len(taken[split].feature_JE) - 1} X-rays that are read from the {split} "
            what += f"split of {where}"
            if not any((table.rows(of["dicom_id"]) >= 0).any() for of in names.values()):
                what += f": none of its {_ID} values occurs in the shards"
            raise _user_error(table.given_by, table.path, what, lacking)
    if statistics is None:
        statistics = _statistics(taken["train"].feature_JE[:-1])
    content = hashlib.sha256()
    for split, of in taken.items():
        content.update(f"{split} {of.feature_JE.shape}".encode())
        content.update(of.feature_JE)
        read_JE = of.feature_JE[:-1]  # standardised in place: there may be gigabytes of them
        read_JE -= statistics.mean_E
        read_JE /= statistics.std_E
    return taken, statistics, content.hexdigest()


def _taken(table: Table, names: dict, several: StayImages | None) -> tuple[CxrFeatures, int]:
    """Return the features of a split's X-rays that are read, as the file has them, and how many it lacks."""
    num_N = names["num_images"]
    first_N = np.cumsum(num_N) - num_N
    if several:  # some or all X-rays of each record
        count_N = np.asarray(several.image_count_N)
        place_J = np.repeat(first_N, count_N) + several.image_of_J
    else:  # the last of each record
        count_N = (num_N > 0).astype(int)
        place_J = (first_N + num_N - 1)[num_N > 0]
    row_J = table.rows(names["dicom_id"][place_J])
    feature_JE = np.zeros((len(row_J) + 1, table.feature_ME.shape[1]), np.float32)
    if len(row_J):
        np.take(table.feature_ME, row_J, axis=0, out=feature_JE[:-1], mode="clip")
    taken = CxrFeatures(feature_JE, (np.cumsum(count_N) - count_N).astype(np.int32), count_N)
    return taken, int((row_J < 0).sum())


def _statistics(feature_JE: np.ndarray) -> Statistics:
    if not len(feature_JE):
        width = feature_JE.shape[1]
        return Statistics(np.zeros(width, np.float32), np.ones(width, np.float32))
    mean_E = feature_JE.mean(0, dtype=np.float64)
    total_E = np.zeros_like(mean_E)
    for first in range(0, len(feature_JE), _CHUNK_ROWS):  # `std` would copy all rows as float64
        total_E += ((feature_JE[first : first + _CHUNK_ROWS] - mean_E) ** 2).sum(0)
    std_E = np.sqrt(total_E / len(feature_JE))
    # A constant feature gets deviation 1, because features are divided by it.
    is_constant_E = std_E <= 1e-6 * np.maximum(np.abs(mean_E), 1e-30)
    return Statistics(mean_E.astype(np.float32), np.where(is_constant_E, 1, std_E).astype(np.float32))


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        stored = np.load(path, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise _Refused(f"is one array: save {_ID} and features together, with np.savez")
        with stored:
            if lacking := [name for name in (_ID, "features") if name not in stored]:
                raise _Refused(f"has no array {lacking[0]!r}")
            return stored[_ID], stored["features"]
    except _DAMAGED as error:
        if "Object arrays" in str(error):
            how = f"save {_ID} as a string array and features as a 2-D float array"
            raise _Refused(f"it holds pickled objects; {how}") from None
        why = "it is no zip file" if "pickle" in str(error) else " ".join(str(error).split())[:200]
        raise _Refused(f"cannot be read ({why})") from None


def _read_columns(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import polars as pl

    try:
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path)
        else:  # the types of all rows: the first may all be 0
            frame = pl.read_csv(path, schema_overrides={_ID: pl.String}, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _Refused(_why_unreadable(error)) from None
    if _ID not in frame.columns:
        raise _Refused(f"has no column {_ID!r}")
    if not len(frame):
        raise _Refused("has no rows")
    of_features = frame.drop(_ID)
    for name, kind in of_features.schema.items():
        if name.strip().lower() in _NOT_FEATURES or name.startswith(_PANDAS_INDEX):
            raise _Refused(f"has a column {name!r}, which is an index or an id and no feature: leave it out")
        if not kind.is_numeric():
            raise _Refused(f"has no numbers in column {name!r}: give {_ID!r} and the features alone")
    return _column_of_ids(frame[_ID]), of_features.cast(pl.Float32).fill_null(float("nan")).to_numpy()


def _column_of_ids(column) -> np.ndarray:
    import polars as pl

    if column.null_count():
        raise _Refused(f"has {column.null_count()} rows without {_ID}")
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum, pl.Binary) and not column.dtype.is_integer():
        raise _Refused(f"{_ID} must be a column of strings, not {column.dtype}")
    try:
        return np.array(column.cast(pl.String).to_list(), str)
    except pl.exceptions.PolarsError:
        raise _Refused(_NOT_UTF8) from None


def _why_unreadable(error: Exception) -> str:
    """Return why polars cannot read a file, without its message, which may quote a row."""
    text = str(error).lower()
    if "empty" in text:
        return "is empty"
    if "utf-8" in text or "utf8" in text:
        return "is not UTF-8 text: save it as UTF-8"
    if "more fields" in text:
        return "has a row with more values than the header has names: each row needs the same columns"
    return f"cannot be read ({type(error).__name__})"


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _user_error(given_by: str, path: Path, what: str, value: object = None) -> UserError:
    return UserError(f"{given_by}={path}: {what}; {_HOW}", field=given_by, path=path, value=value)
