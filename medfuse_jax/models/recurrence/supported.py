"""Which LSTM kernel (config.recurrence) a set of devices runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax.config import ConfigDict
from medfuse_jax.models.recurrence.chunks import chunked_lstm
from medfuse_jax.runtime.errors import UserError

# Of the test of the Pallas kernel. The difference, relative to an array's largest element, is for bfloat16.
_TEST_ROWS, _TEST_STEPS, _TEST_INPUTS = 20, 7, 76
_MAX_DIFFERENCE = 0.05


def choose(config: ConfigDict, devices: list[jax.Device]) -> str:
    """Return the kernel that these devices run, one of `ehr_encoder.LSTM_KERNELS`.

    'auto' is 'pallas', one launch per layer and direction, where it is supported and passes a test on the device. A
    kernel that is not supported falls back to 'chunks'.
    """
    if config.model.ehr_encoder != "lstm":
        return "chunks"  # there is no LSTM to run
    kernel = "pallas" if config.recurrence == "auto" else config.recurrence
    if _why_unsupported(kernel, config, devices):
        return "chunks"
    is_here = devices[0] in jax.local_devices()  # not a device that a program is only compiled for
    if config.recurrence == "auto" and is_here and (problem := _problem_of_pallas(config.model.ehr_hidden)):
        print(f"config.recurrence='auto': the Pallas kernel {problem}; using 'chunks'", flush=True)
        return "chunks"
    return kernel


@functools.cache
def _problem_of_pallas(units: int, interpret: bool = False) -> str:
    """Return what is wrong with the Pallas kernel on this GPU, or ''.

    It is compared with the chunks on a small batch: which drivers and cards run it right cannot be known before.
    """
    rng = np.random.default_rng(0)
    shapes = ((_TEST_INPUTS, 4 * units), (units, 4 * units), (4 * units,), (_TEST_ROWS, _TEST_STEPS, _TEST_INPUTS))
    arrays = [jnp.asarray(rng.uniform(-1, 1, shape) / units**0.5, jnp.float32) for shape in shapes]
    length_B = jnp.asarray(rng.integers(0, _TEST_STEPS + 1, _TEST_ROWS))

    def gradients(kernel, **options):
        def loss(*arrays):
            hidden_BTD, last_BD = kernel(*arrays, length_B, jnp.dtype(jnp.bfloat16), **options)
            return jnp.sum(hidden_BTD**2) + jnp.sum(last_BD)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

    try:
        from medfuse_jax.models.recurrence.pallas import pallas_lstm  # its Triton backend is deprecated

        pairs = list(zip(gradients(pallas_lstm, interpret=interpret), gradients(chunked_lstm), strict=True))
    except Exception as error:  # from jax, Triton or the driver: whatever it is, the chunks run
        return f"does not run here ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    difference = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    return "" if difference <= _MAX_DIFFERENCE else f"differs from the chunks by {difference:.2g} here"


def why_unsupported(config: ConfigDict, devices: list[jax.Device]) -> str:
    """Return why the configured LSTM kernel cannot run on these devices, or ''. 'auto' always can."""
    is_any = config.recurrence == "auto" or config.model.ehr_encoder != "lstm"
    return "" if is_any else _why_unsupported(config.recurrence, config, devices)


def _why_unsupported(kernel: str, config: ConfigDict, devices: list[jax.Device]) -> str:
    device, units = devices[0], config.model.ehr_hidden
    if kernel == "chunks":
        return ""
    if device.platform != "gpu":
        return "needs a GPU"
    most_units = max_units(device.compute_capability)
    if most_units == 0:
        return f"needs a GPU of compute capability 8.0 or higher, not {device.compute_capability}"
    if kernel == "pallas" and units > most_units:
        return (
            f"runs at most {most_units} units at compute capability {device.compute_capability}, and "
            f"config.model.ehr_hidden is {units}"
        )
    return ""


def max_units(compute_capability: str) -> int:
    """Return the width of the widest layer whose tiles `pallas` fits in a block's shared memory; 0 if unsupported.

    With Triton 3.9, 256 units take at most 82,944 bytes and 512 units 164,864. NVIDIA's tables allow a block 101,376
    bytes at compute capability 8.6, 8.9 and 12; 166,912 at 8.0 and 8.7; and 232,448 at 9 and 10.
    """
    try:
        version = float(compute_capability)
    except ValueError:  # not an NVIDIA GPU
        return 0
    if version < 8:  # no bfloat16
        return 0
    return 512 if version in (8.0, 8.7) or 9 <= version < 12 else 256


def check(config: ConfigDict, devices: list[jax.Device]) -> None:
    """Raise UserError if a GPU cannot run the configured kernel; on other devices training falls back to 'chunks'."""
    reason = why_unsupported(config, devices)
    if reason and devices[0].platform == "gpu":
        kernel = config.recurrence
        raise UserError(
            f"config.recurrence={kernel!r} {reason}; use config.recurrence=chunks",
            field="config.recurrence",
            value=kernel,
            nearest="chunks",
        )
