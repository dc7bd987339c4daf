"""Raw MIMIC-IV and MIMIC-CXR to shards.

    python -m data_prep.build --mimic_iv=DIR [--mimic_cxr=DIR] --out=DIR [--profile=paper|released|strict]
        [--timestep_h=2] [--tasks=pheno,mortality,radiology,decompensation,length_of_stay]
        [--val_ids=CSV --test_ids=CSV] [--phenotypes=YAML] [--workers=N] [--seed=0] [--explain]

Stages (events of all tasks, each task's arrays, X-rays, each task's shards) are done once: the same
command run again goes on where it was stopped. `<out>/<task>/` appears when it is whole, `<out>/audit.html` and
`audit.json` at the end (audit.py). `<out>/.stages` holds what a later build with other options can use again; it
may be deleted.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from data_prep import cache, pipeline, profiles, progress, rebuild
from data_prep.audit import gather
from data_prep.ehr import cohort, events
from data_prep.images import store as image_store
from data_prep.labels import hourly, icd
from data_prep.labels import phenotypes as phenotype_labels
from data_prep.pipeline import Source
from data_prep.raw import tables
from data_prep.write import describe
from medfuse_jax import records
from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import UserError, check_choice
from medfuse_jax.schema import CHANNELS, TASKS

# The tasks of the paper; those with a label an hour are built when they are asked for.
DEFAULT_TASKS = tuple(name for name, task in TASKS.items() if not task.per_step)
# A longer step would leave mortality's 48 h none; a shorter one would make millions of steps of a long stay.
SHORTEST_STEP_H, LONGEST_STEP_H = 1 / 60, 48.0


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

    mimic_iv, mimic_cxr: the folders as downloaded; without mimic_cxr no stay has an X-ray and the task
        'radiology' is left out. profile: see profiles.py. timestep_h: hours. val_ids, test_ids: files of
        patients (cohort.read_id_list), or None for a hash of `subject_id` and `seed`. phenotypes: a
        phenotype table. workers: threads that decode X-rays; the output is the same for any number.
    A task that is there with other options is made anew. Raises UserError for what the caller can put right.
    """
    rules, out = profiles.rules(profile), Path(out)
    names = _check_tasks(tasks, mimic_cxr)
    _check_apart(out, names, [Path(folder) for folder in (mimic_iv, mimic_cxr) if folder])
    if mimic_cxr is None:
        rebuild.check_without_cxr(out, names)
    if not SHORTEST_STEP_H <= timestep_h <= LONGEST_STEP_H:  # nan neither
        raise UserError(f"--timestep_h is {timestep_h}; it must be from 1/60 (a minute) to {LONGEST_STEP_H:g} hours")
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
    _check_storetime(source)
    if profile == "released" and timestep_h != 1:
        progress.say(
            f"warning: --profile=released with {timestep_h:g} h steps: the released code's arrays have --timestep_h=1"
        )
    if rules.phenotypes == "table" and phenotypes is None and "pheno" in names:
        progress.say(
            f"warning: --profile={profile} without --phenotypes=FILE (icd_9_10_definitions_2.yaml of the released "
            "extraction): its phenotype labels are not the released ones"
        )
    with cache.private(out) as hidden:
        fingerprint = source.fingerprint(hidden / "tables.json")
        _say_versions(fingerprint, mimic_iv, mimic_cxr)
        images = image_store.read_metadata(source.mimic_cxr) if mimic_cxr else None
        inputs = {
            name: {"key": _task_key(name, source, fingerprint, image_hash), "image_files": image_hash}
            for name, image_hash in pipeline.image_hashes(source, images, names).items()
        }
        rebuild.warn_of_others(out, names, options, fingerprint)
        todo = {}
        for name, known_by in inputs.items():
            manifest = rebuild.read_manifest(out / name)
            if manifest.get("key") == _task_key(name, source, fingerprint, manifest.get("image_files")):
                changes = [] if manifest["key"] == known_by["key"] else ["other X-rays, or some missing or unreadable"]
            else:
                changes = rebuild.changes(manifest, options, fingerprint)
            if not rebuild.is_done(out / name, manifest, changes):
                todo[name] = known_by
        if todo:
            pipeline.make(out, hidden, source, fingerprint, images, val_ids, test_ids, todo)
        gather.write(out)


def _check_storetime(source: Source) -> None:
    """Raises UserError where the rules ask when an event was stored, and a table does not say."""
    for name in ("chartevents", "labevents"):
        table = source.mimic_iv[name]
        if source.rules.stored_in_time and "storetime" not in table.columns:
            raise UserError(f"{table.path} has no column 'storetime', which --profile=strict needs: download it again")


def _check_apart(out: Path, names: list[str], sources: list[Path]) -> None:
    """Raises UserError where the output would be written into what was downloaded, or in its place."""
    for source in sources:
        real, made = source.resolve(), out.resolve()
        if real in (made, *made.parents) or any(made / name in (real, *real.parents) for name in names):
            raise UserError(
                f"--out={out} and {source}, which holds what was downloaded, overlap: give a folder elsewhere"
            )


def _say_versions(fingerprint: dict, mimic_iv, mimic_cxr) -> None:
    progress.say(f"MIMIC-IV {fingerprint['mimic_iv']} in {mimic_iv}")
    if mimic_cxr:
        progress.say(f"MIMIC-CXR-JPG {fingerprint['mimic_cxr']} in {mimic_cxr}")


def _check_tasks(names: Sequence[str], mimic_cxr) -> list[str]:
    for name in names:
        check_choice("--tasks", name, TASKS)
    if mimic_cxr is None and any(TASKS[name].cxr_only for name in names):
        names = [name for name in names if not TASKS[name].cxr_only]
        progress.say("no --mimic_cxr: no stay has an X-ray, and radiology is left out")
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


def _task_key(name: str, source: Source, fingerprint: dict, image_hash: str | None) -> str:
    """A hash of all that a task's dataset is made from: tables, X-rays, options, rules and versions of code."""
    return cache.key(
        task=dataclasses.asdict(TASKS[name]),
        channels=CHANNELS,
        options=source.options,
        rules=dataclasses.asdict(source.rules),
        tables=[fingerprint["mimic_iv_files"], fingerprint.get("mimic_cxr_files")],
        images=image_hash,
        versions=[
            records.FORMAT_VERSION,
            cohort.VERSION,
            events.VERSION,
            pipeline.ARRAYS_VERSION,
            phenotype_labels.VERSION,
        ],
        codes=icd.PACKAGE if name == "pheno" else None,
        pixels=[image_store.VERSION, image_store.DECODER] if image_hash else None,
        facts=[hourly.VERSION, describe.VERSION],
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags; a function, because importing this module must not define any."""
    flags.DEFINE_string("mimic_iv", None, "The MIMIC-IV folder (holds icu/ and hosp/).", flag_values=values)
    flags.DEFINE_string("mimic_cxr", None, "The MIMIC-CXR-JPG folder (holds files/).", flag_values=values)
    flags.DEFINE_string("out", None, "Where the shards go.", flag_values=values)
    flags.DEFINE_string("profile", "paper", "paper, released or strict: see --explain.", flag_values=values)
    flags.DEFINE_float("timestep_h", 2.0, "Hours a step, 1/60 to 48.", flag_values=values)
    flags.DEFINE_list("tasks", list(DEFAULT_TASKS), f"Tasks to build, of {', '.join(TASKS)}.", flag_values=values)
    flags.DEFINE_string("val_ids", None, "CSV of the validation patients.", flag_values=values)
    flags.DEFINE_string("test_ids", None, "CSV of the test patients.", flag_values=values)
    flags.DEFINE_string("phenotypes", None, "A phenotype table (YAML).", flag_values=values)
    flags.DEFINE_integer("workers", None, "Threads that decode X-rays; default: the cores.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of the split, where no lists are given.", flag_values=values)
    flags.DEFINE_bool("explain", False, "Print the profile's rules and end.", flag_values=values)


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
    command_line.run(main, resumes=True)
