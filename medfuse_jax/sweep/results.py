"""The files of a sweep: one record per trial, the table, and the best config.

The best trial is chosen on validation alone; only that trial is scored on the test split, once.
"""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import schema
from medfuse_jax.data.modalities import loading
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep.trial import Trial, short_name

FINISHED, FAILED, PRUNED = "finished", "failed", "pruned"
_CHOOSE = "choose another --workdir"


class NoneFinished(UserError):
    """No trial of a sweep finished, so that none can be chosen."""


def trial_dir(workdir: Path, number: int) -> Path:
    """Return a trial's folder, a workdir like that of a single run."""
    return workdir / "trials" / f"{number:03d}"


def chosen_dir(workdir: Path) -> Path:
    """Return the folder of the trial that a sweep chose; raise UserError if it has not ended, or none finished."""
    path = workdir / "sweep.csv"
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        chosen = next((int(row["trial"]) for row in rows if row["chosen"]), None)
    except FileNotFoundError:
        raise UserError(f"the sweep in {workdir} has not ended: rerun its command first", path=path) from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): rerun the sweep's command", path=path) from None
    if chosen is None:
        message = f"no trial of {workdir} finished, so none was chosen: see the reasons in {path}"
        raise NoneFinished(message, path=path)
    return trial_dir(workdir, chosen)


def record(workdir: Path, trial: Trial) -> dict | None:
    """Return how a trial ended: 'status', 'reason', 'val_auroc', 'best_epoch', 'epochs'; None if it has not ended.

    Also 'val_loss', of the best epoch, where it selects because no validation label has both classes.
    """
    path = trial_dir(workdir, trial.number) / "trial.json"
    if not path.exists():
        return None
    hint = "delete it and rerun to resume the trial"
    content, values = files.read_json(path, hint), _as_json(trial.values)
    if problem := _find_problem(content, {"trial": trial.number, "values": values}):
        raise UserError(f"{path} was edited or belongs to another trial ({problem}): {hint}", path=path)
    return content | {"values": values}  # values in the order of the trial's fields


def has_finished(workdir: Path, number: int) -> bool:
    """Return whether a trial, of whatever values, has finished."""
    path = trial_dir(workdir, number) / "trial.json"
    return path.exists() and files.read_json(path, "delete it and rerun").get("status") == FINISHED


def _find_problem(content: dict, expected: dict) -> str:
    """Return why a file's content is not the trial's record; '' if it is."""
    for field, value in expected.items():
        if content.get(field) != value:
            return f"{field} is {content.get(field)}, not {value}"
    names = ("val_auroc", "best_epoch", "epochs")
    reached = {name: content[name] for name in (*names, "val_loss") if name in content}
    has_ended = content.get("status") in (FINISHED, PRUNED)
    is_complete = content.get("status") == FAILED or (has_ended and set(names) <= set(reached))
    if not is_complete or not isinstance(content.get("reason"), str):
        return "the result is missing"
    invalid = [name for name, value in reached.items() if type(value) not in (int, float, type(None))]
    return f"{invalid[0]} is not a number" if invalid else ""


def _as_json(value):
    return json.loads(json.dumps(value))


def write_record(workdir: Path, trial: Trial, status: str, reason: str = "", **reached) -> None:
    """Write how a trial ended. reached: val_auroc, best_epoch, epochs, val_loss."""
    reached = {k: v if math.isfinite(v) else None for k, v in reached.items()}
    content = {"trial": trial.number, "values": trial.values, "status": status, "reason": reason, **reached}
    write_json(trial_dir(workdir, trial.number) / "trial.json", content)


def write_json(path: Path, content: dict | list) -> None:
    with files.must_write(path, f": {_CHOOSE}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, files.sealed(content) if isinstance(content, dict) else content)


def write_text(path: Path, text: str) -> None:
    with files.must_write(path, f": {_CHOOSE}"):
        files.write_text(path, text)


def claim(workdir: Path, config: ConfigDict, digest: str, search: dict, writes: bool = True) -> None:
    """Claim the folder for this sweep; raise UserError if it belongs to another search, config or build of the shards.

    search: all that determines the trials. A list of 'trials' may extend the stored one. digest: of the shards.
    writes: False in all processes but the first, which only compare.
    """
    existing = read_claim(workdir)
    if existing is None:
        _check_unused(workdir)
    else:
        different = _search_difference(existing["search"], _as_json(search))
        different = different or config_lib.difference(config_lib.with_defaults(existing["config"]), config)
        if different:
            raise UserError(f"{workdir} holds another sweep ({different}): {_CHOOSE}", path=workdir, value=different)
        if existing["data"] != digest:
            shards = Path(config.data.dir) / config.task
            message = f"{shards} was rebuilt since the sweep in {workdir} started: restore the shards, or {_CHOOSE}"
            raise UserError(message, path=shards)
    if writes and (existing is None or existing["search"] != _as_json(search)):
        content = {"search": search, "config": config.copy_and_resolve_references().to_dict(), "data": digest}
        write_json(workdir / "sweep.json", content)


def read_claim(workdir: Path) -> dict | None:
    """Return what `claim` wrote: 'search', 'config' and 'data'; None if the folder is unclaimed."""
    path = workdir / "sweep.json"
    if not path.exists():
        return None
    content = files.read_json(path, _CHOOSE)
    kinds = {"search": dict, "config": dict, "data": str}
    is_valid = all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    per_round = content["search"].get("round", 1) if is_valid else 0
    try:
        if type(per_round) is not int or per_round < 1:
            raise ValueError("search, config or data is missing or invalid")
        ConfigDict(content["config"])
    except ValueError as error:
        raise UserError(f"{path} is damaged or of another version ({error}): {_CHOOSE}", path=path) from None
    return content


def _check_unused(workdir: Path) -> None:
    """Raise UserError if a folder without sweep.json holds a run or the remains of a sweep."""
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a run, not a sweep: {_CHOOSE}", path=workdir / "config.json")
    if runs := sorted(workdir.glob("*/config.json")):
        raise UserError(f"{workdir} holds other runs, such as {runs[0].parent.name}: {_CHOOSE}", path=runs[0])
    if sweeps := sorted(workdir.glob("*/sweep.json")):
        raise UserError(f"{workdir} holds other sweeps, such as {sweeps[0].parent.name}: {_CHOOSE}", path=sweeps[0])
    for name in ("trials", "rounds"):
        if any((workdir / name).glob("*")):
            raise UserError(f"{workdir} holds {name}/ but no sweep.json: {_CHOOSE}", path=workdir / name)


def _search_difference(existing: dict, current: dict) -> str:
    """Return the first flag in which two searches differ; '' if none differs, or if `current` only adds trials."""
    for field in sorted((existing.keys() | current.keys()) - {"trials"}):
        if existing.get(field) != current.get(field):
            return f"--{field} was {existing.get(field)} and is now {current.get(field)}"
    before, now = existing.get("trials"), current["trials"]
    if isinstance(before, list) and isinstance(now, list):
        for number, (old, new) in enumerate(zip(before, now)):
            if old != new:
                return f"--search or --seed: trial {number} was {old} and is now {new}"
        if len(before) <= len(now):
            return ""
        before, now = len(before), len(now)
    return f"--trials was {before} and is now {now}" if before != now else ""


def choose(records: list[dict]) -> dict | None:
    """Return the finished trial with the best validation score (the first in a tie); None if none finished."""
    finished = [r for r in records if r["status"] == FINISHED and score_of(r) is not None]
    return min(finished, key=_worse_last(by_loss(records)), default=None)


def by_loss(records: list[dict]) -> bool:
    """Return whether the validation loss chooses the trial, because no validation label has both classes."""
    return any(r.get("val_loss") is not None for r in records)


def score_name(records: list[dict], task: str) -> str:
    """Return the name of the validation score that chooses the trial: 'AUROC', 'kappa' or 'loss'."""
    return "loss" if by_loss(records) else schema.selected_by(task)


def score_of(r: dict) -> float | None:
    """Return a trial's validation score; None if it has none."""
    return r.get("val_auroc") if r.get("val_loss") is None else r["val_loss"]


def _worse_last(is_loss: bool) -> Callable[[dict], tuple]:
    """Return a sort key: the best score first, then the lowest number; trials without a score last."""

    def key(r: dict) -> tuple:
        score = score_of(r)
        return score is None, (score or 0.0) * (1 if is_loss else -1), r["trial"]

    return key


def write_table(workdir: Path, records: list[dict], task: str) -> str:
    """Write sweep.csv, one row per trial, best first; return it as aligned text.

    The column of the score that selects the task's models is named after it (`score_name`).
    """
    chosen = choose(records)
    fields = list(dict.fromkeys(field for r in records for field in r["values"]))
    score = f"val_{score_name(records, task).lower()}"
    rows = [["trial", *(short_name(f) for f in fields), score, "best_epoch", "epochs", "status", "chosen"]]
    for r in ranked(records):
        value = score_of(r)
        reached = ["" if value is None else f"{value:.6f}", r.get("best_epoch", ""), r.get("epochs", "")]
        values = [r["values"].get(field, "") for field in fields]
        rows.append([r["trial"], *values, *reached, status_text(r), "yes" if r is chosen else ""])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(workdir / "sweep.csv", text.getvalue())
    cells = [[str(x) if len(str(x)) <= 40 else f"{str(x)[:39]}…" for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(f"{x:>{w}}" for x, w in zip(row, widths)).rstrip() for row in cells)


def ranked(records: list[dict]) -> list[dict]:
    """Sort the records by the validation score that selects models, best first and those without one last."""
    return sorted(records, key=_worse_last(by_loss(records)))


def status_text(r: dict) -> str:
    return r["status"] + (f": {r['reason']}" if r["reason"] else "")


def write_best_config(workdir: Path, chosen: dict, config: ConfigDict) -> Path:
    """Write a file for `medfuse_jax.main --config=FILE`. chosen: the chosen trial's record; config: its config."""
    config = config.copy_and_resolve_references()
    _make_absolute(config)
    defaults = config_lib.flat(config_lib.default())
    changed = {k: v for k, v in sorted(config_lib.flat(config).items()) if k not in defaults or defaults[k] != v}
    lines = "".join(
        f"            {field!r}: {tuple(value) if isinstance(value, list) else value!r},\n"
        for field, value in changed.items()
    )
    path = workdir / "best_config.py"
    values = ", ".join(f"{short_name(k)} {v}" for k, v in chosen["values"].items())
    reached = f"validation {score_name([chosen], config.task)} {score_of(chosen):.4f}"
    write_text(
        path,
        f'"""Trial {chosen["trial"]} of a sweep ({values}): {reached}.\n\n'
        "As a single run it gives the same results up to rounding, which training may amplify (docs/sweeps.md).\n"
        f'Command: python -m medfuse_jax.main --config={path.absolute()}\n"""\n\n'
        "from ml_collections import ConfigDict\n\nfrom medfuse_jax import config as config_lib\n\n\n"
        "def get_config() -> ConfigDict:\n    config = config_lib.default()\n"
        f"    config.update_from_flattened_dict(\n        {{\n{lines}        }}\n    )\n    return config\n",
    )
    return path


def _make_absolute(config: ConfigDict) -> None:
    """Make the config's paths absolute, so that the config file works from any folder."""
    for section, field in (("data", "dir"), *(("init", name) for name in config.init)):
        if config[section][field]:
            config[section][field] = str(Path(config[section][field]).absolute())
    if config.data.statistics != "train":
        config.data.statistics = str(Path(config.data.statistics).absolute())
    names = loading.listed(config.model.modalities)
    config.model.modalities = ",".join(str(Path(n).absolute()) if n.endswith(".py") else n for n in names)
