"""Views: AP in any writing is paired, and a table that leaves X-rays unpaired is not read without a word."""

import polars as pl
import pytest
from raw_tables import image, write_mimic_cxr

from data_prep.images import metadata, views
from data_prep.raw import tables

# Every value of MIMIC-CXR-JPG 2.0.0.
REAL = ["AP", "PA", "LATERAL", "LL", "", "PA LLD", "LAO", "RAO", "AP AXIAL", "AP LLD", "AP RLD", "XTABLE LATERAL"]
REAL += ["SWIMMERS", "PA RLD", "LPO"]


def _read(root, values):
    images = [image(n, 1, view) for n, view in enumerate(values)]
    return metadata.read_metadata(tables.mimic_cxr(write_mimic_cxr(root, images, size=(8, 8))))[0]


@pytest.mark.parametrize("text", ["AP", "ap", " AP ", "Ap\t", "antero-posterior", "ANTERO-POSTERIOR"])
def test_ap_is_paired_in_any_writing(tmp_path, capsys, text):
    assert _read(tmp_path, [text, "PA"]).filter(views.is_paired())["dicom_id"].to_list() == ["image-0000-00"]
    assert not capsys.readouterr().err


def test_no_other_view_is_paired_and_those_of_mimic_are_known(tmp_path, capsys):
    table = _read(tmp_path, [*REAL, *(view.lower() for view in REAL)])
    assert table.filter(views.is_paired())["dicom_id"].to_list() == ["image-0000-00", "image-0015-00"]
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["frontal"] * 2 + ["PA", ""], "3 have another ViewPosition (the first looks like 'aaaaaaa') and 1 have none"),
        (["PA", "LATERAL", "NA"], "2 have another ViewPosition and 1 have none"),
        ([""] * 3, "0 have another ViewPosition and 3 have none"),
    ],
)
def test_x_rays_of_which_none_is_ap_give_a_warning(tmp_path, capsys, values, says):
    assert _read(tmp_path, values).filter(views.is_paired()).is_empty()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "metadata.csv.gz: no X-ray has the view AP" in line and says in line


@pytest.mark.parametrize("num_unknown", [1, 2])
def test_over_one_percent_of_unknown_views_give_a_warning(capsys, tmp_path, num_unknown):
    views.warn(tmp_path, pl.Series(["AP"] * (100 - num_unknown) + [""] * 50 + ["FRONTAL 2"] * num_unknown))
    printed = capsys.readouterr().err
    assert ("2 of 100 X-rays have an unknown ViewPosition (the first looks like 'aaaaaaa 9')" in printed) == (
        num_unknown == 2
    )


@pytest.mark.parametrize(("num_blank", "num_images"), [(10, 20), (11, 20), (100, 1000), (101, 1000)])
def test_over_ten_percent_without_a_view_give_a_warning(capsys, tmp_path, num_blank, num_images):
    views.warn(tmp_path, pl.Series(["AP"] * (num_images - num_blank) + [""] * num_blank))
    line = f"{num_blank:,} of {num_images:,} X-rays have no ViewPosition"
    assert (line in capsys.readouterr().err) == (num_blank in (11, 101))


def test_without_ap_blank_views_are_named_once(capsys, tmp_path):
    views.warn(tmp_path, pl.Series(["PA"] * 20 + [""] * 20))
    (line,) = capsys.readouterr().err.splitlines()
    assert "no X-ray has the view AP" in line and "20 have none" in line
