"""Open earlier runs from their workdirs: one to evaluate, or those that a new run starts from."""

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import schema
from medfuse_jax.data.modalities import loading
from medfuse_jax.models import registry
from medfuse_jax.run import Run, check_unseen, open_run
from medfuse_jax.runs import checkpoints, warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def reopen(workdir: Path, devices: list[jax.Device] | None = None, data_dir: str = "", cxr_features: str = "") -> Run:
    """Open the run in a workdir. Raise UserError if there is none, or if its data changed.

    devices: by default all of this process. data_dir, cxr_features: the new places of its shards and of its file of
    precomputed features, if moved; saved in the workdir's config.
    """
    workdir_lib.check_has_weights(workdir)
    if workdir_lib.is_sweep(workdir):
        raise UserError(f"{workdir} holds a sweep: give a trial, such as {workdir / 'trials' / '000'}", path=workdir)
    if sweeps := sorted(workdir.glob("seed*/sweep.json")):
        message = f"{workdir} holds sweeps over seeds and folds: give one of them, such as {sweeps[0].parent}"
        raise UserError(message, path=workdir)
    path = workdir / "config.json"
    config = config_lib.load(path)
    if data_dir:
        config.data.dir = data_dir
    elif not Path(config.data.dir).is_dir():
        how = f"python -m medfuse_jax.evaluate --workdir={workdir} --data_dir=NEW"
        message = f"the shards of {workdir}, {config.data.dir}, are gone: give their new folder once: {how}"
        raise UserError(message, field="--data_dir", path=config.data.dir)
    workdir_lib.check_reads_features(workdir, config, cxr_features)
    if cxr_features:
        config.data.cxr_features = cxr_features
    elif config_lib.reads_features(config) and not Path(file := config.data.cxr_features).is_file():
        how = f"python -m medfuse_jax.evaluate --workdir={workdir} --cxr_features=NEW"
        message = f"{file}, the X-ray features of {workdir}, does not exist; if it moved, pass its new path once: {how}"
        raise UserError(message, field="--cxr_features", path=file)
    for name in loading.listed(config.model.modalities):
        if name.endswith(".py"):
            files.say_code_of_another(Path(name), workdir)
    run = open_run(config, devices)
    workdir_lib.check_data(workdir, run)
    if data_dir or cxr_features:
        config_lib.save(config, path)
    return run


def find(run: Run, folder: Path) -> tuple[dict, dict]:
    """Return (given, stages), the runs that the run in workdir `folder` starts from, each {name: (workdir, run)}.

    given: the runs of config.init; stages: the runs to pre-train. Both are empty if the run resumes.
    Raises UserError if one does not match the run or has no weights, or if a frozen part has nothing to start from.
    """
    if checkpoints.any_saved(folder):
        return {}, {}
    given, stages = open_sources(run.config, folder, warm_start.staged(run.config), run.devices)
    for name, (source_folder, source) in (given | stages).items():
        check(run, name, source_folder, source)
    check_frozen(run, given | stages)
    for _, stage in stages.values():
        check_frozen(stage, ())
    return given, stages


def open_sources(config: ConfigDict, folder: Path, names: list[str], devices: list[jax.Device]) -> tuple[dict, dict]:
    """Open the runs of config.init and the stages `names` of config.pretrain; return them as `find` does."""
    paths = {name: Path(path) for name, path in config.init.items() if path}
    given = {name: (path, reopen(path, devices)) for name, path in paths.items()}
    for path in paths.values():
        checkpoints.reached(path)  # raises UserError if it holds no weights
    stages = {name: (folder / f"pretrain_{name}", open_run(config_lib.stage(config, name))) for name in names}
    return given, stages


def check_frozen(run: Run, source_names: Iterable[str]) -> None:
    """Raise UserError if a frozen part of the run would keep its random initial values.

    source_names: the parts with weights to start from: 'ehr', 'cxr' or 'model'.
    """
    model, names = run.options.model, set(source_names)
    for name in ("ehr", "cxr"):
        if name == "cxr" and model.cxr_kind == "features":
            continue
        if getattr(model, "frozen_encoders", False) and not {name, "model"} & names:
            raise UserError(
                f"the {name} encoder is frozen (method {run.config.method}) and nothing pre-trains it, so it "
                f"would stay random: give config.pretrain.{name} with config.encoders=pretrained, or "
                f"config.init.{name}",
                field=f"config.pretrain.{name}",
            )
    if model.frozen_stats and model.uses_cxr and not {"cxr", "model"} & names:
        raise UserError(
            f"config.model.batch_norm is 'frozen' ({run.config.name}) and nothing pre-trains the cxr encoder, so its "
            "statistics would stay 0 and 1: give config.pretrain.cxr with config.encoders=pretrained, or "
            "config.init.cxr",
            field="config.model.batch_norm",
        )


def check(run: Run, name: str, workdir: Path, source: Run) -> None:
    """Raise UserError if the run cannot start from encoder `name` ('ehr' or 'cxr') or the whole 'model' of `source`.

    Also raises it if the source was trained on patients of the run's validation or test split. workdir: the source's,
    which may not have been trained yet.
    """
    note = checkpoints.imported(workdir)
    method, source_method = run.config.method, source.config.method
    part = "model" if name == "model" else f"{name} encoder"
    what = f"the {part} of {workdir} (task {source.config.task}, method {source_method})"
    if name == "model" and _model(method) != _model(source_method):
        raise UserError(
            f"{what} cannot start the method {method}: for its encoders, use config.init.ehr and config.init.cxr",
            field="config.init.model",
        )
    for encoder in ("ehr", "cxr") if name == "model" else (name,):
        models = [side.options.model for side in (run, source)]
        kind, source_kind = (getattr(model, f"{encoder}_kind") for model in models)
        if kind != source_kind and all(getattr(model, f"uses_{encoder}") for model in models):
            field = f"config.model.{encoder}_encoder"
            raise _cannot_start(what, name, f"its {field} is {source_kind!r}, not {kind!r}", source_kind)
    params, source_params = (side.abstract_state().params for side in (run, source))
    for module in sorted(params.keys() | source_params.keys()) if name == "model" else [f"{name}_encoder"]:
        if note and module not in note["modules"]:
            raise _cannot_start(what, name, f"the imported {note['file']} held no {module}", module)
        for side, its_params in ((run, params), (source, source_params)):
            if module not in its_params:
                raise _cannot_start(what, name, f"the method {side.config.method} has no {module}", module)
        _check_module(what, name, module, params[module], source_params[module])
    if name == "model":
        _check_modalities(what, run, source)
    check_unseen(run, what, source.dataset.index["train"]["subject_id"][source.selects("train")])


def _model(method: str) -> tuple:
    row = registry.METHODS[method]
    return row.model, row.fields


def _cannot_start(what: str, name: str, why: str, value: object) -> UserError:
    return UserError(f"{what} cannot start this run: {why}", field=f"config.init.{name}", value=value)


def _check_module(what: str, name: str, module: str, params: dict, source_params: dict) -> None:
    shapes, source_shapes = (jax.tree.map(jnp.shape, side) for side in (params, source_params))
    if module.endswith("_encoder"):
        # daft3's ResNet lacks the last stage, so the source may have more stages than the run.
        stages, source_stages = ({block.partition("_")[0] for block in side} for side in (shapes, source_shapes))
        if missing := sorted(stages - source_stages):
            raise _cannot_start(what, name, f"its {module} has no {missing[0]}", missing[0])
        source_shapes = {block: s for block, s in source_shapes.items() if block.partition("_")[0] in stages}
    if shapes != source_shapes and module == "classifier":
        raise _cannot_start(what, name, "its labels differ; use config.init.ehr and config.init.cxr instead", module)
    if shapes != source_shapes:
        raise _cannot_start(what, name, f"its {module} does not have the sizes of config.model", module)


def _check_modalities(what: str, run: Run, source: Run) -> None:
    """Raise UserError if further modalities differ in order or values: a category must have the same slot in both."""
    names, source_names = ([m.name for m in getattr(r.options.model, "modalities", ())] for r in (run, source))
    if names != source_names:  # a token's weights depend on its position
        why = f"its modalities, in order, are {', '.join(source_names)}, not {', '.join(names)}"
        raise _cannot_start(what, "model", why, source_names)
    # Without race, which no model reads.
    trained = (r.dataset.index["train"].items() for r in (run, source))
    index, source_index = ({name: values for name, values in of if name != schema.RACE} for of in trained)
    for modality in getattr(run.options.model, "modalities", ()):
        if not np.array_equal(modality.table(index, index), modality.table(index, source_index), equal_nan=True):
            raise _cannot_start(what, "model", f"its modality {modality.name!r} has other values", modality.name)
