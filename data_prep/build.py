"""Raw MIMIC-IV and MIMIC-CXR to shards.

    python -m data_prep.build --mimic_iv=DIR [--mimic_cxr=DIR] --out=DIR [--profile=paper|released|strict]
        [--timestep_h=2] [--tasks=pheno,mortality,radiology,decompensation,length_of_stay]
        [--val_ids=CSV --test_ids=CSV] [--phenotypes=YAML] [--workers=N] [--seed=0] [--explain]

Stages (events of all tasks, each task's arrays, films, each task's shards) are done once: the same
command run again goes on where it was stopped. `<out>/<task>/` appears when it is whole, `<out>/audit.html` and
`audit.json` at the end (audit.py). `<out>/.stages` holds what a later build with other options can use again; it
may be deleted.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from absl import flags

from data_prep import audit, cxr, describe, events, pipeline, profiles, progress, stages, steps, tables
from data_prep import phenotypes as icd
from data_prep.pipeline import Source
from medfuse_jax import errors, records
from medfuse_jax.errors import UserError
from medfuse_jax.tasks import CHANNELS, TASKS

# The tasks of the paper; those with a label an hour are built when they are asked for.
DEFAULT_TASKS = tuple(name for name, task in TASKS.items() if not task.per_step)


def build(
    mimic_iv: str | Path,
    mimic_cxr: str | Path | None,
    out: str | Path,
    profile: str = "paper",
    timestep_h: float = 2.0,
    tasks: Sequence[str] = DEFAULT_TASKS,
    val_ids: str | Path | None = None,
    test_ids: str | Path | None = None,
    phenotypes: str | Path | None = None,
    workers: int | None = None,
    seed: int = 0,
) -> None:
    """Makes `<out>/<task>/` (medfuse_jax/records.py says what it holds) for every task.

    mimic_iv, mimic_cxr: the folders as downloaded; without mimic_cxr no stay has a film and the task
        'radiology' is left out. profile: see profiles.py. timestep_h: hours. val_ids, test_ids: files of
        patients (cohort.read_id_list), or None for a hash of `subject_id` and `seed`. phenotypes: a
        phenotype table. workers: threads that decode films; the output is the same for any number.
    A task that is there with other options is made anew. Raises UserError for what the caller can put right.
    """
    rules = profiles.rules(profile)
    names = _check_tasks(tasks, mimic_cxr)
    if not (math.isfinite(timestep_h) and timestep_h > 0):
        raise UserError(f"--timestep_h is {timestep_h}; it must be more than 0 hours")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    options = {"profile": profile, "timestep_h": float(timestep_h), "seed": seed}
    options |= {"val_ids": _file_hash(val_ids), "test_ids": _file_hash(test_ids), "phenotypes": _file_hash(phenotypes)}
    source = Source(
        tables.mimic_iv(mimic_iv),
        tables.mimic_cxr(mimic_cxr) if mimic_cxr else {},
        Path(mimic_cxr) if mimic_cxr else None,
        rules,
        options,
        phenotypes,
        workers or len(os.sched_getaffinity(0)),
    )
    if rules.phenotypes == "table" and phenotypes is None and "pheno" in names:
        progress.say(
            f"warning: --profile={profile} without --phenotypes=FILE (icd_9_10_definitions_2.yaml of the released "
            "extraction): its phenotype labels are not the released ones"
        )
    out = Path(out)
    with stages.private(out) as hidden:
        fingerprint = source.fingerprint()
        keys = {name: _task_key(name, source, fingerprint) for name in names}
        _note_other_tasks(out, names, options)
        todo = [name for name in names if not _is_done(out, name, keys[name], source)]
        if todo:
            pipeline.make(out, hidden, source, fingerprint, val_ids, test_ids, {name: keys[name] for name in todo})
        audit.write(out)


def _check_tasks(names: Sequence[str], mimic_cxr) -> list[str]:
    for name in names:
        errors.check_choice("--tasks", name, TASKS)
    if mimic_cxr is None and any(TASKS[name].films_only for name in names):
        names = [name for name in names if not TASKS[name].films_only]
        progress.say("no --mimic_cxr: no stay has a film, and radiology is left out")
    if not names:
        raise UserError("no task is left to build: give --mimic_cxr, or other --tasks")
    return list(dict.fromkeys(names))


def _file_hash(path: str | Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def _task_key(name: str, source: Source, fingerprint: dict) -> str:
    return stages.key(
        task=dataclasses.asdict(TASKS[name]),
        channels=CHANNELS,
        options=source.options,
        rules=dataclasses.asdict(source.rules),
        source=fingerprint,
        versions=[records.FORMAT_VERSION, events.VERSION, pipeline.ARRAYS_VERSION, icd.VERSION, cxr.VERSION],
        facts=[steps.VERSION, describe.VERSION],
    )


def _read_manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}


def _is_done(out: Path, name: str, key: str, source: Source) -> bool:
    manifest = _read_manifest(out / name)
    if manifest.get("key") != key:
        if manifest:
            progress.say(f"{name}: {out / name} was built from other input or with other options and is made anew")
        return False
    if manifest["skipped_films"]:
        paths = cxr.read_films(source.mimic_cxr)[0].filter(pl.col("dicom_id").is_in(list(manifest["skipped_films"])))
        now = {
            dicom_id: cxr.signature(source.cxr_root / path)
            for dicom_id, path in paths.select("dicom_id", "path").iter_rows()
        }
        if now != manifest["skipped_films"]:
            progress.say(f"{name}: films that could not be read have changed, so it is made anew")
            return False
    progress.say(f"{name}: {out / name} is there already")
    return True


def _note_other_tasks(out: Path, names: list[str], options: dict) -> None:
    for name in TASKS:
        manifest = _read_manifest(out / name)
        if name not in names and manifest and manifest.get("options") != options:
            progress.say(f"warning: {out / name} was built with other options and is left as it is")


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; a function, because importing this module must not define any."""
    text = flag_values
    flags.DEFINE_string("mimic_iv", None, "The MIMIC-IV folder (holds icu/ and hosp/).", flag_values=text)
    flags.DEFINE_string("mimic_cxr", None, "The MIMIC-CXR-JPG folder (holds files/).", flag_values=text)
    flags.DEFINE_string("out", None, "Where the shards go.", flag_values=text)
    flags.DEFINE_string("profile", "paper", "paper, released or strict: see --explain.", flag_values=text)
    flags.DEFINE_float("timestep_h", 2.0, "Hours a step.", flag_values=text)
    flags.DEFINE_list("tasks", list(DEFAULT_TASKS), f"Tasks to build, of {', '.join(TASKS)}.", flag_values=text)
    flags.DEFINE_string("val_ids", None, "CSV of the validation patients.", flag_values=text)
    flags.DEFINE_string("test_ids", None, "CSV of the test patients.", flag_values=text)
    flags.DEFINE_string("phenotypes", None, "A phenotype table (YAML).", flag_values=text)
    flags.DEFINE_integer("workers", None, "Threads that decode films; default: the cores.", flag_values=text)
    flags.DEFINE_integer("seed", 0, "Of the split, where no lists are given.", flag_values=text)
    flags.DEFINE_bool("explain", False, "Print the profile's rules and end.", flag_values=text)


def main(argv: list[str]) -> None:
    """The command."""
    values = flags.FLAGS
    if values.explain:
        print(profiles.explain(values.profile))
        return
    for name in ("mimic_iv", "out"):
        if not getattr(values, name):
            raise UserError(f"--{name}=DIR is missing")
    names = ("profile", "timestep_h", "tasks", "val_ids", "test_ids", "phenotypes", "workers", "seed")
    build(values.mimic_iv, values.mimic_cxr, values.out, **{name: getattr(values, name) for name in names})


if __name__ == "__main__":
    define_flags()
    errors.run(main)
