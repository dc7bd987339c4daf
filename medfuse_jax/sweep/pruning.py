"""Ends hopeless trials early (--pruning), by the best validation AUROC that each trial has reached by each epoch.

A trial is compared with those that are as far when it gets there. So if several hosts train at different speeds, other
trials may be pruned than on one host. The paper's protocol prunes none.
"""

import statistics
from pathlib import Path

from medfuse_jax.runtime import files
from medfuse_jax.sweep import results

NONE, MEDIAN, ASHA = "none", "median", "asha"
RULES = (NONE, MEDIAN, ASHA)
MIN_FINISHED = 4  # median: so many trials must have finished
ETA = 3  # asha: the best third goes on, at the epochs 3, 9, 27, ...


def read(workdir: Path) -> dict[int, dict[int, float]]:
    """Return the best AUROC so far by epoch, of every trial that has validated, by number."""
    return {int(path.parent.name): _best_so_far(path) for path in (workdir / "trials").glob("*/metrics.jsonl")}


def _best_so_far(path: Path) -> dict[int, float]:
    best, by_epoch = 0.0, {}
    for logged in files.read_json_lines(path):
        if logged and logged.get("phase") == "val":
            best = max(best, logged.get("val_kappa", logged["val_auroc"]) or 0.0)  # what selects the model
            by_epoch[logged["epoch"]] = best
    return by_epoch


def is_hopeless(rule: str, workdir: Path, reached: dict[int, dict[int, float]], number: int, epoch: int) -> bool:
    """Return whether trial `number` should end after `epoch`. reached: from `read`."""
    own = reached.get(number, {}).get(epoch)
    if own is None:
        return False
    others = {n: by_epoch[epoch] for n, by_epoch in reached.items() if n != number and epoch in by_epoch}
    if rule == MEDIAN:
        finished = [auroc for n, auroc in others.items() if results.has_finished(workdir, n)]
        return len(finished) >= MIN_FINISHED and own < statistics.median(finished)
    if rule == ASHA and _is_rung(epoch):
        return sum(auroc > own for auroc in others.values()) >= max(1, (len(others) + 1) // ETA)
    return False


def _is_rung(epoch: int) -> bool:
    while epoch > ETA and epoch % ETA == 0:
        epoch //= ETA
    return epoch == ETA
