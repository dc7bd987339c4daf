"""Which devices can run which LSTM kernel."""

import types

import pytest
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax.models.recurrence import supported
from medfuse_jax.models.recurrence.chunks import chunked_lstm


def _gpus(compute_capability: str, number: int = 1) -> list:
    return [types.SimpleNamespace(platform="gpu", compute_capability=compute_capability)] * number


_CPUS = [types.SimpleNamespace(platform="cpu")]


@pytest.mark.parametrize(
    ("devices", "units", "kernel"),
    [
        (_CPUS, 256, "chunks"),
        (_gpus("9.0"), 256, "pallas"),
        (_gpus("8.0", 4), 512, "pallas"),
        (_gpus("9.0"), 1024, "chunks"),
        (_gpus("7.5"), 256, "chunks"),
    ],
)
def test_auto_is_pallas_where_it_is_supported(devices, units, kernel):
    config = config_lib.default()
    assert config.recurrence == "auto"
    config.model.ehr_hidden = units
    assert supported.choose(config, devices) == kernel
    assert not supported.why_unsupported(config, devices)
    supported.check(config, devices)


def test_auto_falls_back_on_a_gpu_where_pallas_does_not_run(monkeypatch, capsys):
    config = config_lib.default()
    gpus = _gpus("9.0")
    monkeypatch.setattr(supported.jax, "local_devices", lambda: gpus)  # this machine has no GPU: pallas cannot run
    assert supported.choose(config, gpus) == "chunks"
    assert "using 'chunks'" in capsys.readouterr().out
    config.recurrence = "pallas"  # asked for: the run fails rather than use another kernel
    assert supported.choose(config, gpus) == "pallas"


def test_the_test_of_pallas_passes_for_the_right_kernel_and_notices_a_wrong_one(monkeypatch):
    assert supported._problem_of_pallas(32, interpret=True) == ""
    wrong = lambda input_kernel_FG, *rest: chunked_lstm(1.2 * input_kernel_FG, *rest)  # noqa: E731
    monkeypatch.setattr(supported, "chunked_lstm", wrong)
    supported._problem_of_pallas.cache_clear()
    assert "differs" in supported._problem_of_pallas(32, interpret=True)
    supported._problem_of_pallas.cache_clear()


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
