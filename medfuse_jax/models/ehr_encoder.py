"""The EHR encoder: two LSTM layers over a stay's series. ehr_transformer.py has the other one.

Shapes: B batch, T time, F input channel, D LSTM width, G = 4 D gates in the order i, f, g, o.
"""

import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence.chunks import chunked_lstm
from medfuse_jax.models.recurrence.weights import LstmWeights
from medfuse_jax.models.series_encoder import SeriesEncoder


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


class EhrEncoder(SeriesEncoder):
    """Two LSTM layers over a stay; the last hidden state is its feature vector.

    recurrence: one of `LSTM_KERNELS`. ops: 'plain', or 'cpu' for devices that are CPUs.
    """

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
