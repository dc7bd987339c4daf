"""Damage checkpoints, shards, manifests, workdirs and predictions, by the thousand.

    PYTHONPATH=.:tests python -m reliability.damage_fuzz --cases=1000

Each case damages one file or folder of a small run, and uses it as the commands do. The use must be refused in one line
that names the place, give what the undamaged one gives, or go on from the previous checkpoint, which it says. Anything
else is a failure, and is printed with its number; --only=NUMBER repeats one case.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, records, train
from medfuse_jax import run as run_lib
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.report import pages, read_runs
from medfuse_jax.runs import checkpoints, result, sources
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import trial_store

KINDS = ("checkpoint", "trial", "shard", "manifest", "workdir", "predictions")
REFUSED, EQUAL, PREVIOUS = "refused", "equal", "previous"


# Damage: each function changes one file or folder and returns what it did


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 20))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def _overwrite(path: Path, rng: random.Random) -> None:
    """Overwrite a block with zeros, random bytes, or another block of the file, as a lost write does."""
    content = bytearray(path.read_bytes())
    size = min(len(content), rng.choice((1, 16, 512, 4096)))
    at, other = (rng.randrange(len(content) - size + 1) for _ in range(2))
    content[at : at + size] = rng.choice((bytes(size), rng.randbytes(size), bytes(content[other : other + size])))
    path.write_bytes(content)


def _append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def _remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def _make_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _edit_json(path: Path, rng: random.Random) -> None:
    """Delete or change one field of a JSON object, at any depth."""
    content = part = json.loads(path.read_text())
    while True:
        key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
        if not isinstance(part[key], dict | list) or not part[key] or rng.random() < 0.3:
            break
        part = part[key]
    if rng.random() < 0.5:
        del part[key]
    else:
        part[key] = rng.choice((None, 0, 1, "", "x", [], {}, True, 1e300, -1))
    path.write_text(json.dumps(content))


_OF_FILES: tuple[Callable, ...] = (_flip, _flip, _flip, _cut, _overwrite, _overwrite, _append, _remove, _make_folder)


def damage(root: Path, rng: random.Random) -> str:
    """Damage something below `root` in one of many ways; return what was done."""
    found = sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    folders = sorted({path.parent for path in found} - {root})
    kind = rng.random()
    if kind < 0.08 and folders:
        folder = rng.choice(folders)
        for path in sorted(folder.rglob("*"))[: rng.randrange(1, 4)]:  # a deletion that was interrupted
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return f"part of {folder.relative_to(root)} removed"
    if kind < 0.16:
        among = folders if len(folders) > 1 and rng.random() < 0.5 else found
        a, b = rng.sample(among, 2) if len(among) > 1 else (among[0], among[0])
        if a == b or a in b.parents or b in a.parents:
            return damage(root, rng)
        for old, new in ((a, root / "swap"), (b, a), (root / "swap", b)):
            old.rename(new)
        return f"{a.relative_to(root)} and {b.relative_to(root)} swapped"
    path = rng.choice(found)
    is_json = path.suffix == ".json" or path.name == "metadata"
    change = rng.choice((*_OF_FILES, *[_edit_json] * 6 * is_json))
    change(path, rng)
    return f"{change.__name__.strip('_')} {path.relative_to(root)}"


# What is damaged, and its uses


@dataclasses.dataclass(frozen=True)
class Whole:
    """An undamaged run, with what its uses give.

    states: step -> the state and progress of each kept checkpoint. metrics: phase -> lines by epoch.
    """

    folder: Path
    data_dir: Path
    run: run_lib.Run
    abstract: object
    states: dict
    uses: dict
    metrics: dict = dataclasses.field(default_factory=dict)

    @property
    def workdir(self) -> Path:
        return self.folder / "run"


def make(folder: Path, data_dir: Path, config) -> Whole:
    """Train and evaluate a small run on the shards in `data_dir`, and note what each use of its files gives."""
    shutil.copytree(data_dir / config.task, folder / "shards" / config.task)
    config.data.dir = str(folder / "shards")
    run, workdir = run_lib.open_run(config), folder / "run"
    workdir_lib.claim(workdir, run)
    train.train(run, workdir)
    evaluate.evaluate(workdir)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        abstract = run.abstract_state()
        states = {step: checkpoints._restore(manager, step, abstract) for step in manager.all_steps()}
    store = trial_store.FileStore(folder / "trial")
    (folder / "trial").mkdir()
    for step in sorted(states):
        store.save(jax.device_get(states[step][0]), states[step][1], is_best=step == min(states))
    whole = Whole(folder, folder / "shards", run, abstract, jax.device_get(states), {})
    whole.uses.update({kind: _USES[kind](whole, folder) for kind in KINDS})
    return whole


def _numbers(state) -> list:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def _use_checkpoint(whole: Whole, folder: Path):
    """Score with the best checkpoint, then resume."""
    refusal = None
    try:
        best = _numbers(checkpoints.restore_best(folder / "run", whole.abstract))
    except UserError as error:  # training may repair it
        best, refusal = None, error
    with contextlib.closing(checkpoints.open_manager(folder / "run")) as manager:
        state, progress = checkpoints.resume(manager, whole.abstract) or (None, None)
    if state is None:
        raise refusal
    step = int(state.step)
    assert (_numbers(state), progress) == (_numbers(whole.states[step][0]), whole.states[step][1]), "another state"
    return step, best


def _use_trial(whole: Whole, folder: Path):
    state, progress = trial_store.FileStore(folder / "trial").latest(whole.abstract) or (None, None)
    if state is None:
        raise UserError("nothing is saved, and the trial starts again", path=folder / "trial")
    step = int(state.step)
    assert (_numbers(state), progress) == (_numbers(whole.states[step][0]), whole.states[step][1]), "another state"
    return step, None


def _use_shards(whole: Whole, folder: Path):
    """Open the dataset as training does, and read it."""
    dataset = open_dataset(folder / "shards", whole.run.config.task)
    read = [dataset.splits[split][i] for split in dataset.splits for i in range(0, len(dataset.splits[split]), 7)]
    manifest = records.manifest(folder / "shards", whole.run.config.task)
    return dataset.digest, manifest, [sorted((k, np.asarray(v).tobytes()) for k, v in r.items()) for r in read]


def _use_workdir(whole: Whole, folder: Path):
    """Reopen the run, and write a report on it."""
    found = read_runs.read_run(folder / "run")
    page = pages.page([found])
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>"), "no page"
    if found.problems:
        raise UserError(found.problems[0], path=folder / "run")
    for name, lines in (("train", found.train), ("val", found.val)):  # lost lines are not noticed, other ones are
        assert lines.items() <= whole.metrics.setdefault(name, lines).items(), "other numbers in metrics.jsonl"
    run = sources.reopen(folder / "run", data_dir=str(whole.data_dir))
    step, progress = checkpoints.reached(folder / "run")
    return config_lib.flat(run.config), found.result, found.config.get("seed"), step, progress


def _use_predictions(whole: Whole, folder: Path):
    names = ("stay_id", "subject_id", "scores", "labels", "has_ehr", "has_cxr", "age")
    path = folder / "run" / "predictions_test.npz"
    found = result.read_predictions(path, names, "run medfuse_jax.evaluate again")
    shown = read_runs.read_run(folder / "run")
    if shown.problems:
        raise UserError(shown.problems[0], path=path)
    return {name: np.asarray(value).tobytes() for name, value in found.items()}


_USES = {
    "checkpoint": _use_checkpoint,
    "trial": _use_trial,
    "shard": _use_shards,
    "manifest": _use_shards,
    "workdir": _use_workdir,
    "predictions": _use_predictions,
}


def _damaged(kind: str, folder: Path, rng: random.Random) -> str:
    task = next((folder / "shards").iterdir())
    roots = {"checkpoint": folder / "run/checkpoints", "trial": folder / "trial", "shard": task}
    if kind in roots:
        return damage(roots[kind], rng)
    if kind == "manifest":
        change = rng.choice((_edit_json, _edit_json, *_OF_FILES))
        change(task / "manifest.json", rng)
        return f"{change.__name__.strip('_')} manifest.json"
    if kind == "predictions":
        change = rng.choice(_OF_FILES)
        change(folder / "run" / "predictions_test.npz", rng)
        return f"{change.__name__.strip('_')} predictions_test.npz"
    return damage(folder / "run", rng)


def case(whole: Whole, number: int, seed: int, scratch: Path) -> tuple[str, str]:
    """Run one case; return (its kind and damage, its outcome, which is a traceback if it is none of the three)."""
    rng, kind = random.Random(f"{seed} {number}"), KINDS[number % len(KINDS)]
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole.folder, scratch)
    what = f"case {number}: {kind}: {_damaged(kind, scratch, rng)}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            given = _USES[kind](whole, scratch)
        expected = whole.uses[kind]
        if given == expected:
            return what, EQUAL
        if kind in ("checkpoint", "trial") and given[1] in (None, expected[1]):
            assert given[0] == expected[0] or "is damaged" in printed.getvalue(), "an earlier step without a word"
            return what, PREVIOUS if given[0] != expected[0] else EQUAL
        return what, "another result"
    except UserError as error:
        named = error.path is not None and (scratch in error.path.parents or error.path == scratch)
        is_one_line = "\n" not in str(error) and str(error)
        return what, REFUSED if named and is_one_line else f"refused without a place: {error}"
    except BaseException:
        return what, traceback.format_exc()


def fuzz(whole: Whole, numbers: range, seed: int, scratch: Path) -> tuple[collections.Counter, list[str]]:
    """Run cases; return how many of each kind ended how, and the failures."""
    counts: collections.Counter = collections.Counter()
    failures = []
    for number in numbers:
        what, outcome = case(whole, number, seed, scratch)
        is_known = outcome in (REFUSED, EQUAL, PREVIOUS)
        counts[KINDS[number % len(KINDS)], outcome if is_known else "FAILED"] += 1
        if not is_known:
            failures.append(f"{what}\n{outcome}")
    return counts, failures


def tiny_config():
    """Return a config that trains in seconds."""
    config = config_lib.default()
    config.method, config.model.ehr_hidden, config.data.max_buckets = "uni_ehr", 8, 1
    config.num_epochs, config.batch_size, config.eval.num_bootstrap = 3, 32, 20
    config.learning_rate = 0.01
    return config


def main() -> None:
    from absl import flags

    from data_prep import build
    from data_prep.synthetic import tree

    flags.FLAGS.mark_as_parsed()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=-1, help="number of the one case to run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        tree.write(folder / "raw", num_stays=150, seed=1)
        build.build(folder / "raw" / "mimic-iv", None, folder / "built", tasks=["pheno"])
        whole = make(folder / "whole", folder / "built", tiny_config())
        numbers = range(given.cases) if given.only < 0 else range(given.only, given.only + 1)
        counts, failures = fuzz(whole, numbers, given.seed, folder / "scratch")
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:12s} {outcome:10s} {count:6d}")
    print("\n\n".join([f"{len(failures)} failures of {sum(counts.values())}", *failures]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
