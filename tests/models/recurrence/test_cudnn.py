"""The cuDNN LSTM, with jax's reference in place of cuDNN: order of weights, lengths, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn
from lstm_cases import assert_close, assert_padding_is_zero, case, plain, poisoned, with_gradients

from medfuse_jax.models import ehr_encoder

_PLAIN = with_gradients(plain)
_ON_GPU = jax.default_backend() == "gpu"
_cudnn = functools.partial(ehr_encoder.lstm, kernel="cudnn")


@pytest.fixture
def reference(monkeypatch):
    """Replace `rnn.lstm` by jax's reference, with cuDNN's restrictions; on a GPU keep cuDNN."""
    if _ON_GPU:
        return

    def reference_lstm(x, h_0, c_0, weights, seq_lengths, *sizes):
        assert (x.dtype, weights.dtype, seq_lengths.dtype) == (jnp.float32, jnp.float32, jnp.int32)
        input_size, hidden_size, num_layers, _, bidirectional = sizes
        unpacked = rnn.unpack_lstm_weights(weights, input_size, hidden_size, num_layers, bidirectional)
        # cuDNN rejects a length of 0: here it gives NaN.
        x = jnp.where((seq_lengths > 0)[:, None, None], x, jnp.nan)
        return rnn.lstm_ref(x, h_0, c_0, *unpacked, seq_lengths, *sizes)

    monkeypatch.setattr(rnn, "lstm", reference_lstm)


@pytest.mark.parametrize(("num_steps", "lengths"), [(7, [7, 3, 0, 1]), (6, [2, 4]), (3, [0, 0])])
def test_outputs_and_gradients_match_the_plain_scan(reference, num_steps, lengths):
    series = case(num_steps, lengths)
    assert_close(with_gradients(_cudnn)(*series), _PLAIN(*series))


@pytest.mark.skipif(_ON_GPU, reason="a GPU runs cuDNN, not the reference")
def test_a_wrong_order_of_the_weights_fails(reference, monkeypatch):
    unpack = rnn.unpack_lstm_weights

    def swapped(weights, *sizes):
        return unpack(rnn.swap_lstm_gates(weights, *sizes), *sizes)

    monkeypatch.setattr(rnn, "unpack_lstm_weights", swapped)
    series = case(7, [7, 3, 0, 1])
    with pytest.raises(AssertionError):
        assert_close(with_gradients(_cudnn)(*series), _PLAIN(*series))


def test_padding_values_affect_neither_outputs_nor_gradients(reference):
    weights, x_BTF, length_B = case(8, [5, 3, 0])
    outputs, with_nans = (
        (with_gradients(_cudnn)(weights, x, length_B), _cudnn(weights, x, length_B))
        for x in (x_BTF, poisoned(x_BTF, length_B))
    )
    jax.tree.map(np.testing.assert_array_equal, outputs, with_nans)
    hidden_BTD, last_BD = with_nans[1]
    assert_padding_is_zero(hidden_BTD, length_B)
    assert not np.any(last_BD[2])


def test_forward_and_backward_call_cudnn(monkeypatch):
    """Checked on the jaxpr, with a made-up workspace size, so that no GPU is needed."""
    monkeypatch.setattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes", lambda *_: (1, 1), raising=False)
    text = str(jax.make_jaxpr(with_gradients(_cudnn))(*case(7, [7, 3])))
    assert "rnn_fwd" in text and "rnn_bwd" in text
