"""What the encoders of series share: the last state as a stay's features, and its dropout.

Shapes: B batch, T time, F input channel, H hours, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def row_dropout(key: jax.Array, x_BD: jax.Array, rate: float | jax.Array, row_B: jax.Array) -> jax.Array:
    """Drop features with a mask that depends only on the key and the row's id.

    One device with 16 rows and eight devices with 2 rows each therefore drop the same features. rate: a number, or a
    traced array, which lets a sweep's trials have different rates.
    """
    if _is_off(rate):
        return x_BD

    def keep(row):
        return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - rate, x_BD.shape[1:])

    return jnp.where(jax.vmap(keep)(row_B), x_BD / (1 - rate), 0)


def _is_off(rate: float | jax.Array) -> bool:
    return not isinstance(rate, jax.Array) and rate == 0


def states_before(hidden_BTD: jax.Array, step_BH: jax.Array) -> jax.Array:
    """Return the state after the first `step` time steps at each hour [B, H, D]; zeros for 0."""
    state_BHD = jnp.take_along_axis(hidden_BTD, jnp.maximum(step_BH - 1, 0)[..., None], axis=1)
    return jnp.where(step_BH[..., None] > 0, state_BHD, 0)


class SeriesEncoder(nn.Module):
    """Base class of encoders of series. A stay's features are its last state, with dropout.

    width: D. dtype: of the products; states are float32.
    """

    width: int = 256
    dropout: float = 0.3
    dtype: jnp.dtype = jnp.float32

    def states(self, ehr_BTF: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the state at each time step [B, T, D] and the last one [B, D], without dropout.

        A state depends on no later time step. States past the end are zero; so is the last state of an empty
        series.
        """
        raise NotImplementedError

    def drop(self, last_BD: jax.Array, train: bool = False, dropout_rows_B: jax.Array | None = None) -> jax.Array:
        """Apply the encoder's dropout to features, whether computed now or earlier.

        dropout_rows_B: ids of the rows in the whole batch, for dropout (train only).
        """
        if not train or _is_off(self.dropout):
            return last_BD
        if dropout_rows_B is None:
            dropout_rows_B = jnp.arange(last_BD.shape[0])
        return row_dropout(self.make_rng("dropout"), last_BD, self.dropout, dropout_rows_B)

    def __call__(self, ehr_BTF, length_B, train: bool = False, dropout_rows_B=None) -> jax.Array:
        """Turn stays [B, T, F] with `length` valid time steps into features [B, D], float32."""
        return self.drop(self.states(ehr_BTF, length_B)[1], train, dropout_rows_B)
