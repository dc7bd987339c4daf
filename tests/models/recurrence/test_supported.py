"""Which devices can run which LSTM kernel."""

import types

import pytest
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax.models.recurrence import supported


def _gpus(compute_capability: str, number: int = 1) -> list:
    return [types.SimpleNamespace(platform="gpu", compute_capability=compute_capability)] * number


_CPUS = [types.SimpleNamespace(platform="cpu")]


@pytest.mark.parametrize("kernel", ["chunks", "pallas", "cudnn"])
def test_a_gpu_runs_every_kernel_and_a_cpu_falls_back_to_chunks(kernel):
    config = config_lib.default()
    config.recurrence = kernel
    assert not supported.why_unsupported(config, _gpus("9.0"))
    assert bool(supported.why_unsupported(config, _CPUS)) == (kernel != "chunks")
    supported.check(config, _gpus("9.0"))
    supported.check(config, _CPUS)


@pytest.mark.parametrize(
    ("compute_capability", "number", "changes"),
    [
        ("9.0", 2, {"parallel": "jit"}),
        ("9.0", 1, {"model.ehr_hidden": 1024}),
        ("8.9", 1, {"model.ehr_hidden": 512}),
        ("7.5", 1, {}),
        ("gfx942", 1, {"recurrence": "cudnn"}),
    ],
)
def test_a_gpu_that_cannot_run_the_kernel_is_rejected(compute_capability, number, changes):
    config = config_lib.default()
    config.recurrence = "pallas"
    config.update_from_flattened_dict(changes)
    with refused(field="config.recurrence", value=config.recurrence, nearest="chunks"):
        supported.check(config, _gpus(compute_capability, number))
