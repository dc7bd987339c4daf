"""The cost of each method: its parameters, and the floating-point operations of training.

    python -m medfuse_jax.bench.flops [--write=docs/methods.md] [--methods=NAME,...]

Prints the table of docs/methods.md, or writes it there. With --methods, only those rows are counted and written.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from medfuse_jax import augment, losses, schema, step
from medfuse_jax import config as config_lib
from medfuse_jax.models import registry
from medfuse_jax.models.model import variable_shapes
from medfuse_jax.optim import adam
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError, check_choice

STAY_STEPS = 24  # time steps of the table's stay: 48 h at 2 h a step
BEGIN, END = "<!-- made by python -m medfuse_jax.bench.flops --write=docs/methods.md -->", "<!-- end -->"


_HEADER = """\
| method | needs | reads | parameters | MFLOP a time step | GFLOP an X-ray | GFLOP a paired stay |
|---|---|---|---:|---:|---:|---:|"""


def table(methods: Sequence[str] = (), known: str = "") -> str:
    """Return the Markdown table, one row per method.

    methods: those to count; by default all. known: an earlier table, which has the rows of the others.
    """
    rows = {line.split("`")[1]: line for line in known.splitlines() if line.startswith("| `")}
    rows |= {method: _table_row(method) for method in methods or registry.METHODS}
    return "\n".join([_HEADER, *(rows[method] for method in registry.METHODS if method in rows)])


def _table_row(method: str) -> str:
    model_class = registry.METHODS[method].model_class
    reads = [name for name, used in (("EHR", model_class.uses_ehr), ("X-ray", model_class.uses_cxr)) if used]
    needs = {(): "either", ("ehr",): "EHR", ("cxr",): "X-ray"}[model_class.needs]
    counted = training_flops(method)
    stay = STAY_STEPS * counted["time_step"] + counted["cxr"]
    return (
        f"| `{method}` | {needs if len(reads) > 1 else reads[0]} | {' + '.join(reads)} | {num_params(method):,} "
        f"| {counted['time_step'] / 1e6:.2f} | {counted['cxr'] / 1e9:.2f} | {stay / 1e9:.2f} |"
    )


def num_params(method: str, **options) -> int:
    """Count the parameters at the released sizes. options: fields of the model, such as cxr_kind."""
    model = _build(method, **options)
    return sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(model)["params"]))


def training_flops(method: str, **options) -> dict[str, float]:
    """Return the operations that one more 'time_step' or 'cxr' (X-ray) adds to a training step, in float32.

    A time step's cost is that of the LSTM's matrix products, and that of a fusion that reads every time step. An
    X-ray's cost includes augmentation, fusion and classifiers. The costs of fusions are differences between XLA's
    counts of lowered steps, in which the optimizer and the LSTM cancel. options: as of `num_params`. Raise
    UserError for a transformer of series, whose cost of a time step depends on the stay's length.
    """
    model = _build(method, **options)
    if model.uses_ehr and model.ehr_kind != "lstm":
        raise UserError(f"ehr_kind is {model.ehr_kind!r}: only the LSTM's operations can be counted", field="ehr_kind")
    time_step = lstm_flops(1, model.ehr_hidden, trained=not getattr(model, "frozen_encoders", False))

    def row(has_cxr: bool, num_steps: int) -> float:
        return _row_flops(method, has_cxr, num_steps, **options)

    if model.reads_series:
        time_step += row(False, 2) - row(False, 1) - _row_flops("uni_ehr", False, 2) + _row_flops("uni_ehr", False, 1)
    steps = int(model.uses_ehr)
    cxr = row(True, steps) - row(False, steps) + row(False, 0) if model.uses_cxr else 0.0
    return {"time_step": time_step if model.uses_ehr else 0.0, "cxr": cxr}


def lstm_flops(num_steps: int, width: int = 256, trained: bool = True) -> float:
    """Count the operations of the EHR encoder's two layers over `num_steps` valid time steps.

    trained: count forward and backward; otherwise forward alone. The backward pass has twice as many products as the
    forward pass, less those for the gradient of the series.
    """
    channels = len(schema.CHANNELS)
    forward = 2 * 4 * width * (channels + 3 * width)
    return num_steps * (3 * forward - 2 * 4 * width * channels if trained else forward)


def step_flops(
    options: step.StepOptions, state: step.TrainState, batch: dict, compiled: jax.stages.Compiled | None = None
) -> float | None:
    """Return XLA's count of the training step, lowered for a GPU with plain operations; state and batch may be shapes.

    XLA counts a loop's body once, no matter how often it runs. compiled: the step as compiled for this machine, which
    is counted instead where jax cannot count a lowered program: on plug-in backends, such as GPUs and TPUs. None if
    neither can be counted.
    """
    options = dataclasses.replace(options, model=options.model.clone(ops="plain", recurrence="chunks"))
    traced = jax.jit(functools.partial(step.train_step, options)).trace(state, batch, jax.random.key(0))
    cost = traced.lower(lowering_platforms=("cuda",)).cost_analysis()
    return (cost or compiled_cost(compiled)).get("flops")


def compiled_cost(compiled: jax.stages.Compiled | None) -> dict:
    """Return the compiler's figures of a program ('flops', 'bytes accessed'); {} if it gives none."""
    return (compiled and compiled.cost_analysis()) or {}


def _build(method: str, **options):
    """Build the method at the released sizes, with 14 radiology labels for uni_cxr, else the 25 phenotypes."""
    task = schema.TASKS["radiology" if method == "uni_cxr" else "pheno"]
    return registry.build(method, len(task.labels), **options)


def _row_flops(method: str, has_cxr: bool, num_steps: int, **fields) -> float:
    """Return the operations that one more row adds, with or without an X-ray. fields: of the model."""
    model = _build(method, **fields)
    options = step.StepOptions(
        model=model,
        optimizer=adam(0.999),
        image=augment.ImageOptions(**config_lib.section("image")),
        weights=losses.Weights(**config_lib.section("loss")),
        mean_F=(0.0,) * len(schema.CHANNELS),
        std_F=(1.0,) * len(schema.CHANNELS),
    )
    state = jax.eval_shape(lambda: step.state_maker(options)(jax.random.key(0), 0.0))
    one, two = (step_flops(options, state, _batch(model.num_labels, rows, has_cxr, num_steps)) for rows in (1, 2))
    return two - one


def _batch(num_labels: int, rows: int, has_cxr: bool, num_steps: int) -> dict:
    batch = {
        "label": np.zeros((rows, num_labels), np.float32),
        "valid": np.ones(rows, bool),
        "row_id": np.arange(rows, dtype=np.int32),
        "length": np.full(rows, num_steps, np.int32),
        "ehr": np.zeros((rows, num_steps, len(schema.CHANNELS)), np.float32),
    }
    if has_cxr:
        size = schema.IMAGE_SIZE_PX
        batch["image"] = np.zeros((rows, size, size), np.uint8)
        batch |= {"image_row": np.arange(rows, dtype=np.int32), "image_mask": np.ones(rows, bool)}
    return batch


def write(path: Path, methods: Sequence[str] = ()) -> None:
    """Write the table, or only the rows of these methods, into a page, between its marks."""
    with files.must_write(f"--write={path}"):
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        known, _, after = rest.partition(END)
        files.write_text(path, f"{before}{BEGIN}\n{table(methods, known)}\n{END}{after}")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    for method in given.methods:
        check_choice("--methods", method, registry.METHODS)
    if given.write:
        write(Path(given.write), given.methods)
    else:
        print(table(given.methods))


if __name__ == "__main__":
    flags.DEFINE_string("write", "", "Page to write the table into, such as docs/methods.md.")
    flags.DEFINE_list("methods", [], "Methods to count; by default all.")
    command_line.run(main)
