"""The optimiser, and what validation changes about it: the learning rate and the end."""

import dataclasses
import functools
import math

import jax
import optax

# torch's ReduceLROnPlateau, which the released code uses, asks for this relative improvement.
_PLATEAU_THRESHOLD = 1e-4


@functools.lru_cache  # so that equal options are equal: steps compiled for one serve the other
def adam(beta2: float) -> optax.GradientTransformation:
    """Adam's direction, without the learning rate: that is a traced argument of the step.

    So one executable serves every rate of a sweep. epsilon as in torch.
    """
    return optax.scale_by_adam(b1=0.9, b2=beta2, eps=1e-8)


def descend(params, direction, learning_rate: jax.Array):
    """params - learning_rate * direction, leaf by leaf."""
    return jax.tree.map(lambda p, d: p - learning_rate * d.astype(p.dtype), params, direction)


@dataclasses.dataclass
class Progress:
    """What a run has reached by its last validation; saved with each checkpoint.

    best_auroc: of the validation stays that select the model; best_epoch: its epoch.
    """

    epoch: int = 0
    learning_rate: float = 0.0
    best_auroc: float = -math.inf
    best_epoch: int = 0
    best_loss: float = math.inf
    epochs_since_best_loss: int = 0

    def update(self, epoch: int, val_loss: float, val_auroc: float, plateau_epochs: int) -> bool:
        """Takes in one validation; returns whether it is the best yet.

        Halves the learning rate after more than `plateau_epochs` validations in a row
        without a better loss, as torch's ReduceLROnPlateau counts. A validation set
        without an AUROC (no label with both classes: nan) is never the best but the first.
        """
        self.epoch = epoch
        if val_loss < self.best_loss * (1 - _PLATEAU_THRESHOLD):
            self.best_loss, self.epochs_since_best_loss = val_loss, 0
        else:
            self.epochs_since_best_loss += 1
        if self.epochs_since_best_loss > plateau_epochs:
            self.learning_rate, self.epochs_since_best_loss = self.learning_rate / 2, 0
        comparable = -math.inf if math.isnan(val_auroc) else val_auroc
        if comparable > self.best_auroc or self.best_epoch == 0:
            self.best_auroc, self.best_epoch = comparable, epoch
            return True
        return False

    def should_stop(self, early_stop_epochs: int) -> bool:
        return self.epoch - self.best_epoch >= early_stop_epochs
