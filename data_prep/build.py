"""Build shards from raw MIMIC-IV and MIMIC-CXR-JPG.

    python -m data_prep.build --mimic_iv=DIR [--mimic_cxr=DIR] --out=DIR [--profile=paper|released|strict]
        [--timestep_h=2] [--tasks=pheno,mortality,radiology,decompensation,length_of_stay]
        [--val_ids=CSV --test_ids=CSV] [--phenotypes=YAML] [--workers=N] [--seed=0] [--explain]
        [--pairing=in_window|until_outtime] [--images=last|all] [--cxr_layout=auto|tree|flat]
        [--allow_missing_images=0.01]

Rerun the command to resume a stopped build; it also rebuilds datasets that are damaged or whose input has changed.
`<out>/<task>/` appears when its dataset is complete, `<out>/audit.html` and `audit.json` at the end. `<out>/.cache` may
be deleted; it saves time in a later build with other options.
"""

import dataclasses
import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from data_prep import cache, pipeline, profiles, progress, rebuild
from data_prep.audit import gather
from data_prep.ehr import cohort, events
from data_prep.images import decode, metadata
from data_prep.labels import hourly, icd
from data_prep.labels import phenotypes as phenotype_labels
from data_prep.pipeline import Source
from data_prep.raw import tables
from data_prep.write import describe
from medfuse_jax import records
from medfuse_jax.runtime import command_line, cores, files
from medfuse_jax.runtime.errors import UserError, check_choice
from medfuse_jax.schema import CHANNELS, TASKS

# The paper's tasks; hourly tasks are built on request.
DEFAULT_TASKS = tuple(name for name, task in TASKS.items() if not task.hourly)
# What records of phenotyping and mortality hold: --images.
IMAGES = {
    "last": "each stay's last X-ray",
    records.ALL_IMAGES: "all of a stay's X-rays with their times, for config.data.images=all (hourly tasks always)",
}
# A longer step would not fit into mortality's 48 h; a shorter one would give a long stay millions of steps.
SHORTEST_STEP_H, LONGEST_STEP_H = 1 / 60, 48.0


def build(
    mimic_iv: str | Path,
    mimic_cxr: str | Path | None,
    out: str | Path,
    profile: str = "paper",
    timestep_h: float = 2.0,
    tasks: str | Sequence[str] = DEFAULT_TASKS,
    val_ids: str | Path | None = None,
    test_ids: str | Path | None = None,
    phenotypes: str | Path | None = None,
    workers: int | None = None,
    seed: int = 0,
    pairing: str = profiles.IN_WINDOW,
    cxr_layout: str = "auto",
    allow_missing_images: float | None = None,
    images: str = "last",
) -> None:
    """Build `<out>/<task>/` (format: medfuse_jax/records.py) for every task, and the audit.

    mimic_iv, mimic_cxr: the folders as downloaded; without mimic_cxr no stay has an X-ray, and the task 'radiology' is
        left out. profile: see profiles.py. timestep_h: hours per time step. val_ids, test_ids: lists of patients
        (splits.read_id_list), or None to split by a hash of `subject_id` and `seed`. phenotypes: a phenotype table.
        workers: threads that decode X-rays; the output does not depend on it. pairing: see profiles.PAIRING.
        cxr_layout: see metadata.LAYOUTS. allow_missing_images: share of the X-rays that may be missing or unreadable;
        None for 1 %. images: what records of phenotyping and mortality hold, of IMAGES.
    Raises UserError for bad options or input. A dataset built with other options or input is rebuilt.
    """
    for flag, folder in (("--mimic_iv", mimic_iv), ("--mimic_cxr", mimic_cxr), ("--out", out)):
        if folder == "":
            raise UserError(f"{flag} is empty: give a folder", field=flag, value="")
        files.check_local(flag, folder or "")
    rules, out = profiles.rules(profile), Path(out)
    names = _check_tasks(tasks, mimic_cxr)
    _check_out(out, names, [Path(folder) for folder in (mimic_iv, mimic_cxr) if folder])
    if mimic_cxr is None:
        rebuild.check_cxr_kept(out, names)
    _check_numbers(timestep_h, workers, allow_missing_images)
    _check_images(cxr_layout, pairing, profile)
    check_choice("--images", images, IMAGES)
    options = {"profile": profile, "timestep_h": float(timestep_h), "seed": seed, "pairing": pairing}
    if images != "last":  # by default as builds always were, so that theirs are kept
        options["images"] = images
    lists: dict = {"val_ids": val_ids, "test_ids": test_ids, "phenotypes": phenotypes}
    source = Source(
        mimic_iv=tables.mimic_iv(mimic_iv),
        mimic_cxr=tables.mimic_cxr(mimic_cxr) if mimic_cxr else {},
        cxr_root=Path(mimic_cxr) if mimic_cxr else None,
        rules=rules,
        options=options | {name: _file_hash(name, path) for name, path in lists.items()},
        workers=workers or cores.usable(),
        allow_missing_images=allow_missing_images,
        **lists,
    )
    _check_storetime(source)
    _warn_of_released(source, names)
    with cache.private(out) as cache_dir:
        fingerprint = source.fingerprint(cache_dir / "tables.json")
        progress.say(f"MIMIC-IV {fingerprint['mimic_iv']} in {mimic_iv}")
        if mimic_cxr:
            progress.say(f"MIMIC-CXR-JPG {fingerprint['mimic_cxr']} in {mimic_cxr}")
        rebuild.warn_of_others(out, names, source.options, fingerprint)
        listed = metadata.read_metadata(source.mimic_cxr, cxr_layout) if mimic_cxr else None
        hashes = pipeline.image_hashes(source, listed[0] if listed else None, names)
        if inputs := _outdated(out, source, fingerprint, hashes):
            pipeline.make(out, cache_dir, source, fingerprint, listed, inputs)
        gather.write(out)


def _outdated(out: Path, source: Source, fingerprint: dict, image_hashes: dict) -> dict[str, dict]:
    """Return, for each task to build, the manifest fields that identify its input."""
    inputs = {}
    for name, image_hash in image_hashes.items():
        key = _task_key(name, source, fingerprint, image_hash)
        manifest = rebuild.read_manifest(out / name)
        if manifest.get("key") == key:
            changes = []
        elif manifest.get("key") == _task_key(name, source, fingerprint, manifest.get("image_files")):
            changes = ["other X-rays, or some missing or unreadable"]
        else:
            changes = rebuild.changes(manifest, source.options, fingerprint)
        if not rebuild.is_up_to_date(out / name, manifest, changes):
            inputs[name] = {"key": key, "image_files": image_hash}
    return inputs


def _check_tasks(names: str | Sequence[str], mimic_cxr: str | Path | None) -> list[str]:
    """Return the tasks to build; without X-rays, leave out those whose records are X-rays."""
    if isinstance(names, str):  # as the command's flag; else its letters would be the tasks
        names = names.split(",")
    for name in names:
        check_choice("--tasks", name, TASKS)
    if mimic_cxr is None and any(TASKS[name].cxr_only for name in names):
        names = [name for name in names if not TASKS[name].cxr_only]
        progress.say("no --mimic_cxr: no stay has an X-ray, and radiology is left out")
    if not names:
        raise UserError("no task to build; add --mimic_cxr, or choose other --tasks", field="--tasks")
    return list(dict.fromkeys(names))


def _check_out(out: Path, names: list[str], sources: list[Path]) -> None:
    """Raise UserError if the output would be written into a raw folder, or replace one."""
    for source in sources:
        raw, target = source.resolve(), out.resolve()
        if raw in (target, *target.parents) or any(target / name in (raw, *raw.parents) for name in names):
            raise UserError(
                f"--out={out} overlaps the raw data in {source}; use another folder", field="--out", path=out
            )


def _check_numbers(timestep_h: float, workers: int | None, allow_missing_images: float | None) -> None:
    if not SHORTEST_STEP_H <= timestep_h <= LONGEST_STEP_H:  # also rejects NaN
        message = f"--timestep_h is {timestep_h}; it must be from 1/60 (a minute) to {LONGEST_STEP_H:g} hours"
        raise UserError(message, field="--timestep_h", value=timestep_h)
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1", field="--workers", value=workers)
    if allow_missing_images is not None and not 0 <= allow_missing_images <= 1:
        message = f"--allow_missing_images is {allow_missing_images}; it must be a share from 0 to 1"
        raise UserError(message, field="--allow_missing_images", value=allow_missing_images)


def _check_images(cxr_layout: str, pairing: str, profile: str) -> None:
    check_choice("--cxr_layout", cxr_layout, metadata.LAYOUTS)
    check_choice("--pairing", pairing, profiles.PAIRING)
    if pairing == profiles.UNTIL_OUTTIME:
        if profile == "strict":
            message = f"--pairing={pairing} admits X-rays after the window, --profile=strict does not; drop one of them"
            raise UserError(message, field="--pairing", value=pairing)
        progress.say(f"warning: --pairing={pairing} is for comparison with the published mortality results alone")


def _file_hash(name: str, path: str | Path | None) -> str | None:
    if path is None:
        return None
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--{name}={path} cannot be read ({error.strerror})", field=f"--{name}", path=path) from None
    # A pipe, also that of <(...), would be empty the second time, and a named one may wait for ever.
    raise UserError(f"--{name}={path} is a pipe or device: give a file", field=f"--{name}", path=path)


def _check_storetime(source: Source) -> None:
    """Raise UserError if the rules need storetimes and a table has none."""
    for name in ("chartevents", "labevents"):
        table = source.mimic_iv[name]
        if source.rules.stored_in_time and "storetime" not in table.columns:
            message = f"{table.path} has no column 'storetime', which --profile=strict needs; download it again"
            raise UserError(message, path=table.path, field="storetime")


def _warn_of_released(source: Source, names: list[str]) -> None:
    """Warn about options that keep the profile `released` from reproducing the released data."""
    profile = source.options["profile"]
    if profile == "released" and source.timestep_h != 1:
        progress.say(
            f"warning: --profile=released with {source.timestep_h:g} h steps; the released arrays need --timestep_h=1"
        )
    if source.rules.phenotypes == "table" and source.phenotypes is None and "pheno" in names:
        progress.say(
            f"warning: --profile={profile} without --phenotypes; the released labels need "
            "icd_9_10_definitions_2.yaml from the released extraction code"
        )


def _task_key(name: str, source: Source, fingerprint: dict, image_hash: str | None) -> str:
    """Hash everything a task's dataset depends on: tables, X-rays, options, rules and code versions."""
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
        pixels=[decode.VERSION, decode.DECODER] if image_hash else None,
        facts=[hourly.VERSION, describe.VERSION],
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command's flags; in a function, so that importing this module defines none."""
    flags.DEFINE_string("mimic_iv", None, "MIMIC-IV folder (contains icu/ and hosp/).", flag_values=values)
    flags.DEFINE_string("mimic_cxr", None, "MIMIC-CXR-JPG folder (contains files/).", flag_values=values)
    flags.DEFINE_string("out", None, "Output folder.", flag_values=values)
    flags.DEFINE_string("profile", "paper", "paper, released or strict; see --explain.", flag_values=values)
    flags.DEFINE_float("timestep_h", 2.0, "Hours per time step, 1/60 to 48.", flag_values=values)
    flags.DEFINE_list("tasks", list(DEFAULT_TASKS), f"Tasks to build, from {', '.join(TASKS)}.", flag_values=values)
    flags.DEFINE_string("val_ids", None, "CSV file of the validation patients.", flag_values=values)
    flags.DEFINE_string("test_ids", None, "CSV file of the test patients.", flag_values=values)
    flags.DEFINE_string("phenotypes", None, "Phenotype table (YAML).", flag_values=values)
    flags.DEFINE_integer("workers", None, "Threads that decode X-rays; default: one per core.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the split if no lists are given.", flag_values=values)
    flags.DEFINE_string("pairing", profiles.IN_WINDOW, "in_window or until_outtime; see --explain.", flag_values=values)
    holds = "; ".join(f"{name}: {what}" for name, what in IMAGES.items())
    flags.DEFINE_string("images", "last", f"What records of stays hold. {holds}.", flag_values=values)
    layouts = "; ".join(f"{name}: {what}" for name, what in metadata.LAYOUTS.items())
    flags.DEFINE_string("cxr_layout", "auto", f"Where the X-rays are. {layouts}.", flag_values=values)
    share = "Share of the X-rays that may be missing or unreadable (default: 0.01); they are counted."
    flags.DEFINE_float("allow_missing_images", None, share, flag_values=values)
    flags.DEFINE_bool("explain", False, "Print the profile's rules and exit.", flag_values=values)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if values.explain:
        print(profiles.explain(values.profile, values.pairing))
        return
    for name in ("mimic_iv", "out"):
        if not getattr(values, name):
            raise UserError(f"--{name}=DIR is missing", field=f"--{name}")
    names = ("profile", "timestep_h", "tasks", "val_ids", "test_ids", "phenotypes", "workers", "seed", "pairing")
    names += ("cxr_layout", "allow_missing_images", "images")
    build(values.mimic_iv, values.mimic_cxr, values.out, **{name: getattr(values, name) for name in names})


if __name__ == "__main__":
    define_flags()
    command_line.run(main, resumes=True)
