"""Where a trial's states are stored: in checkpoints like those of a single run, or in one file.

One file is used for trials on frozen encoders, whose states are small.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from medfuse_jax.runs import checkpoints
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError

PREVIOUS = "state.previous.npz"


class CheckpointStore:
    """Orbax checkpoints of the best and the latest state, saved in the background."""

    def __init__(self, workdir: Path):
        self._manager = checkpoints.open_manager(workdir)

    def latest(self, abstract) -> tuple | None:
        """Return (state, progress) on the host, since the first device could not hold the states of all trials."""
        return jax.device_get(checkpoints.resume(self._manager, abstract))

    def save(self, state, progress: Progress, is_best: bool) -> None:
        checkpoints.save(self._manager, state, progress, is_best)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


_PARTS = ("latest", "best")


class FileStore:
    """state.npz: the latest and the best state with the progress at each. The one before it is kept, in case of damage.

    Every array has a checksum in the file.
    """

    def __init__(self, workdir: Path):
        self._path, self._previous = workdir / "state.npz", workdir / PREVIOUS
        self._best = {}

    def latest(self, abstract) -> tuple | None:
        """Return (state, progress), of the file before, with a line that says so, if state.npz is damaged or gone."""
        intact, damage = {}, None
        for path in (self._path, self._previous):
            if intact and not self._is_later(self._previous, intact[self._path][1]):
                break  # the usual case: only the progress of the other is read
            try:
                intact |= {path: found} if (found := self._read(path, "latest", abstract)) else {}
            except UserError as error:
                damage = damage or error
        if damage and (not intact or self._path.is_dir()):
            raise damage
        if not intact:
            return None
        path = max(intact, key=lambda path: _reached(intact[path][1]))
        state, progress, self._best = intact[path]
        if path == self._previous:
            print(f"warning: {self._path} is damaged or gone: the trial goes on from {path}", flush=True)
            path.replace(self._path)
        return state, progress

    def best(self, abstract) -> tuple | None:
        found = self._read(self._path, "best", abstract)
        return found and found[:2]

    def save(self, state, progress: Progress, is_best: bool) -> None:
        latest = _to_arrays("latest", state, progress)
        if is_best or not self._best:
            self._best = _to_arrays("best", state, progress)
        with files.written_whole(self._path) as unfinished:
            np.savez(unfinished, **latest, **self._best)
            if self._path.exists():
                self._path.replace(self._previous)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _is_later(self, path: Path, than: Progress) -> bool:
        """Return whether a file, such as one that was swapped, holds a later state; False if that cannot be read."""
        try:
            with np.load(path) as stored:
                return _reached(Progress(**json.loads(str(stored["latest/progress"])))) > _reached(than)
        except (*files.DAMAGED_NPZ, TypeError):
            return False

    def _read(self, path: Path, which: str, abstract) -> tuple | None:
        """Return (state, progress, the entries of the best); None if there is no file."""
        try:
            with files.open_npz(path) as stored:
                best = {name: stored[name] for name in stored if name.startswith("best/")}
                leaves = {name.removeprefix(which): stored[name] for name in stored if name.startswith(which)}
                names = {part: {n.removeprefix(part) for n in stored if n.startswith(f"{part}/")} for part in _PARTS}
            progress = Progress(**json.loads(str(leaves.pop("/progress"))))
            state = jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf(leaves, path, leaf), abstract)
            if names["latest"] != names["best"]:  # a damaged list of entries
                raise ValueError("its best and latest states have different arrays")
        except FileNotFoundError:
            return None
        except (*files.DAMAGED_NPZ, TypeError) as error:
            message = f"{path} cannot be read ({error}): delete it and trial.json beside it to restart the trial"
            raise UserError(message, path=path) from None
        return state, progress, best


def open_store(workdir: Path, is_frozen: bool) -> CheckpointStore | FileStore:
    """Open a trial's store in the process that trains it. A trial that already has a file keeps using it."""
    files.remove_unfinished(workdir / "state.npz")
    has_file = any((workdir / name).exists() for name in ("state.npz", PREVIOUS))
    return FileStore(workdir) if is_frozen or has_file else CheckpointStore(workdir)


def _reached(progress: Progress) -> tuple[int, int]:
    return progress.epoch, progress.num_steps


def _leaf(leaves: dict[str, np.ndarray], path, expected) -> np.ndarray:
    name = _name(path)
    if name not in leaves:
        raise ValueError(f"{name} is missing")
    if leaves[name].shape != expected.shape:
        raise ValueError(f"{name} has shape {leaves[name].shape}, not {expected.shape}")
    return leaves[name]


def _to_arrays(which: str, state, progress: Progress) -> dict[str, np.ndarray]:
    leaves = {f"{which}{_name(path)}": np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return leaves | {f"{which}/progress": np.array(json.dumps(dataclasses.asdict(progress)))}


def _name(path) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator=".")
