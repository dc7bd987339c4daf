"""The report's part on attention: numbers by hand, shown where there are any, and left out where they are damaged."""

import re

import example_runs
import numpy as np
import pytest

from medfuse_jax.report import attention, pages, plots, read_runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention") / "run"
    example_runs.write_run(folder, "pheno", "medfuse_attention", example_runs.simulate("pheno", 80))
    return folder


def test_shares_are_weights_in_units_of_the_even_one_from_either_end():
    weight_NT = np.array([[0.5, 0.25, 0.25], [0.1, 0.9, 0], [0, 0, 0]], np.float16)
    length_N = np.array([3, 2, 0])
    began = plots._shares(weight_NT, length_N, to_end=False)
    np.testing.assert_allclose(began, [[1.5, 0.75], [0.2, 1.8]], atol=1e-3)
    np.testing.assert_allclose(plots._shares(weight_NT, length_N, to_end=True), [[0.75, 0.75], [1.8, 0.2]], atol=1e-3)
    past_N = np.array([3] * 9 + [1])
    past = plots._shares(np.tile(weight_NT[:1], (10, 1)), past_N, to_end=True)
    assert past.shape == (10, 3) and np.isnan(past[9, 1:]).all() and np.isfinite(past[:9]).all()


def test_the_page_shows_hours_modalities_and_stays_without_naming_them(run_dir, tmp_path):
    pages.write([run_dir], tmp_path)
    text = (tmp_path / "index.html").read_text()
    start = text.index("Attention weights")
    part = text[start : text.index("What made it", start)]
    for wanted in ("hours since the stay began", "hours before its end", "time series", "cxr", "static facts"):
        assert wanted in part
    with np.load(run_dir / "predictions_test.npz") as stored:
        paired_N = stored["has_cxr"]
        mean = stored["modality_weights"][paired_N].mean(0)
        lengths = stored["length"][paired_N]
    assert f"{paired_N.sum()} test stays with an X-ray" in part
    assert all(f">{value:.2f}<" in part for value in mean)
    strips = re.findall(r'<svg class="strip" viewBox="0 0 (\d+) 1".*?</svg>', part)
    assert len(strips) == 6 and (int(strips[0]), int(strips[-1])) == (lengths.min(), lengths.max())
    rows = re.findall(r'<th scope="row">([\d.]+) h</th>', part)
    assert [float(hours) for hours in rows] == [2.0 * int(steps) for steps in strips]


def test_a_modality_that_no_shown_stay_has_is_left_out():
    weight_NM = np.array([[0, 0.5, 0.5], [0, 0.4, 0.6]], np.float32)
    svg = plots.weight_by_modality(weight_NM, ["notes", "time series", "cxr"], 0)
    assert "notes" not in svg and ">0.45<" in svg and ">0.55<" in svg


def test_stays_of_one_length_have_one_chart_by_hour(run_dir):
    run = read_runs.read_run(run_dir)
    assert attention.shown(run).count("<figure") == 3
    found = run.predictions["attention"]
    found["length"] = np.full_like(found["length"], 3)
    assert attention.shown(run).count("<figure") == 2


def test_a_strip_is_fullest_where_the_weight_is():
    svg = plots.weight_strip(np.array([0.1, 0.6, 0.3], np.float16), 0, "<b>")
    assert re.findall(r'opacity="([\d.]+)"', svg) == ["0.17", "1.00", "0.50"] and "<b>" not in svg


def test_a_run_without_weights_has_no_such_part_and_damaged_ones_are_said(run_dir, tmp_path):
    example_runs.write_run(tmp_path / "plain", "pheno", "medfuse", example_runs.simulate("pheno", 40))
    assert attention.shown(read_runs.read_run(tmp_path / "plain")) == ""
    with np.load(run_dir / "predictions_test.npz") as stored:
        content = dict(stored)
    for name, value in (("length", content["length"] + 100), ("modalities", np.array(["a"])), ("time_weights", None)):
        damaged = {**content, name: value} if value is not None else {k: v for k, v in content.items() if k != name}
        np.savez(tmp_path / "plain" / "predictions_test.npz", **damaged)
        run = read_runs.read_run(tmp_path / "plain")
        assert "attention weights" in run.problems[0] and attention.shown(run) == ""
