"""What is checked before training, because it would otherwise stop the run after hours."""

from pathlib import Path

import jax

from medfuse_jax import feed
from medfuse_jax import run as run_lib
from medfuse_jax.models.model import variable_shapes
from medfuse_jax.models.recurrence import supported
from medfuse_jax.runtime import hosts
from medfuse_jax.runtime.errors import UserError


def check(run: run_lib.Run, stages: dict[str, tuple[Path, run_lib.Run]], says: bool = True) -> None:
    """Raise UserError for anything that would stop the run or its pre-training stages later.

    says: whether to print that the validation loss will select a model, where there is no AUROC.
    """
    run.check_any("test", run.dataset.usable("test"))
    run.check_any("val", run.selects("val"))
    run.profiled_steps()
    if run.dataset.use_ehr:
        supported.check(run.config, run.devices)
    for trained in (*(staged for _, staged in stages.values()), run):
        _check_memory(trained)
        feed.choose_parts(trained)
        if says and trained.selected_by_loss:
            unit = trained.dataset.task.unit
            print(f"{trained.config.name}: no label has both classes in the validation {unit} ", end="")
            print("that select the model, so there is no AUROC: their loss selects it", flush=True)


def _check_memory(run: run_lib.Run) -> None:
    """Raise UserError if the weights alone, with Adam's moments, exceed this machine's memory: XLA would abort."""
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_state_shapes(run)))
    if num_bytes > (memory := hosts.memory_bytes()):
        what = f"{run.config.name}: the weights and Adam's moments take {num_bytes / 1e9:.0f} GB, and this machine has "
        raise UserError(f"{what}{memory / 1e9:.0f} GB: reduce the sizes in config.model", field="config.model")


def _state_shapes(run: run_lib.Run):
    """Return the shapes of the weights and Adam's moments."""
    if run.options.model.recurrence == "chunks":
        return run.abstract_state()  # which training asks for again: the model is traced once
    # Other kernels can be traced on their own devices only; no weight depends on the kernel.
    extra = {name: of["train"][:1] for name, of in run.dataset.extra.items()}
    variables = variable_shapes(run.options.model.clone(recurrence="chunks"), extra)
    return variables, variables["params"], variables["params"]
