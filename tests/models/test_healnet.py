"""HEALNet: a missing modality's updates are skipped; all layers share their weights."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from model_cases import batch, fast_jit, random_variables, tiny_model

from medfuse_jax.models import healnet


@pytest.fixture(scope="module")
def model():
    model = tiny_model("healnet")
    return model, random_variables(model)


def test_a_row_without_any_modality_is_scored_by_the_latent_vectors_alone(model):
    model, variables = model
    params = variables["params"]
    nothing = {"ehr": batch()["ehr"], "length": np.array([0, 2, 0, 0], np.int32)}
    logits_BK = fast_jit(lambda: model.apply(variables, **nothing)["logits"])()
    mean_D = np.asarray(params["latents"]).mean(axis=0)
    norm_D = nn.LayerNorm().apply({"params": params["norm"]}, mean_D)
    expected_K = norm_D @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(logits_BK[np.array([0, 2, 3])], np.tile(expected_K, (3, 1)), atol=1e-5)
    assert np.abs(logits_BK[1] - expected_K).max() > 1e-2


def test_each_layer_updates_by_each_modality_in_turn_and_tokens_are_read_once(model):
    model, variables = model
    calls = []

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, healnet.Update) and context.method_name != "setup":
            calls.append((context.method_name, context.module.name, args[0].shape[0]))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.apply(variables, **batch()))
    # Four rows with EHR; three slots of X-rays.
    parts = (("ehr_update", 4), ("cxr_update", 3))
    read, updates = ([(name, *part) for part in parts] for name in ("keys_and_values", "__call__"))
    assert calls == [*read, *updates * healnet.NUM_LAYERS]
