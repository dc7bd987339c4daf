"""What all trials of a sweep share."""

import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.runs import warm_start
from medfuse_jax.sweep import caching
from medfuse_jax.sweep import leases as leases_lib
from medfuse_jax.sweep.trial import Trial

_WITHIN_A_GROUP = ("learning_rate", "model.dropout", "seed")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The parts of a sweep that all trials share.

    config: as given. encoders: name -> (workdir, run), all encoders that a trial may start from. leases: those of this
    process; None if it has the sweep to itself. lanes: None to measure them. pruning: one of `pruning.RULES`. divides:
    whether a trial may use several devices. features: those of frozen encoders, by `caching.features_key`.
    """

    config: ConfigDict
    workdir: Path
    encoders: dict
    leases: leases_lib.Leases | None = None
    lanes: int | None = None
    pruning: str = "none"
    divides: bool = False
    features: dict = dataclasses.field(default_factory=dict)

    def config_of(self, trial: Trial) -> ConfigDict:
        """Return the trial's config, with which `medfuse_jax.main` gives the same results.

        It has no pre-training: the sweep has done it already, and the trial starts from the shared encoders.
        """
        config = trial.config(self.config)
        for name in ("dir", "cxr_features"):
            config.data[name] = config.data[name] and str(Path(config.data[name]).absolute())
        for name in warm_start.staged(config):
            config.init[name] = str(self.encoders[name][0].absolute())
        config.pretrain = ConfigDict()
        if caching.can_cache(config, self.encoders_of(config)):
            config.update_from_flattened_dict(caching.NO_AUGMENTATION)
        return config

    def encoders_of(self, config: ConfigDict) -> dict:
        """Return the encoders that a trial with this config (from `config_of`) starts from."""
        return {name: self.encoders[name] for name, path in config.init.items() if path}

    def group_key(self, trial: Trial) -> str:
        """Return the key of the trial's group, which stays the same if shards, features or the sweep are moved."""
        fields = config_lib.flat(self.config_of(trial))
        names = {str(folder.absolute()): folder.name for folder, _ in self.encoders.values()}
        fields |= {k: names.get(v, v) for k, v in fields.items() if k.startswith("init.")}
        may_move = {*config_lib.MOVABLE} - trial.values.keys()  # a search may compare files of features
        ignored = {*_WITHIN_A_GROUP, *may_move}
        return json.dumps({k: v for k, v in fields.items() if k not in ignored}, sort_keys=True)

    def holds(self, trial: Trial) -> bool:
        """Return whether the trial is still this process's to train."""
        return self.leases is None or self.leases.holds(trial.lease)
