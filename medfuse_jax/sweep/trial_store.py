"""How a trial is kept: as `medfuse_jax.main` keeps a run, or in one file.

One file for a head, which is small, and where there are several processes: orbax does not save what one of
them holds alone.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from medfuse_jax import optim
from medfuse_jax.runs import checkpoints
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


class WholeKeeper:
    """Checkpoints by orbax: the best and the latest, saved in the background."""

    def __init__(self, workdir: Path):
        self._manager = checkpoints.open_manager(workdir)

    def latest(self, abstract) -> tuple | None:
        """On the host: on a device, the states of all trials would lie in the memory of the first."""
        return jax.device_get(checkpoints.restore_latest(self._manager, abstract))

    def save(self, state, progress: optim.Progress, is_best: bool) -> None:
        checkpoints.save(self._manager, state, progress, is_best)

    def finish(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class FileKeeper:
    """state.npz: a trial's latest and best state, and its progress at both. It appears whole.

    A whole model that was begun with checkpoints goes on from them.
    """

    def __init__(self, workdir: Path, is_head: bool = False):
        self._workdir, self._path, self._is_head = workdir, workdir / "state.npz", is_head
        self._best = {}

    def latest(self, abstract) -> tuple | None:
        return self._read("latest", abstract) or self._from_checkpoints(abstract)

    def best(self, abstract) -> tuple | None:
        return self._read("best", abstract)

    def save(self, state, progress: optim.Progress, is_best: bool) -> None:
        latest = _to_arrays("latest", state, progress)
        if is_best or not self._best:
            self._best = _to_arrays("best", state, progress)
        with files.written_whole(self._path) as unfinished:
            np.savez(unfinished, **latest, **self._best)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _read(self, which: str, abstract) -> tuple | None:
        try:
            with np.load(self._path) as stored:
                self._best = {name: stored[name] for name in stored.files if name.startswith("best/")}
                leaves = {name.removeprefix(which): stored[name] for name in stored.files if name.startswith(which)}
            progress = optim.Progress(**json.loads(str(leaves.pop("/progress"))))
            state = jax.tree_util.tree_map_with_path(lambda path, leaf: _leaf(leaves, path, leaf), abstract)
        except FileNotFoundError:
            return None
        except (*files.DAMAGED_NPZ, TypeError) as error:
            raise UserError(
                f"{self._path} cannot be read ({error}): delete it and trial.json beside it, and the trial starts anew"
            ) from None
        return state, progress

    def _from_checkpoints(self, abstract) -> tuple | None:
        """Where the trial's checkpoints are; a head's are what came of it, its encoders among them."""
        if self._is_head or not (self._workdir / "checkpoints").is_dir():
            return None
        with contextlib.closing(checkpoints.open_manager(self._workdir)) as manager:
            found = checkpoints.best(manager, abstract)
            if found is not None:
                self._best = _to_arrays("best", *found)
            return jax.device_get(checkpoints.restore_latest(manager, abstract))


def new_keeper(workdir: Path, is_head: bool) -> WholeKeeper | FileKeeper:
    """What a trial is kept by, for the process that trains it; one that began in a file stays in it."""
    files.remove_unfinished(workdir / "state.npz")
    in_a_file = is_head or jax.process_count() > 1 or (workdir / "state.npz").exists()
    return FileKeeper(workdir, is_head) if in_a_file else WholeKeeper(workdir)


def _leaf(leaves: dict[str, np.ndarray], path, wanted) -> np.ndarray:
    stored = leaves.get(_name(path))
    if stored is None or stored.shape != wanted.shape:
        raise ValueError(f"{_name(path)} is {'missing' if stored is None else f'of shape {stored.shape}'}")
    return stored


def _to_arrays(which: str, state, progress: optim.Progress) -> dict[str, np.ndarray]:
    leaves = {f"{which}{_name(path)}": np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return leaves | {f"{which}/progress": np.array(json.dumps(dataclasses.asdict(progress)))}


def _name(path) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator=".")
