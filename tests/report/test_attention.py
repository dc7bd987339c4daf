"""The report's attention section: values computed by hand, no patient named, damaged weights ignored."""

import re

import example_runs
import numpy as np
import pytest

from medfuse_jax.report import attention, plots, read_runs


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention") / "run"
    example_runs.write_run(folder, "pheno", "medfuse_attention", example_runs.simulate("pheno", 80))
    return folder


def test_relative_weights_are_multiples_of_the_uniform_weight_from_either_end():
    weight_NT = np.array([[0.5, 0.25, 0.25], [0.1, 0.9, 0], [0, 0, 0]], np.float16)
    length_N = np.array([3, 2, 0])
    forward, backward = (plots._relative_weights(weight_NT, length_N, to_end) for to_end in (False, True))
    np.testing.assert_allclose(forward, [[1.5, 0.75], [0.2, 1.8]], atol=1e-3)
    np.testing.assert_allclose(backward, [[0.75, 0.75], [1.8, 0.2]], atol=1e-3)
    padded = plots._relative_weights(np.tile(weight_NT[:1], (10, 1)), np.array([3] * 9 + [1]), to_end=True)
    assert padded.shape == (10, 3) and np.isnan(padded[9, 1:]).all() and np.isfinite(padded[:9]).all()


def test_the_section_shows_hours_modalities_and_stays_without_ids(run_dir):
    part = attention.attention(read_runs.read_run(run_dir))
    for expected in ("hours since the stay began", "hours before its end", ">time series<", ">X-ray<", ">static<"):
        assert expected in part
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


def test_a_modality_that_no_stay_has_is_left_out():
    weight_NM = np.array([[0, 0.5, 0.5], [0, 0.4, 0.6]], np.float32)
    svg = plots.weight_by_modality(weight_NM, ["notes", "time series", "X-ray"], 0)
    assert "notes" not in svg and ">0.45<" in svg and ">0.55<" in svg


def test_stays_of_one_length_have_one_chart_by_hour(run_dir):
    run = read_runs.read_run(run_dir)
    assert attention.attention(run).count("<figure") == 3
    arrays = run.predictions["attention"]
    arrays["length"] = np.full_like(arrays["length"], 3)
    assert attention.attention(run).count("<figure") == 2


def test_the_largest_weight_of_a_strip_is_opaque():
    svg = plots.weight_strip(np.array([0.1, 0.6, 0.3], np.float16), 0, "<b>")
    assert re.findall(r'opacity="([\d.]+)"', svg) == ["0.17", "1.00", "0.50"] and "<b>" not in svg


def test_damaged_weights_are_reported_and_a_run_without_weights_has_no_section(run_dir, tmp_path):
    example_runs.write_run(tmp_path / "plain", "pheno", "medfuse", example_runs.simulate("pheno", 40))
    assert attention.attention(read_runs.read_run(tmp_path / "plain")) == ""
    with np.load(run_dir / "predictions_test.npz") as stored:
        content = dict(stored)
    for name, value in (("length", content["length"] + 100), ("modalities", np.array(["a"])), ("time_weights", None)):
        damaged = {**content, name: value} if value is not None else {k: v for k, v in content.items() if k != name}
        np.savez(tmp_path / "plain" / "predictions_test.npz", **damaged)
        run = read_runs.read_run(tmp_path / "plain")
        assert "attention weights" in run.problems[0] and attention.attention(run) == ""
