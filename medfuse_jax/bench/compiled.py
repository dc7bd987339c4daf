"""What a training step costs on a GPU or TPU, and whether it fits, by that device's own compiler; no device is needed.

    python -m medfuse_jax.bench.compiled --target=h200|v5e:2x2x1|v5e:16x16 [--case=NAME] [--json=FILE]
    python -m medfuse_jax.bench.compiled --target=h200 --rows=256 --images=256     # a batch of your own

A figure is counted in the compiled program, never timed. If the compiler is missing, the error gives the command that
installs it.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable

import jax
from absl import flags

from medfuse_jax.bench import compilers, hlo, machine, programs, thunks
from medfuse_jax.bench.compilers import Target
from medfuse_jax.bench.programs import Program, Sizes
from medfuse_jax.models.recurrence import chunks
from medfuse_jax.runtime import command_line, errors, files
from medfuse_jax.runtime.errors import UserError

_QUICK = (1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile.

    make: builds it on some devices. on: 'one' device, all devices of a 'host', or those of several 'hosts'.
    """

    title: str
    make: Callable[[list, Sizes], Program]
    sizes: Sizes
    on: str = "one"
    at_least: int = 1  # devices


CASES = {
    "lstm": Case("LSTM, 16 rows, 64 steps", programs.lstm, Sizes()),
    "augment": Case("augmentation, 16 X-rays", programs.augment, Sizes(images=16)),
    "step": Case("MedFuse, 16 rows, 3 X-rays, 64 steps", programs.step, Sizes()),
    "image": Case("X-rays alone, batch 256", programs.step, Sizes("uni_cxr", 256, 256)),
    "devices": Case("MedFuse, 16 rows, 4 X-rays, divided", programs.step, Sizes(images=4), "host", 2),
    "held": Case("X-rays alone, batch 256, held", programs.held, Sizes("uni_cxr", 256, 256), "host"),
    "hosts": Case("MedFuse, 4,096 rows, 768 X-rays", programs.step, Sizes("medfuse", 4096, 768), "hosts"),
}


def train_step(
    target: str,
    method: str = "medfuse",
    rows: int = 16,
    images: int = 3,
    time_steps: int = 64,
    dtype: str = "bfloat16",
    resnet_stage_sizes: tuple[int, ...] = programs.RESNET_34,
) -> tuple[programs.Step, tuple]:
    """Return the step that training on a target compiles by default, jitted, and the shapes of its arguments.

    `jitted.trace(*args).lower().compile()` compiles it for all devices of the target; with the arguments placed on one
    device, for that one. target: see `compilers.open_target`. rows, images: of a batch, over all devices; images=0: a
    batch without X-rays.
    """
    sizes = Sizes(method, rows, images, time_steps, dtype, tuple(resnet_stage_sizes))
    program = programs.step(compilers.open_target(target).devices, sizes)
    return program.jitted, program.args


def measure(case: Case, target: Target) -> dict:
    """Compile a case for a target and return its figures; of a program that its memory cannot hold, what it needs."""
    on = target.devices[:1] if case.on == "one" else target.devices
    program = case.make(on, case.sizes)
    row = {"devices": len(on), "device_bytes": target.chip.memory_bytes}
    start = time.perf_counter()
    try:
        lowered = program.jitted.trace(*program.args).lower()
        compiled, listed = thunks.compile_with_thunks(lowered) if target.platform == "gpu" else (lowered.compile(), [])
    except jax.errors.JaxRuntimeError as error:
        if not errors.is_out_of_memory(error):
            raise
        return row | {"fits": False, "refused": _refused(str(error))}
    row["compile_s"] = round(time.perf_counter() - start, 1)
    written = hlo.written_collectives(lowered.as_text())
    row |= dict(zip(("collectives_written", "collectives_written_of_one_number"), written))
    return row | figures(compiled, listed, program, target, case.sizes)


def figures(
    compiled: jax.stages.Compiled, listed: list[thunks.Thunk], program: Program, target: Target, sizes: Sizes
) -> dict:
    """Return what a compiled program does in one call, on each device. listed: a GPU program's thunks.

    kernels: all that runs. launches: what a GPU's driver is asked for; a CUDA graph is one. The recurrence counts as if
    a series were as long as its padding, and an epoch on the device as one step. bytes: as the compiler says, which
    counts a loop once, or, of a GPU's, which does not say, as counted here.
    """
    use_ehr = program.run.dataset.use_ehr
    trips = chunks.time_steps_run(sizes.time_steps) // chunks.CHUNK_STEPS if use_ehr else 1
    parsed = hlo.parse(compiled.as_text())
    loops = hlo.loops(parsed, trips)
    kernels = sum(times for _, times in hlo.executed(parsed, trips))
    outside_loops = kernels - sum(loop.trips * loop.launches for loop in loops if loop.depth == 0)
    launched = thunks.count(listed, [loop.trips for loop in loops]) if listed else None
    sent, alone = hlo.collectives(parsed, trips)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    weights = {x.shape for x in jax.tree.leaves(program.run.abstract_state().params) if x.ndim > 1}
    peak = memory.peak_memory_in_bytes
    row = {
        "kernels": kernels,
        "kernels_outside_loops": outside_loops,
        "loops": [dataclasses.asdict(loop) for loop in loops],
        "weight_copies": hlo.weight_copies(parsed, weights),
        "bytes": cost.get("bytes accessed") or hlo.traffic(parsed, trips),
        "collectives": sent,
        "collectives_of_one_number": alone,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "flops": program.flops() if program.flops else None,
        "fits": peak <= target.chip.memory_bytes,
    }
    if launched:
        row |= {"launches": launched.total, "graphs": launched.graphs, "kernels_in_graphs": launched.in_graphs}
        if use_ehr:
            row["launches_a_time_step"] = round((launched.total - launched.outside_loops) / sizes.time_steps, 2)
    if not use_ehr:
        row["bytes_an_image"] = row["bytes"] / program.batch["image"].shape[1]
    if target.chip.clock_hz:
        row["cycles"], row["cycles_loops_once"] = hlo.cycles(parsed, trips), hlo.cycles(parsed)
        times_s = (row["cycles"] / target.chip.clock_hz, row["bytes"] / target.chip.bytes_per_s)
        row["ms"] = 1000 * max(*times_s, cost.get("optimal_seconds", 0.0))
    if program.flops and target.chip.bytes_per_s:
        taken_s = row["ms"] / 1000 if "ms" in row else row["bytes"] / target.chip.bytes_per_s
        row["rows_per_s_device"] = sizes.rows / program.batch["valid"].shape[0] / taken_s
    return row


def _refused(message: str) -> str:
    """Return what a compiler says of a program that does not fit, such as '21.3G of 15.75G'."""
    sizes = re.findall(r"\b(\d[\d.]*[KMG])\b", message)
    return " of ".join(sizes[:2]) if len(sizes) > 1 else " ".join(message.split())[:120]


def _number(row: dict, name: str, scale: float = 1.0, form: str = ",.0f") -> str:
    return "-" if row.get(name) is None else format(row[name] / scale, form)


def _pair(row: dict, name: str) -> str:
    alone = _number(row, f"{name}_of_one_number")
    return _number(row, name) + (f" ({alone})" if alone not in "-0" else "")


# Title, width and text of each column. In brackets: collectives of one number alone.
_COLUMNS = (
    ("case", -36, lambda row: row["title"]),
    ("kernels", 8, lambda row: _number(row, "kernels")),
    ("launches", 8, lambda row: _number(row, "launches")),
    ("a t-step", 8, lambda row: _number(row, "launches_a_time_step", form=".1f")),
    ("f32 copies", 10, lambda row: _number(row, "weight_copies")),
    ("MB moved", 9, lambda row: _number(row, "bytes", 1e6)),
    ("an X-ray", 8, lambda row: _number(row, "bytes_an_image", 1e6, ",.1f")),
    ("collectives", 11, lambda row: _pair(row, "collectives")),
    ("written", 9, lambda row: _pair(row, "collectives_written")),
    ("args GB", 7, lambda row: _number(row, "argument_bytes", 2**30, ".3f")),
    ("temp GB", 7, lambda row: _number(row, "temporary_bytes", 2**30, ".3f")),
    ("peak GB", 7, lambda row: _number(row, "peak_bytes", 2**30, ".3f")),
    ("Mcycles", 7, lambda row: _number(row, "cycles", 1e6, ".2f")),
    ("ms", 6, lambda row: _number(row, "ms", form=".2f")),
    ("rows/s", 7, lambda row: _number(row, "rows_per_s_device")),
    ("GFLOP", 7, lambda row: _number(row, "flops", 1e9, ",.1f")),
    ("fits", 4, lambda row: "yes" if row["fits"] else f"no: {row.get('refused', '')}"),
)


def _line(cells) -> str:
    padded = (f"{cell:{'<' if width < 0 else '>'}{abs(width)}}" for cell, (_, width, _) in zip(cells, _COLUMNS))
    return "  ".join(padded).rstrip()


def _loops(row: dict) -> str:
    """Return a line with the kernels of each loop, trips x kernels of a trip; '' if there is none."""
    outer = [loop for loop in row.get("loops", []) if loop["depth"] == 0]
    text = " + ".join(f"{loop['trips']} x {loop['launches']}" for loop in outer)
    return f"    kernels: {row['kernels_outside_loops']} + {text}" if text else ""


def _chosen(target: Target, values) -> dict[str, Case]:
    """Return the cases by name: the one asked for, the batch of the user's own, or all that suit the target."""
    own = {name: values[name].value for name in ("method", "rows", "images", "time_steps") if values[name].present}
    if values.case:
        errors.check_choice("--case", values.case, CASES)
    if own and values.case:
        message = f"--case={values.case} has sizes of its own: leave out --{next(iter(own))}, or --case"
        raise UserError(message, field="--case", value=values.case)
    if own:
        sizes = dataclasses.replace(Sizes(), **own)
        title = f"{sizes.method}, {sizes.rows} rows, {sizes.images} X-rays"
        cases = {"own": Case(title, programs.step, sizes, "host" if target.num_hosts == 1 else "hosts")}
    else:
        cases = {name: case for name, case in CASES.items() if values.case in ("", name)}
    stage_sizes = _QUICK if values.quick else programs.RESNET_34
    changes: dict = {"dtype": values.dtype, "resnet_stage_sizes": stage_sizes, "device_bytes": target.chip.memory_bytes}
    suited = {name: case for name, case in cases.items() if _suits(case, target, bool(values.case))}
    if not suited:
        wanted = "several hosts, as in v5e:16x16" if cases[values.case].on == "hosts" else "several devices on one host"
        has = f"--target={target.name} has {len(target.devices)} devices on {target.num_hosts} hosts"
        raise UserError(f"--case={values.case} needs {wanted}; {has}", field="--case", value=values.case)
    return {n: dataclasses.replace(c, sizes=dataclasses.replace(c.sizes, **changes)) for n, c in suited.items()}


def _suits(case: Case, target: Target, is_asked_for: bool) -> bool:
    if case.on == "one" and is_asked_for:
        return True
    return (case.on == "hosts") == (target.num_hosts > 1) and case.at_least <= len(_for(case, target).devices)


def _for(case: Case, target: Target) -> Target:
    """Return the target; two GPUs instead of one for a case that needs several devices."""
    return compilers.open_target("h200:2") if case.at_least > 1 and target.name == "h200" else target


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # a GPU or TPU of this machine is not used
    target = compilers.open_target(values.target)
    cases, too_large = _chosen(target, values), []
    out = files.open_to_append(values.json, "--json") if values.json else None
    print(_line(title for title, _, _ in _COLUMNS))
    for name, case in cases.items():
        on = _for(case, target)
        environment = {n: machine.environment()[n] for n in ("jax", "jaxlib", "commit")} | machine.moment()
        row = {"case": name, "title": case.title, "target": on.name} | measure(case, on)
        print(_line(text(row) for _, _, text in _COLUMNS), *filter(None, [_loops(row)]), sep="\n", flush=True)
        if out:
            record = row | {"sizes": dataclasses.asdict(case.sizes), "environment": environment}
            print(json.dumps(record), file=out, flush=True)
        too_large += [] if row["fits"] else [name]
    if too_large:
        memory_gb = target.chip.memory_bytes / 2**30
        raise UserError(
            f"a device of {target.name} has {memory_gb:.0f} GB, too little for {', '.join(too_large)}: use fewer rows "
            "or X-rays, or more devices",
            field="--target",
            value=target.name,
        )


def define_flags() -> None:
    flags.DEFINE_string("target", "", f"What to compile for: {', '.join(compilers.EXAMPLES)}, or 'cpu', this machine.")
    flags.DEFINE_string("case", "", f"Compile this case alone: {', '.join(CASES)}.")
    flags.DEFINE_string("json", "", "File to append the figures to, one JSON object a line.")
    flags.DEFINE_string("method", "medfuse", "Compile a step of your own: the method,")
    flags.DEFINE_integer("rows", 16, "the rows of a batch, over all devices,", lower_bound=1)
    flags.DEFINE_integer("images", 3, "its X-rays,", lower_bound=0)
    flags.DEFINE_integer("time_steps", 64, "and its time steps.", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the products.")
    flags.DEFINE_bool("quick", False, "Compile a small ResNet, in a fraction of the time, to try the command.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
