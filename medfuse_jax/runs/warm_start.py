"""Which encoders a config pre-trains, and how a run takes its first weights from other runs."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints


def staged(config: ConfigDict) -> list[str]:
    """The encoders to pre-train: those of the method that config.init does not give."""
    given = {name for name, path in config.init.items() if path}
    method = registry.METHODS[config.method].model_class
    has = {"ehr": method.uses_ehr, "cxr": method.uses_cxr}
    return [name for name in config_lib.stages(config) if has[name] and not given & {name, "model"}]


def begin(state, sources: dict[str, tuple[Path, Any]]):
    """Returns the TrainState with the weights of the sources, by name 'model', 'ehr', 'cxr' -> (workdir, run).

    The sources must have passed `sources.check`.
    """
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
