"""Makes BENCHMARKS.md of the records under results/: `python -m medfuse_jax.bench.page`.

`results/<date>_<name>/*.json` hold what `python -m medfuse_jax.bench --json=FILE` wrote, a record a line. Every
number on the page is one of theirs.
"""

import json
import math
from pathlib import Path

from absl import flags

from medfuse_jax.bench import table
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

# What is aimed at: the platform, the beginning of the case's name, the contender, its time over ours at least.
TARGETS = (
    ("cpu", "step medfuse B=16 19% paired 2 h float32", "torch_released", 3.0),
    ("cpu", "step medfuse B=16 100% paired 2 h float32", "torch_released", 0.8),
    ("cpu", "bootstrap N=11914", "sklearn_loop", 100.0),
    ("cpu", "trials medfuse", "runs_alone", 0.91),
    ("cpu", "sweep early 64 trials", "one_run", 0.25),
    ("gpu", "trials medfuse", "one_run", 0.25),
    ("gpu", "step medfuse B=256 100% paired", "torch_tuned", 1.5),
    ("gpu", "step medfuse B=16 19% paired", "torch_released", 6.0),
    ("gpu", "lstm medfuse B=256", "torch_tuned", 1.0),
    ("gpu", "bootstrap N=11914", "sklearn_loop", 100.0),
)

# What the page begins with: those, and what stands beside them, though nothing is aimed at (None).
SHOWN = (
    *TARGETS,
    ("cpu", "step medfuse B=16 19% paired 2 h float32", "torch_tuned", None),
    ("cpu", "step medfuse B=16 100% paired 2 h float32", "torch_tuned", None),
    ("cpu", "step uni_ehr B=16 2 h float32", "torch_tuned", None),
    ("cpu", "lstm medfuse B=16 2 h float32", "torch_tuned", None),
)

_HEAD = """# Benchmarks

How fast the training step, its input, the recurrence and the metrics' bounds are, beside the same models in plain
PyTorch on the same machine and the same batches. **A ratio says how many times longer the other takes**; absolute
numbers belong to the machine they were taken on. This page is made by `python -m medfuse_jax.bench.page` from the
records in `results/`, one folder a machine and day.

- `ours`: the training step as a run does it (augmentation included), on batches that lie on the device.
- `torch_released`: the same model as the released code runs it: float32, NCHW, packed series, and a zero image
  through the ResNet for every stay without an X-ray. Its X-rays come augmented: it is timed without.
- `torch_tuned`: channels_last, padded series (cuDNN on a GPU), TF32, fused Adam, only the X-rays there are; on a GPU
  `torch.compile`, and autocast where the case says bfloat16. Also timed without augmentation.
- `end_to_end`, `input`: the same batches read and sent as in a run; reading alone.
- `plain_scan`: the recurrence as one scan over the bucket. `pallas`, `cudnn`: its other forms (on a GPU). How far their
  gradients are from the plain scan's is relative to the largest element.
- `sklearn_loop`: roc_auc_score and average_precision_score label by label, one resample timed and multiplied by 1000.

Contenders take turns within every repeat. Series have phenotyping's lengths (log-normal, median 60 h); time is the
median, with the least and the most of the repeats behind it; a ratio is the median over repeats, with the least, the
most, and that of both sides' best repeats, which a busy machine disturbs least. Padded: the share of the steps run that
belong to no stay; in brackets, what it would be if all steps of a bucket were run. FLOPs are those of the plain
convolution, also where fewer are run (Winograd's, on a CPU), beside the rate of a large matrix product on that device.
A repeat is a pass over several batches (`batches_per_repeat` in the record). In the parts of a step, `cxr_stem`,
`cxr_half` and `cxr_encoder` are the X-ray encoder up to there, and `update` is Adam.
"""


def render(results: Path) -> str:
    """The page. UserError for a file that is not a record file, or where there is none."""
    records = {path: read(path) for path in sorted(results.glob("*/*.json"))}
    if not records:
        raise UserError(f"{results} holds no record (<date>_<name>/*.json): write one with --json")
    newest_first = sorted(records, key=lambda path: _time(records[path]), reverse=True)
    newest_of = {path.stem: path for path in reversed(newest_first)}
    parts = [
        _HEAD,
        "## The newest numbers\n\nA ratio below 1 says that the other is faster.\n",
        _summary([row for path in newest_first for row in records[path]]),
        "## The records\n",
    ]
    for path in newest_first:
        parts.append(_section(path, records[path], is_open=newest_of[path.stem] == path))
    return "\n".join(parts)


def _time(rows: list[dict]) -> str:
    return max(row["environment"]["time"] for row in rows)


def read(path: Path) -> list[dict]:
    """The records of one file."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): take it away, or write it anew with --json") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _check(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: not a record of medfuse_jax.bench ({error!r}); write it with --json"
            ) from None
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no record; write it with `python -m medfuse_jax.bench --json={path}`")
    return rows


def _check(row: dict) -> None:
    """Raises what `read` says in one line."""
    for field in ("case", "contender", "command"):
        if not isinstance(row[field], str):
            raise ValueError(f"{field} is {row[field]!r}")
    for field in ("seconds", "seconds_min", "seconds_max"):
        if not (_is_number(row[field]) and row[field] > 0):
            raise ValueError(f"{field} is {row[field]!r}")
    for field in ("commit", "time", "platform", "device"):
        if not isinstance(row["environment"][field], str):
            raise ValueError(f"environment.{field} is {row['environment'][field]!r}")
    row["settings"]["kind"]
    compared = "time_over_ours" in row or any(_is(row, *shown) for *shown, _ in SHOWN)
    ratios = [row["time_over_ours"][name] for name in ("median", "min", "max", "of_best")] if compared else []
    for number in [*ratios, *(row[name] for name in ("samples_per_s", "images_per_repeat") if name in row)]:
        if not _is_number(number):
            raise ValueError(f"{number!r} is no number")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _summary(rows: list[dict]) -> str:
    """What the page begins with, each from the newest record that has it."""
    newest_first = sorted(rows, key=lambda row: row["environment"]["time"], reverse=True)
    cells = []
    for *shown, least in sorted(SHOWN, key=lambda s: (s[0] != "gpu", not s[1].startswith("step"), s[1:3])):
        found = (row for row in newest_first if _is(row, *shown) and row.get("input") != "shards")
        if row := next(found, None):
            over = row["time_over_ours"]
            aim = "" if least is None else f"{least:g} ({_verdict(over, least)})"
            where = f"{row['environment']['device']}, {row['environment']['time'][:10]}"
            cells.append((row["case"], row["contender"], _over(over), aim, where))
    return markdown(("case", "against", "its time over ours", "aimed at", "device, day"), cells)


def _is(row: dict, platform: str, case: str, contender: str) -> bool:
    here = row["environment"]["platform"] == platform
    return here and row["case"].startswith(case) and row["contender"] == contender


def _verdict(over: dict, least: float) -> str:
    return "reached" if over["median"] >= least else "**missed**"


def _section(path: Path, rows: list[dict], is_open: bool) -> str:
    when = _time(rows)[:16].replace("T", " ")
    title = f"{when} UTC: {path.parent.name}/{path.name}"
    # GitHub reads Markdown within HTML where an empty line comes before it.
    parts = [f"<details{' open' if is_open else ''}><summary>{title}</summary>\n", _about(rows)]
    if targets := _targets(rows):
        parts.append(
            markdown(("case", "against", "aimed at", "measured (least-most; of the best repeats)", ""), targets)
        )
    header = ("case", "contender", "time a repeat", "samples/s", "images/s", "time over ours", "remarks")
    parts.append(markdown(header, [_cells(row) for row in rows]))
    return "\n".join([*parts, "</details>\n"])


def _as_typed(row: dict) -> str:
    """The record's command, with what simulates its devices on a CPU."""
    environment = row["environment"]
    count = environment["num_local_devices"] if environment["platform"] == "cpu" else 1
    simulated = f"NPROC=16 XLA_FLAGS=--xla_force_host_platform_device_count={count} \\\n    " if count > 1 else ""
    return simulated + row["command"]


def _about(rows: list[dict]) -> str:
    """The machine, the software and the command."""
    environment, loads = rows[0]["environment"], [row["environment"]["load_average"] for row in rows]
    versions = [f"{p} {environment[p]}" for p in ("python", "jax", "flax", "numpy")]
    versions += sorted({f"torch {row['environment']['torch']}" for row in rows if "torch" in row["environment"]})
    commands = "\n".join(sorted({_as_typed(row) for row in rows}))
    commits = ", ".join(sorted({row["environment"]["commit"] for row in rows}))
    return (
        f"{environment['device']} (devices: {environment['num_local_devices']}), {environment['cpu']}, "
        f"{environment['cores']} cores; {', '.join(versions)}; code at {commits}. "
        f"Load average before the cases: {min(loads):g} to {max(loads):g}.\n\n"
        f"Repeat it with\n\n```\n{commands}\n```\n\n"
        "and one case of it with `--only=` and a part of its name (a regular expression).\n"
    )


def _targets(rows: list[dict]) -> list[tuple[str, ...]]:
    out = []
    for platform, case, contender, least in TARGETS:
        for row in rows:
            if _is(row, platform, case, contender):
                over = row["time_over_ours"]
                out.append((row["case"], contender, f"{least:g} x", _over(over), _verdict(over, least)))
    return out


def _cells(row: dict) -> tuple[str, ...]:
    spread = f"{table.seconds(row['seconds_min'])} to {table.seconds(row['seconds_max'])}"
    return (
        row["case"],
        row["contender"],
        f"{table.seconds(row['seconds'])} ({spread})",
        f"{row['samples_per_s']:.1f}" if "samples_per_s" in row else "",
        f"{row['images_per_repeat'] / row['seconds']:.1f}"
        if row.get("images_per_repeat") and "samples_per_s" in row
        else "",
        _over(row["time_over_ours"]) if "time_over_ours" in row else "",
        "; ".join(_remarks(row)),
    )


def _remarks(row: dict) -> list[str]:
    out = []
    if "share_of_matrix_rate" in row:
        rate, best = row["tflop_per_s_device"], row["matrix_tflop_per_s"]
        out.append(f"{rate:.3g} TFLOP/s a device, {row['share_of_matrix_rate']:.0%} of a matrix product's {best:.3g}")
    if "padded_share_run" in row:
        out.append(f"padded {row['padded_share_run']:.1%} (buckets: {row['padded_share_bucket']:.1%})")
    if row.get("difference_from_plain_scan"):
        out.append(f"gradients {row['difference_from_plain_scan']:.1g} from the plain scan's")
    if "compilations" in row:
        out.append(f"{row['compilations']} compilations, {row['compile_s']:.1f} s")
    if "step_memory_gb" in row:
        out.append(f"{row['step_memory_gb']:.2f} GB")
    if "cold_s" in row:
        phases = ", ".join(f"{name} {s:.1f} s" for name, s in row["warm_phases_s"].items())
        out.append(f"warm cache; cold {row['cold_s']:.1f} s; warm: {phases}")
    if "lanes" in row:
        tried = ", ".join(f"{lanes} together {table.seconds(step_s)}" for lanes, step_s in row["lanes_step_s"].items())
        out.append(f"{row['num_trials']} trials, a step of all: {tried}")
    if "startup_s" in row:
        once = {"startup_s": "start-up", "encode_s": "encoding", "compile_cached_s": "compilation", "input_s": "input"}
        spent = ", ".join(f"{what} {row[field]:.1f} s" for field, what in once.items() if field in row)
        out.append(f"once for {row['num_trials']} trials: {spent}; {row['steps']} steps of all {row['train_s']:.1f} s")
    if "scaled_from_resamples" in row:
        out.append("scaled from 1 resample a repeat")
    return out


def _over(over: dict) -> str:
    return f"{over['median']:.2f} ({over['min']:.2f}-{over['max']:.2f}; best {over['of_best']:.2f})"


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main(argv: list[str]) -> None:
    results = Path(flags.FLAGS.results)
    text = render(results)
    with files.must_write(f"--out={flags.FLAGS.out}"):
        files.write_text(Path(flags.FLAGS.out), text)
    print(f"{flags.FLAGS.out}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    flags.DEFINE_string("results", "results", "The folder of the records.")
    flags.DEFINE_string("out", "BENCHMARKS.md", "The page to write.")
    command_line.run(main)
