"""Raw MIMIC-IV and MIMIC-CXR to shards.

    python -m data_prep.build --mimic_iv=DIR [--mimic_cxr=DIR] --out=DIR [--profile=paper|released|strict]
        [--timestep_h=2] [--tasks=pheno,mortality,radiology] [--val_ids=CSV --test_ids=CSV]
        [--phenotypes=YAML] [--workers=N] [--seed=0] [--explain]

Stages (events of all tasks, each task's arrays, films, each task's shards) are done once: the same
command run again goes on where it was stopped. `<out>/<task>/` appears when it is whole. `<out>/.stages`
holds what a later build with other options can use again; it may be deleted.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from absl import flags

from data_prep import cohort, cxr, datasets, discretize, events, pairing, profiles, progress, stages, tables
from data_prep import phenotypes as icd
from medfuse_jax import errors, records
from medfuse_jax.errors import UserError
from medfuse_jax.tasks import CHANNELS, SPLITS, TASKS, Task

ARRAYS_VERSION = 1  # raise it when the same events give other arrays


@dataclasses.dataclass(frozen=True)
class Source:
    """The raw tables, and the rules they are read by."""

    mimic_iv: dict[str, tables.Table]
    mimic_cxr: dict[str, tables.Table]  # empty without films
    cxr_root: Path | None
    rules: profiles.Rules
    options: dict
    phenotypes: Path | None
    workers: int

    def fingerprint(self) -> dict:
        """Versions and files, for the manifest."""
        source = {
            "mimic_iv": tables.mimic_iv_version(self.mimic_iv),
            "mimic_iv_files": [table.fingerprint() for table in self.mimic_iv.values()],
        }
        if self.mimic_cxr:
            source["mimic_cxr"] = tables.mimic_cxr_version(self.mimic_cxr)
            source["mimic_cxr_files"] = [table.fingerprint() for table in self.mimic_cxr.values()]
        return source


@dataclasses.dataclass(frozen=True)
class Cohort:
    """The stays that count, their splits and phenotype labels."""

    stays: pl.DataFrame
    flow: list[dict]
    split_of: dict[int, str]
    pheno_label_NK: np.ndarray
    icd_counts: dict

    def splits(self, frame: pl.DataFrame) -> list[str]:
        """The split of each row; a patient without a stay of the cohort trains, unless a list names him."""
        return [self.split_of.get(subject, "train") for subject in frame["subject_id"]]


def build(
    mimic_iv: str | Path,
    mimic_cxr: str | Path | None,
    out: str | Path,
    profile: str = "paper",
    timestep_h: float = 2.0,
    tasks: Sequence[str] = tuple(TASKS),
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
            _make(out, hidden, source, fingerprint, val_ids, test_ids, {name: keys[name] for name in todo})


def _make(out: Path, hidden: Path, source: Source, fingerprint: dict, val_ids, test_ids, keys: dict[str, str]) -> None:
    """Runs the stages that the tasks of `keys` need."""
    films = cxr.read_films(source.mimic_cxr) if source.mimic_cxr else None
    film_labels = cxr.read_labels(source.mimic_cxr) if "radiology" in keys else None
    people = _read_cohort(source, val_ids, test_ids)
    stay_tasks = [TASKS[name] for name in keys if not TASKS[name].films_only]
    arrays = {}
    if stay_tasks:
        events_dir = _events_stage(hidden, source, people)
        arrays = {task.name: _arrays_stage(hidden, source, people, task, events_dir) for task in stay_tasks}
    store, labelled, pairs = None, None, {name: _no_pairs() for name in arrays}
    if films:
        store = cxr.FilmStore(hidden / "films", source.cxr_root, source.rules.film_shape, source.workers)
        if film_labels is not None:
            labelled = films[0].join(film_labels, on="study_id", maintain_order="left")
            store.add(labelled.select("dicom_id", "path").iter_rows())
        pairs = _pair_readable(source, people, arrays, films[0], store)
        if store.unreadable:
            progress.say(
                f"warning: {len(store.unreadable)} film(s) cannot be read and are left out; the manifests list them"
            )
    for name, key in keys.items():
        task, extra = TASKS[name], {}
        if task.films_only:
            readable = labelled.filter(~pl.col("dicom_id").is_in(list(store.unreadable)))
            patients = cohort.read_patients(source.mimic_iv)
            index, records_of = datasets.film_dataset(readable, people.splits(readable), patients, store)
            extra["films"] = films[1] | {"films with labels": len(labelled), "films readable": len(readable)}
        else:
            label_NK = people.pheno_label_NK if name == "pheno" else cohort.mortality_labels(people.stays)
            index, records_of = datasets.stay_dataset(
                people.stays, people.splits(people.stays), arrays[name], label_NK, pairs[name], store
            )
            extra = _stay_counts(source, people, task, arrays[name], events.read_counts(events_dir))
            extra |= {"films": films[1]} if films else {}
            window_h = cohort.window_h(task, source.rules.pheno_window_h)
            extra["time_check"] = datasets.check_times(people.stays, arrays[name], pairs[name], window_h)
        manifest = _manifest(source, fingerprint, task, key, index, extra, store)
        manifest["train_mean"], manifest["train_std"] = _statistics(people, arrays.get(name))
        _shards_stage(out, hidden, task, key, index, records_of, manifest)
    if store:
        store.forget_others()
    for left in hidden.glob("arrays-*"):
        shutil.rmtree(left)


def _read_cohort(source: Source, val_ids, test_ids) -> Cohort:
    stays, flow = cohort.read_stays(source.mimic_iv)
    split_of = cohort.assign_splits(stays["subject_id"], val_ids, test_ids, source.options["seed"])
    label_NK, icd_counts = icd.labels(source.mimic_iv, stays, source.phenotypes)
    progress.say("cohort: " + ", ".join(f"{step['stays']:,} {step['filter']}" for step in flow))
    return Cohort(stays, flow, split_of, label_NK, icd_counts)


def _events_stage(hidden: Path, source: Source, people: Cohort) -> Path:
    files = [table.fingerprint() for table in source.mimic_iv.values()]
    key = stages.key(files=files, rules=dataclasses.asdict(source.rules), version=events.VERSION)
    folder = stages.run(
        hidden, "events", key, lambda folder: events.extract(source.mimic_iv, people.stays, source.rules, folder)
    )
    counts = {reason: sum(by_variable.values()) for reason, by_variable in events.read_counts(folder).items()}
    progress.say("events: " + ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(counts.items())))
    return folder


def _arrays_stage(hidden: Path, source: Source, people: Cohort, task: Task, events_dir: Path) -> discretize.Arrays:
    key = stages.key(
        events=events_dir.name, task=dataclasses.asdict(task), step=source.options["timestep_h"], version=ARRAYS_VERSION
    )

    def write(folder: Path) -> None:
        discretize.write_arrays(folder, events_dir, people.stays, source.rules, task, source.options["timestep_h"])

    arrays = discretize.Arrays.open(stages.run(hidden, f"arrays-{task.name}", key, write))
    if not len(arrays.row):
        raise UserError(
            f"no stay has an event that the task {task.name!r} can use: are chartevents and labevents whole?"
        )
    return arrays


def _no_pairs() -> pl.DataFrame:
    return pl.DataFrame(schema={"stay_id": pl.Int64, "dicom_id": pl.String, "film_time": pl.Datetime("us")})


def _pair_readable(source: Source, people: Cohort, arrays: dict, films: pl.DataFrame, store: cxr.FilmStore) -> dict:
    """Each task's pairs; a film that turns out unreadable is as if it were not there."""
    path_of = dict(films.select("dicom_id", "path").iter_rows())
    while True:
        readable = films.filter(~pl.col("dicom_id").is_in(list(store.unreadable)))
        pairs = {
            name: pairing.pair(
                people.stays[task_arrays.row], readable, cohort.window_h(TASKS[name], source.rules.pheno_window_h)
            )
            for name, task_arrays in arrays.items()
        }
        wanted = {dicom_id for frame in pairs.values() for dicom_id in frame["dicom_id"]}
        missing = [(dicom_id, path_of[dicom_id]) for dicom_id in wanted if dicom_id not in store]
        if not missing:
            return pairs
        store.add(missing)


def _stay_counts(source: Source, people: Cohort, task: Task, arrays: discretize.Arrays, event_counts: dict) -> dict:
    flow = [*people.flow]
    if task.window_h:
        flow.append({"filter": f"{task.window_h:g} h or longer", "stays": arrays.num_long_enough})
    flow.append({"filter": "with an event in the time seen", "stays": len(arrays.row)})
    counts = {"cohort": flow, "event_rows": event_counts}
    return counts | ({"diagnosis_codes": people.icd_counts} if task.name == "pheno" else {})


def _statistics(people: Cohort, arrays: discretize.Arrays | None) -> tuple[list[float], list[float]]:
    from data_prep import shards  # imports TFDS (2 s): not for what ends before

    if arrays is None:
        return shards.train_statistics(iter(()))
    splits = people.splits(people.stays)
    train = [i for i, row in enumerate(arrays.row.tolist()) if splits[row] == "train"]
    return shards.train_statistics(arrays.of(i) for i in train)


def _manifest(source: Source, fingerprint: dict, task: Task, key: str, index: dict, extra: dict, store) -> dict:
    return {
        "format_version": records.FORMAT_VERSION,
        "task": task.name,
        "key": key,
        "profile": source.options["profile"],
        "timestep_h": source.options["timestep_h"],
        "options": source.options,
        "rules": profiles.describe(source.options["profile"]),
        "phenotype_table_given": source.phenotypes is not None,
        "source": fingerprint,
        "channels": list(CHANNELS),
        "labels": list(task.labels),
        "counts": {"splits": datasets.split_counts(index, task.labels), **extra},
        "skipped_films": dict(sorted(store.unreadable.items())) if store else {},
    }


def _shards_stage(out: Path, hidden: Path, task: Task, key: str, index: dict, records_of: dict, manifest: dict) -> None:
    from data_prep import shards

    datasets.check_patients_stay_put(index)
    total = sum(len(fields["stay_id"]) for fields in index.values())
    if not total:
        raise UserError(f"the task {task.name!r} has no record: are its tables whole?")
    whole = stages.run(
        hidden, f"shards-{task.name}", key, lambda folder: shards.write(folder, task, index, records_of, manifest)
    )
    stages.put_in_place(whole, out / task.name)
    sizes = "/".join(str(len(index[split]["stay_id"])) for split in SPLITS)
    paired = "/".join(str(int(index[split]["has_cxr"].sum())) for split in SPLITS)
    progress.say(f"{task.name}: {total:,} records (train/val/test {sizes}), with a film {paired}, in {out / task.name}")


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
        versions=[records.FORMAT_VERSION, events.VERSION, ARRAYS_VERSION, icd.VERSION, cxr.VERSION],
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
    flags.DEFINE_list("tasks", list(TASKS), "Tasks to build.", flag_values=text)
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
