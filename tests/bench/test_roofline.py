"""A step's share of what the device could do: data sheets, measured rates, bounds."""

import types

import jax
import pytest

from medfuse_jax.bench import machine, rates, roofline
from medfuse_jax.bench.cases import Case


@pytest.mark.parametrize(
    ("device_kind", "bfloat16", "bytes_per_s"),
    [
        ("NVIDIA H200", 989.4e12, 4800e9),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 3350e9),
        ("NVIDIA H100 PCIe", 756e12, 2000e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5p", 459e12, 2765e9),
        ("TPU v6 lite", 918e12, 1640e9),
    ],
)
def test_data_sheet_is_found_by_the_name_of_the_device(device_kind, bfloat16, bytes_per_s):
    peak = roofline.peak(device_kind)
    assert (peak.bfloat16, peak.bytes_per_s) == (bfloat16, bytes_per_s)
    assert roofline.peak("cpu") is None


def _shares(monkeypatch, device_kind, *args):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(device_kind=device_kind)])
    monkeypatch.setattr(machine, "matrix_flops_per_s", lambda precision: 500e12)
    monkeypatch.setattr(machine, "copy_bytes_per_s", lambda: 4000e9)
    return roofline.shares(*args)


def test_shares_are_of_the_data_sheet_and_of_what_was_measured(monkeypatch):
    row = _shares(monkeypatch, "NVIDIA H200", 1e12, 48e9, 0.02, "float32")
    assert row["share_of_peak"] == pytest.approx(50 / 494.7, abs=1e-4) and row["share_of_matrix_rate"] == 0.1
    assert (row["roofline_s"], row["measured_roofline_s"]) == (0.01, 0.012)  # the memory's, which takes longer
    row = _shares(monkeypatch, "NVIDIA H200", 989.4e12, 48e9, 2.0, "bfloat16")
    assert (row["roofline_s"], row["measured_roofline_s"]) == (1.0, 1.9788)  # that of the products


def test_what_is_not_known_is_none(monkeypatch):
    row = _shares(monkeypatch, "A device", None, None, 0.02, "float32")
    assert {name for name, value in row.items() if value is not None} == {"matrix_tflop_per_s"}
    row = _shares(monkeypatch, "A device", 1e12, None, 0.02, "float32")
    assert row["share_of_peak"] is None and row["roofline_s"] is None and row["measured_roofline_s"] == 0.002


def test_rates_of_the_device_are_measured():
    copy, bfloat16, float32 = rates.measure(Case(kind="rates", repeats=2))
    assert (copy["contender"], copy["repeats"]) == ("copy", 2) and copy["gb_per_s"] > 0
    assert [row["contender"] for row in (bfloat16, float32)] == ["product bfloat16", "product float32"]
    assert min(bfloat16["tflop_per_s"], float32["tflop_per_s"]) > 0
    assert copy["share_of_peak"] is None, "a CPU has no data sheet here"
