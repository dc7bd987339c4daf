"""One line a contender, for the screen: read beside each other, they are a table."""


def line(row: dict) -> str:
    """A record in at most 120 columns: case, contender, time and spread, rate, ratio."""
    spread = f"{seconds(row['seconds']):>8} ({seconds(row['seconds_min'])}-{seconds(row['seconds_max'])})"
    rate = f"{row['samples_per_s']:>9.1f} samples/s" if "samples_per_s" in row else ""
    return f"{row['case']:<44} {row['contender']:<15} {spread:<26} {rate:<20} {remark(row)}".rstrip()


def remark(row: dict) -> str:
    """What matters about a record beside its time."""
    if "time_over_ours" in row:
        off = f", {row['difference_from_plain_scan']:.0e} off" if row.get("difference_from_plain_scan") else ""
        return f"{row['time_over_ours']['median']:.2f} x ours' time{off}"
    if "cold_s" in row:
        return f"warm; cold {row['cold_s']:.1f} s"
    if "share_of_matrix_rate" in row:
        return f"{row['share_of_matrix_rate']:.0%} of matrix rate"
    if "padded_share_run" in row:
        return f"{row['padded_share_run']:.1%} padded"
    return ""


def seconds(value: float) -> str:
    """Three figures, in s or ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
