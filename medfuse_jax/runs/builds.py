"""Which build of the data a run was trained on and scored on, and how that differs between runs. Never imports jax."""

from collections.abc import Mapping
from pathlib import Path

from medfuse_jax import schema
from medfuse_jax.runtime import files

FILE = "data.json"  # in a workdir; written by runs/inputs.py
_SHOWN_HASH = 8  # characters
_NAMES = {"timestep_h": "time steps of"}

UNTIL_OUTTIME_NOTE = (
    "X-rays up to the end of the stay (--pairing=until_outtime): for comparison with the published mortality results "
    "alone."
)


def unusual(manifest: Mapping) -> dict[str, str]:
    """Return {'pairing': ...} if a dataset pairs stays with X-rays in another way than usual; else {}."""
    pairing = manifest.get("pairing") or schema.IN_WINDOW  # builds of earlier versions have no other
    return {} if pairing == schema.IN_WINDOW else {"pairing": pairing}


def note(described: Mapping) -> str:
    """Return the sentence that every table of such data has; '' if the pairing is the usual one.

    described: a manifest, data.json, or the 'data' of a result.
    """
    return UNTIL_OUTTIME_NOTE if described.get("pairing") == schema.UNTIL_OUTTIME else ""


def of(result: Mapping, trained: Mapping) -> dict[str, Mapping]:
    """Return what `differing` compares of a run. result: its result.json; trained: its data.json; {} if missing."""
    scored = result.get("data")
    return {"trained": trained, "scored": scored if isinstance(scored, Mapping) else {}}


def read(workdir: Path, result: Mapping) -> dict[str, Mapping]:
    """Return `of` the run in a workdir; an ensemble, which was not trained, has no data.json."""
    path = workdir / FILE
    return of(result, files.read_json(path, f"it belongs to the run in {workdir}") if path.exists() else {})


def differing(named: list[tuple[str, dict[str, Mapping]]]) -> list[str]:
    """Return a sentence on each run whose data differ from those of the most runs, the first if as many; usually [].

    named: (the run's name, `of` the run).
    """
    if not named:
        return []
    kinds: list[list[tuple[str, dict[str, Mapping]]]] = []  # runs of the same data
    for run in named:
        same = next((kind for kind in kinds if not _differences(kind[0][1], run[1])), None)
        if same is None:
            kinds.append([run])
        else:
            same.append(run)
    usual_name, usual = max(kinds, key=len)[0]
    return [
        f"{name} was trained or scored on other data than {usual_name}: {', '.join(differences)}"
        for name, build in named
        if (differences := _differences(usual, build))
    ]


def _differences(usual: dict[str, Mapping], other: dict[str, Mapping]) -> list[str]:
    """Return what differs, in words: of the data trained on, then of those scored on. What is unknown is the same."""
    words = []
    for kind in ("trained", "scored"):
        pair = _facts(usual[kind]), _facts(other[kind])
        for name in (name for name in pair[0] if name in pair[1]):
            theirs, ours = (facts[name] for facts in pair)
            if theirs != ours:
                words.append(f"{_NAMES.get(name, name)} {_shown(name, ours)} instead of {_shown(name, theirs)}")
    return list(dict.fromkeys(words))


def _facts(described: Mapping) -> dict[str, object]:
    """Return those of a data.json's, or of a result's 'data', that two runs should share, without unknown ones."""
    facts = {name: described.get(name) for name in ("profile", "timestep_h")}
    if facts["profile"] is not None:
        facts["pairing"] = described.get("pairing", schema.IN_WINDOW)
    # The hash of the shards alone: 'digest' also has the fold, the modalities and the features.
    facts |= {"build": described["shards"]} if "shards" in described else {"digest": described.get("digest")}
    return {name: value for name, value in facts.items() if value is not None}


def _shown(name: str, value: object) -> str:
    if name in ("build", "digest"):
        return str(value)[:_SHOWN_HASH]
    return f"{value:g} h" if name == "timestep_h" and isinstance(value, int | float) else str(value)
