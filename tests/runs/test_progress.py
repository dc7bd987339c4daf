"""Progress: learning-rate plateau and early stopping, counted as the released code does."""

import math

from medfuse_jax.runs.progress import Progress


def _rate_after(losses) -> float:
    progress = Progress(learning_rate=1.0)
    for epoch, loss in enumerate(losses, start=1):
        progress.update(epoch, val_loss=loss, val_auroc=0.6, plateau_epochs=10)
    return progress.learning_rate


def test_learning_rate_halves_after_ten_epochs_without_a_lower_loss():
    assert _rate_after([0.5] * 11) == 1.0
    assert _rate_after([0.5] * 11 + [0.49999]) == 0.5  # a relative improvement below 1e-4 does not count
    assert _rate_after([0.5] * 22) == 0.5
    assert _rate_after([0.5] * 23) == 0.25
    assert _rate_after([0.5 - 0.01 * (epoch // 8) for epoch in range(1, 40)]) == 1.0  # a lower loss restarts the count


def test_stops_after_epochs_without_a_higher_auroc():
    progress = Progress()
    assert progress.update(1, 0.5, 0.7, 10)
    for epoch in range(2, 16):
        assert not progress.update(epoch, 0.5, 0.69, 10)
        assert not progress.should_stop(15)
    progress.update(16, 0.5, 0.7, 10)  # equal is not higher
    assert progress.should_stop(15) and progress.best_epoch == 1


def test_without_an_auroc_the_lowest_validation_loss_selects():
    progress = Progress()
    assert [progress.update(e, loss, math.nan, 10) for e, loss in enumerate([0.6, 0.5, 0.5, 0.4, 0.7], 1)] == [
        True,
        True,
        False,  # equal is not lower
        True,
        False,
    ]
    assert progress.best_epoch == 4 and progress.selected_loss == 0.4 and progress.best_auroc == -math.inf
