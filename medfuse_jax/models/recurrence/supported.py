"""Which LSTM kernel (config.recurrence) a set of devices can run."""

import jax
from ml_collections import ConfigDict

from medfuse_jax.models.recurrence import pallas
from medfuse_jax.runtime.errors import UserError


def why_unsupported(config: ConfigDict, devices: list[jax.Device]) -> str:
    """Return why the configured LSTM kernel cannot run on these devices, or ''."""
    kernel, device, units = config.recurrence, devices[0], config.model.ehr_hidden
    if kernel == "chunks":
        return ""
    if device.platform != "gpu":
        return "needs a GPU"
    max_units = pallas.max_units(device.compute_capability)
    if max_units == 0:
        return f"needs a GPU of compute capability 8.0 or higher, not {device.compute_capability}"
    if kernel == "pallas" and units > max_units:
        return (
            f"runs at most {max_units} units at compute capability {device.compute_capability}, and "
            f"config.model.ehr_hidden is {units}"
        )
    if len(devices) > 1 and config.parallel == "jit":
        return f"cannot be divided over {len(devices)} devices by config.parallel=jit, only by pmap"
    return ""


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
