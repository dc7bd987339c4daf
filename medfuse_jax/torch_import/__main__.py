"""Import a checkpoint into a workdir, or export a workdir's best checkpoint (docs/weights.md).

python -m medfuse_jax.torch_import --checkpoint=FILE --config=FILE --config.data.dir=DIR --workdir=DIR
python -m medfuse_jax.torch_import --workdir=DIR --export=FILE
"""

import contextlib
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import records, torch_import
from medfuse_jax import run as run_lib
from medfuse_jax.runs import checkpoints, sources
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError

_RELEASED_TIMESTEP_H = 1.0  # in all released scripts


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    given = {name for name in ("checkpoint", "config", "export") if getattr(options, name)}
    if given == {"checkpoint", "config"}:
        print("\n".join(import_weights(Path(options.checkpoint), options.config, Path(options.workdir))))
    elif given == {"export"}:
        print(export_weights(Path(options.workdir), Path(options.export)))
    else:
        raise UserError("give --checkpoint=FILE and --config=FILE to import, or --export=FILE alone to export")


def import_weights(checkpoint: Path, config: ConfigDict, workdir: Path) -> list[str]:
    """Make `workdir` a finished run of `config` with the checkpoint's weights; return the lines to print.

    A bare ResNet fills only the X-ray encoder: other runs can start from it, but `evaluate` refuses to score it.
    Raises UserError if the file, the config and its data do not match, or the workdir is in use.
    """
    config_lib.validate(config)
    _check_inputs(config)
    if not config.data.dir:
        raise UserError("config.data.dir is empty: give the folder of the run's shards", field="config.data.dir")
    run = run_lib.open_run(config)
    notes: list[str] = []
    state_dict = torch_import.read(checkpoint, notes)
    try:
        variables, unused = _fill(run.options.model, config.method, state_dict)
    except UserError as error:
        message = f"{checkpoint} for config.method={config.method}, config.task={config.task}: {error}"
        raise UserError(message, field=error.field, path=checkpoint, value=error.value) from None
    state = run.fresh_state()
    state = state.replace(
        params={**state.params, **variables["params"]},
        batch_stats={**state.batch_stats, **variables.get("batch_stats", {})},
    )
    modules = sorted(variables["params"])
    note = {"file": checkpoint.name, "sha256": files.sha256(checkpoint), "modules": modules, "unused": unused}
    _claim(workdir, run, note)
    # The progress of a run after its last epoch, so that `main` does not train it further.
    progress = Progress(epoch=config.num_epochs, learning_rate=config.learning_rate)
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        checkpoints.save(manager, state, progress, is_best=True)
        manager.wait_until_finished()
    is_whole = set(modules) == set(state.params)
    return [
        f"imported {checkpoint} into {workdir}: {', '.join(modules)}",
        *notes,
        f"not used by {config.method}: {_by_module(unused)}",
        *([_label_order(run.dataset.manifest["labels"])] if is_whole else []),
        *(_differences_from_released(config, run.dataset.manifest) if "ehr_encoder" in modules else ()),
        f"to score it: python -m medfuse_jax.evaluate --workdir={workdir}"
        if is_whole
        else f"to start a run from it: python -m medfuse_jax.main --config.init.cxr={workdir} ...",
    ]


def export_weights(workdir: Path, path: Path) -> str:
    """Write a run's best checkpoint under the released names, as `write` does; return the line to print."""
    run = sources.reopen(workdir)
    config = run.config
    _check_inputs(config)
    state = checkpoints.restore_best(workdir, run.abstract_state())
    state_dict = torch_import.export({"params": state.params, "batch_stats": state.batch_stats}, config.method)
    torch_import.write(path, state_dict)
    return f"exported {workdir}, method {config.method}, {len(state_dict)} entries, to {path}"


def _check_inputs(config: ConfigDict) -> None:
    if config.model.modalities:
        raise UserError(
            f"config.model.modalities is {config.model.modalities!r}; the released models have EHR and X-ray only",
            field="config.model.modalities",
        )
    if config.data.images == records.ALL_IMAGES:
        what = "config.data.images is 'all'; the released models read the last X-ray of a stay"
        raise UserError(what, field="config.data.images", value=config.data.images)
    if config_lib.reads_features(config):
        what = "config.model.cxr_encoder is 'features'; the released models have a ResNet: use 'resnet34'"
        raise UserError(what, field="config.model.cxr_encoder", value="features", nearest="resnet34")


def _fill(model, method: str, state_dict: dict) -> tuple[dict, list[str]]:
    """Return (variables, names of the unused weights)."""
    if torch_import.is_backbone(state_dict):
        variables = torch_import.fill_backbone(model, state_dict)
        unused = [name for name in state_dict if name.startswith("fc.")]
    else:
        variables = torch_import.fill(model, method, state_dict)
        missing = getattr(model, "missing", "")
        unused = torch_import.unused(state_dict, method, model.resnet_stage_sizes, missing, model.cxr_kind)
    return variables, [name for name in unused if not name.endswith("num_batches_tracked")]  # counters, not weights


def _claim(workdir: Path, run, note: dict) -> None:
    workdir_lib.check_outside_sweeps(workdir)
    workdir_lib.check(workdir, run)
    with files.must_write(f"--workdir={workdir}"):
        if workdir.exists() and any(workdir.iterdir()):
            raise UserError(f"{workdir} is not empty: choose another --workdir", field="--workdir", path=workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / checkpoints.IMPORT_NOTE, files.sealed(note))
    workdir_lib.claim(workdir, run)


def _label_order(labels: list[str]) -> str:
    """Return a line on the outputs: a state dict has no names of labels, so their order cannot be checked."""
    order = labels[0] if len(labels) == 1 else f"{labels[0]!r} first, {labels[-1]!r} last"
    return f"note: its {len(labels)} outputs are taken in the order of the manifest's labels ({order}); check that"


def _by_module(names: list[str]) -> str:
    """Return the names of entries as text, grouped by module."""
    modules = {}
    for name in names:
        module, _, entry = name.rpartition(".")
        modules.setdefault(module or entry, []).append(entry)
    groups = [f"{module} ({', '.join(e)})" if e != [module] else module for module, e in modules.items()]
    return ", ".join(groups) or "nothing"


def _differences_from_released(config: ConfigDict, manifest: dict) -> list[str]:
    """Return a line on how the config's data differs from a released model's training data, which lowers its scores."""
    found = []
    if config.data.statistics == "train":
        found.append("series standardised with MIMIC-III's mean and deviation (here with the train split's)")
    if manifest["timestep_h"] != _RELEASED_TIMESTEP_H:
        found.append(f"time steps of {_RELEASED_TIMESTEP_H:g} h (here {manifest['timestep_h']:g} h)")
    if manifest["profile"] != "released":
        found.append(f"arrays of the 'released' profile (here {manifest['profile']})")
    return [f"note: a released model was trained on {'; '.join(found)}: see docs/weights.md"] if found else []


if __name__ == "__main__":
    command_line.DEFINE_config_file("config", "To import: the config of the run.")
    flags.DEFINE_string("checkpoint", None, "To import: a .pth.tar, .pth, .pt or .safetensors file.")
    flags.DEFINE_string("export", None, "To export: the .safetensors or .pth.tar file to write.")
    flags.DEFINE_string("workdir", None, "Folder of the run: new to import into, trained to export from.")
    flags.mark_flag_as_required("workdir")
    command_line.run(main)
