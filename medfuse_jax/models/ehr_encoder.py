"""The recurrence, and the EHR encoder made of two of them.

Shapes: B batch, T time, F input channel, D LSTM width, G = 4 D gates in the order i, f, g, o.

`lstm` is the one door to the recurrence, which has several forms; each is tested against `masked_lstm`, the plain scan.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models.recurrence.cell import NUM_GATES, valid_steps
from medfuse_jax.models.recurrence.chunks import chunked_lstm
from medfuse_jax.models.recurrence.cudnn import cudnn_lstm
from medfuse_jax.models.recurrence.pallas import pallas_lstm

# The first runs anywhere, the others on CUDA.
FORMS = {"chunks": chunked_lstm, "pallas": pallas_lstm, "cudnn": cudnn_lstm}


def lstm(
    weights: dict, x_BTF: jax.Array, length_B: jax.Array, dtype=jnp.float32, form: str = "chunks"
) -> tuple[jax.Array, jax.Array]:
    """An LSTM over series of which only the first `length` steps count.

    weights: input_kernel [F, G], recurrent_kernel [D, G], bias [G], float32. dtype: of the
    products; the state is float32. form: of `FORMS`. Returns the hidden states [B, T, D], zeros
    past a series' end, and the last one [B, D]: zeros for a length of 0. What stands in the
    padding, NaN included, reaches neither outputs nor gradients.
    """
    kernels = (weights["input_kernel"], weights["recurrent_kernel"], weights["bias"])
    if x_BTF.shape[1] == 0:
        return jnp.zeros((*x_BTF.shape[:2], len(kernels[1]))), jnp.zeros((x_BTF.shape[0], len(kernels[1])))
    length_B = jnp.minimum(length_B, x_BTF.shape[1])  # a form's own padding is no step
    return FORMS[form](*kernels, x_BTF, length_B, jnp.dtype(dtype))


def masked_lstm(weights: dict, x_BTF: jax.Array, valid_BT: jax.Array, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """The plain scan, for steps that count in any pattern: an invalid step leaves the state as it was.

    Returns the hidden states [B, T, D], after an invalid step those before it, and the last one.
    """
    clean_BTF = jnp.where(valid_BT[..., None], x_BTF, 0).astype(dtype)
    # The input product of all steps at once, time first: the scan then only has the recurrent one.
    gates_TBG = jnp.einsum("btf,fg->tbg", clean_BTF, weights["input_kernel"].astype(dtype))
    gates_TBG = gates_TBG.astype(jnp.float32) + weights["bias"]
    recurrent_DG = weights["recurrent_kernel"].astype(dtype)

    def step(state, inputs):
        hidden_BD, cell_BD = state
        gates_BG, valid_B = inputs
        gates_BG = gates_BG + (hidden_BD.astype(dtype) @ recurrent_DG).astype(jnp.float32)
        i_BD, f_BD, g_BD, o_BD = jnp.split(gates_BG, NUM_GATES, axis=-1)
        next_cell_BD = jax.nn.sigmoid(f_BD) * cell_BD + jax.nn.sigmoid(i_BD) * jnp.tanh(g_BD)
        next_hidden_BD = jax.nn.sigmoid(o_BD) * jnp.tanh(next_cell_BD)
        hidden_BD = jnp.where(valid_B[:, None], next_hidden_BD, hidden_BD)
        cell_BD = jnp.where(valid_B[:, None], next_cell_BD, cell_BD)
        return (hidden_BD, cell_BD), hidden_BD

    zeros_BD = jnp.zeros((x_BTF.shape[0], recurrent_DG.shape[0]), jnp.float32)
    (last_BD, _), hidden_TBD = jax.lax.scan(step, (zeros_BD, zeros_BD), (gates_TBG, valid_BT.T))
    return hidden_TBD.swapaxes(0, 1), last_BD


def mean_over_steps(hidden_BTD: jax.Array, length_B: jax.Array) -> jax.Array:
    """The mean over the valid steps [B, D]; zeros for a length of 0."""
    valid_BT1 = valid_steps(length_B, hidden_BTD.shape[1])[..., None]
    total_BD = jnp.sum(jnp.where(valid_BT1, hidden_BTD, 0), axis=1)
    return total_BD / jnp.maximum(jnp.sum(valid_BT1, axis=1), 1)


def row_dropout(key: jax.Array, x_BD: jax.Array, rate: float | jax.Array, row_B: jax.Array) -> jax.Array:
    """Dropout that a row takes with it: its mask depends on the key and its row id alone.

    So one device with 16 rows and eight devices with 2 each drop the same numbers. rate: a number,
    or an array (traced), so that the trials of a sweep can differ in it.
    """
    if _is_off(rate):
        return x_BD

    def keep(row):
        return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - rate, x_BD.shape[1:])

    return jnp.where(jax.vmap(keep)(row_B), x_BD / (1 - rate), 0)


def _is_off(rate: float | jax.Array) -> bool:
    return not isinstance(rate, jax.Array) and rate == 0


def orthogonal_per_gate(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """A recurrent kernel [D, 4 D] of four random orthogonal matrices.

    Differs from MedFuse (models/lstm.py), where the four together have orthonormal columns,
    so that each gate's matrix has half the gain.
    """
    width = shape[0]
    gaussian_4DD = jax.random.normal(key, (NUM_GATES, width, width))
    return jnp.concatenate(list(_nearest_orthogonal(gaussian_4DD)), axis=1).astype(dtype)


def _nearest_orthogonal(x_4DD: jax.Array) -> jax.Array:
    """The orthogonal factor of each matrix's polar decomposition (uniform, for Gaussian ones), by Newton-Schulz.

    Products alone: a QR is a LAPACK call, and several at once can wait for each other for ever in XLA on
    two cores. 80 steps: a singular value grows by a half in each until it is near one.
    """

    def closer(_, x_4DD):
        gram_4DD = jnp.matmul(x_4DD.mT, x_4DD, precision="highest")
        return 1.5 * x_4DD - 0.5 * jnp.matmul(x_4DD, gram_4DD, precision="highest")

    norm_411 = jnp.sqrt(jnp.sum(x_4DD**2, axis=(1, 2), keepdims=True))  # at least the largest singular value
    return jax.lax.fori_loop(0, 80, closer, x_4DD / norm_411)


def uniform_by_width(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """torch's default for every weight of an LSTM: uniform within 1 / sqrt(D). shape [..., 4 D]."""
    limit = (shape[-1] // NUM_GATES) ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class LstmWeights(nn.Module):
    """The weights of one LSTM layer, float32: what `lstm` takes as `weights`.

    `torch_default` chooses torch's initial values; otherwise Glorot, orthogonal and zeros.
    """

    width: int
    torch_default: bool = False

    @nn.compact
    def __call__(self, num_inputs: int) -> dict:
        if self.torch_default:
            input_init = recurrent_init = bias_init = uniform_by_width
        else:
            input_init, recurrent_init = nn.initializers.glorot_uniform(), orthogonal_per_gate
            bias_init = nn.initializers.zeros_init()
        num_gates = NUM_GATES * self.width
        return {
            "input_kernel": self.param("input_kernel", input_init, (num_inputs, num_gates)),
            "recurrent_kernel": self.param("recurrent_kernel", recurrent_init, (self.width, num_gates)),
            # torch adds two biases, whose sum is all that counts; here there is one
            "bias": self.param("bias", bias_init, (num_gates,)),
        }


class EhrEncoder(nn.Module):
    """Two LSTM layers over a stay; the last hidden state is its feature vector. recurrence: of `FORMS`."""

    width: int = 256
    dropout: float = 0.3
    dtype: jnp.dtype = jnp.float32
    recurrence: str = "chunks"

    def setup(self):
        self.layer0 = LstmWeights(self.width)
        self.layer1 = LstmWeights(self.width)

    def first_layer(self, ehr_BTF: jax.Array, length_B: jax.Array) -> jax.Array:
        """The hidden states of the first layer [B, T, D]."""
        # NaN * 0 is NaN in the weights' gradient: `lstm` clears the padding before it multiplies
        return lstm(self.layer0(ehr_BTF.shape[-1]), ehr_BTF, length_B, self.dtype, self.recurrence)[0]

    def last_state(
        self, hidden_BTD: jax.Array, length_B: jax.Array, train: bool = False, dropout_rows_B: jax.Array | None = None
    ) -> jax.Array:
        """The feature vector [B, D] from the first layer's hidden states.

        dropout_rows_B: ids of the rows in the whole batch, for dropout (train only).
        """
        last_BD = self.second_layer(hidden_BTD, length_B)[1]
        return self.drop(last_BD, train, dropout_rows_B)

    def second_layer(self, hidden_BTD: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The hidden states of the second layer [B, T, D] and the last one [B, D], from those of the first."""
        return lstm(self.layer1(self.width), hidden_BTD, length_B, self.dtype, self.recurrence)

    def states(self, ehr_BTF: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Every hidden state of the second layer [B, T, D] and the last one [B, D], without dropout."""
        return self.second_layer(self.first_layer(ehr_BTF, length_B), length_B)

    def drop(self, last_BD: jax.Array, train: bool = False, dropout_rows_B: jax.Array | None = None) -> jax.Array:
        """The encoder's dropout, which also falls on features that were computed before."""
        if not train or _is_off(self.dropout):
            return last_BD
        if dropout_rows_B is None:
            dropout_rows_B = jnp.arange(last_BD.shape[0])
        return row_dropout(self.make_rng("dropout"), last_BD, self.dropout, dropout_rows_B)

    def __call__(self, ehr_BTF, length_B, train: bool = False, dropout_rows_B=None) -> jax.Array:
        """Stays [B, T, F] of `length` valid steps -> features [B, D], float32."""
        return self.last_state(self.first_layer(ehr_BTF, length_B), length_B, train, dropout_rows_B)
