"""The stages of a build, from raw tables to shards; build.py is the command and decides what is left to do."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import polars as pl

from data_prep import cache, profiles, progress
from data_prep.ehr import cohort, discretize, events
from data_prep.images import pairing
from data_prep.images import store as image_store
from data_prep.labels import hourly as step_tasks
from data_prep.labels import phenotypes as icd
from data_prep.raw import tables
from data_prep.synthetic import tree
from data_prep.write import datasets, describe, time_check
from medfuse_jax import records
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.schema import CHANNELS, SPLITS, TASKS, Task

_MAX_UNDATED = 0.01  # of the events kept: more than that is said
ARRAYS_VERSION = 3  # raise it when the same events give other arrays


@dataclasses.dataclass(frozen=True)
class Source:
    """The raw tables, and the rules they are read by."""

    mimic_iv: dict[str, tables.Table]
    mimic_cxr: dict[str, tables.Table]  # empty without X-rays
    cxr_root: Path | None
    rules: profiles.Rules
    options: dict
    phenotypes: Path | None
    workers: int

    def is_synthetic(self) -> bool:
        """Whether the tables lie in a tree that data_prep.synthetic wrote, beside its report."""
        table = next(iter(self.mimic_iv.values())).path
        # The folder may be a link, and so may the table alone, to anywhere: also where no folder is two above it.
        above = [table.parents[1].resolve().parent, *table.resolve().parents[2:3]]
        return any((folder / tree.REPORT).is_file() for folder in above)

    def fingerprint(self, cache: Path) -> dict:
        """Versions and files, for the manifest; `cache` as of tables.fingerprints."""
        source = {
            "mimic_iv": tables.mimic_iv_version(self.mimic_iv),
            "mimic_iv_files": tables.fingerprints(self.mimic_iv.values(), cache),
        }
        if self.mimic_cxr:
            source["mimic_cxr"] = tables.mimic_cxr_version(self.mimic_cxr)
            source["mimic_cxr_files"] = tables.fingerprints(self.mimic_cxr.values(), cache)
        return source


@dataclasses.dataclass(frozen=True)
class Cohort:
    """The stays that count, their splits and phenotype labels."""

    stays: pl.DataFrame
    flow: list[dict]
    split_of: dict[int, str]
    pheno_label_NK: np.ndarray
    icd_counts: dict
    unreadable_times: dict[str, int]

    def splits(self, frame: pl.DataFrame) -> list[str]:
        """The split of each row; a patient without a stay of the cohort trains, unless a list names him."""
        return [self.split_of.get(subject, "train") for subject in frame["subject_id"]]


def image_hashes(source: Source, images: tuple | None, names: list[str]) -> dict[str, str | None]:
    """Task -> a hash of the signatures of the X-rays it may use: of those with labels, or of its stays' patients."""
    if not images:
        return dict.fromkeys(names)
    hashes = {}
    for cxr_only in sorted({TASKS[name].cxr_only for name in names}):
        used = _labelled(source, images[0]) if cxr_only else _of_stays(source, images[0])
        hashes[cxr_only] = cache.key(
            images=image_store.signatures(source.cxr_root, used.select("dicom_id", "path").iter_rows(), source.workers)
        )
    return {name: hashes[TASKS[name].cxr_only] for name in names}


def _of_stays(source: Source, images: pl.DataFrame) -> pl.DataFrame:
    """The X-rays that pairing.py may give to a stay, whatever its task and options."""
    patients = source.mimic_iv["icustays"].read("subject_id").select(tables.integer("subject_id"))
    return images.filter(pl.col("view") == "AP", pl.col("time").is_not_null()).join(patients, "subject_id", "semi")


def _labelled(source: Source, images: pl.DataFrame) -> pl.DataFrame:
    return images.join(image_store.read_labels(source.mimic_cxr), on="study_id", maintain_order="left")


def make(
    out: Path,
    hidden: Path,
    source: Source,
    fingerprint: dict,
    images: tuple | None,
    val_ids,
    test_ids,
    inputs: dict[str, dict],
) -> None:
    """Runs the stages that the tasks of `inputs` need.

    images: what `read_metadata` gave, None without X-rays. inputs: task -> what identifies its manifest.
    """
    people = _read_cohort(source, val_ids, test_ids)
    stay_tasks = [TASKS[name] for name in inputs if not TASKS[name].cxr_only]
    arrays, events_dir = {}, None
    if stay_tasks:
        events_dir = _events_stage(hidden, source, fingerprint, people)
        arrays = {task.name: _arrays_stage(hidden, source, people, task, events_dir) for task in stay_tasks}
    store, labelled, pairs = None, None, {name: _no_pairs() for name in arrays}
    if images:
        store = image_store.ImageStore(hidden / "images", source.cxr_root, source.rules.image_shape, source.workers)
        if "radiology" in inputs:
            labelled = _labelled(source, images[0])
            store.add(labelled.select("dicom_id", "path").iter_rows())
        pairs = _pair_readable(source, people, arrays, images[0], store)
        if store.unreadable:
            progress.say(
                f"warning: {len(store.unreadable)} X-ray(s) cannot be read and are left out; the manifests list them"
            )
    for name, known_by in inputs.items():
        task = TASKS[name]
        if task.cxr_only:
            index, records_of, extra = _image_task(source, people, labelled, store)
        else:
            index, records_of, extra = _stay_task(source, people, task, arrays[name], pairs[name], store, events_dir)
            extra["event_rows"] = events.read_counts(events_dir)
        if images:
            extra["images"] = images[1] | extra.get("images", {})
        manifest = known_by | _manifest(source, fingerprint, task, index, extra, store)
        manifest["train_mean"], manifest["train_std"] = _statistics(people, arrays.get(name))
        _shards_stage(out, hidden, task, index, records_of, manifest)
    if store:
        store.forget_useless()
    for left in hidden.glob("arrays-*"):
        shutil.rmtree(left)


def _image_task(source: Source, people: Cohort, labelled: pl.DataFrame, store: image_store.ImageStore) -> tuple:
    """Index, record generators and counts of a task whose records are X-rays."""
    readable = labelled.filter(~pl.col("dicom_id").is_in(list(store.unreadable)))
    patients = cohort.read_patients(source.mimic_iv)
    index, records_of = datasets.image_dataset(readable, people.splits(readable), patients, store)
    return index, records_of, {"images": {"X-rays with labels": len(labelled), "X-rays readable": len(readable)}}


def _stay_task(
    source: Source, people: Cohort, task: Task, arrays: discretize.Arrays, pairs: pl.DataFrame, store, events_dir: Path
) -> tuple:
    """Index, record generators and counts of a task whose records are stays."""
    splits = people.splits(people.stays)
    flow = [*people.flow]
    if task.window_h:
        flow.append({"filter": f"{task.window_h:g} h or longer", "stays": arrays.num_long_enough})
    flow.append({"filter": "with an event in the time seen", "stays": len(arrays.row)})
    counts = {"cohort": flow, "unreadable_times": people.unreadable_times}
    counts["events_stored_too_late"] = arrays.num_stored_late
    counts["events_given_twice"] = arrays.num_given_twice
    found = None
    if task.per_step:
        found, more = step_tasks.predictions(task, people.stays, arrays, source.options["timestep_h"])
        flow += more
        kept = people.stays[arrays.row[found.place_N]]["stay_id"].implode()
        pairs = pairs.filter(pl.col("stay_id").is_in(kept))
        index, records_of = datasets.step_dataset(people.stays, splits, arrays, found, pairs, store)
        counts["predictions"] = step_tasks.counts(found, np.array(splits)[arrays.row[found.place_N]], task.labels)
    else:
        label_NK = people.pheno_label_NK if task.name == "pheno" else cohort.mortality_labels(people.stays)
        index, records_of = datasets.stay_dataset(people.stays, splits, arrays, label_NK, pairs, store)
    counts["variables"] = describe.variables(arrays)
    counts["length_h"] = describe.histogram(arrays.length * source.options["timestep_h"], describe.LENGTH_EDGES_H)
    seen = time_check.Seen(
        people.stays, arrays, pairs, cohort.window_h(task, source.rules.pheno_window_h), source.options["timestep_h"]
    )
    counts["time_check"] = time_check.check(seen, events_dir, found)
    if task.name == "pheno":
        counts["diagnosis_codes"] = people.icd_counts
    return index, records_of, counts


def _read_cohort(source: Source, val_ids, test_ids) -> Cohort:
    unreadable = cohort.unreadable_times(source.mimic_iv)
    stays, flow = cohort.read_stays(source.mimic_iv)
    split_of = cohort.assign_splits(stays["subject_id"], val_ids, test_ids, source.options["seed"])
    label_NK, icd_counts = icd.labels(source.mimic_iv, stays, source.phenotypes)
    _say_flow(flow)
    return Cohort(stays, flow, split_of, label_NK, icd_counts, unreadable)


def _say_flow(flow: list[dict]) -> None:
    removed = [
        f"{before['stays'] - step['stays']:,} by '{step['filter']}'"
        for before, step in itertools.pairwise(flow)
        if step["stays"] < before["stays"]
    ]
    left_out = f"; left out {', '.join(removed)}" if removed else ""
    progress.say(f"cohort: {flow[-1]['stays']:,} of {flow[0]['stays']:,} ICU stays{left_out}")


def _events_stage(hidden: Path, source: Source, fingerprint: dict, people: Cohort) -> Path:
    key = cache.key(
        files=fingerprint["mimic_iv_files"],
        cohort=cohort.digest(people.stays),  # an event holds its stay's row
        rules=dataclasses.asdict(source.rules),
        version=events.VERSION,
    )
    folder = cache.run(
        hidden, "events", key, lambda folder: events.extract(source.mimic_iv, people.stays, source.rules, folder)
    )
    _say_events(events.read_counts(folder))
    return folder


def _say_events(counts: dict[str, dict[str, int]]) -> None:
    rows = {reason: sum(by_variable.values()) for reason, by_variable in counts.items()}
    kept, clipped = rows.pop(events.KEPT, 0), rows.pop(events.CLIPPED, 0)
    undated = rows.pop(events.UNDATED, 0)
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rows.items()))
    progress.say(f"events: {kept:,} rows kept ({clipped:,} clipped); left out: {left_out or 'none'}")
    if undated > _MAX_UNDATED * kept:
        progress.say(
            f"warning: {undated:,} events have no storetime and are kept: nothing says that they were known in time"
        )


def _arrays_stage(hidden: Path, source: Source, people: Cohort, task: Task, events_dir: Path) -> discretize.Arrays:
    window_h = cohort.window_h(task, source.rules.pheno_window_h)
    # Tasks that see the same part of the same stays share their arrays.
    name = "whole" if window_h is None else f"{'first' if task.window_h is None else 'full'}{window_h:g}h"
    key = cache.key(events=events_dir.name, name=name, step=source.options["timestep_h"], version=ARRAYS_VERSION)

    def write(folder: Path) -> None:
        discretize.write_arrays(folder, events_dir, people.stays, source.rules, task, source.options["timestep_h"])

    arrays = discretize.Arrays.open(cache.run(hidden, f"arrays-{name}", key, write))
    if not len(arrays.row):
        raise UserError(
            f"no stay has an event that the task {task.name!r} can use: are chartevents and labevents whole?"
        )
    return arrays


def _no_pairs() -> pl.DataFrame:
    return pl.DataFrame(schema={"stay_id": pl.Int64, "dicom_id": pl.String, "cxr_time": pl.Datetime("us")})


def _pair_readable(
    source: Source, people: Cohort, arrays: dict, images: pl.DataFrame, store: image_store.ImageStore
) -> dict:
    """Each task's pairs; an X-ray that turns out unreadable is as if it were not there."""
    path_of = dict(images.select("dicom_id", "path").iter_rows())
    while True:
        readable = images.filter(~pl.col("dicom_id").is_in(list(store.unreadable)))
        pairs = {
            name: (pairing.within if TASKS[name].per_step else pairing.pair)(
                people.stays[task_arrays.row], readable, cohort.window_h(TASKS[name], source.rules.pheno_window_h)
            )
            for name, task_arrays in arrays.items()
        }
        wanted = {dicom_id for frame in pairs.values() for dicom_id in frame["dicom_id"]}
        missing = [(dicom_id, path_of[dicom_id]) for dicom_id in wanted if dicom_id not in store]
        if not missing:
            return pairs
        store.add(missing)


def _statistics(people: Cohort, arrays: discretize.Arrays | None) -> tuple[list[float], list[float]]:
    from data_prep.write import shards  # imports TFDS (2 s): not for what ends before

    if arrays is None:
        return shards.train_statistics(iter(()))
    splits = people.splits(people.stays)
    train = [i for i, row in enumerate(arrays.row.tolist()) if splits[row] == "train"]
    return shards.train_statistics(arrays.of(i) for i in train)


def _manifest(source: Source, fingerprint: dict, task: Task, index: dict, extra: dict, store) -> dict:
    return {
        "format_version": records.FORMAT_VERSION,
        "facts_version": describe.VERSION,
        "task": task.name,
        "profile": source.options["profile"],
        "timestep_h": source.options["timestep_h"],
        "options": source.options,
        "rules": profiles.describe(source.options["profile"]),
        "phenotype_table_given": source.phenotypes is not None,
        "source": fingerprint,
        "synthetic": source.is_synthetic(),
        "channels": list(CHANNELS),
        "labels": list(task.labels),
        "counts": {"splits": datasets.split_counts(index, task.labels), **extra},
        "skipped_images": dict(sorted(store.unreadable.items())) if store else {},
    }


def _shards_stage(out: Path, hidden: Path, task: Task, index: dict, records_of: dict, manifest: dict) -> None:
    from data_prep.write import shards

    datasets.check_patients_stay_put(index)
    total = sum(len(fields["stay_id"]) for fields in index.values())
    if not total:
        raise UserError(f"the task {task.name!r} has no record: are its tables whole?")
    whole = cache.run(
        hidden,
        f"shards-{task.name}",
        manifest["key"],
        lambda folder: shards.write(folder, task, index, records_of, manifest),
    )
    cache.put_in_place(whole, out / task.name)
    sizes = "/".join(str(len(index[split]["stay_id"])) for split in SPLITS)
    paired = "/".join(str(int(index[split]["has_cxr"].sum())) for split in SPLITS)
    progress.say(
        f"{task.name}: {total:,} records (train/val/test {sizes}), with an X-ray {paired}, in {out / task.name}"
    )
