"""What a model with attention weighed: by hour, by modality, and in a few stays. Never imports jax.

Shapes: N stays, T time steps, M modalities.
"""

from html import escape

import numpy as np

from medfuse_jax.report import plots
from medfuse_jax.report.read_runs import Run, number, section

MODALITY_NAMES = {"ehr": "time series", "cxr": "cxr", "static": "static facts"}
_NUM_EXAMPLES = 6


def shown(run: Run) -> str:
    """The charts and examples of one run; '' where it has no attention, or no stay with a time series."""
    found = (run.predictions or {}).get("attention")
    if not found or not (found["length"] > 0).any():
        return ""
    names = [MODALITY_NAMES.get(str(name), str(name)) for name in found["modalities"]]
    timestep_h = section(run.result or {}, "data").get("timestep_h")
    if not isinstance(timestep_h, int | float):
        return ""
    paired_N = _paired(found)
    charts = _by_hour(found, timestep_h, run.color)
    if paired_N.any():
        title = f"By modality, {number(int(paired_N.sum()), 0)} test stays with an X-ray"
        charts += _figure(plots.weight_by_modality(found["modality_weights"][paired_N], names, run.color), title)
    return (
        f'<h4>Attention weights</h4><div class="charts">{charts}</div>'
        '<p class="note">Lines and dots: means over the test stays; bands: 10th to 90th percentile. Hours are in units '
        "of the even share, which is 1 over the stay\u2019s length. A weight says how much of an hour or a modality "
        "went into the pooled vector, not that it made the score what it is.</p>"
        f"{_examples(found, names, timestep_h, run.color)}"
    )


def _by_hour(found: dict, timestep_h: float, color: int) -> str:
    args = (found["time_weights"], found["length"], timestep_h, color)
    charts = _figure(plots.weight_by_hour(*args, to_end=False), "By hours since the stay began")
    if len(np.unique(found["length"][found["length"] > 0])) > 1:  # else it is the same chart
        charts += _figure(plots.weight_by_hour(*args, to_end=True), "By hours before its end")
    return charts


def _paired(found: dict) -> np.ndarray:
    """bool [N]: stays with time series and X-ray; a missing one weighs exactly 0."""
    weight_of = dict(zip(found["modalities"].tolist(), found["modality_weights"].T))
    zeros_N = np.zeros(len(found["length"]))
    return (weight_of.get("ehr", zeros_N) > 0) & (weight_of.get("cxr", zeros_N) > 0)


def _examples(found: dict, names: list[str], timestep_h: float, color: int) -> str:
    """A few stays, from the shortest to the longest, those with an X-ray where there are any.

    Nothing but their lengths and weights: no id, age or label of a patient.
    """
    paired_N = _paired(found)
    rows = np.flatnonzero(paired_N if paired_N.any() else found["length"] > 0)
    rows = rows[np.argsort(found["length"][rows], kind="stable")]
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, _NUM_EXAMPLES).round().astype(int))]
    body = ""
    for row in chosen:
        weight_T = found["time_weights"][row, : found["length"][row]]
        hours = len(weight_T) * timestep_h
        most_h = (int(weight_T.argmax()) + 1) * timestep_h
        strip = plots.weight_strip(weight_T, color, f"{hours:g} hours, the most weight on hour {most_h:g}")
        cells = "".join(f'<td class="num">{number(float(w), 2)}</td>' for w in found["modality_weights"][row])
        body += f'<tr><th scope="row">{hours:g} h</th><td class="strip">{strip}</td>{cells}</tr>'
    heads = "".join(f'<th scope="col" class="num">{escape(name)}</th>' for name in names)
    return (
        "<h4>Weights of single stays</h4>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Weights of single stays"><table>'
        "<caption>Weights of single stays</caption>"
        '<thead><tr><th scope="col">Length</th><th scope="col" class="strip">first hour to last</th>'
        f"{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
        '<p class="note">Test stays from the shortest to the longest, evenly spaced. A strip\u2019s fullest colour is '
        "the largest weight of that stay.</p>"
    )


def _figure(svg: str, title: str) -> str:
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}</figure>'
