"""Features of X-rays that were computed elsewhere (config.data.cxr_features), which stand for their pixels.

Shapes: M X-rays of the file, N records of a split, J X-rays that are read, of all records together, E features; of a
batch: D devices, B rows, P images.
"""

import dataclasses
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medfuse_jax.data.images import StayImages
from medfuse_jax.runtime.errors import UserError

FIELD = "config.data.cxr_features"
SUFFIXES = (".npz", ".parquet", ".csv")
_ID = "dicom_id"
_HOW = "docs/encoders.md shows how to make the file"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What features are standardised by: mean and deviation [E], of the train split's X-rays that are read."""

    mean_E: np.ndarray
    std_E: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """What a file holds. dicom_id_M is sorted; row_M is the row of each in feature_ME, which is as in the file."""

    path: Path
    dicom_id_M: np.ndarray
    row_M: np.ndarray
    feature_ME: np.ndarray

    def rows(self, dicom_id_J: np.ndarray) -> np.ndarray:
        """Return the row of each X-ray in the file, -1 for one that it lacks."""
        if not len(dicom_id_J):
            return np.zeros(0, int)
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


def read(path: str | Path) -> Table:
    """Read a file of features; raise UserError unless it has one row of finite numbers for each dicom_id.

    .npz: arrays dicom_id str [M] and features [M, E]. .parquet, .csv: a column dicom_id, and E columns of numbers.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise _refused(path, f"must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise _refused(path, "does not exist")
    dicom_id_M, feature_ME = _read_npz(path) if path.suffix == ".npz" else _read_columns(path)
    if dicom_id_M.dtype.kind == "S":
        dicom_id_M = np.char.decode(dicom_id_M, "utf-8", "replace")
    if dicom_id_M.dtype.kind != "U" or dicom_id_M.ndim != 1:
        raise _refused(path, f"must have text of one axis as {_ID}, not {dicom_id_M.dtype} {list(dicom_id_M.shape)}")
    if feature_ME.dtype.kind not in "fiu" or feature_ME.ndim != 2 or not feature_ME.size:
        raise _refused(path, f"must have features of shape [X-rays, width], not {_shape(feature_ME)}")
    if len(dicom_id_M) != len(feature_ME):
        raise _refused(path, f"has {len(dicom_id_M)} values of {_ID} for {len(feature_ME)} rows of features")
    with np.errstate(over="ignore"):
        feature_ME = feature_ME.astype(np.float32, copy=False)  # overflow becomes infinite and is refused below
    if broken := int((~np.isfinite(feature_ME)).any(1).sum()):
        raise _refused(path, f"has NaN or infinite numbers in {broken} of {len(feature_ME)} rows")
    row_M = np.argsort(dicom_id_M, kind="stable")
    dicom_id_M = dicom_id_M[row_M]
    if twice := int((dicom_id_M[1:] == dicom_id_M[:-1]).sum()):
        raise _refused(path, f"has {twice} rows whose {_ID} another row has too")
    return Table(path, dicom_id_M, row_M, feature_ME)


def of_splits(
    table: Table,
    names: Mapping[str, dict],
    several: Mapping[str, StayImages],
    where: str,
    statistics: Statistics | None = None,
) -> tuple[dict[str, CxrFeatures], Statistics, str]:
    """Return the features of each split's X-rays, what they are standardised by, and a hash of those that are read.

    names: by split, what `records.dicom_ids` reads. several: which X-rays of a record are read, by split, if not its
    last alone. where: the dataset, for messages. statistics: of a trained run; None for those of the train split.
    Raise UserError if the file lacks an X-ray, or has another width than the run.
    """
    width = table.feature_ME.shape[1]
    if statistics and len(statistics.mean_E) != width:
        raise _refused(
            table.path, f"has {width} features an X-ray, and the run was trained on {len(statistics.mean_E)}"
        )
    taken = {
        split: _taken(table, of, several.get(split), f"the {split} split of {where}") for split, of in names.items()
    }
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


def _taken(table: Table, names: dict, several: StayImages | None, where: str) -> CxrFeatures:
    """Return the features of a split's X-rays that are read, as the file has them."""
    num_N = names["num_images"]
    first_N = np.cumsum(num_N) - num_N
    if several:  # some or all X-rays of each record
        count_N = np.asarray(several.image_count_N)
        place_J = np.repeat(first_N, count_N) + several.image_of_J
    else:  # the last of each record
        count_N = (num_N > 0).astype(int)
        place_J = (first_N + num_N - 1)[num_N > 0]
    row_J = table.rows(names["dicom_id"][place_J])
    if lacking := int((row_J < 0).sum()):
        what = f"lacks {lacking} of the {len(row_J)} X-rays of {where}: it must hold every X-ray that is read; {_HOW}"
        raise UserError(f"{FIELD}={table.path} {what}", field=FIELD, path=table.path, value=lacking)
    feature_JE = np.zeros((len(row_J) + 1, table.feature_ME.shape[1]), np.float32)
    np.take(table.feature_ME, row_J, axis=0, out=feature_JE[:-1], mode="clip")
    return CxrFeatures(feature_JE, (np.cumsum(count_N) - count_N).astype(np.int32), count_N)


def _statistics(feature_JE: np.ndarray) -> Statistics:
    if not len(feature_JE):
        width = feature_JE.shape[1]
        return Statistics(np.zeros(width, np.float32), np.ones(width, np.float32))
    mean_E, std_E = feature_JE.mean(0, dtype=np.float64), feature_JE.std(0, dtype=np.float64)
    # A constant feature gets deviation 1, because features are divided by it.
    is_constant_E = std_E <= 1e-6 * np.maximum(np.abs(mean_E), 1e-30)
    return Statistics(mean_E.astype(np.float32), np.where(is_constant_E, 1, std_E).astype(np.float32))


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if lacking := [name for name in (_ID, "features") if name not in stored]:
                raise _refused(path, f"has no array {lacking[0]!r}")
            return stored[_ID], stored["features"]
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        why = "an array of Python objects: save text as str and rows of one width" if "pickle" in str(error) else error
        raise _refused(path, f"cannot be read ({why})") from None


def _read_columns(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import polars as pl

    try:
        read_one = pl.read_parquet if path.suffix == ".parquet" else pl.read_csv
        frame = read_one(path, **({} if path.suffix == ".parquet" else {"schema_overrides": {_ID: pl.String}}))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _refused(path, f"cannot be read ({type(error).__name__}): each row needs the same columns") from None
    if _ID not in frame.columns:
        raise _refused(path, f"has no column {_ID!r}")
    of_features = frame.drop(_ID)
    if others := [name for name, kind in of_features.schema.items() if not kind.is_numeric()]:
        raise _refused(path, f"has no numbers in column {others[0]!r}: give {_ID!r} and the features alone")
    if frame[_ID].null_count():
        raise _refused(path, f"has {frame[_ID].null_count()} rows without {_ID}")
    dicom_id_M = np.array(frame[_ID].cast(pl.String).to_list(), str)
    return dicom_id_M, of_features.cast(pl.Float32).fill_null(float("nan")).to_numpy()


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _refused(path: Path, what: str) -> UserError:
    return UserError(f"{FIELD}={path} {what}; {_HOW}", field=FIELD, path=path)
