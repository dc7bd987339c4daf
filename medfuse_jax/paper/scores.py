"""The predictions that the tables are made of, aligned by stay, and their metrics.

Shapes: N stays, K labels.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medfuse_jax import metrics, schema
from medfuse_jax.data import folds
from medfuse_jax.runs import result as result_lib

_LEAST = 1e-7  # of a probability, so that its logarithm is finite
_FIELDS = ("stay_id", "subject_id", "labels", "scores", "has_cxr", "age")


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """A model's scores of some stays, by ascending stay_id. has_cxr: whether the stay had an X-ray, scored or not."""

    stay_id: np.ndarray  # [N]
    subject_id: np.ndarray  # [N]
    labels: np.ndarray  # [N, K]
    scores: np.ndarray  # [N, K]
    has_cxr: np.ndarray  # bool [N]
    age: np.ndarray  # [N], years

    def part(self, include_N: np.ndarray, columns: Sequence[int] | None = None) -> "Scores":
        """Return the scores of some stays and, if given, some labels."""
        values = {name: getattr(self, name)[include_N] for name in _FIELDS}
        if columns is not None:
            values |= {name: values[name][:, list(columns)] for name in ("labels", "scores")}
        return Scores(**values)

    @property
    def paired(self) -> "Scores":
        return self.part(self.has_cxr)


@dataclasses.dataclass(frozen=True)
class Model:
    """A chosen run of one task: its test and validation scores.

    choice: how it was chosen, if in an unusual way. on_paired: whether it was on the validation stays with an X-ray.
    without_cxr: its scores of the test stays without any X-ray, of MedFuse (OPTIMAL).
    """

    id: str
    title: str
    folder: Path
    rate: float
    test: Scores
    val: Scores
    choice: str = ""
    on_paired: bool = False
    without_cxr: Scores | None = None

    @property
    def is_by_loss(self) -> bool:
        """Whether the loss chose it, because no label of the validation stays has both classes."""
        val = self.val.paired if self.on_paired else self.val
        return len(val.stay_id) > 0 and math.isnan(auroc(val))


@dataclasses.dataclass
class TaskResults:
    """The models of one task. opt_by_share: validation scores by the share of EHR-only stays, 1.0 included.

    missing: id -> why there is no such model.
    """

    task: str
    labels: list[str]
    train_prevalence: np.ndarray  # [K], of the training stays; see `prevalence`
    models: dict[str, Model] = dataclasses.field(default_factory=dict)
    opt_by_share: dict[float, Scores] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)


def read(predictions: dict) -> Scores:
    """Return the scores in the arrays of a predictions file."""
    had_cxr = predictions.get("had_cxr", predictions["has_cxr"])
    arrays = {name: predictions[name] for name in _FIELDS} | {"has_cxr": had_cxr.astype(bool)}
    order = np.argsort(arrays["stay_id"], kind="stable")
    return Scores(**{name: values[order] for name, values in arrays.items()})


def read_dropped(path: Path) -> Scores:
    """Return the scores without any X-ray in a predictions file. Raise UserError if it is missing or damaged."""
    return read(result_lib.read_predictions(path, (*_FIELDS, "had_cxr"), "run the command again"))


def combine(first: Scores, second: Scores, from_second_N: np.ndarray) -> Scores:
    """Return the first model's scores, with those of the second model for some of the same stays."""
    return dataclasses.replace(first, scores=np.where(from_second_N[:, None], second.scores, first.scores))


def drawn(stay_id_N: np.ndarray, share: float) -> np.ndarray:
    """Return a mask of a share of the stays, the same for every model: a larger share includes a smaller one."""
    return folds.hash_fractions(stay_id_N) < share


def prevalence(labels_NK: np.ndarray) -> np.ndarray:
    """Return the share of stays with each label [K]; NaN where so few have, or lack, it that a count is withheld."""
    num_K = (labels_NK == 1).sum(0)
    is_few_K = np.minimum(num_K, len(labels_NK) - num_K) < schema.FEWEST_SHOWN
    return np.where(is_few_K, math.nan, num_K / max(1, len(labels_NK)))


def auroc(val: Scores) -> float:
    """Return the macro AUROC on validation stays, by which models are chosen; NaN if no label has both classes."""
    return metrics.macro(metrics.auroc(val.labels, val.scores)) if len(val.stay_id) else math.nan


def rank(val: Scores) -> float:
    """Return what a model is chosen by among others on the same validation stays, higher for better.

    It is the macro AUROC, or minus the mean binary cross-entropy where there is none, as in training.
    """
    if not len(val.stay_id):
        return -math.inf
    value = auroc(val)
    return -_loss(val) if math.isnan(value) else value


def _loss(of: Scores) -> float:
    right_NK = np.where(of.labels == 1, of.scores, 1 - of.scores.astype(np.float64))
    return float(-np.log(np.clip(right_NK, _LEAST, 1)).mean())


def chosen_on(val: Scores, words: str) -> str:
    """Say on what a model was chosen, and that it was by loss if there is no AUROC. words: names the stays."""
    by_loss = "by loss, as no label has both classes, " if math.isnan(auroc(val)) else ""
    return f"chosen {by_loss}on {words}"


def _unknown(of: Scores) -> dict:
    """Return what the tables read of `metrics.evaluate` and `metrics.compare`, all NaN."""
    found: dict = {}
    for name in ("auroc", "auprc"):
        nan_K = np.full(of.labels.shape[1], math.nan)
        found |= {name: nan_K, f"{name}_p": nan_K, f"{name}_ci": np.stack([nan_K, nan_K], 1)}
        found |= {f"{name}_macro": math.nan, f"{name}_macro_p": math.nan, f"{name}_macro_ci": (math.nan, math.nan)}
    return found


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How to make intervals. resample: see `result.RESAMPLES`; '' for its default."""

    num_bootstrap: int = 1000
    seed: int = 0
    resample: str = ""

    def metrics(self, scores: Scores) -> dict:
        """Return AUROC and average precision as `metrics.evaluate` does; NaN without stays."""
        if not len(scores.stay_id):
            return _unknown(scores)
        return metrics.evaluate(scores.labels, scores.scores, self.num_bootstrap, self.seed, self._groups(scores))

    def difference(self, ours: Scores, other: Scores) -> dict:
        """Return ours minus the other's on the stays that both score, as `metrics.compare` does; NaN without stays."""
        _, i, j = np.intersect1d(ours.stay_id, other.stay_id, assume_unique=True, return_indices=True)
        if not len(i):
            return _unknown(ours)
        labels, groups = ours.labels[i], self._groups(ours.part(i))
        return metrics.compare(labels, other.scores[j], ours.scores[i], self.num_bootstrap, self.seed, groups)

    def _groups(self, scores: Scores) -> np.ndarray | None:
        drawn = result_lib.resample_by(self.resample, {"subject_id": scores.subject_id})
        return scores.subject_id if drawn == "patient" else None
