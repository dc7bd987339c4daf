"""The X-rays: what is known of each, its 14 labels, and its pixels as one grey 256 x 256 square.

Shape key: N X-rays, H W pixels, K 14 labels.
"""

import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import polars as pl
from PIL import Image

from data_prep import cache, progress
from data_prep.raw import tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

DECODER = f"Pillow {PIL.__version__}"  # another may give other pixels
VERSION = 1  # raise it when the same file gives other pixels
CHUNK_FORMAT = 2  # raise it when a chunk's files hold something else
CHUNK_IMAGES = 1024  # 64 MiB: one file of the cache, and what a stopped build loses at most
MAX_UNREADABLE = 0.01


def read_metadata(raw: dict[str, tables.Table]) -> tuple[pl.DataFrame, dict]:
    """Every X-ray with a usable metadata row, sorted by dicom_id, and what was left out.

    Columns: dicom_id, subject_id, study_id, view, time, path (below the MIMIC-CXR folder).
    """
    metadata = raw["metadata"].read(*tables.MIMIC_CXR["metadata"])
    # StudyTime is HHMMSS.fff written as a float: 3042.1 is 00:30:42.
    clock = pl.col("StudyTime").str.strip_chars().str.split(".").list.first().str.zfill(6)
    images = metadata.select(
        pl.col("dicom_id").str.strip_chars(),
        tables.integer("subject_id"),
        tables.integer("study_id"),
        view=pl.col("ViewPosition").fill_null(""),
        time=(pl.col("StudyDate").str.strip_chars() + clock).str.to_datetime("%Y%m%d%H%M%S", strict=False),
    )
    counts = {"rows of metadata": len(images)}
    images = images.drop_nulls(["dicom_id", "subject_id", "study_id"]).unique(
        "dicom_id", keep="first", maintain_order=True
    )
    counts["X-rays with ids"] = len(images)
    counts["X-rays without a valid time (never paired)"] = images["time"].null_count()
    if images.is_empty():
        raise UserError(f"{raw['metadata'].path} names no X-ray; is it whole?")
    if "split" in raw:
        _note_without_metadata(raw, images, counts)
    subject, study = pl.col("subject_id").cast(pl.String), pl.col("study_id").cast(pl.String)
    path = pl.format("files/p{}/p{}/s{}/{}.jpg", subject.str.head(2), subject, study, "dicom_id")
    return images.with_columns(path=path).sort("dicom_id"), counts


def _note_without_metadata(raw: dict[str, tables.Table], images: pl.DataFrame, counts: dict) -> None:
    listed = raw["split"].read("dicom_id").select(pl.col("dicom_id").str.strip_chars()).drop_nulls().unique()
    lost = listed.join(images, on="dicom_id", how="anti")["dicom_id"].sort().to_list()
    counts["X-rays without a metadata row"] = len(lost)
    counts["dicom_ids without a metadata row"] = lost[:100]
    if lost:
        progress.say(
            f"warning: {len(lost)} X-ray(s) of {raw['split'].path} have no row in {raw['metadata'].path} and are left "
            f"out, the first is {lost[0]}: download that table again if it should be whole"
        )


def read_labels(raw: dict[str, tables.Table]) -> pl.DataFrame:
    """study_id and the 14 labels (int8): 1 where positive; blank, 0 and -1 (uncertain) are 0."""
    table = raw["chexpert"]
    for label in schema.RADIOLOGY_LABELS:
        if label not in table.columns:
            raise UserError(f"{table.path} has no column {label!r}; download it again, it holds all 14 CheXpert labels")
    rows = table.read("study_id", *schema.RADIOLOGY_LABELS)
    positive = [
        (tables.number(name) == 1).fill_null(False).cast(pl.Int8).alias(name) for name in schema.RADIOLOGY_LABELS
    ]
    rows = rows.select(tables.integer("study_id"), *positive)
    return rows.drop_nulls("study_id").unique("study_id", keep="first", maintain_order=True)


def decode(path: Path, image_shape: str) -> np.ndarray:
    """One X-ray as uint8 [256, 256]; OSError where it cannot be read.

    The JPEG is decoded at the smallest of its own scales (1/8 to 1) that still has 256 px on both
    sides, which is several times faster than decoding it whole, then resized.
    image_shape: 'squash' makes both sides 256 px, as the paper says, and stretches the X-ray by its
        aspect ratio. 'crop' keeps the ratio: the shorter side to 256 px, then the centre square, of
        which the released test transform (resize 256, centre crop 224) sees every pixel it ever saw.
    """
    size = schema.IMAGE_SIZE_PX
    try:
        with Image.open(path) as image:
            image.draft("L", (size, size))
            image = image.convert("L")
    except (SyntaxError, ValueError, IndexError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise OSError(f"not a readable image ({type(error).__name__})") from None
    box = None
    if image_shape == "crop":
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def chunks(images: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """X-rays (dicom_id, path) in the groups that share a file of the cache."""
    images = sorted(images)
    return [images[i : i + CHUNK_IMAGES] for i in range(0, len(images), CHUNK_IMAGES)]


def write_chunk(
    folder: Path, root: Path, image_shape: str, images: list[tuple[str, str]], map_images: Callable = map
) -> Path:
    """Decodes one chunk of X-rays to a file of the cache, unless it is there and whole; the file.

    The .npy holds the pixels of the readable ones. The .json beside it says how they were made, and of each X-ray its
    file's signature: 'readable' in the order of the pixels, 'unreadable'.
    map_images: maps a function over the X-rays, in order. Two processes may write the same chunk at once.
    """
    signed = [(dicom_id, path, signature(root / path)) for dicom_id, path in images]
    made = _made(image_shape)
    path = folder / f"{cache.key(images=signed, made=made)}.npy"
    if _facts(path, made):
        return path

    def try_decode(image_path: str) -> np.ndarray | None:
        try:
            return decode(root / image_path, image_shape)
        except OSError:
            return None

    decoded = list(map_images(try_decode, [image_path for _, image_path in images]))
    readable = [image for image in decoded if image is not None]
    pixels = np.stack(readable) if readable else np.zeros((0, schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX), np.uint8)
    facts = {"made": made, "readable": [], "unreadable": []}
    for (dicom_id, _, sign), image in zip(signed, decoded, strict=True):
        facts["unreadable" if image is None else "readable"].append([dicom_id, sign])
    mark = f".{os.getpid()}-{threading.get_ident()}.partial"
    for target, write in (
        (path.with_suffix(".json"), lambda file: file.write(json.dumps(facts).encode())),
        (path, lambda file: np.save(file, pixels)),  # last: it is what says that the chunk is whole
    ):
        temporary = target.with_name(target.name + mark)
        with open(temporary, "wb") as file:
            write(file)
        temporary.rename(target)
    return path


def _facts(path: Path, made: dict) -> dict | None:
    """What the .json beside a chunk says; None where either is damaged or missing, or it is of another making."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        if not isinstance(facts, dict) or facts.get("made") != made:
            return None
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            num_bytes = os.fstat(file.fileno()).st_size - file.tell()
    except (OSError, ValueError):
        return None
    wanted = (len(facts["readable"]), schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX)
    return facts if shape == wanted and num_bytes == math.prod(wanted) else None


def _made(image_shape: str) -> dict:
    return {"image_shape": image_shape, "version": VERSION, "format": CHUNK_FORMAT, "decoder": DECODER}


class ImageStore:
    """Decoded X-rays by dicom_id, kept in a folder in chunks, so that no X-ray is decoded twice.

    An X-ray is found in whichever chunk holds it, an earlier build's or Beam's, while its file's signature is
    the one it was decoded with. `unreadable` lists what could not be read (dicom_id -> signature). Neither that nor
    the pixels depend on the number of workers.
    """

    def __init__(self, folder: Path, root: Path, image_shape: str, workers: int):
        self.unreadable: dict[str, list[int] | None] = {}
        self._folder, self._root, self._image_shape, self._workers = folder, root, image_shape, workers
        self._place: dict[str, tuple[Path, int]] = {}
        self._asked: set[str] = set()
        self._kept: dict[str, list[tuple[Path, int | None, list[int] | None]]] = {}  # row None: unreadable
        folder.mkdir(exist_ok=True)
        for path in sorted(folder.glob("*.npy")):
            self._note_chunk(path)

    def __getitem__(self, dicom_id: str) -> np.ndarray:
        path, row = self._place[dicom_id]
        return np.load(path, mmap_mode="r")[row]

    def __contains__(self, dicom_id: str) -> bool:
        return dicom_id in self._place

    def add(self, images: Iterable[tuple[str, str]]) -> None:
        """Decodes X-rays (dicom_id, path); UserError where more than 1 % of all asked for are unreadable."""
        images = sorted(images)
        self._asked.update(dicom_id for dicom_id, _ in images)
        signed = signatures(self._root, images, self._workers)
        missing = [image for image in images if not self._find(image[0], signed[image[0]])]
        with ThreadPoolExecutor(self._workers) as pool:
            for chunk in progress.bar(chunks(missing), "images", "chunks"):
                path = write_chunk(self._folder, self._root, self._image_shape, chunk, pool.map)
                for dicom_id, sign in self._note_chunk(path).items():
                    self._find(dicom_id, sign)
                # Or they would be asked for again, for ever.
                assert all(image[0] in self or image[0] in self.unreadable for image in chunk), path
                self._check_unreadable()
        self._check_unreadable()

    def forget_useless(self) -> None:
        """Removes the chunks that no build can use again: of another shape or version, or of X-rays all replaced."""
        for path in self._folder.glob("*.partial"):
            path.unlink()
        used = {path for path, _ in self._place.values()}
        for dicom_id, places in self._kept.items():
            if dicom_id not in self._asked or dicom_id in self.unreadable:
                used.update(path for path, _, _ in places)
        for path in self._folder.glob("*.npy"):
            if path not in used:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink()

    def _note_chunk(self, path: Path) -> dict[str, list[int] | None]:
        """Takes note of the X-rays of a chunk (dicom_id -> signature); of none where it cannot be used."""
        facts = _facts(path, _made(self._image_shape))
        if facts is None:
            return {}
        for row, (dicom_id, sign) in enumerate(facts["readable"]):
            self._kept.setdefault(dicom_id, []).append((path, row, sign))
        for dicom_id, sign in facts["unreadable"]:
            self._kept.setdefault(dicom_id, []).append((path, None, sign))
        return dict(facts["readable"] + facts["unreadable"])

    def _find(self, dicom_id: str, sign: list[int] | None) -> bool:
        """Whether a chunk knows this X-ray as it is now; then it is in `_place`, or `unreadable`."""
        for path, row, kept_sign in self._kept.get(dicom_id, ()):
            if kept_sign == sign:
                if row is None:
                    self.unreadable[dicom_id] = sign
                else:
                    self._place[dicom_id] = (path, row)
                return True
        return False

    def _check_unreadable(self) -> None:
        bad = sorted(self.unreadable)
        if len(bad) > MAX_UNREADABLE * len(self._asked):
            raise UserError(
                f"{len(bad)} of {len(self._asked)} X-rays under {self._root / 'files'} are missing or cannot be read, "
                f"more than 1 %, the first is {bad[0]}.jpg: download them (again), then run the same command"
            )


def signature(path: str | Path) -> list[int] | None:
    """Size and time of change of a file, None where it is missing."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def signatures(root: Path, images: Iterable[tuple[str, str]], workers: int) -> dict[str, list[int] | None]:
    """dicom_id -> signature of X-rays (dicom_id, path). Threads, because a network file system answers slowly."""
    images = list(images)

    def of_some(some: list[tuple[str, str]]) -> list[tuple[str, list[int] | None]]:
        return [(dicom_id, signature(f"{root}/{path}")) for dicom_id, path in some]

    with ThreadPoolExecutor(4 * workers) as pool:
        parts = pool.map(of_some, [images[i : i + CHUNK_IMAGES] for i in range(0, len(images), CHUNK_IMAGES)])
        return {dicom_id: sign for part in parts for dicom_id, sign in part}
