"""Shared fixtures. Two CPU devices are simulated, so that every step is tested on more than one."""

import gc
import os

import xla_flags

# Before jax starts. NPROC: several CPU devices on two cores can otherwise abort at an all-reduce.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=2 {xla_flags.QUICK}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # 1 s else, which is the whole of a program
if "MEDFUSE_TEST_CACHE" not in os.environ:  # else a worker of pytest-xdist: it shares the one of its parent
    import atexit
    import shutil
    import tempfile

    os.environ["MEDFUSE_TEST_CACHE"] = tempfile.mkdtemp(prefix="medfuse_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["MEDFUSE_TEST_CACHE"], ignore_errors=True)
# Commands keep compiled programs in the user's cache folder: in tests that is this one, and no user's is read.
os.environ["XDG_CACHE_HOME"] = os.environ["MEDFUSE_TEST_CACHE"]
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["MEDFUSE_TEST_CACHE"], "medfuse_jax", "xla")

from pathlib import Path

import pytest
from absl import flags


def pytest_collection_finish():
    """Save a tenth of the time of tracing, in which Python's garbage collector would walk through all modules."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    from medfuse_jax.runtime import compilation

    compilation.RUN_ONCE = {"xla_backend_optimization_level": 0}  # draws the weights of tiny models, which is quick


@pytest.fixture(scope="session", autouse=True)
def parsed_flags():
    """Parse absl flags, which grain reads: outside a command nobody else does."""
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real input that MEDFUSE_TEST_DATA names (MIMIC-IV demo, X-rays, parity values)."""
    folder = os.environ.get("MEDFUSE_TEST_DATA", "")
    if not folder:
        pytest.skip("MEDFUSE_TEST_DATA is not set: no real data to test on")
    return Path(folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """The shards of a small synthetic cohort, built once a test process."""
    from data_prep import build
    from data_prep.synthetic import tree

    root = tmp_path_factory.mktemp("cohort")
    tree.write(root / "raw", num_stays=150, seed=1)
    build.build(root / "raw" / "mimic-iv", root / "raw" / "mimic-cxr", root / "shards")
    return root / "shards"


@pytest.fixture(scope="session")
def hourly_shards(shards) -> Path:
    """The hourly tasks of the same cohort, and phenotyping and mortality with all X-rays of each stay."""
    from data_prep import build

    raw, out = shards.parent / "raw", shards.parent / "hourly"
    tasks = ["decompensation", "length_of_stay", "pheno", "mortality"]
    build.build(raw / "mimic-iv", raw / "mimic-cxr", out, tasks=tasks, images="all")
    return out


@pytest.fixture
def hourly_config(tiny_config, hourly_shards):
    """The tiny config on decompensation."""
    tiny_config.task, tiny_config.data.dir = "decompensation", str(hourly_shards)
    return tiny_config


@pytest.fixture
def images_config(tiny_config, hourly_shards):
    """The tiny config on all X-rays of each stay."""
    tiny_config.data.images, tiny_config.data.dir = "all", str(hourly_shards)
    return tiny_config


@pytest.fixture(scope="session")
def raw_tree(tmp_path_factory) -> tuple[Path, Path]:
    """The small tree of build_cases: (MIMIC-IV, MIMIC-CXR)."""
    import build_cases

    return build_cases.write_tree(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def id_lists(tmp_path_factory) -> dict[str, Path]:
    """Lists of the small tree's validation and test patients."""
    folder = tmp_path_factory.mktemp("lists")
    (folder / "val.csv").write_text("10000003\n10000005\n")
    (folder / "test.csv").write_text("10000006,1\n10000008,1\n10000001,0\n")
    return {"val_ids": folder / "val.csv", "test_ids": folder / "test.csv"}


@pytest.fixture(scope="session")
def built(raw_tree, id_lists, tmp_path_factory) -> Path:
    """The build of the small tree with these lists."""
    from data_prep import build

    out = tmp_path_factory.mktemp("built") / "out"
    build.build(*raw_tree, out, timestep_h=1, **id_lists)
    return out


@pytest.fixture
def tiny_config(shared_tiny_config):
    """A config whose model trains in seconds on the small cohort."""
    return shared_tiny_config.copy_and_resolve_references()


@pytest.fixture
def ehr_config(tiny_config):
    """A config without X-rays, which compiles in a second."""
    tiny_config.method = "uni_ehr"
    return tiny_config


@pytest.fixture
def fusion_config(tiny_config):
    """A config of MedFuse with both pre-training stages, of one epoch each."""
    from ml_collections import ConfigDict

    tiny_config.num_epochs = 1
    tiny_config.pretrain.ehr = ConfigDict({"method": "uni_ehr"})
    tiny_config.pretrain.cxr = ConfigDict({"method": "uni_cxr", "task": "radiology"})
    return tiny_config


@pytest.fixture(scope="session")
def shared_tiny_config(shards):
    """The tiny config for fixtures that outlive a test: copy it, never change it."""
    from medfuse_jax import config as config_lib

    config = config_lib.default()
    config.data.dir = str(shards)
    config.data.max_buckets = 1
    config.image.resize_px, config.image.crop_px = 32, 32
    config.model.ehr_hidden, config.model.fusion_hidden = 8, 8
    config.model.resnet_stage_sizes, config.model.resnet_width = (1, 1, 1, 1), 4
    config.num_epochs = 2
    config.batch_size = 32
    config.eval.num_bootstrap = 20
    return config
