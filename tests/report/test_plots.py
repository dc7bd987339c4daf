"""Charts are valid inline SVG, and their curves match the scores."""

import functools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from medfuse_jax.report import html, plots

TRAIN = {1: 0.6, 2: 0.5, 3: 0.45, 4: 0.4}
VAL = {1: 0.61, 2: 0.52, 3: 0.5, 4: 0.53}


_HOURS = [
    {"name": "1 to 24", "auroc_macro": 0.7, "auroc_macro_ci": [0.6, 0.8]},
    {"name": "25 to 48", "withheld": True},
    {"name": "after 48", "auroc_macro": 0.8, "auroc_macro_ci": [0.7, 0.9]},
]


def problem(num_samples=200, num_labels=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((num_samples, num_labels)) < 0.3
    return labels, labels + rng.normal(size=labels.shape)


@functools.cache
def charts() -> dict[str, str]:
    return draw()


def draw() -> dict[str, str]:
    labels, scores = problem()
    return {
        "loss": plots.loss_curves(TRAIN, VAL, 3, 0),
        "auroc": plots.auroc_curve(VAL, 3, 1),
        "roc": plots.curves("ROC", labels, scores, 0),
        "precision_recall": plots.curves("PR", labels, scores, 0),
        "overlay": plots.overlay("ROC", [("A", 0, labels, scores), ("B", 1, labels, -scores)]),
        "interval": plots.interval((0.5, 1.0), 0.8, (0.7, 0.9), 0, [(0.6, 1)], 0.5),
        "by_hour": plots.by_hour(_HOURS, 0),
    }


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag == "text"]


@pytest.mark.parametrize("name", ["loss", "auroc", "roc", "precision_recall", "overlay", "interval", "by_hour"])
def test_a_chart_takes_colours_and_font_from_the_page(name):
    svg = charts()[name]
    assert ElementTree.fromstring(svg).tag == "svg"
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert "var(--run" in svg
    for unwanted in ("font-family", "<style", "http", "xlink", "<metadata"):
        assert unwanted not in svg


def test_charts_are_reproducible_and_define_the_ids_they_refer_to():
    assert charts() == draw()
    for svg in charts().values():
        assert set(re.findall(r' id="([^"]+)"', svg)) == set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg))


def test_charts_of_a_page_share_no_id():
    page = html.document("Two of each", "".join([*charts().values()] * 2))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', page)) == set(ids)


def test_lines_are_labelled_and_the_best_epoch_is_marked():
    assert {"training", "validation", "chosen: epoch 3", "epoch"} <= set(texts(plots.loss_curves(TRAIN, VAL, 3, 0)))
    named = texts(plots.auroc_curve({1: 0.7, 2: 0.7345678}, 2, 0, "best so far"))
    assert {"0.735", "best so far: epoch 2"} <= set(named)  # only positions are rounded, not text
    assert "training" not in texts(plots.loss_curves({}, VAL, None, 0))


def test_labels_at_line_ends_do_not_overlap():
    svg = plots.loss_curves({1: 0.5, 2: 0.4}, {1: 0.5, 2: 0.4001}, None, 0)
    heights = {e.text: float(e.get("y")) for e in ElementTree.fromstring(svg).iter() if e.tag == "text"}
    assert abs(heights["training"] - heights["validation"]) > 9


def mean_curve(kind, labels, scores):
    return plots._points(kind, np.mean(plots._label_curves(kind, labels, scores), axis=0))


def test_the_area_under_a_mean_curve_is_the_mean_score():
    labels, scores = problem(3000)
    grid, roc = mean_curve("ROC", labels, scores)
    auroc = np.mean([roc_auc_score(y, s) for y, s in zip(labels.T, scores.T, strict=True)])
    assert abs(np.trapezoid(roc, grid) - auroc) < 0.004
    _, precision = mean_curve("PR", labels, scores)
    ap = np.mean([average_precision_score(y, s) for y, s in zip(labels.T, scores.T, strict=True)])
    assert abs(precision.mean() - ap) < 0.004
    _, wrong = mean_curve("ROC", labels, scores[:, ::-1])
    assert abs(np.trapezoid(wrong, grid) - auroc) > 0.1


def test_a_label_of_one_class_has_no_curve():
    labels, scores = problem()
    labels[:, 1] = False
    assert len(plots._label_curves("ROC", labels, scores)) == 2
    labels[:] = False
    assert "<path" in plots.curves("ROC", labels, scores, 0) and "<path" in plots.overlay(
        "PR", [("A", 0, labels, scores)]
    )


def test_names_are_escaped_and_not_parsed_as_math():
    labels, scores = problem()
    svg = plots.overlay("ROC", [('<b>"$x_{$&', 0, labels, scores)])
    assert "<b>" not in svg and '<b>"$x_{$&' in texts(svg)


def test_the_size_does_not_grow_with_the_samples():
    assert len(plots.curves("ROC", *problem(20_000, 2), 0)) < 1.5 * len(plots.curves("ROC", *problem(500, 2), 0))


def test_a_chart_by_hour_names_every_group_and_its_score():
    assert {"1 to 24", "25 to 48", "after 48", "AUROC"} <= set(texts(charts()["by_hour"]))
    kappa = [group | {"kappa": 0.4, "kappa_ci": [0.3, 0.5]} for group in _HOURS]
    assert "linear kappa" in texts(plots.by_hour(kappa, 0))
    assert plots.by_hour(_HOURS[1:2], 0) == ""


def test_a_bin_of_the_hours_of_few_stays_is_left_out():
    curve = [{"num_samples": 500, "score": 0.2, "positive": 0.1, "num_stays": n} for n in (9, 10)]
    assert plots.reliability(curve[:1], 0) == "" != plots.reliability(curve[1:], 0)


def test_interval_places_its_marks():
    svg = plots.interval((0.5, 0.9), 0.7, (0.6, 0.8), 0, [(0.5, 1)])
    assert 'cx="66.0"' in svg and 'd="M36.0 8H96.0"' in svg and 'cx="6.0"' in svg
    assert "stroke-dasharray" not in svg and "stroke-dasharray" in plots.interval((0, 1), 0.5, (None, None), 0, (), 0.5)
    assert "stroke-width" not in plots.interval((0, 1), 0.5, (None, None), 0)
    assert 'cx="66.0"' in plots.interval((0.5, 0.5), 0.5, (0.5, 0.5), 0)
