"""The static features of a stay, known from its start: age, sex, admission type, first care unit.

Shapes: B batch, N records, V values.
"""

import flax.linen as nn
import jax
import numpy as np

from medfuse_jax.schema import STATIC_TEXTS

# Constants rather than statistics of the train split: they suit any adult cohort, and are the same everywhere.
_AGE_CENTRE_YEARS, _AGE_SCALE_YEARS = 60.0, 20.0


def categories(train: dict) -> dict[str, list[str]]:
    """Return the categories of each text in the train split, sorted."""
    return {field: sorted(set(train[field].tolist()) - {""}) for field in STATIC_TEXTS}


def table(part: dict, train: dict) -> np.ndarray:
    """Return float32 [N, V]: the age, a flag for an unknown age, and one slot per category of each text.

    Each text's last slot stands for unknown: '', or a category that is not in the train split. A record of which
    nothing is known is NaN throughout.
    """
    age_N = np.asarray(part["age"], np.float32)
    no_age_N = np.isnan(age_N)
    columns = [np.where(no_age_N, 0, (age_N - _AGE_CENTRE_YEARS) / _AGE_SCALE_YEARS), no_age_N]
    for field, known in categories(train).items():
        columns += [part[field] == category for category in known]
        columns.append(~np.isin(part[field], known))
    values_NV = np.stack(columns, axis=1).astype(np.float32)
    nothing_N = no_age_N & np.all([part[field] == "" for field in STATIC_TEXTS], axis=0)
    values_NV[nothing_N] = np.nan
    return values_NV


class Encoder(nn.Module):
    """A linear layer.

    It starts at zero, so that a slot that no training stay uses never contributes anything.
    """

    width: int

    @nn.compact
    def __call__(self, values_BV: jax.Array) -> jax.Array:
        """Map values [B, V] to tokens [B, width]."""
        return nn.Dense(self.width, kernel_init=nn.initializers.zeros_init())(values_BV)
