"""How a trial is kept: as `medfuse_jax.main` keeps a run, or in one file.

One file for a head, which is small, and where there are several processes: orbax does not save what one of
them holds alone.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from medfuse_jax import checkpoints, files, optim
from medfuse_jax.errors import UserError


class WholeKeeper:
    """Checkpoints by orbax: the best and the latest, saved in the background."""

    def __init__(self, workdir: Path):
        self._manager = checkpoints.open_manager(workdir)

    def latest(self, abstract) -> tuple | None:
        return checkpoints.restore_latest(self._manager, abstract)

    def save(self, state, progress: optim.Progress, is_best: bool) -> None:
        checkpoints.save(self._manager, state, progress, is_best)

    def finish(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class FileKeeper:
    """state.npz: a trial's latest and best state, and its progress at both. It appears whole."""

    def __init__(self, workdir: Path):
        self._path = workdir / "state.npz"
        self._best = {}

    def latest(self, abstract) -> tuple | None:
        return self._read("latest", abstract)

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
        except FileNotFoundError:
            return None
        except files.DAMAGED_NPZ as error:
            raise UserError(f"{self._path} cannot be read ({error}): delete it, and the trial starts anew") from None
        progress = optim.Progress(**json.loads(str(leaves.pop("/progress"))))
        state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], abstract)
        return state, progress


def new_keeper(workdir: Path, is_head: bool) -> WholeKeeper | FileKeeper:
    """What a trial is kept by; one that began in a file stays in it."""
    in_a_file = is_head or jax.process_count() > 1 or (workdir / "state.npz").exists()
    return FileKeeper(workdir) if in_a_file else WholeKeeper(workdir)


def _to_arrays(which: str, state, progress: optim.Progress) -> dict[str, np.ndarray]:
    leaves = {f"{which}{_name(path)}": np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return leaves | {f"{which}/progress": np.array(json.dumps(dataclasses.asdict(progress)))}


def _name(path) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator=".")
