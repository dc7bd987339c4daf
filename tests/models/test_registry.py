"""Every method: shapes, sizes, and that missing modalities change no number and no gradient."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import (
    DISTINCT_METHODS,
    NUM_LABELS,
    batch,
    dense,
    equations,
    fast_jit,
    random_variables,
    shapes,
    tiny_model,
)
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax import schema
from medfuse_jax.models import registry, resnet
from medfuse_jax.models.model import Inputs, ProjectedModel, init_variables, linear
from medfuse_jax.report import wording
from medfuse_jax.runtime.errors import UserError

_WITH_IMAGE = tuple(m for m in DISTINCT_METHODS if m != "uni_ehr")
_WITH_EHR = tuple(m for m in DISTINCT_METHODS if m != "uni_cxr")
_TRANSFORMER = {"ehr_kind": "transformer"}

# Summed up by hand from the released shapes. 25 labels, but for uni_cxr: the 14 of the pre-training.
# An LSTM has one bias here and two in torch; daft3 has no fourth stage, as nothing reads it.
_PARAMETERS = {
    "uni_ehr": 872_729,
    "uni_cxr": 21_291_854,
    "early": 22_295_129,
    "joint": 22_295_129,
    "joint_zeros": 22_295_129,
    "joint_learnable": 22_295_385,
    "medfuse": 23_870_041,
    "medfuse_attention": 22_821_721,
    "unified": 22_308_736,
    "mmtm3": 22_590_347,
    "mmtm4": 22_918_411,
    "daft3": 9_081_945,
    "daft4": 22_253_401,
    "metra": 23_344_729,
    "drfuse": 23_497_636,
    "shaspec": 23_215_707,
    "healnet": 23_348_569,
    "m3care": 23_481_183,
}


def _inputs(batch: dict) -> dict:
    return {"dropout_rows": np.arange(len(batch["length"])), **batch}


@functools.cache
def _functions(method: str, **options):
    """Return (variables, train, evaluate) of a tiny model, compiled once. options: its other fields.

    train(variables, batch) -> (outputs, statistics, gradients of parameters, ehr and image).
    """
    model = tiny_model(method, **options)
    variables = random_variables(model)

    def loss(params, ehr, image, variables, rest):
        outputs, updated = model.apply(
            {**variables, "params": params},
            **{**rest, "ehr": ehr, "image": image},
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        total = jnp.sum(jnp.sin(outputs["logits"]))
        total += sum(jnp.sum(jnp.sin(outputs[name])) for name in outputs if name.endswith("only_logits"))
        total += sum(jnp.sum(term.rows(outputs, jnp.zeros_like(outputs["logits"]))) for term in model.terms)
        return total, (outputs, updated.get("batch_stats", {}))

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)

    @fast_jit
    def step(variables, batch):
        gradients, (outputs, stats) = gradient(variables["params"], batch["ehr"], batch["image"], variables, batch)
        return {"outputs": outputs, "stats": stats, "gradients": gradients}

    def train(variables, batch):
        return step(variables, _inputs(batch))

    @fast_jit
    def evaluate(variables, batch):
        return model.apply(variables, **batch)

    return variables, train, evaluate


def _assert_same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(tolerance or {"rtol": 0})), a, b)


def _largest(tree) -> float:
    return max((float(np.abs(leaf).max(initial=0)) for leaf in jax.tree.leaves(tree)), default=0.0)


@pytest.mark.parametrize("method", registry.METHODS)
def test_parameter_counts_are_golden(method):
    num_labels = 14 if method == "uni_cxr" else 25
    params = shapes(registry.build(method, num_labels))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == _PARAMETERS.get(method)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_a_resnet_50_adds_its_own_parameters_and_a_wider_projection():
    params = shapes(registry.build("medfuse", 25, cxr_kind="resnet50"))["params"]
    of_encoders = 23_508_032 - 21_284_672
    assert sum(x.size for x in jax.tree.leaves(params)) == _PARAMETERS["medfuse"] + of_encoders + (2048 - 512) * 256


@pytest.mark.parametrize("method", _WITH_IMAGE)
def test_every_method_reads_the_wider_features_of_a_resnet_50(method):
    model = tiny_model(method, cxr_kind="resnet50")
    variables = shapes(model)
    assert jax.eval_shape(lambda v: model.apply(v, **batch()), variables)["logits"].shape == (4, NUM_LABELS)


def test_the_config_offers_every_encoder():
    unusual = {name: {*config_lib.FIELDS[f"model.{name}"].choices} - {"lstm", "resnet34"} for name in wording.ENCODERS}
    assert {name: set(shown) for name, shown in wording.ENCODERS.items()} == unusual
    assert {*resnet.BLOCKS, "features"} == set(config_lib.FIELDS["model.cxr_encoder"].choices)


def test_every_method_has_its_golden_count():
    assert set(_PARAMETERS) == set(registry.METHODS)


@pytest.mark.parametrize("method", DISTINCT_METHODS)
def test_outputs_have_the_specified_shapes(method):
    variables, _, evaluate = _functions(method)
    outputs = evaluate(variables, dense(batch()))
    assert outputs["logits"].shape == (4, NUM_LABELS)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.float32)}
    if method in _WITH_EHR:
        assert outputs["ehr_features"].shape == (4, 8)
    if method not in ("uni_ehr", "daft3"):  # projected X-ray features are as wide, here, as the ResNet's
        assert outputs["cxr_features"].shape == (4, 8)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs))


@pytest.mark.parametrize("method", _WITH_IMAGE)
def test_listed_and_dense_images_give_the_same_outputs(method):
    variables, _, evaluate = _functions(method)
    listed = batch()
    a, b = evaluate(variables, listed), evaluate(variables, dense(listed))
    if method == "uni_cxr":  # which scores every image of the dense form
        a, b = (jax.tree.map(lambda x: x[np.array([0, 2])], outputs) for outputs in (a, b))
    _assert_same(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"), [*((m, {}) for m in DISTINCT_METHODS), *((m, _TRANSFORMER) for m in ("medfuse", "metra"))]
)
def test_missing_modalities_change_no_number_and_no_gradient(method, options):
    variables, train, _ = _functions(method, **options)
    clean = batch()
    clean["length"][1] = 0  # row 1: no stay, no X-ray; row 3: no X-ray
    padding_BT1 = (np.arange(5) >= clean["length"][:, None])[..., None]
    poisoned = {
        **clean,
        "ehr": np.where(padding_BT1, np.nan, clean["ehr"]),
        "image": np.where(clean["image_mask"][:, None, None], clean["image"], np.nan),
    }
    a, b = train(variables, clean), train(variables, poisoned)
    _assert_same(a, b)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(b))
    _, ehr_gradient, image_gradient = b["gradients"]
    assert not np.any(np.where(padding_BT1, ehr_gradient, 0)) and not np.any(image_gradient[~clean["image_mask"]])
    # and what is there does reach it
    assert np.any(ehr_gradient) == (method in _WITH_EHR)
    assert np.any(image_gradient[:2]) == (method in _WITH_IMAGE)


@pytest.mark.parametrize("method", ["medfuse"])
def test_absent_rows_of_dense_images_change_nothing_in_training(method):
    variables, train, _ = _functions(method)
    clean = dense(batch())
    poisoned_BHW = np.where(clean["has_cxr"][:, None, None], clean["image"], np.nan)
    a, b = train(variables, clean), train(variables, {**clean, "image": poisoned_BHW})
    _assert_same(a, b)
    listed = train(variables, batch())
    _assert_same(a["stats"], listed["stats"], atol=1e-5)
    _assert_same(a["gradients"][0], listed["gradients"][0], atol=1e-3 * _largest(listed["gradients"][0]))


@pytest.mark.parametrize("method", [m for m in _WITH_IMAGE if m != "uni_cxr"])
def test_an_x_ray_changes_only_its_own_row(method):
    variables, _, evaluate = _functions(method)
    before = batch()
    changed = {**before, "image": before["image"].copy()}
    changed["image"][0] += 1.0  # the X-ray of row 2
    removed = {**before, "image_mask": np.array([False, True, False])}
    base = evaluate(variables, before)["logits"]
    for after in (changed, removed):
        moved_B = np.abs(evaluate(variables, after)["logits"] - base).max(axis=1)
        assert moved_B[2] > 1e-6 and moved_B[[0, 1, 3]].max() == 0


@pytest.mark.parametrize(("method", "options"), [*((m, {}) for m in _WITH_EHR), ("medfuse", _TRANSFORMER)])
def test_random_numbers_follow_a_row_to_another_place_in_the_batch(method, options):
    """Otherwise two devices, or another order of the rows, would draw other dropout."""
    variables, train, _ = _functions(method, **options)
    rows, order = batch(), np.array([2, 0, 3, 1])
    moved = {**rows, "ehr": rows["ehr"][order], "length": rows["length"][order], "dropout_rows": order}
    moved["image_row"] = np.argsort(order)[rows["image_row"]]
    inputs = Inputs(None, None, rows["length"], None, dropout_rows_B=order)
    np.testing.assert_array_equal(inputs.row_id_B, order)  # which M3Care and hourly tasks read
    expected, found = (train(variables, each)["outputs"]["logits"] for each in (rows, moved))
    _assert_same(found, expected[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", _WITH_IMAGE)
def test_without_an_x_ray_its_encoder_gets_no_gradient_and_keeps_its_statistics(method):
    variables, train, _ = _functions(method)
    some, none = batch(), {**batch(), "image_mask": np.zeros(3, bool)}
    gradients, _, image_gradient = train(variables, none)["gradients"]
    assert _largest(gradients["cxr_encoder"]) == 0 == _largest(image_gradient)
    _assert_same(train(variables, none)["stats"], variables["batch_stats"])
    assert _largest(train(variables, some)["gradients"][0]["cxr_encoder"]) > 0


@pytest.mark.parametrize(("method", "options"), [*((m, {}) for m in _WITH_EHR), ("medfuse", _TRANSFORMER)])
def test_without_ehr_its_encoder_gets_no_gradient(method, options):
    variables, train, _ = _functions(method, **options)
    none = {**batch(), "length": np.zeros(4, np.int32)}
    assert _largest(train(variables, none)["gradients"][0]["ehr_encoder"]) == 0
    assert _largest(train(variables, batch())["gradients"][0]["ehr_encoder"]) > 0


def _primitives(jaxpr) -> set[str]:
    return {equation.primitive.name for equation in equations(jaxpr)}


@pytest.mark.parametrize("method", _WITH_IMAGE)
@pytest.mark.parametrize("image", [None, np.zeros((0, 16, 16), np.float32)], ids=["none", "no_slots"])
def test_without_image_slots_no_image_code_is_traced(method, image):
    model = tiny_model(method)
    variables = _functions(method)[0]
    slots = np.zeros(0, np.int32)
    none = {**batch(), "image": image, "image_row": slots, "image_mask": slots.astype(bool)}
    some = batch()
    assert "conv_general_dilated" in _primitives(jax.make_jaxpr(lambda v: model.apply(v, **some))(variables).jaxpr)
    assert "conv_general_dilated" not in _primitives(jax.make_jaxpr(lambda v: model.apply(v, **none))(variables).jaxpr)


@pytest.mark.parametrize("method", _WITH_IMAGE)
def test_empty_image_slots_give_the_same_as_no_slots(method):
    variables, _, evaluate = _functions(method)
    empty = evaluate(variables, {**batch(), "image_mask": np.zeros(3, bool)})
    none = fast_jit(tiny_model(method).apply)(variables, ehr=batch()["ehr"], length=batch()["length"])
    _assert_same(empty, none, atol=1e-5)


@pytest.mark.parametrize("method", DISTINCT_METHODS)
def test_without_stays_no_ehr_code_is_traced(method):
    model = tiny_model(method)
    variables = _functions(method)[0]
    given = batch()
    images = {name: given[name] for name in ("image", "image_row", "image_mask")}
    for ehr in (None, np.zeros((4, 0, 76), np.float32)):
        run = functools.partial(model.apply, ehr=ehr, length=np.zeros(4, np.int32), **images)
        outputs, jaxpr = jax.eval_shape(run, variables), jax.make_jaxpr(run)(variables).jaxpr
        assert outputs["logits"].shape == (4, NUM_LABELS)
        kernels = [v for v, leaf in zip(jaxpr.invars, jax.tree.leaves(variables)) if leaf.shape == (76, 32)]
        used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
        assert len(kernels) == (method in _WITH_EHR) and not any(id(v) in used for v in kernels)


@pytest.mark.parametrize("method", ["medfuse", "medfuse_attention", "mmtm3", "daft3"])
def test_bfloat16_compute_gives_float32_outputs_near_the_exact_ones(method):
    variables, _, evaluate = _functions(method)
    rounded_model = tiny_model(method, dtype=jnp.bfloat16)
    exact, rounded = evaluate(variables, batch()), fast_jit(rounded_model.apply)(variables, **batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.float32)}
    deviation = np.abs(exact["logits"] - rounded["logits"]).max()
    assert 1e-6 < deviation < 0.05 * np.abs(exact["logits"]).max()


def test_medfuse_of_one_modality_is_a_shorter_sequence():
    variables, _, evaluate = _functions("medfuse")
    both = batch(image_rows=(0, 1, 2))
    cxr_only = evaluate(variables, {**both, "length": np.array([0, 2, 4, 1], np.int32)})
    full = evaluate(variables, both)
    np.testing.assert_array_equal(full["logits"][1:], cxr_only["logits"][1:])
    assert np.abs(full["logits"][0] - cxr_only["logits"][0]).max() > 1e-3
    assert not np.any(cxr_only["ehr_features"][0]) and not np.any(cxr_only["cxr_features"][3])


def test_joint_learnable_puts_its_vector_where_an_x_ray_is_missing():
    variables, _, evaluate = _functions("joint_learnable")
    features_BD = np.asarray(evaluate(variables, batch())["cxr_features"])
    token_D = variables["params"]["missing_token"]
    np.testing.assert_array_equal(features_BD[[1, 3]], [token_D, token_D])
    assert np.abs(features_BD[[0, 2]] - token_D).max(axis=1).min() > 1e-3


def test_mmtm_late_averages_the_modalities_present():
    variables, _, evaluate = _functions("mmtm3")
    given = {**batch(), "length": np.array([0, 2, 4, 0], np.int32)}  # X-ray; stay; both; nothing
    out = evaluate(variables, given)
    expected = [out["cxr_only"][0], out["ehr_only"][1], (out["cxr_only"][2] + out["ehr_only"][2]) / 2, np.zeros(3)]
    np.testing.assert_allclose(out["late_average"], expected, atol=1e-6)
    np.testing.assert_array_equal(out["align_loss_rows"] > 0, [False, False, True, False])
    np.testing.assert_allclose(out["align_loss"], out["align_loss_rows"][2], rtol=1e-6)


@pytest.mark.parametrize("method", ["early", "medfuse_attention"])
def test_with_frozen_encoders_the_fusion_alone_is_trained(method):
    """The attention over an encoder's hours is the fusion's."""
    model = tiny_model(method).clone(frozen_encoders=True)
    variables = random_variables(model)

    @fast_jit
    def train(params):
        def loss(params):
            outputs, updated = model.apply(
                {**variables, "params": params},
                **batch(),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return jnp.sum(jnp.sin(outputs["logits"])), updated["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    gradients, stats = train(variables["params"])
    assert _largest({name: gradients[name] for name in ("ehr_encoder", "cxr_encoder")}) == 0
    assert min(_largest(part) for name, part in gradients.items() if not name.endswith("_encoder")) > 0
    _assert_same(stats, variables["batch_stats"])


def test_unified_scores_a_row_by_the_classifier_of_its_modalities():
    variables, _, evaluate = _functions("unified")
    given = {**batch(), "length": np.array([0, 2, 4, 1], np.int32)}  # X-ray; stay; both; stay
    out = jax.tree.map(np.asarray, evaluate(variables, given))
    np.testing.assert_array_equal(out["logits"][[0, 2]], out["joint_logits"][[0, 2]])
    np.testing.assert_array_equal(out["logits"][[1, 3]], out["ehr_only_logits"][[1, 3]])
    assert np.abs(out["joint_logits"] - out["ehr_only_logits"]).max(axis=1).min() > 1e-3
    assert out["cxr_only_logits"].shape == (4, len(schema.RADIOLOGY_LABELS))


def test_the_alignment_loss_pulls_only_the_stay_towards_the_image():
    model = tiny_model("mmtm3")
    variables = random_variables(model)

    @fast_jit
    def gradient(params):
        def loss(params):
            return model.apply({**variables, "params": params}, **batch())["align_loss"]

        return jax.grad(loss)(params)

    found = gradient(variables["params"])
    assert _largest(found["projection"]) > 0
    # after the exchange nothing but the stay's side moves; before it the X-ray has gated the stay
    assert _largest(found["cxr_encoder"]["stage2_block0"]) == 0 < _largest(found["cxr_encoder"]["stage1_block0"])


def test_initial_variables_differ_by_seed_only():
    model = tiny_model("medfuse")
    init = fast_jit(lambda key: init_variables(model, key))
    a, b, c = (init(jax.random.key(seed, impl="rbg")) for seed in (0, 0, 1))
    _assert_same(a, b)
    assert np.any(a["params"]["projection"]["kernel"] != c["params"]["projection"]["kernel"])
    assert set(a) == {"params", "batch_stats"}
    assert a["params"]["ehr_encoder"]["layer0"]["input_kernel"].shape[0] == len(schema.CHANNELS)


def test_a_wrong_method_option_or_label_count_is_named():
    with pytest.raises(UserError, match=r"'medfuze'.*Did you mean 'medfuse'"):
        registry.build("medfuze", 3)
    with pytest.raises(UserError, match=r"'resnet_widht'.*Did you mean 'resnet_width'"):
        registry.build("medfuse", 3, resnet_widht=3)
    for number in (0, 2.0, "3", None):
        with refused(field="num_labels"):
            registry.build("medfuse", number)


def test_lengths_may_come_as_floats():
    """They are floats if they come from a table with a missing value, or from another library's default type."""
    model, one = tiny_model("uni_ehr"), batch()
    variables = random_variables(model)
    whole, as_float = (
        model.apply(variables, ehr=one["ehr"], length=one["length"].astype(dtype))["logits"] for dtype in (int, float)
    )
    np.testing.assert_array_equal(whole, as_float)


class _Sum(ProjectedModel):
    """A toy fusion: the sum of both feature vectors."""

    def setup_fusion(self):
        self.classifier = linear(self.num_labels)

    def forward(self, batch: Inputs) -> dict:
        ehr_BD, cxr_BD = self.encode(batch)
        return {"logits": self.classifier(ehr_BD + cxr_BD)}


def test_a_new_method_is_one_class_and_one_row(monkeypatch):
    """A row alone makes a method that a config may name, that is built with all options and has gradients."""
    monkeypatch.setattr(importlib.import_module("medfuse_jax.models.concat"), "Sum", _Sum, raising=False)
    monkeypatch.setitem(registry.METHODS, "sum", registry.Method("Sum of features", "concat:Sum", features_only=True))
    model = tiny_model("sum", frozen_encoders=True)
    variables, listed = random_variables(model), batch()
    loss = fast_jit(jax.value_and_grad(lambda v: (model.apply(v, **listed)["logits"] ** 2).sum()))
    value, gradient = loss(variables)
    assert (
        value > 0
        and np.any(gradient["params"]["projection"]["kernel"])
        and wording.method_name("sum") == "Sum of features"
    )
    assert "sum" in registry.with_field("frozen_encoders")
