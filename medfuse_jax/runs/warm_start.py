"""Which encoders a config pre-trains, and how a run takes its initial weights from other runs."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints


def staged(config: ConfigDict) -> list[str]:
    """Return the encoders to pre-train: those that the method has and config.init does not give."""
    given = {name for name, path in config.init.items() if path}
    encoders = registry.METHODS[config.method].encoders
    return [name for name in config_lib.stages(config) if name in encoders and not given & {name, "model"}]


def begin(state, sources: dict[str, tuple[Path, Any]]):
    """Return the TrainState with the weights of the sources, {'model', 'ehr' or 'cxr': (workdir, run)}.

    The sources must have passed `sources.check`.
    """
    return fill(state, restore(sources))


def restore(sources: dict[str, tuple[Path, Any]]) -> dict[str, Any]:
    """Return the best state of each source, by name."""
    return {name: checkpoints.restore_best(path, source.abstract_state()) for name, (path, source) in sources.items()}


def fill(state, trained: dict[str, Any]):
    """Return the TrainState with the weights of the states from `restore`."""
    params, batch_stats = dict(state.params), dict(state.batch_stats)
    for name, source in trained.items():
        if name == "model":
            params, batch_stats = dict(source.params), dict(source.batch_stats)
            continue
        module = f"{name}_encoder"
        params[module] = {part: source.params[module][part] for part in params[module]}
        if module in batch_stats:
            batch_stats[module] = {part: source.batch_stats[module][part] for part in batch_stats[module]}
    return state.replace(params=params, batch_stats=batch_stats)
