"""The synthetic cohort that a run without data uses: the one place where medfuse_jax calls data_prep."""

from pathlib import Path

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError


def set_data_dir(config: ConfigDict) -> None:
    """Set config.data.dir, if it is not given, to a synthetic cohort, which is built on first use."""
    if not config.data.dir:
        stages = config_lib.stages(config).values()
        tasks = dict.fromkeys([config.task, *(stage.task for stage in stages), config.data.cxr_task])
        cohort = config.data.synthetic_stays, config.data.synthetic_cxr_fraction
        config.data.dir = str(build(*cohort, list(tasks), config.data.images))


def build(num_stays: int, cxr_fraction: float, tasks: list[str], images: str = "last") -> Path:
    """Build a synthetic cohort in the cache, unless it is there; return the folder of its shards.

    images: config.data.images.
    """
    from data_prep import build
    from data_prep.synthetic import tree

    root = files.cache_dir() / f"synthetic_{tree.VERSION}_{num_stays}_{cxr_fraction:g}"
    print(f"no --config.data.dir given: using a synthetic cohort of {num_stays} stays in {root}", flush=True)
    raw, shards = root / "raw", root / ("shards" if images == "last" else f"shards_{images}")
    try:
        # Both skip what is there already; the build replaces what an older version left. One X-ray per stay is enough.
        tree.write(raw, num_stays=num_stays, seed=0, cxr_fraction=cxr_fraction, images_per_stay=1.0)
        build.build(mimic_iv=raw / "mimic-iv", mimic_cxr=raw / "mimic-cxr", out=shards, tasks=tasks, images=images)
    except UserError as error:
        if "--out" not in str(error):
            raise
        # The command that trains has no such flag.
        message = f"{error} (--out: of the synthetic cohort, in the cache folder that XDG_CACHE_HOME sets)"
        raise type(error)(message, path=error.path) from None
    return shards
