"""The curves with less data are drawn from a file of the same weights, and from no other."""

import json
from xml.etree import ElementTree

import example_runs
import pytest

from medfuse_jax.report import read_runs
from medfuse_jax.report.robustness import robustness


def _point(at, value):
    return {"at": at, "num_samples": 50, "auroc_macro": value, "auroc_macro_ci": [value - 0.1, value + 0.1]}


@pytest.fixture
def folder(tmp_path):
    example_runs.write_run(tmp_path, "pheno", "medfuse", example_runs.simulate("pheno", 60))
    return tmp_path


def _write(folder, **changes):
    step = json.loads((folder / "result.json").read_text())["step"]
    curves = [
        {"name": "cxr_dropped", "points": [_point(0.0, 0.8), _point(0.5, 0.75), _point(1.0, 0.6)]},
        {"name": "ehr_hours", "points": [_point(2, 0.6), _point(48, 0.7), _point(302, 0.7)]},
    ]
    (folder / "robustness.json").write_text(json.dumps({"step": step, "resample": "stay", "curves": curves} | changes))


def test_curves_are_drawn(folder):
    _write(folder)
    html = robustness(read_runs.read_run(folder))
    assert html.count("<svg") == 2 and "by share of X-rays dropped" in html and "hours of EHR" in html
    for part in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")


@pytest.mark.parametrize("changes", [{"step": 7}, {"curves": []}, {"curves": "none"}, {"curves": [{"name": "x"}]}])
def test_other_weights_and_other_content_are_not_drawn(folder, changes):
    _write(folder, **changes)
    assert robustness(read_runs.read_run(folder)) == ""
