"""What is known of a stay from its start: age, sex, admission type, first care unit.

Shapes: B batch, N records, V values.
"""

import flax.linen as nn
import jax
import numpy as np

from medfuse_jax.schema import STATIC_TEXTS

# Fixed numbers, not the train split's: near 0 and 1 in any adult cohort, and the same on every machine.
_AGE_CENTRE_YEARS, _AGE_SCALE_YEARS = 60.0, 20.0


def categories(train: dict) -> dict[str, list[str]]:
    """The known categories of each text in the train split, sorted."""
    return {field: sorted(set(train[field].tolist()) - {""}) for field in STATIC_TEXTS}


def table(part: dict, train: dict) -> np.ndarray:
    """float32 [N, V]: the age, 1 where it is unknown, and of each text one slot a category, the last for unknown.

    Unknown is '', and a category that the train split has not. NaN throughout for a record of which nothing
    is known at all.
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
    """A linear layer: a sum of what each value contributes.

    It starts as zeros, so that a slot that no train stay is in never adds anything.
    """

    width: int

    @nn.compact
    def __call__(self, values_BV: jax.Array) -> jax.Array:
        """Values [B, V] -> tokens [B, width]."""
        return nn.Dense(self.width, kernel_init=nn.initializers.zeros_init())(values_BV)
