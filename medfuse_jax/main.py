"""Trains, evaluates and reports one experiment: `python -m medfuse_jax.main --config=configs/pheno.py`.

Intentionally kept short: the stages are `train`, `evaluate` and `report`, which meet in the workdir.
"""

import hashlib
import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from medfuse_jax import config as config_lib
from medfuse_jax import errors
from medfuse_jax.errors import UserError


def main(argv: list[str]) -> None:
    from medfuse_jax import evaluate, experiment, train  # late: a wrong flag is refused before jax starts
    from medfuse_jax.report import page

    config = flags.FLAGS.config
    config_lib.validate(config)
    experiment.use_compilation_cache()
    if not config.data.dir:
        config.data.dir = str(_synthetic_shards(config.data, experiment.cache_dir()))
    stages = {name: config_lib.stage(config, name) for name in config.pretrain}
    for staged in (*stages.values(), config):
        experiment.open_experiment(staged)  # what is missing is said now, not after hours of pre-training
    workdir = Path(flags.FLAGS.workdir or _default_workdir(config))
    _claim(workdir, config)

    encoder_dirs = {name: Path(path) for name, path in config.init.items() if path}
    for name, staged in stages.items():
        encoder_dirs[name] = workdir / f"pretrain_{name}"
        _claim(encoder_dirs[name], staged)
        train.train(staged, encoder_dirs[name])
        evaluate.evaluate(encoder_dirs[name])
    train.train(config, workdir, encoder_dirs)
    evaluate.evaluate(workdir)
    print(page.write(workdir, workdir / "report"))


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the workdir this config's, or refuses one that is another's."""
    path = workdir / "config.json"
    if path.exists():
        if difference := config_lib.difference(config_lib.load(path), config):
            raise UserError(f"{workdir} holds another run ({difference}): choose another --workdir")
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        config_lib.save(config, path)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error.strerror})") from None


def _default_workdir(config: ConfigDict) -> str:
    """One folder a config, so that the same command goes on where it was and another does not mix with it."""
    content = json.dumps(config.copy_and_resolve_references().to_dict(), sort_keys=True)
    return f"runs/{config.name}_{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _synthetic_shards(options: ConfigDict, cache_dir: Path) -> Path:
    """The shards of a synthetic cohort, built on first use."""
    from data_prep import build, synthetic  # the one place where medfuse_jax calls data_prep

    stays, film_fraction = options.synthetic_stays, options.synthetic_film_fraction
    root = cache_dir / f"synthetic_{stays}_{film_fraction:g}"
    print(f"no --config.data.dir given: using a synthetic cohort of {stays} stays, kept in {root}", flush=True)
    raw, shards = root / "raw", root / "shards"
    if not (root / "complete").exists():
        synthetic.write(raw, num_stays=stays, seed=0, film_fraction=film_fraction)
        build.build(mimic_iv=raw / "mimic-iv", mimic_cxr=raw / "mimic-cxr", out=shards)
        (root / "complete").touch()
    return shards


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "An experiment, such as configs/pheno.py.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder for the run; by default one under runs/, named by its config.")
    flags.mark_flag_as_required("config")
    errors.run(main)
