"""A cache of decoded X-rays in chunk files, shared by builds and the Beam pipeline."""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep import cache, progress
from data_prep.images import decode
from medfuse_jax import schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

CHUNK_FORMAT = 3  # increment when the contents of a chunk's files change
CHUNK_IMAGES = 1024  # 64 MiB per chunk: the most that an interrupted build loses
MAX_UNREADABLE = 0.01
_SHAPE = (schema.IMAGE_SIZE_PX, schema.IMAGE_SIZE_PX)

Signature = list[int] | None  # size and modification time of an image's file; None where it is missing


def chunks(images: Iterable[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Group X-rays (dicom_id, path) into chunks."""
    images = sorted(images)
    return [images[i : i + CHUNK_IMAGES] for i in range(0, len(images), CHUNK_IMAGES)]


def write_chunk(
    folder: Path, root: Path, image_shape: str, images: list[tuple[str, str]], map_images: Callable = map
) -> Path:
    """Decode one chunk of X-rays into the cache, unless it is cached already, and return its .npy file.

    The .npy holds the pixels of the readable X-rays. The .json beside it holds how they were decoded and each X-ray's
    signature: 'readable' in the order of the pixels, 'unreadable', 'blank' (rows of one grey everywhere). Two processes
    may write the same chunk at once.
    map_images: maps a function over the X-rays, in order.
    """
    signed = [(dicom_id, path, signature(root / path)) for dicom_id, path in images]
    made = _made(image_shape)
    path = folder / f"{cache.key(images=signed, made=made)}.npy"
    if _read_info(path, made):
        return path

    def try_decode(image_path: str) -> np.ndarray | None:
        try:
            return decode.decode(root / image_path, image_shape)
        except OSError:
            return None

    decoded = list(map_images(try_decode, [image_path for _, image_path in images]))
    readable = [image for image in decoded if image is not None]
    pixels_NHW = np.stack(readable) if readable else np.zeros((0, *_SHAPE), np.uint8)
    info: dict = {"made": made, "readable": [], "unreadable": []}
    for (dicom_id, _, sign), image in zip(signed, decoded, strict=True):
        info["unreadable" if image is None else "readable"].append([dicom_id, sign])
    info["blank"] = [row for row, image in enumerate(readable) if image.min() == image.max()]
    files.write_json(path.with_suffix(".json"), info)
    with files.written_whole(path) as unfinished:  # last: a chunk with a .npy is complete
        np.save(unfinished, pixels_NHW)
    return path


def _made(image_shape: str) -> dict:
    """Return how a chunk's pixels must have been made; a chunk made differently is not used."""
    return {"image_shape": image_shape, "version": decode.VERSION, "format": CHUNK_FORMAT, "decoder": decode.DECODER}


def _read_info(path: Path, made: dict) -> dict | None:
    """Return a chunk's .json; None if either file is missing or damaged, or the chunk was made differently."""
    try:
        info = files.read_json(path.with_suffix(".json"), "decode the X-rays again")
        if info.get("made") != made:
            return None
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            num_bytes = os.fstat(file.fileno()).st_size - file.tell()
    except (OSError, ValueError):
        return None
    expected = (len(info["readable"]), *_SHAPE)
    return info if shape == expected and num_bytes == math.prod(expected) else None


class ImageStore:
    """Decoded X-rays by dicom_id: uint8 [256, 256]; each X-ray is decoded once, and cached in `folder`.

    A cached X-ray is valid while its file keeps the signature it was decoded with, whichever chunk holds it.
    `unreadable`: dicom_id -> signature. Neither `unreadable` nor the pixels depend on the number of workers.
    max_unreadable: the largest share of the requested X-rays that may be missing or unreadable; None for 1 %.
    """

    def __init__(self, folder: Path, root: Path, image_shape: str, workers: int, max_unreadable: float | None = None):
        self.unreadable: dict[str, Signature] = {}
        self._folder, self._root, self._image_shape, self._workers = folder, root, image_shape, workers
        self._place: dict[str, tuple[Path, int]] = {}  # dicom_id -> chunk and row of its valid pixels
        self._max_unreadable = MAX_UNREADABLE if max_unreadable is None else max_unreadable
        self._blank: set[tuple[Path, int]] = set()
        self._requested: dict[str, str] = {}  # dicom_id -> path
        self._cached: dict[str, list[tuple[Path, int | None, Signature]]] = {}  # row None: unreadable
        self._open: dict[Path, np.ndarray] = {}  # only the chunk read last, to limit the memory that is mapped
        folder.mkdir(exist_ok=True)
        for path in sorted(folder.glob("*.npy")):
            self._load_info(path)

    def __getitem__(self, dicom_id: str) -> np.ndarray:
        path, row = self._place[dicom_id]
        if path not in self._open:
            self._open = {path: np.load(path, mmap_mode="r")}
        return self._open[path][row]

    def __contains__(self, dicom_id: str) -> bool:
        return dicom_id in self._place

    def num_blank(self) -> int:
        """Return how many of the requested X-rays have one grey everywhere; they are kept."""
        return len(self._blank & {self._place[dicom_id] for dicom_id in self._requested if dicom_id in self._place})

    def add(self, images: Iterable[tuple[str, str]]) -> None:
        """Decode X-rays (dicom_id, path); raise UserError if too many of all requested ones are unreadable."""
        images = sorted(images)
        self._requested.update(images)
        signed = signatures(self._root, images, self._workers)
        missing = [image for image in images if not self._look_up(image[0], signed[image[0]])]
        with ThreadPoolExecutor(self._workers) as pool:
            for chunk in progress.bar(chunks(missing), "images", "chunks"):
                path = write_chunk(self._folder, self._root, self._image_shape, chunk, pool.map)
                for dicom_id, sign in self._load_info(path).items():
                    self._look_up(dicom_id, sign)
                # Otherwise the build would request them again and again.
                assert all(image[0] in self or image[0] in self.unreadable for image in chunk), path
                self._check_unreadable()
        self._check_unreadable()

    def remove_unusable(self) -> None:
        """Remove chunks that no build can use: made differently, or all of their X-rays replaced."""
        for path in self._folder.glob("*.partial*"):
            path.unlink()
        used = {path for path, _ in self._place.values()}
        for dicom_id, places in self._cached.items():
            if dicom_id not in self._requested or dicom_id in self.unreadable:
                used.update(path for path, _, _ in places)
        for path in self._folder.glob("*.npy"):
            if path not in used:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink()

    def _load_info(self, path: Path) -> dict[str, Signature]:
        """Register a chunk's X-rays and return their signatures; {} for an unusable chunk."""
        info = _read_info(path, _made(self._image_shape))
        if info is None:
            return {}
        self._blank.update((path, row) for row in info["blank"])
        for row, (dicom_id, sign) in enumerate(info["readable"]):
            self._cached.setdefault(dicom_id, []).append((path, row, sign))
        for dicom_id, sign in info["unreadable"]:
            self._cached.setdefault(dicom_id, []).append((path, None, sign))
        return dict(info["readable"] + info["unreadable"])

    def _look_up(self, dicom_id: str, sign: Signature) -> bool:
        """Return whether a chunk holds this version of the X-ray; if so, enter it in `_place` or `unreadable`."""
        for path, row, cached_sign in self._cached.get(dicom_id, ()):
            if cached_sign == sign:
                if row is None:
                    self.unreadable[dicom_id] = sign
                else:
                    self._place[dicom_id] = (path, row)
                return True
        return False

    def _check_unreadable(self) -> None:
        bad = sorted(self.unreadable)
        if len(bad) > self._max_unreadable * len(self._requested):
            missing = [dicom_id for dicom_id in bad if self.unreadable[dicom_id] is None]
            first = (missing or bad)[0]
            path = self._root / self._requested[first]
            hint = "" if not missing else _hint(path)
            message = (
                f"{len(missing):,} of {len(self._requested):,} X-rays are missing and {len(bad) - len(missing):,} are "
                f"unreadable, more than {100 * self._max_unreadable:g} % (first tried: {path}{hint}); download them "
                "again and rerun the command, or accept them with --allow_missing_images=PART"
            )
            raise UserError(message, field="--allow_missing_images", path=path, value=first)


def _hint(path: Path) -> str:
    """Return what may be wrong where a file is missing, for the text behind its path."""
    if path.is_symlink():
        return ", a link to a file that is missing"
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ", whose folder cannot be read: see --cxr_layout"
    if any(Path(name).stem.lower() == path.stem.lower() for name in names):
        return "; its folder has that name with letters of another case or another ending: rename such files"
    return ""


def signature(path: str | Path) -> Signature:
    """Return a file's size and modification time, or None if it is missing."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def signatures(root: Path, images: Iterable[tuple[str, str]], workers: int) -> dict[str, Signature]:
    """Return dicom_id -> signature of X-rays (dicom_id, path). Threads hide the latency of network file systems."""

    def of_chunk(chunk: list[tuple[str, str]]) -> list[tuple[str, Signature]]:
        return [(dicom_id, signature(f"{root}/{path}")) for dicom_id, path in chunk]

    with ThreadPoolExecutor(4 * workers) as pool:
        return dict(pair for chunk in pool.map(of_chunk, chunks(images)) for pair in chunk)
