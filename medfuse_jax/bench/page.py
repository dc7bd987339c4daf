"""Write BENCHMARKS.md from the records in results/: `python -m medfuse_jax.bench.page`.

A record is a line of `results/<date>_<name>/*.json`, written by `python -m medfuse_jax.bench --json=FILE`.
"""

import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from absl import flags

from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

# Rows of the headline table: platform, start of the case's name, contender, target speed-up (or None).
HEADLINE = (
    ("gpu", "step medfuse B=16 19% paired", "torch_released", 6.0),
    ("gpu", "step medfuse B=256 100% paired", "torch_tuned", 1.5),
    ("gpu", "bootstrap N=11914", "sklearn_loop", 100.0),
    ("gpu", "lstm medfuse B=256", "torch_tuned", 1.0),
    ("gpu", "trials medfuse", "one_run", 0.25),
    ("cpu", "step medfuse B=16 19% paired 2 h float32", "torch_released", 3.0),
    ("cpu", "step medfuse B=16 19% paired 2 h float32", "torch_tuned", None),
    ("cpu", "step medfuse B=16 100% paired 2 h float32", "torch_released", 0.8),
    ("cpu", "step medfuse B=16 100% paired 2 h float32", "torch_tuned", None),
    ("cpu", "step uni_ehr B=16 2 h float32", "torch_tuned", None),
    ("cpu", "lstm medfuse B=16 2 h float32", "torch_tuned", None),
    ("cpu", "bootstrap N=11914", "sklearn_loop", 100.0),
    ("cpu", "trials medfuse", "runs_alone", 0.91),
    ("cpu", "sweep early 64 trials", "one_run", 0.25),
)

_PEERS = {"torch_released": "PyTorch as the released code uses it", "torch_tuned": "Tuned PyTorch"}

_HEAD = """# Benchmarks

Speed of ours beside the same models in plain PyTorch, on the same machine and the same batches. Where the time of a
training step goes: [docs/performance.md](docs/performance.md).
"""

_TAIL = """## How to read it

- **Speed-up**: the other's time divided by ours. Contenders take turns within every repeat; the table shows the median
  of the repeats' ratios and, in brackets, their range. Below 1 the other is faster. Compare ratios, not seconds: those
  belong to one machine.
- `step`: one training step, on batches that are already on the device. B is the batch size; "19% paired" is the
  fraction of stays with an X-ray; "2 h" is one time step of the series, whose lengths are those of phenotyping.
- `torch_released`: the model as the released code runs it: float32, NCHW, packed series, and a zero image through the
  ResNet for every stay without an X-ray; on a GPU, convolutions in TF32, torch's default. `torch_tuned`: channels_last,
  padded series, fused Adam, no zero images, and on a GPU TF32, cuDNN, autocast and the fastest of four forms: eager,
  compiled ResNet, compiled model, compiled model in CUDA graphs. A record's `augmentation` says "in all" if all
  contenders augment X-rays on the device; in records without it, only ours does.
- `lstm`: the EHR encoder's recurrence alone, forward and backward. `bootstrap`: 1000 resamples of the test metrics;
  `sklearn_loop` is one resample of scikit-learn's functions, times 1000.
- `hourly`: an epoch of decompensation on the MIMIC-IV demo's stays ([docs/hourly.md](docs/hourly.md)), all hours of a
  stay in one pass, against one sample an hour, with our step (`prefixes`) and with `torch_tuned`'s (`torch_prefixes`).
- `dispatch`: what a call of a step costs the host in one process, and in one of two that train together
  (`two_processes`).
- `trials`: the steps of ten trials of a sweep, against ten single runs (`runs_alone`) or one (`one_run`).
  `sweep`: the whole command for 64 trials on frozen encoders, against the command for one run: 0.25 means that the
  sweep takes as long as four runs.
"""


_COMPILED = """## Compiled, not timed

Counted in the programs that the compilers of an H200 and of TPUs make of our steps (bfloat16), on a machine that has
neither: `python -m medfuse_jax.bench.compiled --target=h200`. No accelerator has run them. Loops over time count 64
steps; TPU traffic is the compiler's own figure, which counts a loop once. "Estimate": the larger of XLA's cycles and of
the traffic at the memory's bandwidth. How to read and repeat it: [docs/performance.md](docs/performance.md).

"""


def render(results: Path) -> str:
    """Return the page; raise UserError if there is no record, or a damaged one."""
    paths = sorted(results.glob("*/*.json"))
    records = {path: rows for path in paths if not _is_compiled(path) and (rows := read(path))}
    if not records:
        message = f"{results} has no records (<date>_<name>/*.json): make one with python -m medfuse_jax.bench --json"
        raise UserError(message, path=results)
    rows = sorted((row for rows in records.values() for row in rows), key=_time, reverse=True)
    shown = [(row, target) for *key, target in HEADLINE if (row := _newest(rows, *key))]
    cells = [(row["case"], row["contender"], _speed_up(row, target), _machine(row)) for row, target in shown]
    parts = [_HEAD, markdown(("case", "compared with", "speed-up of ours / target", "machine, date"), cells)]
    counted = [row for path in paths if _is_compiled(path) for row in _read_lines(path, _check_compiled)]
    parts += [_slower([row for row, _ in shown]), _TAIL, _compiled(counted), _repeat(records)]
    return "\n".join(part for part in parts if part)


def _is_compiled(path: Path) -> bool:
    return path.parent.name.endswith("_compiled")


def read(path: Path) -> list[dict]:
    """Return the records of one file; raise UserError (path, row) for a line that is not a record.

    Cases that failed, were left out or not reached are skipped.
    """
    return [row for row in _read_lines(path, _check) if "outcome" not in row]


def _read_lines(path: Path, check: Callable[[dict], None]) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it or make it again", path=path) from None
    if not lines:
        raise UserError(f"{path} is empty: make it again with python -m medfuse_jax.bench --json={path}", path=path)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
            check(rows[-1])
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path}, line {number}: not a record of medfuse_jax.bench ({error!r})"
            raise UserError(message, path=path, row=number) from None
    return rows


def _check(row: dict) -> None:
    """Raise ValueError, KeyError or TypeError if a field that the pages read is missing or of the wrong type."""
    if "outcome" in row:
        return
    environment = row["environment"]
    texts = {name: row[name] for name in ("case", "contender", "command")}
    texts |= {name: environment[name] for name in ("commit", "time", "platform", "device")}
    numbers = {name: row[name] for name in ("seconds", "seconds_min", "seconds_max")}
    numbers |= {name: row[name] for name in ("samples_per_s", "images_per_repeat") if name in row}
    if "time_over_ours" in row or any(_matches(row, *key) for *key, _ in HEADLINE):
        numbers |= {name: row["time_over_ours"][name] for name in ("median", "min", "max")}
    row["settings"]["kind"]
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}")
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value!r}")


def _time(row: dict) -> str:
    return row["environment"]["time"]


def _newest(rows: list[dict], platform: str, case: str, contender: str) -> dict | None:
    """Return the newest matching row (rows: newest first); None without one. Skip records on a user's own shards."""
    matching = (row for row in rows if _matches(row, platform, case, contender) and row.get("input") != "shards")
    return next(matching, None)


def _matches(row: dict, platform: str, case: str, contender: str) -> bool:
    same_platform = row["environment"]["platform"] == platform
    return same_platform and row["case"].startswith(case) and row["contender"] == contender


def _speed_up(row: dict, target: float | None) -> str:
    over = row["time_over_ours"]
    median, low, high = (f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in (over["median"], over["min"], over["max"]))
    text = f"{median} ({low}-{high})"
    if target is None:
        return text
    return f"{text} / {target:g}" if over["median"] >= target else f"**{text} / {target:g}: missed**"


def _hardware(row: dict) -> str:
    environment = row["environment"]
    if environment["platform"] == "cpu":
        return f"{environment['cpu']}, {environment['cores']} cores"
    return environment["device"]


def _machine(row: dict) -> str:
    return f"{_hardware(row)}, {_time(row)[:10]}"


def _slower(rows: list[dict]) -> str:
    """Return sentences that say on which machines and in which cases PyTorch is faster than ours."""
    slower = {}
    for row in rows:
        if row["contender"] in _PEERS and (over := row["time_over_ours"]["median"]) < 1:
            text = f"{row['case'].removesuffix(' float32')} ({1 / over:.2f} times as fast)"
            slower.setdefault(f"{_PEERS[row['contender']]} is ahead of ours on {_hardware(row)}", []).append(text)
    return "\n".join(textwrap.fill(f"**{lead}**: {'; '.join(texts)}.", 118) + "\n" for lead, texts in slower.items())


def _check_compiled(row: dict) -> None:
    """Raise KeyError or TypeError if a field that the page reads is missing or of the wrong type."""
    _compiled_cells(row)


def _compiled(rows: list[dict]) -> str:
    """Return the section of compiled figures, the newest of each target and case; '' if there are none."""
    newest = {(row["target"], row["case"]): row for row in sorted(rows, key=_time)}
    if not newest:
        return ""
    cells = [_compiled_cells(row) for _, row in sorted(newest.items())]
    header = ("compiled case", "target", "launches", "a time step", "float32 copies", "memory traffic")
    return _COMPILED + markdown((*header, "collectives", "peak memory of a device", "estimate", "date"), cells)


def _compiled_cells(row: dict) -> tuple[str, ...]:
    def shown(name: str, scale: float = 1.0, unit: str = "", form: str = ",.0f") -> str:
        return "" if row.get(name) is None else f"{row[name] / scale:{form}}{unit}"

    launches = "" if "ms" in row else shown("launches")  # a TPU has none: the host launches a whole program
    peak = f"{shown('peak_bytes', 2**30, ' GB', '.2f')} of {row['device_bytes'] / 2**30:.0f} GB"
    traffic = [shown("bytes", 1e6, " MB"), shown("bytes_an_image", 1e6, " MB an X-ray", ".1f")]
    return (
        row["title"],
        row["target"],
        launches,
        shown("launches_a_time_step", form=".1f") if launches else "",
        shown("weight_copies"),
        ", ".join(filter(None, traffic)),
        shown("collectives"),
        peak if row["fits"] else f"does not fit: {row.get('refused', peak)}",
        shown("ms", 1.0, " ms", ".2f"),
        _time(row)[:10],
    )


def _repeat(records: dict[Path, list[dict]]) -> str:
    """Return the section on how to repeat each record: its machine and command, newest first."""
    cells = []
    for path, rows in sorted(records.items(), key=lambda item: max(map(_time, item[1])), reverse=True):
        folder = f"[{path.parent.name}](results/{path.parent.name})/{path.name}"
        commands = ", ".join(sorted({f"`{_as_typed(row)}`" for row in rows}))
        cells.append((folder, _machine(rows[0]), commands))
    return "\n".join(
        [
            "## How to repeat it\n",
            "`--only=` and a part of a case's name measure it alone; `python -m medfuse_jax.bench.page` then writes "
            "this page.\n",
            markdown(("record", "machine, date", "command"), cells),
        ]
    )


def _as_typed(row: dict) -> str:
    """Return the record's command, with the variables that simulate several CPU devices."""
    environment = row["environment"]
    count = environment["num_local_devices"] if environment["platform"] == "cpu" else 1
    simulated = f"NPROC=16 XLA_FLAGS=--xla_force_host_platform_device_count={count} " if count > 1 else ""
    return simulated + row["command"].replace("|", "\\|")  # it goes into a Markdown table


def markdown(header: tuple[str, ...], rows: list) -> str:
    """Return a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main(argv: list[str]) -> None:
    text = render(Path(flags.FLAGS.results))
    with files.must_write(f"--out={flags.FLAGS.out}"):
        files.write_text(Path(flags.FLAGS.out), text)
    print(f"{flags.FLAGS.out}: {text.count(chr(10))} lines")


if __name__ == "__main__":
    flags.DEFINE_string("results", "results", "Folder of the records.")
    flags.DEFINE_string("out", "BENCHMARKS.md", "Page to write.")
    command_line.run(main)
