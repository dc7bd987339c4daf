"""The report's section on attention weights: by hour, by modality, and in a few stays. Never imports jax.

Shapes: N stays, T time steps, M modalities.
"""

from html import escape

import numpy as np

from medfuse_jax.report import html, plots
from medfuse_jax.report.read_fields import section
from medfuse_jax.report.read_runs import Run
from medfuse_jax.report.wording import number

MODALITY_NAMES = {"ehr": "time series", "cxr": "X-ray", "earlier_cxr": "earlier X-rays"}
_NUM_EXAMPLES = 6


def attention(run: Run) -> str:
    """Return charts and examples of one run; '' if it has no attention weights or no stay with a time series."""
    arrays = (run.predictions or {}).get("attention")
    timestep_h = section(run.result or {}, "data").get("timestep_h")
    if not arrays or not (arrays["length"] > 0).any() or not isinstance(timestep_h, int | float):
        return ""
    names = [MODALITY_NAMES.get(str(name), str(name)) for name in arrays["modalities"]]
    paired_N = _paired(arrays)
    charts = _by_hour(arrays, timestep_h, run.color)
    if paired_N.any():
        caption = f"By modality, {number(int(paired_N.sum()), 0)} test stays with an X-ray"
        charts += html.figure(plots.weight_by_modality(arrays["modality_weights"][paired_N], names, run.color), caption)
    return (
        f'<h4>Attention weights</h4><div class="charts">{charts}</div>'
        '<p class="note">Lines and dots: means over the test stays; bands: 10th to 90th percentile. Hourly weights are '
        "multiples of the uniform weight, 1 / length of the stay. A weight is the share of an hour or a modality in "
        "the pooled vector; it does not explain the score.</p>"
        f"{_examples(arrays, names, timestep_h, run.color, paired_N)}"
    )


def _by_hour(arrays: dict, timestep_h: float, color: int) -> str:
    args = (arrays["time_weights"], arrays["length"], timestep_h, color)
    charts = html.figure(plots.weight_by_hour(*args, to_end=False), "By hours since the stay began")
    if len(np.unique(arrays["length"][arrays["length"] > 0])) > 1:  # otherwise both charts show the same values
        charts += html.figure(plots.weight_by_hour(*args, to_end=True), "By hours before its end")
    return charts


def _paired(arrays: dict) -> np.ndarray:
    """Return bool [N]: stays with time series and X-ray. The weight of a missing modality is exactly 0."""
    weights = dict(zip(arrays["modalities"].tolist(), arrays["modality_weights"].T))
    zeros_N = np.zeros(len(arrays["length"]))
    return (weights.get("ehr", zeros_N) > 0) & (weights.get("cxr", zeros_N) > 0)


def _examples(arrays: dict, names: list[str], timestep_h: float, color: int, paired_N: np.ndarray) -> str:
    """Return a table of a few stays, only paired ones if there are any. For privacy: no id, age or label."""
    rows = np.flatnonzero(paired_N if paired_N.any() else arrays["length"] > 0)
    rows = rows[np.argsort(arrays["length"][rows], kind="stable")]
    body = ""
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, _NUM_EXAMPLES).round().astype(int))]:
        weight_T = arrays["time_weights"][row, : arrays["length"][row]]
        hours = len(weight_T) * timestep_h
        peak_h = (int(weight_T.argmax()) + 1) * timestep_h
        strip = plots.weight_strip(weight_T, color, f"{hours:g} hours, largest weight at hour {peak_h:g}")
        cells = "".join(f'<td class="num">{number(float(w), 2)}</td>' for w in arrays["modality_weights"][row])
        body += f'<tr><th scope="row">{hours:g} h</th><td class="strip">{strip}</td>{cells}</tr>'
    heads = "".join(f'<th scope="col" class="num">{escape(name)}</th>' for name in names)
    head = f'<th scope="col">Length</th><th scope="col" class="strip">first hour to last</th>{heads}'
    return (
        f"<h4>Weights of single stays</h4>{html.table(head, body, 'Weights of single stays')}"
        '<p class="note">Test stays from the shortest to the longest, evenly spaced. The strongest colour of a strip '
        "is that stay\u2019s largest weight.</p>"
    )
