"""Trains, evaluates and reports one experiment: `python -m medfuse_jax.main --config=configs/pheno.py`.

Intentionally kept short: the stages are `train`, `evaluate` and `report`, which meet in the workdir.
"""

import hashlib
import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from medfuse_jax import config as config_lib
from medfuse_jax.runtime import command_line, files


def main(argv: list[str]) -> None:
    # late: a wrong flag is refused before jax starts
    from medfuse_jax import evaluate, experiment, feed, train
    from medfuse_jax.report import pages
    from medfuse_jax.runs import sources, workdir
    from medfuse_jax.runtime import compilation

    config = flags.FLAGS.config
    config_lib.validate(config)
    compilation.keep()
    name_data(config)
    folder = Path(flags.FLAGS.workdir or _default_workdir(config))
    workdir.check_outside_sweeps(folder)

    # What is missing is said now, not after hours of pre-training.
    run = experiment.open_experiment(config)
    run.check_any("test", run.dataset.usable("test"))
    train.profiled_steps(run)
    experiment.check_recurrence(run)
    given, stages = sources.find(run, folder)
    for trained in (run, *(staged for _, staged in stages.values())):
        feed.check_placement(trained.dataset, trained.selects("train"), trained.devices, trained.config.placement)

    with workdir.locked(folder):
        workdir.claim(folder, run)
        train.pretrain(stages)
        for stage_folder, staged in stages.values():
            if staged.dataset.usable("test").any():
                evaluate.evaluate(stage_folder)
            else:
                print(f"{stage_folder} is not scored: the test split of {staged.config.task} has no record for it")
        train.train(run, folder, given | stages)
        evaluate.evaluate(folder)
    print(pages.write([folder], folder / "report"))


def name_data(config: ConfigDict) -> None:
    """Sets config.data.dir where it is not given: to a synthetic cohort, built on first use."""
    if not config.data.dir:
        config.data.dir = str(_synthetic_shards(config.data, files.cache_dir()))


def _default_workdir(config: ConfigDict) -> str:
    """One folder a config, so that the same command goes on where it was and another does not mix with it."""
    execution_only = config_lib.names(execution_only=True)
    fields = {name: value for name, value in config_lib.flat(config).items() if name not in execution_only}
    content = json.dumps(fields, sort_keys=True)
    return f"runs/{config.name}_{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _synthetic_shards(options: ConfigDict, cache_dir: Path) -> Path:
    """The shards of a synthetic cohort, built on first use."""
    from data_prep import build  # the one place where medfuse_jax calls data_prep
    from data_prep.synthetic import tree

    stays, cxr_fraction = options.synthetic_stays, options.synthetic_cxr_fraction
    root = cache_dir / f"synthetic_{tree.VERSION}_{stays}_{cxr_fraction:g}"
    print(f"no --config.data.dir given: using a synthetic cohort of {stays} stays, kept in {root}", flush=True)
    raw, shards = root / "raw", root / "shards"
    # Both leave alone what is there already; the build makes anew what an older version of this package left.
    tree.write(raw, num_stays=stays, seed=0, cxr_fraction=cxr_fraction)
    build.build(mimic_iv=raw / "mimic-iv", mimic_cxr=raw / "mimic-cxr", out=shards)
    return shards


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "An experiment, such as configs/pheno.py.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder for the run; by default one under runs/, named by its config.")
    flags.mark_flag_as_required("config")
    command_line.run(main, resumes=True)
