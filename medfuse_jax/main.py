"""Train, evaluate and report one run: `python -m medfuse_jax.main --config=configs/pheno.py`.

Intentionally kept short: `train`, `evaluate` and `report` meet only in the workdir.
"""

import functools
import hashlib
import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.runtime import command_line


def main(argv: list[str]) -> None:
    # Import late, here and below, so that a wrong flag is refused before jax starts.
    from medfuse_jax.runtime import compilation, hosts

    given = flags.FLAGS
    config_lib.validate(given.config)
    compilation.configure()
    hosts.start_training(given.coordinator, given.num_processes, given.process, given.distributed)
    hosts.run(functools.partial(run_all, given.config, given.workdir))


def run_all(config: ConfigDict, given_folder: str | None) -> None:
    """Train, evaluate and report the run of a config. given_folder: its workdir; by default one per config."""
    from medfuse_jax import evaluate, train
    from medfuse_jax import run as run_lib
    from medfuse_jax.data import synthetic
    from medfuse_jax.report import pages
    from medfuse_jax.runs import preflight, sources, workdir
    from medfuse_jax.runtime import hosts

    hosts.check_same("configs", json.dumps(config_lib.flat(config), sort_keys=True))
    if hosts.is_first():
        synthetic.set_data_dir(config)
    hosts.wait("the cohort is built")
    synthetic.set_data_dir(config)  # the others find it
    folder = Path(given_folder or _default_workdir(config))
    workdir.check_outside_sweeps(folder)

    run = run_lib.open_run(config)
    hosts.check_same("data", run.dataset.digest)
    workdir.check(folder, run)
    given, stages = sources.find(run, folder)
    preflight.check(run, stages)

    with workdir.locked(folder):
        workdir.claim(folder, run)
        train.pretrain(stages)
        for stage_folder, staged in stages.values():
            if staged.dataset.usable("test").any():
                evaluate.evaluate(stage_folder)
            else:
                print(f"{stage_folder} is not evaluated: {staged.config.task} has no test record that it can score")
        train.train(run, folder, given | stages)
        evaluate.evaluate(folder)
    if hosts.is_first():
        print(pages.write([folder], folder / "report"))


def _default_workdir(config: ConfigDict) -> str:
    """Return one folder per config, so that rerunning the command resumes it, also after a field was added."""
    default = config_lib.flat(config_lib.default())
    fields = {name: value for name, value in config_lib.flat(config).items() if not config_lib.is_execution_only(name)}
    content = json.dumps({name: v for name, v in fields.items() if v != default.get(name)}, sort_keys=True)
    return f"runs/{config.name}_{hashlib.sha256(content.encode()).hexdigest()[:8]}"


if __name__ == "__main__":
    command_line.DEFINE_config_file("config", "A config file, such as configs/pheno.py.")
    flags.DEFINE_string("workdir", None, "Folder for the run; default: one below runs/ per config.")
    flags.mark_flag_as_required("config")
    command_line.define_process_flags()
    __doc__ += f"\n\nFields of a config (docs/config.md):\n{config_lib.describe()}"
    command_line.run(main, resumes=True)
