"""Contenders take turns; their times are summarised and printed."""

import pytest

from medfuse_jax.bench import cases, clock


def test_contenders_take_turns_and_the_first_one_rotates():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = clock.interleave(runs, warm_up=1, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_taken_within_each_repeat():
    rows = clock.records({"ours": [1.0, 3.0, 1.0], "other": [2.0, 9.0, 4.0]})
    assert rows["other"]["time_over_ours"] == {"median": 3.0, "min": 2.0, "max": 4.0, "of_best": 2.0}
    assert "time_over_ours" not in rows["ours"]
    assert (rows["other"]["seconds"], rows["other"]["seconds_min"], rows["other"]["seconds_max"]) == (4.0, 2.0, 9.0)


@pytest.mark.parametrize(
    ("fields", "remark"),
    [
        ({"time_over_ours": {"median": 12.34}}, "12.34 x ours' time"),
        ({"time_over_ours": {"median": 1.5}, "difference_from_plain_scan": 7e-7}, "1.50 x ours' time, 7e-07 off"),
        ({"cold_s": 30.0}, "warm; cold 30.0 s"),
        ({"share_of_matrix_rate": 0.5}, "50.0% of matrix rate"),
        ({"padded_share_run": 0.05}, "5.0% padded"),
        ({}, ""),
    ],
)
def test_line_of_a_record_fits_the_screen(fields, remark):
    row = {"case": cases.preset("h200")[0][0].name, "contender": "torch_released", "samples_per_s": 12345.6}
    row |= {"seconds": 1.234, "seconds_min": 0.1234, "seconds_max": 12.34}
    line = clock.line(row | fields)
    assert "12345.6 samples/s" in line and "1.23 s (123 ms-12.3 s)" in line and line.endswith(remark)
    assert len(line) <= 140
