"""What a sweep leaves behind: a record a trial, the table, the choice, and the best config as a file that runs.

Selection is by validation alone; the test split is scored once, for the chosen trial. Never imports jax.
"""

import csv
import io
import json
import math
from pathlib import Path

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import files
from medfuse_jax.errors import UserError
from medfuse_jax.sweep.search import Trial, short_name

FINISHED, FAILED = "finished", "failed"


def trial_dir(workdir: Path, number: int) -> Path:
    """A trial's folder, which is a workdir as `medfuse_jax.main` makes them."""
    return workdir / "trials" / f"{number:03d}"


def record(workdir: Path, number: int) -> dict | None:
    """How a trial ended: 'status', 'reason', 'val_auroc', 'best_epoch', 'epochs'; None while it has not."""
    try:
        return json.loads((trial_dir(workdir, number) / "trial.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        path = trial_dir(workdir, number) / "trial.json"
        raise UserError(f"{path} cannot be read ({error}): delete it, and the trial goes on") from None


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


def claim(workdir: Path, config: ConfigDict, search: dict) -> None:
    """Makes the folder this sweep's, or refuses one that is another's. search: all that decides the trials."""
    path = workdir / "sweep.json"
    mine = {"search": search, "config": config_lib.flat(config)}
    if not path.exists():
        if (workdir / "config.json").exists():
            raise UserError(f"{workdir} holds a run, not a sweep: choose another --workdir")
        write_whole(path, json.dumps(mine, indent=1, sort_keys=True) + "\n")
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --workdir") from None
    for part in mine:
        for field in sorted(mine[part].keys() | there.get(part, {}).keys()):
            theirs, ours = there.get(part, {}).get(field), mine[part].get(field)
            if theirs != json.loads(json.dumps(ours)):
                name = f"--{field}" if part == "search" else f"config.{field}"
                difference = f"{name} is {theirs} there and {ours} here"
                raise UserError(f"{workdir} holds another sweep ({difference}): choose another --workdir")


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


def write_best_config(workdir: Path, chosen: dict) -> Path:
    """Writes the chosen trial's config as a file for `medfuse_jax.main --config=FILE`."""
    config = config_lib.load(trial_dir(workdir, chosen["trial"]) / "config.json")
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
        f'Command: python -m medfuse_jax.main --config={path}\n"""\n\n'
        "from ml_collections import ConfigDict\n\nfrom medfuse_jax import config as config_lib\n\n\n"
        "def get_config() -> ConfigDict:\n    config = config_lib.default()\n"
        f"    config.update_from_flattened_dict(\n        {{\n{lines}        }}\n    )\n    return config\n",
    )
    return path


def _as_python(value) -> str:
    return repr(tuple(value) if isinstance(value, list) else value)
