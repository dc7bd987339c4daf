"""The steps of a build, from raw tables to shards. build.py decides which datasets are built."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import polars as pl

from data_prep import cache, profiles, progress
from data_prep.ehr import cohort, discretize, events
from data_prep.ehr import splits as splits_lib
from data_prep.ehr.arrays import Arrays
from data_prep.images import chexpert, pairing, views
from data_prep.images import store as image_store
from data_prep.labels import hourly, mortality, phenotypes
from data_prep.raw import parse, tables
from data_prep.synthetic import tree
from data_prep.write import datasets, describe, time_check
from medfuse_jax import records
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.schema import CHANNELS, SPLITS, TASKS, Task

_MAX_UNDATED = 0.01  # the build warns if more than this share of the kept events has no storetime
_NO_PAIRS = pl.DataFrame(schema={"stay_id": pl.Int64, "dicom_id": pl.String, "cxr_time": pl.Datetime("us")})
ARRAYS_VERSION = 4  # increment when the same events give other arrays


@dataclasses.dataclass(frozen=True)
class Source:
    """The raw tables, and the rules and options they are read with."""

    mimic_iv: dict[str, tables.Table]
    mimic_cxr: dict[str, tables.Table]  # empty without X-rays
    cxr_root: Path | None
    rules: profiles.Rules
    options: dict
    val_ids: Path | None
    test_ids: Path | None
    phenotypes: Path | None
    workers: int
    allow_missing_images: float | None  # the largest share of the X-rays that may be missing or unreadable

    @property
    def timestep_h(self) -> float:
        return self.options["timestep_h"]

    def pairing(self, task: Task) -> str:
        """Return the task's value of profiles.PAIRING: tasks that use the whole stay are not affected."""
        affected = task.window_h is not None and self.options["pairing"] == profiles.UNTIL_OUTTIME
        return profiles.UNTIL_OUTTIME if affected else profiles.IN_WINDOW

    def holds_all_images(self, task: Task) -> bool:
        """Return whether a task's records hold all X-rays of a stay, not the last alone."""
        return task.hourly or (self.options.get("images") == records.ALL_IMAGES and not task.cxr_only)

    def image_window_h(self, task: Task) -> float | None:
        """Return the hours from `intime` that a task's X-rays may come from; None for the whole stay."""
        return None if self.pairing(task) == profiles.UNTIL_OUTTIME else self.rules.window_h(task)

    def is_synthetic(self) -> bool:
        """Return whether data_prep.synthetic wrote the tables, judging by its report in the same tree."""
        table = next(iter(self.mimic_iv.values())).path
        # A symbolic link, or a chain of them, may stand for the folder or only for the table.
        roots = [table.parents[1].resolve().parent, *table.resolve().parents[2:3]]
        return any((root / tree.REPORT).is_file() for root in roots)

    def fingerprint(self, hashes: Path) -> dict:
        """Return the versions and file hashes that go into the manifest. hashes: see tables.fingerprints."""
        source = {
            "mimic_iv": tables.mimic_iv_version(self.mimic_iv),
            "mimic_iv_files": tables.fingerprints(self.mimic_iv.values(), hashes),
        }
        if self.mimic_cxr:
            source["mimic_cxr"] = tables.mimic_cxr_version(self.mimic_cxr)
            source["mimic_cxr_files"] = tables.fingerprints(self.mimic_cxr.values(), hashes)
        return source


@dataclasses.dataclass(frozen=True)
class Cohort:
    """The cohort's stays, splits and phenotype labels, with counts of what was dropped."""

    stays: pl.DataFrame
    flow: list[dict]
    split_of: dict[int, str]
    pheno_label_NK: np.ndarray
    icd_counts: dict
    unreadable_times: dict[str, int]

    def splits(self, frame: pl.DataFrame) -> list[str]:
        """Return the split of each row: 'train' for patients outside the cohort, unless a list names them."""
        return [self.split_of.get(subject, "train") for subject in frame["subject_id"]]


# The labels of a task, int8 [cohort, K], a row for each stay. Those of hourly tasks are in labels/hourly.py.
_LABELS = {
    "pheno": lambda people: people.pheno_label_NK,
    "mortality": lambda people: mortality.labels(people.stays),
}


def image_hashes(source: Source, images: pl.DataFrame | None, names: list[str]) -> dict[str, str | None]:
    """Map each task to a hash of the files of all X-rays it may use."""
    if images is None:
        return dict.fromkeys(names)
    hashes = {}
    for cxr_only in sorted({TASKS[name].cxr_only for name in names}):
        used = chexpert.of_labelled_studies(source.mimic_cxr, images) if cxr_only else _of_stays(source, images)
        files = used.select("dicom_id", "path").iter_rows()
        hashes[cxr_only] = cache.key(images=image_store.signatures(source.cxr_root, files, source.workers))
    return {name: hashes[TASKS[name].cxr_only] for name in names}


def _of_stays(source: Source, images: pl.DataFrame) -> pl.DataFrame:
    """Return the X-rays that may be paired with a stay, for any task and options."""
    patients = source.mimic_iv["icustays"].read("subject_id").select(parse.integer("subject_id"))
    return images.filter(views.is_paired(), pl.col("time").is_not_null()).join(patients, "subject_id", "semi")


def make(
    out: Path, cache_dir: Path, source: Source, fingerprint: dict, images: tuple | None, inputs: dict[str, dict]
) -> None:
    """Build the datasets of the tasks in `inputs`.

    images: from `metadata.read_metadata`, None without X-rays. inputs: task -> the manifest fields that identify it.
    """
    stay_tasks = [TASKS[name] for name in inputs if not TASKS[name].cxr_only]
    if unlabelled := [task.name for task in stay_tasks if not task.hourly and task.name not in _LABELS]:
        raise AssertionError(f"data_prep.pipeline._LABELS has no labels for the task {unlabelled[0]!r}")
    labelled = None
    if images and any(TASKS[name].cxr_only for name in inputs):
        labelled = chexpert.labelled(source.mimic_cxr, images[0])
    people = _read_cohort(source)
    arrays, events_dir = {}, None
    if stay_tasks:
        events_dir = _extract_events(cache_dir, source, fingerprint, people)
        arrays = {task.name: _discretize(cache_dir, source, people, task, events_dir) for task in stay_tasks}
    store, pairs = None, dict.fromkeys(arrays, _NO_PAIRS)
    if images:
        store = image_store.ImageStore(
            cache_dir / "images",
            source.cxr_root,
            source.rules.image_shape,
            source.workers,
            source.allow_missing_images,
        )
        if labelled is not None:
            store.add(labelled.select("dicom_id", "path").iter_rows())
        pairs = _pair_readable(source, people, arrays, images[0], store)
        if blank := store.num_blank():
            progress.say(f"warning: {blank:,} X-ray(s) have one grey everywhere, such as black, and are kept")
        if store.unreadable:
            progress.say(
                f"warning: {len(store.unreadable)} X-ray(s) cannot be read and are left out; the manifests list them"
            )
    for name, identity in inputs.items():
        task = TASKS[name]
        if task.cxr_only:
            index, records_of, counts = _image_task(source, people, labelled, store)
        else:
            index, records_of, counts = _stay_task(source, people, task, arrays[name], pairs[name], store, events_dir)
        if images:
            counts["images"] = images[1] | counts.get("images", {})
        manifest = identity | _manifest(source, fingerprint, task, index, counts, store)
        manifest["train_mean"], manifest["train_std"] = _train_statistics(people, arrays.get(name))
        _write_dataset(out, cache_dir, task, index, records_of, manifest)
    if store:
        store.remove_unusable()
    for folder in cache_dir.glob("arrays-*"):
        shutil.rmtree(folder)


def _image_task(source: Source, people: Cohort, labelled: pl.DataFrame, store: image_store.ImageStore) -> tuple:
    """Return the index, record generators and counts of a task whose records are X-rays."""
    readable = labelled.filter(~pl.col("dicom_id").is_in(list(store.unreadable)))
    patients = cohort.read_patients(source.mimic_iv)
    index, records_of = datasets.image_dataset(readable, people.splits(readable), patients, store)
    return index, records_of, {"images": {"X-rays with labels": len(labelled), "X-rays readable": len(readable)}}


def _stay_task(
    source: Source, people: Cohort, task: Task, arrays: Arrays, pairs: pl.DataFrame, store, events_dir: Path
) -> tuple:
    """Return the index, record generators and counts of a task whose records are stays."""
    splits = people.splits(people.stays)
    flow = [*people.flow]
    if task.window_h:
        flow.append({"filter": f"{task.window_h:g} h or longer", "stays": arrays.num_long_enough})
    if not source.rules.deaths_in_window:
        living = arrays.num_long_enough - arrays.num_died
        flow.append({"filter": "alive at the end of the window", "stays": living})
    flow.append({"filter": "with an event in the task's window", "stays": len(arrays.row)})
    counts = {
        "cohort": flow,
        "stays_without_a_diagnosis": int((~people.stays["has_diagnosis"]).sum()),
        "deaths_unlike_hospital_expire_flag": int((people.stays["expire_flag"] != people.stays["died"]).sum()),
        "unreadable_times": people.unreadable_times | events.read_unreadable_times(events_dir),
        "events_stored_too_late": arrays.num_stored_late,
        "duplicate_events": arrays.num_duplicates,
        "event_rows": events.read_counts(events_dir),
    }
    if source.rules.window_h(task) and not source.rules.after_death:
        counts["deaths_in_the_window"] = arrays.num_died
    predicted = None
    if task.hourly:
        predicted, hourly_flow = hourly.predictions(task, people.stays, arrays, source.timestep_h)
        flow += hourly_flow
        rows = arrays.row[predicted.position_N]
        pairs = pairs.filter(pl.col("stay_id").is_in(people.stays[rows]["stay_id"].implode()))
        counts["predictions"] = hourly.counts(predicted, np.array(splits)[rows], task.labels)
    labels = predicted or _LABELS[task.name](people)
    all_images = source.holds_all_images(task)
    index, records_of = datasets.stay_dataset(people.stays, splits, arrays, labels, pairs, store, all_images)
    counts["variables"] = describe.variables(arrays)
    counts["length_h"] = describe.histogram(arrays.length * source.timestep_h, describe.LENGTH_EDGES_H)
    windows = {"window_h": source.rules.window_h(task), "image_window_h": source.image_window_h(task)}
    inputs = time_check.Inputs(people.stays, arrays, pairs, timestep_h=source.timestep_h, **windows)
    counts["time_check"] = time_check.check(inputs, events_dir, predicted)
    if task.name == "pheno":
        counts["diagnosis_codes"] = people.icd_counts
    return index, records_of, counts


def _read_cohort(source: Source) -> Cohort:
    unreadable = tables.count_unreadable_times(source.mimic_iv)
    stays, flow = cohort.read_stays(source.mimic_iv, source.rules)
    split_of = splits_lib.assign(stays["subject_id"], source.val_ids, source.test_ids, source.options["seed"])
    label_NK, icd_counts = phenotypes.labels(source.mimic_iv, stays, source.phenotypes)
    dropped = [
        f"{before['stays'] - step['stays']:,} that fail '{step['filter']}'"
        for before, step in itertools.pairwise(flow)
        if step["stays"] < before["stays"]
    ]
    removed = f"; removed {', '.join(dropped)}" if dropped else ""
    progress.say(f"cohort: {flow[-1]['stays']:,} of {flow[0]['stays']:,} ICU stays{removed}")
    return Cohort(stays, flow, split_of, label_NK, icd_counts, unreadable)


def _extract_events(cache_dir: Path, source: Source, fingerprint: dict, people: Cohort) -> Path:
    key = cache.key(
        files=fingerprint["mimic_iv_files"],
        cohort=cohort.digest(people.stays),  # an event holds the row of its stay in the cohort
        rules=dataclasses.asdict(source.rules),
        version=events.VERSION,
    )
    folder = cache.entry(
        cache_dir, "events", key, lambda folder: events.extract(source.mimic_iv, people.stays, source.rules, folder)
    )
    rows = {fate: sum(by_variable.values()) for fate, by_variable in events.read_counts(folder).items()}
    kept, clipped, undated = (rows.pop(fate, 0) for fate in (events.KEPT, events.CLIPPED, events.UNDATED))
    dropped = ", ".join(f"{fate} {count:,}" for fate, count in sorted(rows.items()))
    progress.say(f"events: {kept:,} rows kept ({clipped:,} clipped); dropped: {dropped or 'none'}")
    if undated > _MAX_UNDATED * kept:
        progress.say(f"warning: {undated:,} events have no storetime and are kept; they may have been stored too late")
    return folder


def _discretize(cache_dir: Path, source: Source, people: Cohort, task: Task, events_dir: Path) -> Arrays:
    window_h = source.rules.window_h(task)
    # Tasks that use the same window of the same stays share their arrays.
    name = "whole" if window_h is None else f"{'first' if task.window_h is None else 'full'}{window_h:g}h"
    key = cache.key(events=events_dir.name, name=name, step=source.timestep_h, version=ARRAYS_VERSION)

    def write(folder: Path) -> None:
        discretize.write_arrays(folder, events_dir, people.stays, source.rules, task, source.timestep_h)

    arrays = Arrays.open(cache.entry(cache_dir, f"arrays-{name}", key, write))
    if not len(arrays.row):
        message = f"no stay has an event that task {task.name!r} can use; are chartevents and labevents complete?"
        raise UserError(message, field="--mimic_iv", value=task.name)
    return arrays


def _pair_readable(
    source: Source, people: Cohort, arrays: dict, images: pl.DataFrame, store: image_store.ImageStore
) -> dict[str, pl.DataFrame]:
    """Pair each task's stays with X-rays; an unreadable X-ray is treated as absent, so an earlier one may be paired."""
    path_of = dict(images.select("dicom_id", "path").iter_rows())
    stays = people.stays.with_columns(outtime=pl.min_horizontal("outtime", "alive_until"))  # no X-ray from after death
    while True:
        readable = images.filter(~pl.col("dicom_id").is_in(list(store.unreadable)))
        pairs = {
            name: (pairing.within if source.holds_all_images(TASKS[name]) else pairing.pair)(
                stays[task_arrays.row], readable, source.image_window_h(TASKS[name])
            )
            for name, task_arrays in arrays.items()
        }
        paired = {dicom_id for frame in pairs.values() for dicom_id in frame["dicom_id"]}
        missing = [(dicom_id, path_of[dicom_id]) for dicom_id in paired if dicom_id not in store]
        if not missing:
            break
        store.add(missing)
    candidates = images.filter(views.is_paired())
    if pairs and not paired and not store.unreadable and len(candidates):
        progress.say(
            f"warning: no stay has an X-ray: none of the {len(candidates):,} AP X-rays was taken in a task's window of "
            "its patient's stay; do both datasets have the same patients and dates?"
        )
    return pairs


def _train_statistics(people: Cohort, arrays: Arrays | None) -> tuple[list[float], list[float]]:
    if arrays is None:
        return records.train_statistics(iter(()))
    splits = people.splits(people.stays)
    train = [i for i, row in enumerate(arrays.row.tolist()) if splits[row] == "train"]
    return records.train_statistics(arrays[i] for i in train)


def _manifest(source: Source, fingerprint: dict, task: Task, index: dict, counts: dict, store) -> dict:
    return {
        "format_version": records.FORMAT_VERSION,
        "facts_version": describe.VERSION,
        "task": task.name,
        "profile": source.options["profile"],
        "pairing": source.pairing(task),
        # Without the field for a task that has no choice, or for each stay's last X-ray: as builds always were.
        **({"images": records.ALL_IMAGES} if source.holds_all_images(task) and not task.hourly else {}),
        "timestep_h": source.timestep_h,
        "options": source.options,
        "rules": profiles.describe(source.options["profile"]),
        "phenotype_table_given": source.phenotypes is not None,
        "source": fingerprint,
        "synthetic": source.is_synthetic(),
        "channels": list(CHANNELS),
        "labels": list(task.labels),
        "counts": {"splits": datasets.split_counts(index, task.labels), **counts},
        "blank_images": store.num_blank() if store else 0,
        "skipped_images": dict(sorted(store.unreadable.items())) if store else {},
    }


def _write_dataset(out: Path, cache_dir: Path, task: Task, index: dict, records_of: dict, manifest: dict) -> None:
    from data_prep.write import shards

    datasets.check_splits_disjoint(index)
    splits = manifest["counts"]["splits"]
    total = sum(counts["records"] for counts in splits.values())
    if not total:
        raise UserError(f"task {task.name!r} has no record; are its tables complete?", field="--tasks", value=task.name)
    dataset = cache.entry(
        cache_dir,
        f"shards-{task.name}",
        manifest["key"],
        lambda folder: shards.write(folder, task, index, records_of, manifest),
    )
    cache.move_into_place(dataset, out / task.name)
    sizes, paired = ("/".join(str(splits[split][what]) for split in SPLITS) for what in ("records", "paired"))
    progress.say(
        f"{task.name}: {total:,} records (train/val/test {sizes}), with an X-ray {paired}, in {out / task.name}"
    )
