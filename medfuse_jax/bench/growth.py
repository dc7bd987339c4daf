"""The tables and the picture of docs/performance.md: `python -m medfuse_jax.bench.growth`.

They are made of the newest folder of `results/` that holds `growth.json` and `devices.json`, which are what
`python -m medfuse_jax.bench` wrote with the presets of these names.

The model of a step's time is t = a B T + b P + c: B rows, T time steps run, P X-rays, and what a step costs whatever
its batch. On a CPU a, b and c are fitted; for accelerators they are worked out from what is assumed below.
"""

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags

from medfuse_jax.bench import cases, page, parts, table
from medfuse_jax.bench.cases import Case
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

_STAYS = Case.num_stays  # phenotyping's train split
_BEGIN, _END = "<!-- made by python -m medfuse_jax.bench.growth -->", "<!-- end -->"
_PARTS = {
    "augment": "augmentation",
    "cxr_stem": "ResNet: stem",
    "cxr_half": "ResNet: stages 1-2",
    "cxr_encoder": "ResNet: stages 3-4",
    "ehr_encoder": "EHR encoder (LSTM)",
    "update": "Adam",
}
# MedFuse: docs/methods.md (parameters; operations an X-ray, forward and backward).
_PARAMETERS, _FLOPS_A_IMAGE = 23_870_041, 19.98e9


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Several devices of a kind. bf16_flops, link_bytes: a device's peak rates a second, as assumed (not checked
    against a data sheet). batch: rows a device. time_step_s: one step of both LSTM layers, forward and backward.
    fixed_s: the rest of a step.
    """

    name: str
    num_devices: int
    bf16_flops: float
    link_bytes: float
    batch: int
    time_step_s: float = 40e-6
    fixed_s: float = 1e-3


_SHARE_OF_PEAK = 0.2  # of the convolutions: assumed, measured nowhere
_ACCELERATORS = (
    Accelerator("1 H200", 1, 989e12, 450e9, 256),
    Accelerator("8 H200", 8, 989e12, 450e9, 256),
    Accelerator("v5e-256", 256, 197e12, 100e9, 16),
)


def write(results: Path, docs: Path) -> None:
    """Puts the tables between their marks in performance.md, and draws step_time.svg beside it."""
    folder = _newest(results)
    growth, devices = page.read(folder / "growth.json"), page.read(folder / "devices.json")
    parts, steps = ([row for row in growth if row["settings"]["kind"] == kind] for kind in ("parts", "step"))
    for preset, rows in (("growth", growth), ("devices", devices)):
        missing = {case.name for case in cases.preset(preset)[0]} - {row["case"] for row in rows}
        if missing:
            raise UserError(f"{folder}/{preset}.json lacks {min(missing)}: run all of --preset={preset}")
    try:
        parts = _shares(parts)
        tables = [_parts_table(parts), _growth_table(steps), _devices_table(devices), _predicted_table(steps)]
    except (KeyError, TypeError) as error:
        raise UserError(f"a record of {folder} is damaged ({error!r}): write it anew with --json") from None
    picture = "![Where the time of a training step goes](step_time.svg)\n"
    text = "\n".join([f"From `results/{folder.name}`.\n", picture, *tables])
    path = docs / "performance.md"
    with files.must_write(f"--docs={docs}"):
        before, _, rest = path.read_text().partition(_BEGIN)
        files.write_text(path, f"{before}{_BEGIN}\n{text}{_END}{rest.partition(_END)[2]}")
        draw(parts, docs / "step_time.svg")
    print(f"{path} and its picture: from {folder}")


def _newest(results: Path) -> Path:
    wanted = ("growth.json", "devices.json")
    folders = [p for p in sorted(results.glob("*")) if all((p / name).exists() for name in wanted)]
    if not folders:
        raise UserError(
            f"no folder of {results} holds {' and '.join(wanted)}: write them with "
            "`python -m medfuse_jax.bench --preset=growth --json=...` and --preset=devices"
        )
    return folders[-1]


def _shares(rows: list[dict]) -> dict[str, float]:
    """Seconds of each part a batch. The X-ray encoder is timed up to three depths: here what each adds."""
    taken = {row["contender"]: row["seconds"] / row["batches_per_repeat"] for row in rows}
    deeper = {"cxr_half": "cxr_stem", "cxr_encoder": "cxr_half"}
    added = {name: taken[name] - taken.get(deeper.get(name), 0.0) for name in parts.PARTS}
    return added | {"rest": taken["ours"] - sum(added.values()), "whole": taken["ours"]}


def _parts_table(parts: dict[str, float]) -> str:
    names = _PARTS | {"rest": "the rest (fusion, heads, loss; what the parts save or lose alone)", "whole": "the step"}
    rows = [(names[name], table.seconds(s), f"{s / parts['whole']:.0%}") for name, s in parts.items()]
    return page.markdown(("part, forward and backward", "time a batch", "share"), rows)


def fit(rows: list[dict]) -> np.ndarray:
    """Seconds a row and time step, an X-ray, a step without an X-ray encoder, and a step with one (least squares)."""
    return np.linalg.lstsq(np.stack([_terms(row) for row in rows]), [_seconds(row) for row in rows], rcond=None)[0]


def _terms(row: dict) -> np.ndarray:
    batches, images = row["batches_per_repeat"], row["images_per_batch"]
    row_steps = row["time_steps_per_repeat"] / batches * row["settings"]["batch_size"]
    return np.array([row_steps, row["images_per_repeat"] / batches, not images, bool(images)], float)


def _seconds(row: dict) -> float:
    return row["seconds"] / row["batches_per_repeat"]


def _epoch_s(row: dict) -> float:
    """Of phenotyping's train split."""
    return _seconds(row) * _STAYS / row["settings"]["batch_size"]


def _growth_table(rows: list[dict]) -> str:
    a, b, alone, fused = fit(rows)
    cells = []
    for row in rows:
        row_steps, images, _, _ = _terms(row)
        settings, modelled = row["settings"], float(_terms(row) @ np.array([a, b, alone, fused]))
        cells.append(
            (
                settings["method"],
                str(settings["batch_size"]),
                f"{row_steps / settings['batch_size']:.0f}",
                f"{images:g}",
            )
            + (table.seconds(_seconds(row)), f"{_epoch_s(row) / 60:.1f} min")
            + (f"{table.seconds(modelled)} ({modelled / _seconds(row) - 1:+.0%})",)
        )
    header = ("method", "rows", "time steps", "images", "a batch", f"an epoch of {_STAYS:,} stays", "by the model")
    formula = f"a = {a * 1e6:.0f} us a row and time step, b = {b * 1e3:.0f} ms an X-ray, "
    formula += f"c = {alone * 1e3:.0f} ms (LSTM alone) or {fused * 1e3:.0f} ms (MedFuse)"
    return page.markdown(header, cells) + f"\nFitted: {formula}. An epoch is as many batches as its stays fill.\n"


def _devices_table(rows: list[dict]) -> str:
    base = {row["settings"]["parallel"]: row["seconds"] for row in rows if row["settings"]["num_devices"] == 1}
    cells = []
    for row in rows:
        settings = row["settings"]
        more = row["seconds"] / base[settings["parallel"]]
        cells.append((str(settings["num_devices"]), settings["parallel"], table.seconds(_seconds(row)), f"{more:.2f}"))
    return page.markdown(("simulated devices", "by", "a batch of 64", "times that of one"), cells)


def _predicted_table(rows: list[dict]) -> str:
    """MedFuse at 19 % paired, 2 h steps. Each device runs its own batch; gradients add up in a ring."""
    fused = next(row for row in rows if row["settings"]["method"] == "medfuse")
    time_steps = fused["time_steps_per_repeat"] / fused["batches_per_repeat"]
    cells = []
    for device in _ACCELERATORS:
        images = 0.19 * device.batch
        compute_s = images * _FLOPS_A_IMAGE / (_SHARE_OF_PEAK * device.bf16_flops)
        sum_s = 2 * (device.num_devices - 1) / device.num_devices * 4 * _PARAMETERS / device.link_bytes
        step_s = compute_s + time_steps * device.time_step_s + sum_s + device.fixed_s
        rate = device.batch * device.num_devices / step_s
        cells.append(
            (device.name, str(device.batch), table.seconds(compute_s), table.seconds(time_steps * device.time_step_s))
            + (table.seconds(sum_s), table.seconds(step_s), f"{rate:,.0f}", table.seconds(_STAYS / rate))
        )
    header = ("predicted", "rows a device", "images", "recurrence", "gradients' sum", "a step", "stays/s", "an epoch")
    return page.markdown(header, cells)


def draw(parts: dict[str, float], path: Path) -> None:
    """One bar: the parts of a step, as long as their time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "step"  # the same picture of the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.1), layout="constrained")
    left = 0.0
    shown = _PARTS | ({"rest": "the rest"} if parts["rest"] > 0 else {})  # else the parts take longer alone
    for name, label in shown.items():
        width = max(parts[name], 0.0) * 1e3  # noise can make a small part negative
        axes.barh(0, width, left=left, height=0.5, label=f"{label}, {width:.0f} ms")
        left += width
    together = "" if parts["rest"] > 0 else f"; in one step, {-parts['rest'] * 1e3:.0f} ms less"
    xlabel = f"ms a training step (MedFuse, 16 stays, 3 with an X-ray, 2 CPU cores){together}"
    axes.set(yticks=[], xlabel=xlabel, ylim=(-0.3, 0.3))
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str]) -> None:
    write(Path(flags.FLAGS.results), Path(flags.FLAGS.docs))


if __name__ == "__main__":
    flags.DEFINE_string("results", "results", "The folder of the records.")
    flags.DEFINE_string("docs", "docs", "The folder of performance.md.")
    command_line.run(main)
