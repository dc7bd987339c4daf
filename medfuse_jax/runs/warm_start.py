"""Where a run's first weights come from: finished or imported runs, for an encoder each or the whole model."""

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import step as step_lib
from medfuse_jax.experiment import Experiment, check_unseen, open_experiment
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runtime.errors import UserError


def find(run: Experiment, folder: Path) -> tuple[dict, dict]:
    """What the run of workdir `folder` starts from, by name -> (workdir, run): what is given, and what to pre-train.

    Nothing where the run has begun: it goes on from a checkpoint of its own. UserError where one does not fit the
    run or holds no weights, or what is frozen has nothing to start from.
    """
    if checkpoints.any_saved(folder):
        return {}, {}
    given, stages = open_sources(run.config, folder, staged(run.config), run.devices)
    for name, (source_folder, source) in (given | stages).items():
        check(run, name, source_folder, source)
    check_frozen(run, given | stages)
    for _, stage in stages.values():
        check_frozen(stage, ())
    return given, stages


def staged(config: ConfigDict) -> list[str]:
    """The encoders that a config has pre-trained: those of its method that config.init does not give."""
    given = {name for name, path in config.init.items() if path}
    method, _ = registry.METHODS[config.method]
    has = {"ehr": method.uses_ehr, "cxr": method.uses_cxr}
    return [name for name in config_lib.stages(config) if has[name] and not given & {name, "model"}]


def open_sources(config: ConfigDict, folder: Path, names: list[str], on: list[jax.Device]) -> tuple[dict, dict]:
    """What config.init gives, opened on the devices `on`, and the stages `names` of config.pretrain, as in `find`."""
    paths = {name: Path(path) for name, path in config.init.items() if path}
    given = {name: (path, workdir_lib.open_run(path, on)) for name, path in paths.items()}
    for path in paths.values():
        checkpoints.reached(path)  # UserError where it holds no weights
    stages = {name: (folder / f"pretrain_{name}", open_experiment(config_lib.stage(config, name))) for name in names}
    return given, stages


def check_frozen(run: Experiment, starts_from: Iterable[str]) -> None:
    """Raises UserError where the run trains nothing of a part that would stay as it was initialised.

    starts_from: what has weights to start from, 'ehr', 'cxr' or 'model'.
    """
    model, names = run.options.model, set(starts_from)
    for name in ("ehr", "cxr"):
        if getattr(model, "frozen_encoders", False) and not {name, "model"} & names:
            raise UserError(
                f"the {name} encoder is frozen (method {run.config.method}), and nothing trains it before, so it would "
                f"stay random: give config.pretrain.{name} with config.encoders=pretrained, or config.init.{name}"
            )
    if model.frozen_stats and model.uses_cxr and not {"cxr", "model"} & names:
        raise UserError(
            f"config.model.batch_norm is 'frozen' ({run.config.name}), and nothing trains the cxr encoder before, so "
            "its statistics would stay 0 and 1: give config.pretrain.cxr with config.encoders=pretrained, or "
            "config.init.cxr"
        )


def check(run: Experiment, name: str, workdir: Path, source: Experiment) -> None:
    """Raises UserError where an encoder of `source` ('ehr' or 'cxr'), or its whole 'model', cannot start the run.

    Nor must it where it was trained on patients whom the run is validated or tested on.
    workdir: the source's, trained or not yet.
    """
    imported = checkpoints.imported(workdir)
    here, there = run.config.method, source.config.method
    part = "model" if name == "model" else f"{name} encoder"
    what = f"the {part} of {workdir} (task {source.config.task}, method {there})"
    if name == "model" and registry.METHODS[here] != registry.METHODS[there]:
        raise UserError(
            f"{what} cannot start the method {here}: for its encoders use config.init.ehr and config.init.cxr"
        )
    ours, theirs = (side.abstract_state().params for side in (run, source))
    for module in sorted(ours.keys() | theirs.keys()) if name == "model" else [f"{name}_encoder"]:
        if imported and module not in imported["modules"]:
            raise UserError(f"{what} cannot be a start: the imported {imported['file']} held no {module}")
        for side, params in ((run, ours), (source, theirs)):
            if module not in params:
                method = side.config.method
                raise UserError(f"{what} cannot start {here}: the method {method} has no {module}")
        _check_module(what, run, module, ours[module], theirs[module])
    if name == "model":
        _check_values(what, run, source)
    check_unseen(run, what, source.dataset.index["train"]["subject_id"][source.selects("train")])


def _check_values(what: str, run: Experiment, source: Experiment) -> None:
    """A further modality's values must mean here what they meant to the source: the same slots for categories."""
    here, there = run.dataset.index["train"], source.dataset.index["train"]
    ours, theirs = ([m.name for m in getattr(of.options.model, "modalities", ())] for of in (run, source))
    if ours != theirs:  # the place of a token decides its weights
        raise UserError(f"{what} has the modalities {', '.join(theirs)}, in this order; here: {', '.join(ours)}")
    for modality in getattr(run.options.model, "modalities", ()):
        if not np.array_equal(modality.table(here, here), modality.table(here, there), equal_nan=True):
            raise UserError(f"{what} has other values of the modality {modality.name!r}, such as other categories")


def _check_module(what: str, run: Experiment, module: str, ours: dict, theirs: dict) -> None:
    ours, theirs = (jax.tree.map(jnp.shape, params) for params in (ours, theirs))
    if module.endswith("_encoder"):
        # daft3's X-ray encoder is a whole one's but for the last stage; stages themselves are taken whole.
        our_stages, their_stages = ({part.partition("_")[0] for part in parts} for parts in (ours, theirs))
        if lacking := sorted(our_stages - their_stages):
            raise UserError(f"{what} cannot start {run.config.method}: its {module} has no {lacking[0]}")
        theirs = {part: shapes for part, shapes in theirs.items() if part.partition("_")[0] in our_stages}
    if ours != theirs and module == "classifier":
        raise UserError(f"{what} has other labels: for its encoders alone use config.init.ehr and config.init.cxr")
    if ours != theirs:
        raise UserError(f"{what} has other sizes than config.model here")


def begin(state: step_lib.TrainState, sources: dict[str, tuple[Path, Experiment]]) -> step_lib.TrainState:
    """The state with weights of finished runs that passed `check`: 'model', 'ehr', 'cxr' -> (workdir, run)."""
    params, batch_stats = dict(state.params), dict(state.batch_stats)
    for name, (workdir, source) in sources.items():
        trained = checkpoints.restore_best(workdir, source.abstract_state())
        if name == "model":
            params, batch_stats = dict(trained.params), dict(trained.batch_stats)
            continue
        module = f"{name}_encoder"
        params[module] = {part: trained.params[module][part] for part in params[module]}
        if module in batch_stats:
            batch_stats[module] = {part: trained.batch_stats[module][part] for part in batch_stats[module]}
    return state.replace(params=params, batch_stats=batch_stats)
