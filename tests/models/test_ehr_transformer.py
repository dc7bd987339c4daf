"""The transformer over series: causal, untouched by padding, and in the place of the LSTM in every method but two.

Shapes: B rows, T time steps, F channels, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import NUM_LABELS, TINY, batch, fast_jit, shapes, tiny_model
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax import torch_import
from medfuse_jax.models import ehr_transformer, registry, transformer

_NEED_LSTM = ["mmtm3", "mmtm4", "daft3", "daft4"]
_OTHERS = [name for name in registry.METHODS if name not in _NEED_LSTM]
_LENGTH_B = np.array([7, 3, 0, 1], np.int32)
_EHR_BTF = np.random.default_rng(1).standard_normal((4, 7, 6)).astype(np.float32)
_VALID_BT1 = (np.arange(7) < _LENGTH_B[:, None])[..., None]


@pytest.fixture(scope="module")
def encoder():
    """A tiny encoder with random weights, and (series, length) -> (states, last states)."""
    module = ehr_transformer.EhrTransformer(width=8)
    variables = fast_jit(module.init)(jax.random.key(0), _EHR_BTF, _LENGTH_B)
    return fast_jit(lambda x, length: module.apply(variables, x, length, method="states"))


def _gradient_of_states() -> np.ndarray:
    """Return the largest gradient of each state by each time step of its own series [B, T, T]."""
    module = ehr_transformer.EhrTransformer(width=8)
    variables = fast_jit(module.init)(jax.random.key(0), _EHR_BTF, _LENGTH_B)

    def total_BT(x_BTF):
        return jnp.sin(module.apply(variables, x_BTF, _LENGTH_B, method="states")[0]).sum(-1)

    by_BTBTF = np.asarray(fast_jit(jax.jacrev(total_BT))(_EHR_BTF))
    return np.abs(np.stack([by_BTBTF[b, :, b] for b in range(4)])).max(-1)


def test_a_state_depends_on_exactly_the_time_steps_until_then():
    valid_BT = _VALID_BT1[..., 0]
    expected_BTT = np.tril(np.ones((7, 7), bool)) & valid_BT[:, :, None] & valid_BT[:, None]
    np.testing.assert_array_equal(_gradient_of_states() > 0, expected_BTT)


def test_a_planted_look_ahead_is_noticed(monkeypatch):
    monkeypatch.setattr(transformer.jnp, "tril", lambda x: x)
    assert _gradient_of_states()[0][np.triu_indices(7, 1)].max() > 1e-4


def test_padding_changes_no_bit_and_a_shorter_padding_no_number(encoder):
    hidden_BTD, last_BD = encoder(_EHR_BTF, _LENGTH_B)
    poisoned = encoder(np.where(_VALID_BT1, _EHR_BTF, np.nan), _LENGTH_B)
    np.testing.assert_array_equal(poisoned[0], hidden_BTD)
    np.testing.assert_array_equal(poisoned[1], last_BD)
    cut_BTD, cut_BD = encoder(_EHR_BTF[1:2, :3], _LENGTH_B[1:2])
    np.testing.assert_allclose(cut_BTD, hidden_BTD[1:2, :3], atol=1e-6)
    np.testing.assert_allclose(cut_BD, last_BD[1:2], atol=1e-6)
    assert np.abs(last_BD[0] - last_BD[1]).max() > 1e-2


def test_the_last_state_is_that_of_the_last_time_step_and_zeros_without_any(encoder):
    hidden_BTD, last_BD = encoder(_EHR_BTF, _LENGTH_B)
    for row, length in enumerate(_LENGTH_B):
        expected_D = hidden_BTD[row, length - 1] if length else np.zeros(8)
        np.testing.assert_array_equal(last_BD[row], expected_D)
    np.testing.assert_array_equal(np.asarray(hidden_BTD)[~_VALID_BT1[..., 0]], 0)
    none_BTD, none_BD = encoder(_EHR_BTF[:, :0], np.zeros(4, np.int32))
    assert none_BTD.shape == (4, 0, 8) and not np.any(none_BD)


def test_the_order_of_time_steps_matters(encoder):
    swapped_BTF = _EHR_BTF.copy()
    swapped_BTF[0, [0, 1]] = _EHR_BTF[0, [1, 0]]
    assert np.abs(encoder(swapped_BTF, _LENGTH_B)[1][0] - encoder(_EHR_BTF, _LENGTH_B)[1][0]).max() > 1e-3


def test_parameter_counts_are_golden():
    """Summed up by hand: the input, two layers of queries, keys, values, output, two feed-forward parts and norms."""
    width, hidden = 256, 1024
    attention = 3 * (width * width + width) + width * width + width
    layer = attention + width * hidden + hidden + hidden * width + width + 2 * 2 * width
    expected = 76 * width + width + 2 * layer + 2 * width
    assert expected == 1_599_744
    params = shapes(registry.build("medfuse", 25, ehr_kind="transformer"))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params["ehr_encoder"])) == expected
    of_lstm = shapes(registry.build("medfuse", 25))["params"]
    assert jax.tree.map(jnp.shape, {**params, "ehr_encoder": 0}) == jax.tree.map(
        jnp.shape, {**of_lstm, "ehr_encoder": 0}
    )


@pytest.mark.parametrize("method", _OTHERS)
def test_every_other_method_reads_it_as_it_reads_the_lstm(method):
    outputs = []
    for kind in ("lstm", "transformer"):
        model = tiny_model(method, ehr_kind=kind)
        made = jax.eval_shape(lambda v, m=model: m.apply(v, **batch()), shapes(model))
        outputs.append(jax.tree.map(lambda x: (x.shape, x.dtype), made))
    assert outputs[0] == outputs[1] and outputs[0]["logits"][0] == (4, NUM_LABELS)


@pytest.mark.parametrize("method", registry.METHODS)
def test_methods_that_act_within_the_lstm_are_refused(method):
    config = config_lib.default()
    config.method, config.model.ehr_encoder = method, "transformer"
    if method in _NEED_LSTM:
        with refused(field="config.model.ehr_encoder", value="transformer", nearest="lstm"):
            config_lib.validate(config)
    else:
        config_lib.validate(config)


def test_it_has_no_released_names():
    model = registry.build("uni_ehr", NUM_LABELS, **TINY, ehr_kind="transformer")
    with refused(field="config.model.ehr_encoder", value="transformer"):
        torch_import.fill(model, "uni_ehr", {})


def test_no_lstm_kernel_is_chosen_or_asked_for(ehr_config):
    from medfuse_jax.models.recurrence import supported

    ehr_config.recurrence, devices = "pallas", jax.devices("cpu")
    assert supported.why_unsupported(ehr_config, devices)
    ehr_config.model.ehr_encoder = "transformer"
    assert not supported.why_unsupported(ehr_config, devices) and supported.choose(ehr_config, devices) == "chunks"
