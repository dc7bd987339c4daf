"""The compilers of GPUs and TPUs, used on a machine that has neither.

They come with jax's plug-ins: `jax-cuda12-plugin` and `jax-cuda12-pjrt` (without CUDA's own libraries), and `libtpu`.
They are installed into a folder of their own, because jax would look for a GPU or TPU at each start if it found them in
its environment. `how_to_install()` gives the command.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

import jax
from jax.experimental import topologies

from medfuse_jax.runtime import compilation, files, hosts
from medfuse_jax.runtime.errors import UserError

VARIABLE = "MEDFUSE_COMPILERS"  # the folder, if it is not the default one
EXAMPLES = ("h200", "v5e:2x2x1", "v5e:16x16")
_LIBTPU = "libtpu/libtpu.so"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts of one device: memory, its bandwidth, the clock behind XLA's estimated cycles (0: not known)."""

    memory_bytes: float
    bytes_per_s: float
    clock_hz: float = 0.0


# H200: NVIDIA's data sheet. TPUs: cloud.google.com/tpu/docs, a page per version; v5e's clock: 197 TFLOP/s over 4 matrix
# units of 128 x 128 multiply-adds.
CHIPS = {
    "h200": Chip(151_397_597_184, 4800e9),
    "v5e": Chip(16 * 2**30, 819e9, 1.5e9),
    "v5p": Chip(95 * 2**30, 2765e9),
    "v6e": Chip(32 * 2**30, 1640e9),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for: its devices, which can compile but not compute, and the facts of one of them."""

    name: str
    devices: list
    chip: Chip

    @property
    def platform(self) -> str:
        return self.devices[0].platform

    @property
    def num_hosts(self) -> int:
        return len({device.process_index for device in self.devices})


def open_target(name: str) -> Target:
    """Return the target 'h200', 'h200:2' (GPUs of one host), 'v5e:2x2x1' (a slice of TPUs) or 'cpu', this machine.

    Raise UserError if there is no such target, or if its compiler is not installed.
    """
    if name == "cpu":
        return Target(name, jax.local_devices(backend="cpu"), Chip(hosts.memory_bytes(), 0.0))
    generation, _, shape = name.partition(":")
    shapes = r"([1-8])?" if generation == "h200" else r"[1-9]\d*(x[1-9]\d*){1,2}"
    if generation not in CHIPS or not re.fullmatch(shapes, shape) or name.endswith(":"):
        raise _no_such_target(name, f"there are {', '.join(EXAMPLES)} and other slices of {', '.join(list(CHIPS)[1:])}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when the plug-in is loaded
    make = _h200_devices if generation == "h200" else _tpu_devices
    return Target(name, make(name), CHIPS[generation])


def folder() -> Path:
    """Return the folder of the compilers."""
    return Path(os.environ.get(VARIABLE) or files.cache_dir() / "compilers").absolute()


def how_to_install() -> str:
    """Return the command that installs the compilers which fit the installed jax."""
    version = importlib.metadata.version("jaxlib")
    libtpu = [r.partition(";")[0].strip() for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
    packages = (f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}", *(f"'{r}'" for r in libtpu[:1]))
    return f"pip install --no-deps --target={folder()} {' '.join(packages)}"


def _h200_devices(name: str) -> list:
    # Autotuning would time kernels on a device. Added before the plug-in is loaded.
    compilation.add_xla_flag("--xla_gpu_autotune_level=0")
    if not compilation.has_cuda_plugin():
        sys.path.insert(0, str(folder()))
        if not compilation.has_cuda_plugin():
            sys.path.remove(str(folder()))
            raise _missing("CUDA's", name)
    compilation.use_cuda_graphs()
    description = Path(__file__).with_name("h200.txtpb").read_text(encoding="utf-8")
    try:
        return _devices("cuda", name, topology=f"1x1x{name.partition(':')[2] or 1}", target_config=description)
    except NotImplementedError:
        # jax looked for plug-ins before the folder was known.
        raise UserError(
            f"jax was in use before it could find the compiler for {name}: call this first, or set "
            f"PYTHONPATH={folder()}",
            field="--target",
            value=name,
        ) from None


def _tpu_devices(name: str) -> list:
    # Without these libtpu asks Google Cloud which machine it is on, and lets only one process load it.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
    alone |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for variable, value in alone.items():
        os.environ.setdefault(variable, value)
    if "TPU_LIBRARY_PATH" not in os.environ and (folder() / _LIBTPU).exists():
        os.environ["TPU_LIBRARY_PATH"] = str(folder() / _LIBTPU)
    if not Path(os.environ.get("TPU_LIBRARY_PATH", "")).is_file() and importlib.util.find_spec("libtpu") is None:
        raise _missing("TPU's", name)
    return _devices("tpu", name)


def _devices(platform: str, name: str, **options) -> list:
    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = f"the compiler says: {' '.join(str(error).split())[:200]}"
        if str(error).startswith("INVALID_ARGUMENT"):
            raise _no_such_target(name, reason) from None
        message = f"--target={name} cannot be compiled for here; {reason}"
        raise UserError(message, field="--target", value=name) from None


def _no_such_target(name: str, why: str) -> UserError:
    return UserError(f"--target={name} does not exist; {why}", field="--target", value=name)


def _missing(whose: str, name: str) -> UserError:
    message = f"--target={name} needs {whose} compiler, which is not in {folder()} ({VARIABLE} sets another folder)"
    return UserError(f"{message}; install it: {how_to_install()}", field="--target", path=folder(), value=name)
