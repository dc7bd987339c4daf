"""How a fusion scores the validation stays with both modalities, and the same stays with one of the two alone.

Logged after each epoch (config.eval.modalities_alone): a modality that hardly learns shows as a flat curve.
`run` is a run.Run.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from medfuse_jax.data import missing
from medfuse_jax.runs import predictions

BOTH = "both"


def views(run) -> dict[str, object]:
    """Return the run with both modalities, and with each alone, by name; {} if it is not asked for or shows nothing.

    A modality without which the method cannot score the stays is left out; in an hourly task, the X-ray alone.
    """
    dataset = run.dataset
    if not run.config.eval.modalities_alone or not (dataset.use_ehr and dataset.use_cxr) or not _both(run).any():
        return {}
    dropped = {"ehr": (0.0, 1.0)} | ({} if dataset.hours else {"cxr": (1.0, 0.0)})
    apart = {name: missing.drop_modalities(dataset, *shares) for name, shares in dropped.items()}
    # Their records differ from those in the devices' memory.
    scored = {name: less for name, less in apart.items() if less.usable("val")[_both(run)].all()}
    made = {name: dataclasses.replace(run, dataset=less, held={}) for name, less in scored.items()}
    return {BOTH: run} | made if made else {}


def _both(run) -> np.ndarray:
    index = run.dataset.index["val"]
    return index["has_cxr"] & (index["length"] > 0) & run.selects("val")


def score(run, by_name: dict[str, object], eval_fn: Callable, state) -> dict[str, float]:
    """Return val_loss_<name> and the selecting scores, such as val_auroc_<name>, of each view."""
    found: dict[str, float] = {}
    for name, view in by_name.items():
        predicted = predictions.predict(view, eval_fn, state, "val", _both(run))
        _, scores = predictions.selecting(view, predicted)
        found |= {f"val_loss_{name}": predicted.loss} | {f"{key}_{name}": value for key, value in scores.items()}
    return found
