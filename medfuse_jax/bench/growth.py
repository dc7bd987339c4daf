"""Write the tables of docs/performance.md: `python -m medfuse_jax.bench.growth`.

The tables show the newest folder of results/ that has `growth.json` and `devices.json`: the records of
`python -m medfuse_jax.bench` with the presets 'growth' and 'devices'.
"""

from pathlib import Path

from absl import flags

from medfuse_jax.bench import cases, page, parts
from medfuse_jax.bench.clock import OURS, format_s
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

_STAYS = cases.Case.num_stays  # phenotyping's train split
BEGIN, END = "<!-- made by python -m medfuse_jax.bench.growth -->", "<!-- end -->"
_PARTS = {
    "augment": "augmentation",
    "cxr_stem": "ResNet: stem",
    "cxr_half": "ResNet: stages 1-2",
    "cxr_encoder": "ResNet: stages 3-4",
    "ehr_encoder": "EHR encoder (LSTM)",
    "update": "Adam",
    "rest": "the rest: fusion, classifiers, loss, and what one program for all gains or loses",
    "whole": "the step",
}


def write(results: Path, docs: Path) -> None:
    """Write the tables into performance.md, between their marks."""
    folder = _newest(results)
    rows = {preset: page.read(folder / f"{preset}.json") for preset in ("growth", "devices")}
    for preset in rows:
        missing = {case.name for case in cases.preset(preset)[0]} - {row["case"] for row in rows[preset]}
        if missing:
            path = folder / f"{preset}.json"
            raise UserError(f"{path} lacks {min(missing)}: run all of --preset={preset}", path=path, value=min(missing))
    by_kind = {kind: [r for r in rows["growth"] if r["settings"]["kind"] == kind] for kind in ("parts", "step")}
    try:
        tables = [_parts_table(by_kind["parts"]), _growth_table(by_kind["step"]), _devices_table(rows["devices"])]
    except (KeyError, TypeError) as error:
        message = f"a record of {folder} is damaged ({error!r}): make it again with --json"
        raise UserError(message, path=folder) from None
    text = "\n".join([f"From `results/{folder.name}`.\n", *tables])
    path = docs / "performance.md"
    with files.must_write(f"--docs={docs}"):
        before, _, rest = path.read_text().partition(BEGIN)
        files.write_text(path, f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")
    print(f"{path}: tables from {folder}")


def _newest(results: Path) -> Path:
    names = ("growth.json", "devices.json")
    folders = [p for p in sorted(results.glob("*")) if all((p / name).exists() for name in names)]
    if not folders:
        message = f"no folder of {results} has {' and '.join(names)}: make them with python -m medfuse_jax.bench --json"
        raise UserError(message, path=results)
    return folders[-1]


def part_seconds(rows: list[dict]) -> dict[str, float]:
    """Return the seconds per batch of each part, of the rest and of the whole step.

    The X-ray encoder is timed up to three depths; each of its parts is the difference from the previous depth.
    """
    seconds = {row["contender"]: _seconds(row) for row in rows}
    before = {"cxr_half": "cxr_stem", "cxr_encoder": "cxr_half"}
    added = {name: seconds[name] - seconds.get(before.get(name), 0.0) for name in parts.PARTS}
    return added | {"rest": seconds[OURS] - sum(added.values()), "whole": seconds[OURS]}


def _parts_table(rows: list[dict]) -> str:
    seconds = part_seconds(rows)
    cells = [(_PARTS[name], format_s(s), f"{s / seconds['whole']:.0%}") for name, s in seconds.items()]
    return page.markdown(("part, forward and backward", "time a batch", "share"), cells)


def _growth_table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        settings, batches = row["settings"], row["batches_per_repeat"]
        counts = (row["time_steps_per_repeat"] / batches, row["images_per_repeat"] / batches)
        epoch_min = _seconds(row) * _STAYS / settings["batch_size"] / 60
        cells.append(
            (settings["method"], str(settings["batch_size"]), *(f"{count:.0f}" for count in counts))
            + (format_s(_seconds(row)), f"{epoch_min:.1f} min")
        )
    header = ("method", "rows", "time steps", "X-rays", "time a batch", f"an epoch of {_STAYS:,} stays")
    return page.markdown(header, cells)


def _devices_table(rows: list[dict]) -> str:
    one_device = {row["settings"]["parallel"]: row["seconds"] for row in rows if row["settings"]["num_devices"] == 1}
    cells = []
    for row in rows:
        devices, parallel = row["settings"]["num_devices"], row["settings"]["parallel"]
        cells.append((str(devices), parallel, format_s(_seconds(row)), f"{row['seconds'] / one_device[parallel]:.2f}"))
    return page.markdown(("simulated devices", "parallel", "time a batch of 64", "relative to one device"), cells)


def _seconds(row: dict) -> float:
    """Return the seconds per batch."""
    return row["seconds"] / row["batches_per_repeat"]


def main(argv: list[str]) -> None:
    write(Path(flags.FLAGS.results), Path(flags.FLAGS.docs))


if __name__ == "__main__":
    flags.DEFINE_string("results", "results", "Folder of the records.")
    flags.DEFINE_string("docs", "docs", "Folder of performance.md.")
    command_line.run(main)
