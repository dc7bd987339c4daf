"""What the device itself does: copies within its memory, and large matrix products in bfloat16 and float32."""

import jax

from medfuse_jax.bench import clock, machine, roofline
from medfuse_jax.bench.cases import Case


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return a record of copies and one of products in each precision. data is ignored."""
    sheet, rows = roofline.peak(jax.local_devices()[0].device_kind), []
    say("copies")
    num_bytes, seconds = machine.time_copies(case.repeats)
    row = {"contender": "copy"} | clock.summary(seconds)
    row["gb_per_s"] = round(num_bytes / min(seconds) / 1e9, 2)
    row["share_of_peak"] = sheet and round(num_bytes / min(seconds) / sheet.bytes_per_s, 4)
    rows.append(row)
    for precision in ("bfloat16", "float32"):
        say(f"products in {precision}")
        flops, seconds = machine.time_products(precision, case.repeats)
        row = {"contender": f"product {precision}"} | clock.summary(seconds)
        row["tflop_per_s"] = round(flops / min(seconds) / 1e12, 4)
        row["share_of_peak"] = sheet and round(flops / min(seconds) / getattr(sheet, precision), 4)
        rows.append(row)
    return rows
