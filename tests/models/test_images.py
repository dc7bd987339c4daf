"""All X-rays of a stay in the fusion: a token each, in order of time; what is absent changes nothing.

Shapes: B rows, P images, M images of a row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import batch, fast_jit, random_variables, tiny_model

from medfuse_jax import config as config_lib
from medfuse_jax.models import attention, fusion, registry
from medfuse_jax.models.model import variable_shapes
from medfuse_jax.runtime.errors import UserError

METHODS = registry.with_field("all_images")
# Row 0 has one X-ray, row 2 three; slot 4 is empty.
_ROW_P, _MASK_P = np.array([2, 2, 2, 0, 0], np.int32), np.array([True] * 4 + [False])
_SLOT_BM = np.array([[3, -1, -1], [-1] * 3, [0, 1, 2], [-1] * 3], np.int32)
_TIME_P = np.array([2.0, 9.0, 30.0, 5.0, 0.0], np.float32)


def _stays(**changes) -> dict:
    listed = {"image_row": _ROW_P, "image_mask": _MASK_P, "image_slot": _SLOT_BM, "image_time_h": _TIME_P}
    return batch(image_rows=(2, 2, 2, 0), slots=5) | listed | changes


@pytest.fixture(scope="module", params=METHODS)
def scored(request):
    """Return the method's scores of a batch, for random variables."""
    model = tiny_model(request.param, all_images=True)
    variables = random_variables(model)
    apply = fast_jit(lambda inputs: model.apply(variables, **inputs, train=False))
    return lambda **changes: np.asarray(apply(_stays(**changes))["logits"])


def test_medfuse_and_its_attention_variant_read_all_images():
    assert METHODS == ["medfuse", "medfuse_attention"]


@pytest.mark.parametrize("method", METHODS)
def test_one_image_is_fused_as_the_last_is_until_times_matter(method):
    """The embedding of times starts as zeros; the attention's place of earlier X-rays is not used."""
    last, every = tiny_model(method), tiny_model(method, all_images=True)
    variables = random_variables(every)
    params = variables["params"] | {"image_time": jax.tree.map(jnp.zeros_like, variables["params"]["image_time"])}
    of_last = {name: x for name, x in params.items() if name != "image_time"}
    if method == "medfuse_attention":
        of_last["modality_attention"] = {
            name: x if name == "score" else x[:-1] for name, x in params["modality_attention"].items()
        }
    inputs = batch()
    listed = {"image_slot": np.array([[1], [-1], [0], [-1]], np.int32), "image_time_h": np.array([3.0, 7, 0], "f4")}
    expected = fast_jit(lambda: last.apply(variables | {"params": of_last}, **inputs))()
    found = fast_jit(lambda: every.apply(variables | {"params": params}, **inputs, **listed, train=False))()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6, err_msg=name)


def test_the_embedding_of_a_time_is_nothing_at_first_and_tells_times_apart():
    embedding, time_h_P = fusion.TimeEmbedding(4), np.array([0, 2, 2, 47, 300, 2000], np.float32)
    variables = embedding.init(jax.random.key(0), time_h_P)
    assert not np.any(embedding.apply(variables, time_h_P))
    variables = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape), variables)
    found_PD = np.asarray(embedding.apply(variables, time_h_P))
    np.testing.assert_array_equal(found_PD[1], found_PD[2])
    assert len(np.unique(found_PD.round(3), axis=0)) == 5


def test_the_order_of_slots_does_not_matter_and_that_of_times_does(scored):
    expected_BK = scored()
    order = np.array([3, 2, 4, 0, 1])  # what each slot now holds
    moved = {"image": _stays()["image"][order], "image_time_h": _TIME_P[order]}
    moved |= {"image_row": _ROW_P[order], "image_mask": _MASK_P[order]}
    place = np.append(np.argsort(order), -1).astype(np.int32)  # of each old slot, -1 stays -1
    np.testing.assert_allclose(scored(**moved, image_slot=place[_SLOT_BM]), expected_BK, rtol=1e-5, atol=1e-6)
    reversed_PHW = _stays()["image"][[2, 1, 0, 3, 4]]
    changed_B = (scored(image=reversed_PHW) != expected_BK).any(1)
    assert changed_B.tolist() == [False, False, True, False]


def test_every_image_and_its_time_reach_the_score_of_its_row_alone(scored):
    expected_BK, image_PHW = scored(), _stays()["image"]
    for slot, row in ((0, 2), (1, 2), (2, 2), (3, 0)):
        other = image_PHW.copy()
        other[slot] = -other[slot]
        later_P = _TIME_P + np.eye(5, dtype=np.float32)[slot]
        for changes in ({"image": other}, {"image_time_h": later_P}):
            changed_B = (scored(**changes) != expected_BK).any(1)
            assert np.flatnonzero(changed_B).tolist() == [row]


def test_an_absent_image_changes_nothing(scored):
    expected_BK, image_PHW = scored(), _stays()["image"].copy()
    image_PHW[4] = np.nan
    np.testing.assert_array_equal(scored(image=image_PHW), expected_BK)
    wider_BM = np.pad(_SLOT_BM, ((0, 0), (0, 2)), constant_values=-1)
    np.testing.assert_allclose(scored(image_slot=wider_BM), expected_BK, rtol=1e-5, atol=1e-6)
    # without its second X-ray, row 2 is as if it never had been there; the other rows do not notice
    without_BM = _SLOT_BM.copy()
    without_BM[2] = [0, 2, -1]
    found_BK = scored(image_slot=without_BM, image_mask=_MASK_P & (np.arange(5) != 1))
    gap_BM = _SLOT_BM.copy()
    gap_BM[2] = [0, -1, 2]
    np.testing.assert_allclose(scored(image_slot=gap_BM), found_BK, rtol=1e-5, atol=1e-6)
    changed_B = (found_BK != expected_BK).any(1)
    assert changed_B.tolist() == [False, False, True, False]


def test_earlier_images_share_one_weight_and_all_weights_add_up_to_one():
    model = tiny_model("medfuse_attention", all_images=True)
    variables = random_variables(model)
    apply = fast_jit(lambda given: model.apply(variables, **given, mutable=["intermediates"])[1]["intermediates"])
    weight_BM = np.asarray(apply(_stays())["modality_weights"])
    assert model.token_names == ("ehr", "cxr", attention.EARLIER)
    np.testing.assert_array_equal(weight_BM > 0, [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
    np.testing.assert_allclose(weight_BM.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("method", "added"), [("medfuse", 20 * 8), ("medfuse_attention", 20 * 8 + 2 * (8 * 8 + 8))])
def test_the_parameters_that_all_images_take(method, added):
    def count(**options):
        shapes = variable_shapes(tiny_model(method, **options))["params"]
        return sum(np.prod(x.shape) for x in jax.tree.leaves(shapes))

    assert count(all_images=True) - count() == added


@pytest.mark.parametrize("method", [name for name in registry.METHODS if name not in METHODS])
def test_a_method_of_one_x_ray_a_stay_is_refused(method):
    config = config_lib.default()
    config.method, config.data.images = method, "all"
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert (caught.value.field, caught.value.value) == ("config.data.images", "all")
    assert repr(method) in str(caught.value) and "medfuse_attention" in str(caught.value)
