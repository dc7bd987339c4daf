"""What each method costs: parameters, and operations of training by XLA's own count.

`python -m medfuse_jax.bench.flops` prints the table of docs/methods.md; `--write=docs/methods.md` puts it there.

Shapes: as in step.py; B rows, P X-rays, T time.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags

from medfuse_jax import augment, schema, step
from medfuse_jax.models import registry
from medfuse_jax.models.recurrence import chunks
from medfuse_jax.optim import adam
from medfuse_jax.runtime import command_line

STAY_STEPS = 24  # of the table's stay: 48 h in steps of 2 h
_BEGIN, _END = "<!-- made by python -m medfuse_jax.bench.flops --write=docs/methods.md -->", "<!-- end -->"


def table() -> str:
    """A Markdown table with a row a method."""
    lines = [
        "| method | needs | reads | parameters | MFLOP a time step | GFLOP an X-ray | GFLOP a paired stay |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for method, (module, _) in registry.METHODS.items():
        reads = [name for name, used in (("EHR", module.uses_ehr), ("cxr", module.uses_cxr)) if used]
        needs = {(): "either", ("ehr",): "EHR", ("cxr",): "cxr"}[module.needs]
        flops = training_flops(method)
        stay = STAY_STEPS * flops["time_step"] + flops["cxr"]
        lines.append(
            f"| `{method}` | {needs if len(reads) > 1 else reads[0]} | {' + '.join(reads)} | {num_params(method):,} "
            f"| {flops['time_step'] / 1e6:.2f} | {flops['cxr'] / 1e9:.2f} | {stay / 1e9:.2f} |"
        )
    return "\n".join(lines)


def num_labels(method: str) -> int:
    """Those the method is counted with: the 14 X-rays' labels for uni_cxr, else the 25 phenotypes."""
    return len(schema.TASKS["radiology" if method == "uni_cxr" else "pheno"].labels)


def num_params(method: str) -> int:
    """Parameters of the released sizes."""
    model = registry.build(method, num_labels(method))
    shapes = jax.eval_shape(lambda: registry.init(model, jax.random.key(0)))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def training_flops(method: str) -> dict[str, float]:
    """{'time_step', 'cxr'}: floating-point operations that one more of it adds to a training step.

    Forward, backward and augmentation, at the released sizes, in float32. By XLA's cost analysis of
    the lowered step, as differences: what a step costs whatever its batch (the update) cancels.
    The time step is of a stay without an X-ray; fusion and heads count with the X-ray.
    """
    module, _ = registry.METHODS[method]
    with _loops_of_one_step():
        time_step = (
            _row_flops(method, images=False, steps=1) - _row_flops(method, images=False) if module.uses_ehr else 0.0
        )
        paired = _row_flops(method, images=True, steps=int(module.uses_ehr)) if module.uses_cxr else time_step
    return {"time_step": time_step, "cxr": paired - time_step}


def _row_flops(method: str, images: bool, steps: int = 0) -> float:
    """Of one more row, with an X-ray or without."""
    one, two = (_step_flops(method, rows, rows * images, steps) for rows in (1, 2))
    return two - one


@contextlib.contextmanager
def _loops_of_one_step() -> Iterator[None]:
    """XLA counts a loop's body once, whatever its trips: with chunks of one step that is one step."""
    chunk_steps, chunks.CHUNK_STEPS = chunks.CHUNK_STEPS, (1,)
    try:
        yield
    finally:
        chunks.CHUNK_STEPS = chunk_steps


def _step_flops(method: str, rows: int, images: int, steps: int = 0) -> float:
    options = step.StepOptions(
        model=registry.build(method, num_labels(method)),
        optimizer=adam(0.999),
        image=augment.ImageOptions(),
        mean_F=(0.0,) * len(schema.CHANNELS),
        std_F=(1.0,) * len(schema.CHANNELS),
    )
    batch = _batch(num_labels(method), rows, images, steps)
    state = jax.eval_shape(lambda: step.state_maker(options)(jax.random.key(0), 0.0))
    return step_flops(options, state, batch)


def step_flops(options: step.StepOptions, state: step.TrainState, batch: dict) -> float:
    """XLA's count of the training step as written, in which a loop's body counts once. Of state and batch: the shapes.

    As written for a GPU: on a CPU a convolution is written as what is faster there (`models/conv.py`).
    """
    traced = jax.jit(functools.partial(step.train_step, options)).trace(state, batch, jax.random.key(0))
    return traced.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"]


def _batch(labels: int, rows: int, images: int, steps: int) -> dict:
    batch = {
        "label": np.zeros((rows, labels), np.float32),
        "valid": np.ones(rows, bool),
        "row_id": np.arange(rows, dtype=np.int32),
        "length": np.full(rows, steps, np.int32),
        "ehr": np.zeros((rows, steps, len(schema.CHANNELS)), np.float32),
    }
    if images:
        size = schema.IMAGE_SIZE_PX
        batch |= {"image": np.zeros((images, size, size), np.uint8), "image_row": np.arange(images, dtype=np.int32)}
    return batch


def write(path: Path) -> None:
    """Puts the table between its marks in a page; the rest of the page stays."""
    before, _, rest = path.read_text().partition(_BEGIN)
    path.write_text(f"{before}{_BEGIN}\n{table()}\n{_END}{rest.partition(_END)[2]}")


def main(argv: list[str]) -> None:
    if flags.FLAGS.write:
        write(Path(flags.FLAGS.write))
    else:
        print(table())


if __name__ == "__main__":
    flags.DEFINE_string("write", "", "A page with the table's marks, such as docs/methods.md.")
    command_line.run(main)
