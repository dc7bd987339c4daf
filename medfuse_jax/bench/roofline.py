"""What a device could do at most: its data sheet's and its measured rates, and a step's share of them."""

import dataclasses

import jax

from medfuse_jax.bench import compilers, machine


@dataclasses.dataclass(frozen=True)
class Peak:
    """A data sheet's rates: FLOP/s of dense matrix products by precision, and bytes/s of the memory.

    float32 is what jax runs by default: TF32 on a GPU, bfloat16 passes on a TPU.
    """

    bfloat16: float
    float32: float
    bytes_per_s: float


_CHIPS = compilers.CHIPS
# Start of jax's name of the device -> its rates; the first that matches. NVIDIA's data sheets of H200, H100 and A100;
# cloud.google.com/tpu/docs, a page per version.
PEAKS = {
    "NVIDIA H200": Peak(989.4e12, 494.7e12, _CHIPS["h200"].bytes_per_s),
    "NVIDIA H100 PCIe": Peak(756e12, 378e12, 2000e9),
    "NVIDIA H100 NVL": Peak(835e12, 417.5e12, 3900e9),
    "NVIDIA H100": Peak(989.4e12, 494.7e12, 3350e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 156e12, 2039e9),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 156e12, 1935e9),
    "NVIDIA A100": Peak(312e12, 156e12, 1555e9),
    "TPU v5 lite": Peak(197e12, 197e12, _CHIPS["v5e"].bytes_per_s),
    "TPU v5e": Peak(197e12, 197e12, _CHIPS["v5e"].bytes_per_s),
    "TPU v5": Peak(459e12, 459e12, _CHIPS["v5p"].bytes_per_s),
    "TPU v6": Peak(918e12, 918e12, _CHIPS["v6e"].bytes_per_s),
}


def peak(device_kind: str) -> Peak | None:
    """Return the data sheet's rates of a device; None if it is not known here."""
    return next((rates for start, rates in PEAKS.items() if device_kind.startswith(start)), None)


def shares(flops: float | None, num_bytes: float | None, seconds: float, precision: str) -> dict:
    """Return what a pass of `seconds` reaches on one device, which took these operations and moved these bytes.

    roofline_s: the time that the device needs at least, by its data sheet; measured_roofline_s: by the rates measured
    here. None stands for what is not known.
    """
    sheet = peak(jax.local_devices()[0].device_kind)
    measured = machine.matrix_flops_per_s(precision)
    row = {
        "tflop_per_repeat_device": flops and round(flops / 1e12, 6),
        "tflop_per_s_device": flops and round(flops / seconds / 1e12, 4),
        "matrix_tflop_per_s": round(measured / 1e12, 4),
        "share_of_matrix_rate": flops and round(flops / seconds / measured, 4),
        "share_of_peak": None,
        "gb_per_repeat_device": num_bytes and round(num_bytes / 1e9, 6),
        "roofline_s": None,
        "measured_roofline_s": _bound_s(flops, measured, num_bytes, machine.copy_bytes_per_s()),
    }
    if sheet:
        fastest = getattr(sheet, precision)
        row["share_of_peak"] = flops and round(flops / seconds / fastest, 4)
        row["roofline_s"] = _bound_s(flops, fastest, num_bytes, sheet.bytes_per_s)
    return row


def _bound_s(flops: float | None, flops_per_s: float, num_bytes: float | None, bytes_per_s: float) -> float | None:
    bounds = [amount / rate for amount, rate in ((flops, flops_per_s), (num_bytes, bytes_per_s)) if amount]
    return round(max(bounds), 7) if bounds else None
