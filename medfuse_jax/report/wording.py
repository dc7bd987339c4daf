"""Names, numbers and phrases as reports show them. Never imports jax."""

from pathlib import Path

from medfuse_jax import schema
from medfuse_jax.models import registry
from medfuse_jax.report.read_fields import is_number, pair, section

_ENSEMBLE_NAMES = {
    "late_average": "Late average",
    "weighted_average": "Weighted average",
    "ensemble": "Ensemble, by X-ray",
}
# Fields of a result, for encoders that are not the paper's: value -> name.
ENCODERS = {
    "ehr_encoder": {"transformer": "transformer"},
    "cxr_encoder": {"resnet50": "ResNet-50", "features": "precomputed features"},
}
_USUAL = {"ehr_encoder": "LSTM", "cxr_encoder": "ResNet"}  # as methods' titles call them
OUTSIDE_ITS_CI = (
    "A value lies outside its own interval. With few positives, resamples that repeat them score higher, so such an "
    "interval is unreliable."
)


def method_name(method) -> str:
    """Return a method's display name; an unknown method's name as it is."""
    row = registry.METHODS.get(method)
    return row.title if row else _ENSEMBLE_NAMES.get(method, str(method))


def task_name(task) -> str:
    """Return a task's display name; an unknown task's name as it is."""
    return schema.TASKS[task].title if task in schema.TASKS else str(task)


def title(result: dict) -> str:
    """Return the display name of a result's method, with unusual encoders, whether it reads all X-rays, and further
    modalities."""
    method = method_name(result.get("method"))
    for field, names in ENCODERS.items():
        if name := names.get(result.get(field) or ""):
            usual = f"({_USUAL[field]})"
            method = method.replace(usual, f"({name})") if usual in method else f"{method}, {name}"
    method += ", all X-rays" if result.get("images") == "all" else ""
    return " + ".join([method, *(Path(name).stem for name in result.get("modalities") or [])])


def of_fold(content: dict) -> str:
    """Return ', fold 0 of 5' for a result or config of a fold, which has test patients of its own; else ''."""
    data = section(content, "data")
    return f", fold {data.get('fold')} of {data['folds']}" if data.get("folds") else ""


def against(result: dict, comparison: dict) -> str:
    """Return the display name of the run that a result is compared with: a stage of the same run, or another method."""
    method = comparison.get("against")
    return title({"method": method} | {f: result.get(f) for f in ENCODERS if f == f"{str(method)[4:]}_encoder"})


def unit(task: str) -> str:
    """Return what the task's scores are of: 'stays' (also for an unknown task), their 'hours', or 'X-rays'."""
    if task not in schema.TASKS:
        return "stays"
    return "hours" if schema.TASKS[task].hourly else schema.TASKS[task].unit


def number(value, digits: int = 3, sign: bool = False) -> str:
    """Format a number for a table, with a true minus sign; '–' if there is none."""
    if not is_number(value):
        return "–"
    value = round(float(value), digits) + 0.0  # never -0.0
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def resampled(results: list[dict], unit: str, split: str = "test") -> str:
    """Return what the results' intervals resample, in words: patients, records, or 'the test set' if not recorded."""
    stays = "stays, each with all of its hours" if unit == "hours" else unit
    words = {"patient": f"{split} patients, each with all of their {unit}", "stay": f"{split} {stays}"}
    named = dict.fromkeys(words.get(str(result.get("resample")), f"the {split} set") for result in results)
    return ", or ".join(named)


def ordinal(scores: dict, sign: bool = False) -> str:
    """Return kappa and mean absolute deviation in words, with their intervals; '' where labels are no ordered bins.

    sign: for differences, with their p-values where there are some.
    """
    if "kappa" not in scores:
        return ""
    shown = (("kappa", "linear kappa", "", 3), ("mad_h", "mean absolute deviation (lower is better)", " h", 1))
    words = []
    for name, title, unit, digits in shown:
        value, low, high = (number(x, digits, sign) for x in (scores.get(name), *pair(scores[f"{name}_ci"])))
        p = f", p {number(scores[f'{name}_p'])}" if f"{name}_p" in scores else ""
        words.append(f"{title} {value}{unit} ({low} to {high}{p})")
    return ", ".join(words)
