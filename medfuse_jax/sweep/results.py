"""What a sweep leaves behind: a record a trial, the table, the choice, and the best config as a file that runs.

Selection is by validation alone; the test split is scored once, for the chosen trial.
"""

import csv
import io
import json
import math
from pathlib import Path

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.data.modalities import loading
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep.search import Trial, short_name

FINISHED, FAILED = "finished", "failed"


def trial_dir(workdir: Path, number: int) -> Path:
    """A trial's folder, which is a workdir as `medfuse_jax.main` makes them."""
    return workdir / "trials" / f"{number:03d}"


def record(workdir: Path, trial: Trial) -> dict | None:
    """How a trial ended: 'status', 'reason', 'val_auroc', 'best_epoch', 'epochs'; None while it has not."""
    path = trial_dir(workdir, trial.number) / "trial.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, and the trial goes on") from None
    if problem := _problem_of(content, trial):
        raise UserError(f"{path} was edited or is another trial's ({problem}): delete it, and the trial goes on")
    return content


def _problem_of(content, trial: Trial) -> str:
    """What keeps a file's content from being the trial's record, '' where nothing does."""
    if not isinstance(content, dict) or content.get("status") not in (FINISHED, FAILED):
        return "it does not say how the trial ended"
    wanted = {"trial": trial.number, "values": _as_json(trial.values)}
    for field, value in wanted.items():
        if content.get(field) != value:
            return f"{field} {content.get(field)}, not {value}"
    reached = {name: content[name] for name in ("val_auroc", "best_epoch", "epochs") if name in content}
    is_whole = isinstance(content.get("reason"), str) and (len(reached) == 3 or content["status"] == FAILED)
    if not is_whole or any(type(n) not in (int, float, type(None)) for n in reached.values()):
        return "it does not say what the trial reached"
    return ""


def _as_json(value):
    return json.loads(json.dumps(value))


def write_record(workdir: Path, trial: Trial, status: str, reason: str = "", **reached) -> None:
    """Says how a trial ended, in one file that appears whole. reached: val_auroc, best_epoch, epochs."""
    reached = {k: v if math.isfinite(v) else None for k, v in reached.items()}
    content = {"trial": trial.number, "values": trial.values, "status": status, "reason": reason, **reached}
    write_whole(trial_dir(workdir, trial.number) / "trial.json", json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that other processes see either whole or not at all."""
    with files.must_write(path, ": choose another --workdir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)


def claim(workdir: Path, config: ConfigDict, digest: str, search: dict, writes: bool = True) -> None:
    """Makes the folder this sweep's, or refuses one that is another's: of another search, config or shards.

    search: all that decides the trials, by flag; a list of 'trials' that begins with those there goes on with more.
    digest: of the shards. writes: whether this process writes sweep.json; the others only compare.
    """
    there = claimed(workdir)
    if there is None:
        if (workdir / "config.json").exists():
            raise UserError(f"{workdir} holds a run, not a sweep: choose another --workdir")
        if runs := sorted(workdir.glob("*/config.json")):
            raise UserError(f"{workdir} holds other runs, such as {runs[0].parent.name}: choose another --workdir")
        if left := [name for name in ("trials", "rounds") if any((workdir / name).glob("*"))]:
            raise UserError(f"{workdir} holds {left[0]}/ and no sweep.json to say whose: choose another --workdir")
    else:
        different = _different_search(there["search"], _as_json(search))
        different = different or config_lib.difference(ConfigDict(there["config"]), config)
        if different:
            raise UserError(f"{workdir} holds another sweep ({different}): choose another --workdir")
        if there["data"] != digest:
            raise UserError(
                f"{config.data.dir}/{config.task} is no longer the build that the sweep in {workdir} was begun on: "
                "put the shards back, or choose another --workdir"
            )
    mine = {"search": search, "config": config.copy_and_resolve_references().to_dict(), "data": digest}
    if writes and (there is None or there["search"] != _as_json(search)):
        write_whole(workdir / "sweep.json", json.dumps(mine, indent=1, sort_keys=True) + "\n")


def claimed(workdir: Path) -> dict | None:
    """What `claim` wrote: 'search', 'config', 'data'; None where the folder is no sweep's yet."""
    path = workdir / "sweep.json"
    try:
        content = json.loads(path.read_text())
        kinds = {"search": dict, "config": dict, "data": str}
        if not isinstance(content, dict) or any(not isinstance(content.get(k), kinds[k]) for k in kinds):
            raise ValueError("it does not hold a search, a config and the data's digest")
        per_round = content["search"].get("round", 1)
        if type(per_round) is not int or per_round < 1:
            raise ValueError(f"its round is {per_round!r}")
        ConfigDict(content["config"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read or is of another version ({error}): choose another --workdir") from None
    return content


def _different_search(theirs: dict, ours: dict) -> str:
    """The first flag in which two searches differ, '' where none does or ours only has more trials."""
    for field in sorted((theirs.keys() | ours.keys()) - {"trials"}):
        if theirs.get(field) != ours.get(field):
            return f"--{field} is {theirs.get(field)} there and {ours.get(field)} here"
    there, here = theirs.get("trials"), ours["trials"]
    if isinstance(there, list) and isinstance(here, list):
        for number, (one, other) in enumerate(zip(there, here)):
            if one != other:
                return f"by --search or --seed, trial {number} is {one} there and {other} here"
        if len(there) <= len(here):
            return ""
        there, here = len(there), len(here)
    return f"--trials is {there} there and {here} here" if there != here else ""


def choose(records: list[dict]) -> dict | None:
    """The finished trial of the highest validation AUROC, the first of equals; None where no trial finished."""
    finished = [r for r in records if r["status"] == FINISHED and r["val_auroc"] is not None]
    return max(finished, key=lambda r: (r["val_auroc"], -r["trial"]), default=None)


def write_table(workdir: Path, records: list[dict]) -> str:
    """Writes sweep.csv, a line a trial, the best first; returns it as aligned text."""
    chosen = choose(records)
    fields = list(dict.fromkeys(field for r in records for field in r["values"]))
    rows = [["trial", *(short_name(f) for f in fields), "val_auroc", "best_epoch", "epochs", "status", "chosen"]]
    for r in in_order(records):
        auroc = "" if r.get("val_auroc") is None else f"{r['val_auroc']:.6f}"
        reached = [auroc, r.get("best_epoch", ""), r.get("epochs", "")]
        status = r["status"] + (f": {r['reason']}" if r["reason"] else "")
        values = [r["values"].get(field, "") for field in fields]
        rows.append([r["trial"], *values, *reached, status, "yes" if r is chosen else ""])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(workdir / "sweep.csv", text.getvalue())
    shown = [[cell if len(str(cell)) <= 40 else f"{str(cell)[:39]}…" for cell in row] for row in rows]
    widths = [max(len(str(row[i])) for row in shown) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell!s:>{w}}" for cell, w in zip(row, widths)).rstrip() for row in shown)


def in_order(records: list[dict]) -> list[dict]:
    """The best validation AUROC first, what has none last."""
    return sorted(records, key=lambda r: (-(r.get("val_auroc") or -1.0), r["trial"]))


def write_best_config(workdir: Path, chosen: dict, config: ConfigDict) -> Path:
    """Writes a file for `medfuse_jax.main --config=FILE`. chosen: the record of the chosen trial; config: its own."""
    config = config.copy_and_resolve_references()
    _make_absolute(config)
    changed = config_lib.flat(config)
    for field, value in config_lib.flat(config_lib.default()).items():
        if changed.get(field) == value:
            del changed[field]
    lines = "".join(f"            {field!r}: {_as_python(value)},\n" for field, value in sorted(changed.items()))
    path = workdir / "best_config.py"
    values = ", ".join(f"{short_name(k)} {v}" for k, v in chosen["values"].items())
    write_whole(
        path,
        f'"""Trial {chosen["trial"]} of a sweep ({values}): validation AUROC {chosen["val_auroc"]:.4f}.\n\n'
        "Run alone it gives the same to rounding, which training may amplify (docs/sweeps.md).\n"
        f'Command: python -m medfuse_jax.main --config={path.absolute()}\n"""\n\n'
        "from ml_collections import ConfigDict\n\nfrom medfuse_jax import config as config_lib\n\n\n"
        "def get_config() -> ConfigDict:\n    config = config_lib.default()\n"
        f"    config.update_from_flattened_dict(\n        {{\n{lines}        }}\n    )\n    return config\n",
    )
    return path


def _make_absolute(config: ConfigDict) -> None:
    """The config's paths, so that its file runs from any folder."""
    for section, field in (("data", "dir"), *(("init", name) for name in config.init)):
        if config[section][field]:
            config[section][field] = str(Path(config[section][field]).absolute())
    if config.data.statistics != "train":
        config.data.statistics = str(Path(config.data.statistics).absolute())
    names = loading.listed(config.model.modalities)
    config.model.modalities = ",".join(str(Path(n).absolute()) if n.endswith(".py") else n for n in names)


def _as_python(value) -> str:
    return repr(tuple(value) if isinstance(value, list) else value)
