"""The LSTM against loops in numpy and against torch; the encoder's dropout and initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import fast_jit

from medfuse_jax.models import ehr_encoder, series_encoder
from medfuse_jax.models.recurrence import scan
from medfuse_jax.models.recurrence.weights import LstmWeights

TOLERANCE = 1e-5


def _weights(num_inputs: int = 6, width: int = 5, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "input_kernel": rng.standard_normal((num_inputs, 4 * width)).astype(np.float32),
        "recurrent_kernel": rng.standard_normal((width, 4 * width)).astype(np.float32),
        "bias": rng.standard_normal(4 * width).astype(np.float32),
    }


def _series(seed: int = 1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((4, 7, 6)).astype(np.float32), np.array([7, 3, 0, 1], np.int32)


def _numpy_lstm(weights: dict, x_TF: np.ndarray, order: str = "ifgo") -> np.ndarray:
    """Run one series step by step; return the hidden states [T, D]."""

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    width = len(weights["recurrent_kernel"])
    hidden, cell, states = np.zeros(width), np.zeros(width), []
    for x_F in x_TF:
        gates = x_F @ weights["input_kernel"] + hidden @ weights["recurrent_kernel"] + weights["bias"]
        gate = dict(zip(order, np.split(gates, 4)))
        cell = sigmoid(gate["f"]) * cell + sigmoid(gate["i"]) * np.tanh(gate["g"])
        hidden = sigmoid(gate["o"]) * np.tanh(cell)
        states.append(hidden)
    return np.array(states).reshape(-1, width)


def _max_error_against_numpy(order: str) -> float:
    weights, (x_BTF, length_B) = _weights(), _series()
    hidden_BTD, last_BD = ehr_encoder.lstm(weights, x_BTF, length_B)
    worst = 0.0
    for x_TF, length, hidden_TD, last_D in zip(x_BTF, length_B, hidden_BTD, last_BD):
        expected_TD = _numpy_lstm(weights, x_TF[:length], order)
        expected_last_D = expected_TD[-1] if length else np.zeros_like(last_D)
        worst = max(worst, np.abs(last_D - expected_last_D).max())
        worst = max(worst, np.abs(hidden_TD[:length] - expected_TD).max(initial=0))
    return worst


def test_matches_a_numpy_loop_over_the_valid_steps():
    assert _max_error_against_numpy("ifgo") < TOLERANCE


@pytest.mark.parametrize("order", ["ifog", "figo", "igfo"])
def test_a_wrong_gate_order_exceeds_the_tolerance(order):
    assert _max_error_against_numpy(order) > 100 * TOLERANCE


def test_matches_torch_on_packed_series():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weights, (x_BTF, length_B) = _weights(), _series()
    keep = length_B > 0  # torch cannot pack an empty series
    layer = torch.nn.LSTM(6, 5, batch_first=True)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.from_numpy(weights["input_kernel"].T.copy()))
        layer.weight_hh_l0.copy_(torch.from_numpy(weights["recurrent_kernel"].T.copy()))
        layer.bias_ih_l0.copy_(torch.from_numpy(weights["bias"]))
        layer.bias_hh_l0.zero_()
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            torch.from_numpy(x_BTF[keep]), torch.from_numpy(length_B[keep]), batch_first=True, enforce_sorted=False
        )
        _, (torch_last, _) = layer(packed)
    _, last_BD = ehr_encoder.lstm(weights, x_BTF[keep], length_B[keep])
    np.testing.assert_allclose(last_BD, torch_last[0].numpy(), atol=TOLERANCE)


def test_an_empty_series_has_a_zero_state():
    weights = _weights()
    assert not np.any(ehr_encoder.lstm(weights, np.ones((2, 3, 6), np.float32), np.zeros(2, np.int32))[1])
    hidden_BTD, last_BD = ehr_encoder.lstm(weights, np.ones((2, 0, 6), np.float32), np.zeros(2, np.int32))
    assert hidden_BTD.shape == (2, 0, 5) and not np.any(last_BD)


def test_the_masked_scan_skips_invalid_steps():
    weights, (x_BTF, _) = _weights(), _series()
    valid_T = np.array([False, True, False, True, True, False, True])
    _, masked_BD = scan.masked_lstm(weights, x_BTF, np.tile(valid_T, (4, 1)))
    _, removed_BD = ehr_encoder.lstm(weights, x_BTF[:, valid_T], np.full(4, valid_T.sum()))
    np.testing.assert_allclose(masked_BD, removed_BD, atol=1e-6)
    _, everything_BD = ehr_encoder.lstm(weights, x_BTF, np.full(4, 7))
    assert np.abs(masked_BD - everything_BD).max() > 1e-2


def test_mean_over_time_counts_valid_time_steps_only():
    hidden_BTD = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    hidden_BTD[0, 2:] = np.nan
    mean_BD = scan.mean_over_time(jnp.asarray(hidden_BTD), jnp.array([2, 0]))
    np.testing.assert_array_equal(mean_BD, [[1, 2], [0, 0]])


def test_dropout_depends_on_the_row_id_not_on_the_layout():
    key, x_BD = jax.random.key(3), np.ones((8, 256), np.float32)
    dropped = fast_jit(lambda x_BD, row_B: series_encoder.row_dropout(key, x_BD, 0.3, row_B))
    whole_BD = dropped(x_BD, np.arange(8))
    halves = [dropped(x_BD[:4], np.arange(4) + start) for start in (0, 4)]
    np.testing.assert_array_equal(whole_BD, np.concatenate(halves))
    assert len({row.tobytes() for row in np.asarray(whole_BD)}) == 8
    values, counts = np.unique(whole_BD, return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.7], rtol=1e-6)
    assert abs(counts[0] / x_BD.size - 0.3) < 0.04  # 4 standard deviations of 2,048 draws


def test_dropout_applies_in_training_only():
    encoder = ehr_encoder.EhrEncoder(width=8, dropout=0.5)
    x_BTF, length_B = _series()
    variables = {"params": {"layer0": _weights(6, 8), "layer1": _weights(8, 8)}}

    @fast_jit
    def train(x_BTF, length_B, row_B):
        rngs = {"dropout": jax.random.key(1)}
        return encoder.apply(variables, x_BTF, length_B, train=True, dropout_rows_B=row_B, rngs=rngs)

    plain_BD = fast_jit(encoder.apply)(variables, x_BTF, length_B)
    dropped_BD = train(x_BTF, length_B, np.arange(4))
    kept = np.asarray(dropped_BD) != 0
    np.testing.assert_allclose(dropped_BD[kept], 2 * plain_BD[kept], rtol=1e-6)
    assert 0 < kept[:2].sum() < kept[:2].size
    swapped_BD = train(x_BTF[::-1], length_B[::-1], np.arange(4)[::-1])
    np.testing.assert_allclose(dropped_BD, swapped_BD[::-1], atol=1e-6)


def test_initial_weights():
    weights = fast_jit(LstmWeights(16).init, static_argnums=1)(jax.random.key(0), 6)["params"]
    for gate_DD in np.split(np.asarray(weights["recurrent_kernel"]), 4, axis=1):
        np.testing.assert_allclose(gate_DD.T @ gate_DD, np.eye(16), atol=1e-5)
    limit = np.sqrt(6 / (6 + 64))
    assert 0.9 * limit < np.abs(weights["input_kernel"]).max() <= limit
    assert not np.any(weights["bias"])
    torchs = fast_jit(LstmWeights(16, torch_default=True).init, static_argnums=1)(jax.random.key(0), 6)["params"]
    assert all(0.2 < np.abs(leaf).max() <= 0.25 for leaf in jax.tree.leaves(torchs))
