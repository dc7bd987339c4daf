"""sweep.html: the labels below a chart are legible, whatever was searched."""

import itertools

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medfuse_jax.sweep import page

_RATES = [
    [1e-5, 3e-5, 1e-4, 1e-3],  # the paper's range
    [3.0e-4, 3.1e-4, 3.3e-4, 3.9e-4, 4.2e-4],
    [1e-4, 1.002e-4, 1.01e-4],
    [1.2e-4, 8e-4],
    [1e-4, 4e-4, 1.5e-3],
    [1e-8, 1e-6, 0.5],
    [0.02, 0.3, 0.9],
    [9e-5, 1.1e-4],
]
_GAP = 15  # pixels between two labels: a browser's font may be wider than matplotlib's


def _extents(axes) -> list:
    """Return the positions of the labels of the x axis, from left to right."""
    FigureCanvasAgg(axes.figure).draw()
    return [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]


def _plot(values) -> page.Axes:
    axes = page._new_axes("learning rate", "validation AUROC")
    for value in values:
        axes.plot([value], [0.7], "o")
    axes.margins(x=0.08, y=0.2)
    return axes


@pytest.mark.parametrize("rates", _RATES, ids=str)
def test_a_log_axis_has_few_labels_that_do_not_overlap(rates):
    with mpl.rc_context(page._STYLE):
        axes = _plot(rates)
        page._set_log_scale(axes)
        extents = _extents(axes)
        assert 2 <= len(extents) <= 5
        assert all(left.x1 + _GAP < right.x0 for left, right in itertools.pairwise(extents))
        low, high = axes.get_xlim()
        assert low < min(rates) and max(rates) < high, "every trial is inside the chart"
        shown = [float(label.get_text().replace("−", "-")) for label in axes.get_xticklabels()]
        assert shown == pytest.approx(list(axes.get_xticks()), rel=1e-9), "each label is the value of its tick"


def test_close_rates_would_overlap_on_a_linear_axis():
    """The error that the test above looks for."""
    with mpl.rc_context(page._STYLE):
        extents = _extents(_plot(_RATES[1]))
    assert any(left.x1 + _GAP >= right.x0 for left, right in itertools.pairwise(extents))


def test_a_chart_of_rates_has_a_log_axis():
    records = [{"trial": i, "values": {"learning_rate": rate}, "val_auroc": 0.7} for i, rate in enumerate(_RATES[1])]
    svg = page._scatter("learning_rate", records, records[0], "AUROC")
    assert 2 <= svg.count("e−4<") <= 5 and ">0.000" not in svg


def test_no_two_labels_are_equal():
    with mpl.rc_context(page._STYLE):
        axes = _plot([1e-4, 1.00001e-4])
        page._set_log_scale(axes)
        labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels and len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "names",
    [
        ["medfuse_attention", "joint_learnable", "joint_zeros", "uni_ehr", "mmtm4", "unified"],
        [f"static,../../modalities/notes_{i}.py" for i in range(3)],
    ],
)
def test_long_names_are_tilted_and_stay_inside_the_chart(names):
    with mpl.rc_context(page._STYLE):
        axes = _plot(names)
        assert any(left.x1 > right.x0 for left, right in itertools.pairwise(_extents(axes))), "they would overlap"
        page._tilt_long_names(axes, names)
        extents = [*_extents(axes), axes.xaxis.label.get_window_extent()]
        assert min(e.x0 for e in extents) > 0 and min(e.y0 for e in extents) > 0
        shown = [label.get_text() for label in axes.get_xticklabels()]
        assert len(set(shown)) == len(names), "shortened names still differ"
        assert all(label.get_rotation() == 35 for label in axes.get_xticklabels())


def test_short_names_are_not_tilted():
    with mpl.rc_context(page._STYLE):
        axes = _plot(["uni_ehr", "mmtm4"])
        page._tilt_long_names(axes, ["uni_ehr", "mmtm4"])
        assert {label.get_rotation() for label in axes.get_xticklabels()} == {0}
