"""The EHR encoder: two LSTM layers over a stay's series.

Shapes: B batch, T time, F input channel, D LSTM width, G = 4 D gates in the order i, f, g, o.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence.chunks import chunked_lstm
from medfuse_jax.models.recurrence.weights import LstmWeights


def _pallas_lstm(*args):
    from medfuse_jax.models.recurrence import pallas  # only where it is used: its Triton backend is deprecated

    return pallas.pallas_lstm(*args)


def _cudnn_lstm(*args):
    from medfuse_jax.models.recurrence import cudnn

    return cudnn.cudnn_lstm(*args)


# Interchangeable kernels, each tested against `scan.masked_lstm`; `recurrence.supported` says where each runs.
LSTM_KERNELS = {"chunks": chunked_lstm, "pallas": _pallas_lstm, "cudnn": _cudnn_lstm}


def lstm(
    weights: dict,
    x_BTF: jax.Array,
    length_B: jax.Array,
    dtype=jnp.float32,
    kernel: str = "chunks",
    ops: str = "plain",
) -> tuple[jax.Array, jax.Array]:
    """Run an LSTM over the first `length` time steps of each series.

    weights: input_kernel [F, G], recurrent_kernel [D, G], bias [G], float32. dtype: of the products. The state is
    float32. kernel: one of `LSTM_KERNELS`. ops: 'cpu' for devices that are CPUs. Returns the hidden states [B, T, D],
    zeros past a series' end, and the last one [B, D], zeros for a length of 0. Values in the padding, NaN included,
    affect neither outputs nor gradients.
    """
    arrays = (weights["input_kernel"], weights["recurrent_kernel"], weights["bias"])
    num_rows, num_time_steps, _ = x_BTF.shape
    if num_time_steps == 0:
        width = len(weights["recurrent_kernel"])
        return jnp.zeros((num_rows, 0, width)), jnp.zeros((num_rows, width))
    length_B = jnp.minimum(length_B, num_time_steps)  # a kernel may pad T: the added time steps must not count
    options = (ops != "cpu",) if kernel == "chunks" else ()  # whether to unroll a chunk's time steps
    return LSTM_KERNELS[kernel](*arrays, x_BTF, length_B, jnp.dtype(dtype), *options)


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


class EhrEncoder(nn.Module):
    """Two LSTM layers over a stay; the last hidden state is its feature vector.

    recurrence: one of `LSTM_KERNELS`. ops: 'plain', or 'cpu' for devices that are CPUs.
    """

    width: int = 256
    dropout: float = 0.3
    dtype: jnp.dtype = jnp.float32
    recurrence: str = "chunks"
    ops: str = "plain"

    def setup(self):
        self.layer0 = LstmWeights(self.width)
        self.layer1 = LstmWeights(self.width)

    def first_layer(self, ehr_BTF: jax.Array, length_B: jax.Array) -> jax.Array:
        """Return the hidden states of the first layer [B, T, D]."""
        return lstm(self.layer0(ehr_BTF.shape[-1]), ehr_BTF, length_B, self.dtype, self.recurrence, self.ops)[0]

    def second_layer(self, hidden_BTD: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the second layer's hidden states [B, T, D] and the last one [B, D], from those of the first."""
        return lstm(self.layer1(self.width), hidden_BTD, length_B, self.dtype, self.recurrence, self.ops)

    def states(self, ehr_BTF: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the second layer's hidden states [B, T, D] and the last one [B, D], without dropout."""
        return self.second_layer(self.first_layer(ehr_BTF, length_B), length_B)

    def last_state(
        self, hidden_BTD: jax.Array, length_B: jax.Array, train: bool = False, dropout_rows_B: jax.Array | None = None
    ) -> jax.Array:
        """Return the feature vector [B, D] from the first layer's hidden states.

        dropout_rows_B: ids of the rows in the whole batch, for dropout (train only).
        """
        return self.drop(self.second_layer(hidden_BTD, length_B)[1], train, dropout_rows_B)

    def drop(self, last_BD: jax.Array, train: bool = False, dropout_rows_B: jax.Array | None = None) -> jax.Array:
        """Apply the encoder's dropout to features, whether computed now or earlier."""
        if not train or _is_off(self.dropout):
            return last_BD
        if dropout_rows_B is None:
            dropout_rows_B = jnp.arange(last_BD.shape[0])
        return row_dropout(self.make_rng("dropout"), last_BD, self.dropout, dropout_rows_B)

    def __call__(self, ehr_BTF, length_B, train: bool = False, dropout_rows_B=None) -> jax.Array:
        """Turn stays [B, T, F] with `length` valid time steps into features [B, D], float32."""
        return self.last_state(self.first_layer(ehr_BTF, length_B), length_B, train, dropout_rows_B)
