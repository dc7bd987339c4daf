"""How far a run has trained, and what its validations decide: the learning rate and when to stop."""

import dataclasses
import math

import numpy as np
from ml_collections import ConfigDict

from medfuse_jax.runtime.errors import UserError

# The smallest relative improvement that counts, as in torch's ReduceLROnPlateau, which the released code uses.
_PLATEAU_THRESHOLD = 1e-4


@dataclasses.dataclass
class Progress:
    """State of a run at its last validation, and the losses since then, saved with each checkpoint.

    best_epoch: the selected epoch, 0 for none yet. best_auroc: its validation AUROC, or kappa
    (`predictions.selecting`). selected_loss: its validation loss, if that selected it because there is no AUROC.
    temperature: of its validation scores (`predictions.temperature`), None if it has none.
    loss_sum, num_steps: of the epoch in progress.
    """

    epoch: int = 0
    learning_rate: float = 0.0
    best_auroc: float = -math.inf
    best_epoch: int = 0
    best_loss: float = math.inf
    epochs_since_best_loss: int = 0
    selected_loss: float = math.inf
    temperature: float | None = None
    loss_sum: float = 0.0
    num_steps: int = 0

    def add(self, losses: list) -> None:
        """Add the losses of some steps, numbers or arrays, and empty the list."""
        loss_S = np.concatenate([[self.loss_sum], *map(np.atleast_1d, losses)])
        self.loss_sum = float(np.cumsum(loss_S)[-1])  # one after another: the same number if the epoch is resumed
        self.num_steps += len(loss_S) - 1
        losses.clear()

    @property
    def train_loss(self) -> float:
        """The mean loss of the epoch in progress."""
        return self.loss_sum / self.num_steps

    def update(self, epoch: int, val_loss: float, val_auroc: float, plateau_epochs: int) -> bool:
        """Record one validation; return whether its AUROC, or without one its loss, is the best so far.

        The learning rate is halved after more than `plateau_epochs` validations in a row without a lower loss, counted
        as in torch's ReduceLROnPlateau. val_auroc: NaN in every epoch if no label has both classes.
        """
        self.epoch, self.loss_sum, self.num_steps = epoch, 0.0, 0
        if val_loss < self.best_loss * (1 - _PLATEAU_THRESHOLD):
            self.best_loss, self.epochs_since_best_loss = val_loss, 0
        else:
            self.epochs_since_best_loss += 1
        if self.epochs_since_best_loss > plateau_epochs:
            self.learning_rate, self.epochs_since_best_loss = self.learning_rate / 2, 0
        if math.isnan(val_auroc):
            is_best = val_loss < self.selected_loss or self.best_epoch == 0
            self.selected_loss = min(val_loss, self.selected_loss)
        else:
            is_best = val_auroc > self.best_auroc or self.best_epoch == 0
            self.best_auroc = max(val_auroc, self.best_auroc)
        self.best_epoch = epoch if is_best else self.best_epoch
        return is_best

    @property
    def by_loss(self) -> bool:
        """Whether the validation loss selects the epoch, because there is no AUROC."""
        return math.isfinite(self.selected_loss)

    @property
    def rank(self) -> float:
        """The score of the selected epoch, higher for better: of two runs with the same validation records."""
        return -self.selected_loss if self.by_loss else self.best_auroc

    def describe(self, measure: str) -> str:
        """Return the selected epoch's score in words. measure: what selects where labels have both classes."""
        return f"loss {self.selected_loss:.4f}" if self.by_loss else f"{measure} {self.best_auroc:.4f}"

    def should_stop(self, early_stop_epochs: int) -> bool:
        return self.epoch - self.best_epoch >= early_stop_epochs

    def is_finished(self, config: ConfigDict) -> bool:
        """Return whether the run has reached its last epoch or should stop early."""
        return self.epoch >= config.num_epochs or self.should_stop(config.early_stop_epochs)


def check_finite(loss, step: int, config: ConfigDict) -> float:
    """Return the last of the given losses, that of `step`; raise UserError if any is not finite."""
    losses = np.atleast_1d(loss)
    if not np.isfinite(losses).all():
        first = int(np.argmin(np.isfinite(losses)))
        raise UserError(
            f"{config.name}: the loss of step {step - len(losses) + 1 + first} is {losses[first]}; try a lower "
            f"config.learning_rate (now {config.learning_rate}) or config.precision=float32",
            field="config.learning_rate",
            value=config.learning_rate,
        )
    return float(losses[-1])
