"""Pairing: the last AP X-ray in the window."""

import datetime

import polars as pl
import pytest

from data_prep.images import pairing

INTIME = datetime.datetime(2150, 1, 1)
STAYS = pl.DataFrame(
    {
        "stay_id": [30, 31],
        "subject_id": [1, 2],
        "intime": [INTIME] * 2,
        "outtime": [INTIME + datetime.timedelta(hours=72)] * 2,
    }
)


def _images(*images):
    """Return a frame of images: (dicom_id, subject_id, view, hours after intime)."""
    rows = [(d, s, v, None if h is None else INTIME + datetime.timedelta(hours=h)) for d, s, v, h in images]
    return pl.DataFrame(
        rows,
        {"dicom_id": pl.String, "subject_id": pl.Int64, "view": pl.String, "time": pl.Datetime("us")},
        orient="row",
    )


@pytest.mark.parametrize(
    ("hour", "paired_72", "paired_48"),
    [
        (-0.01, False, False),
        (0, True, True),
        (48, True, True),
        (48.01, True, False),
        (72, True, False),
        (72.01, False, False),
    ],
)
def test_the_window_includes_both_ends(hour, paired_72, paired_48):
    images = _images(("a", 1, "AP", hour))
    assert len(pairing.pair(STAYS, images, None)) == paired_72
    assert len(pairing.pair(STAYS, images, 48.0)) == paired_48


def test_the_last_ap_image_is_paired():
    images = _images(
        ("a", 1, "AP", 1), ("c", 1, "AP", 60), ("b", 1, "PA", 70), ("d", 1, "LATERAL", 71), ("e", 2, "PA", 3)
    )
    assert pairing.pair(STAYS, images, None).rows() == [(30, "c", INTIME + datetime.timedelta(hours=60))]
    assert pairing.pair(STAYS, images, 48.0)["dicom_id"].to_list() == ["a"]


def test_ties_go_to_the_last_id_in_any_row_order():
    images = _images(("a", 1, "AP", 5), ("b", 1, "AP", 5), ("z", 1, "AP", None), ("x", 3, "AP", 5))
    assert pairing.pair(STAYS, images, None)["dicom_id"].to_list() == ["b"]
    assert pairing.pair(STAYS[::-1], images[::-1], None)["dicom_id"].to_list() == ["b"]


def test_the_window_ends_with_the_stay():
    short = STAYS.with_columns(outtime=pl.lit(INTIME + datetime.timedelta(hours=10)))
    assert len(pairing.pair(short, _images(("a", 1, "AP", 11)), 48.0)) == 0
