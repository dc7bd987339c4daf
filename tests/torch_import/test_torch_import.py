"""Released weights: which names are read, what is refused, and parity with the released models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from model_cases import (
    NUM_LABELS,
    TINY,
    fast_jit,
    random_variables,
    reference_module,
    reference_outputs,
    reference_shapes,
    reference_state_dict,
)
from refusals import refused

from medfuse_jax import torch_import
from medfuse_jax.models import batch_norm, ehr_encoder, registry, resnet
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import.names import released_methods

TOLERANCE = 1e-4  # of the contract, in float32

# case of the reference -> (method, labels, whether every row has its X-ray)
_CASES = {
    "uni_ehr": ("uni_ehr", 25, True),
    "uni_cxr": ("uni_cxr", 14, True),
    "joint_paired": ("joint", 25, True),
    "joint_zeros": ("joint_zeros", 25, False),
    "joint_learnable": ("joint_learnable", 25, False),
    "medfuse": ("medfuse", 25, False),
    "mortality": ("medfuse", 1, False),
    "mmtm3": ("mmtm3", 25, True),
    "mmtm4": ("mmtm4", 25, True),
    "daft3": ("daft3", 25, True),
    "daft4": ("daft4", 25, True),
}
_ALIKE = ("joint_paired", "joint_zeros", "mortality", "mmtm3", "daft4")  # each differs from another case in one value
_OUTPUT_NAMES = {"ehr_feats": "ehr_features", "cxr_feats": "cxr_features"}
_BACKBONE = "cxr_model.vision_backbone."


@functools.cache
def _tiny(method: str):
    model = registry.build(method, NUM_LABELS, **TINY)
    return model, random_variables(model)


def _tiny_state_dict(method: str = "medfuse") -> dict:
    return torch_import.export(_tiny(method)[1], method)


@functools.cache
def _tiny_50(method: str):
    model = registry.build(method, NUM_LABELS, **TINY, cxr_kind="resnet50")
    return model, random_variables(model)


def _bare_resnet(tiny=_tiny) -> dict:
    released = torch_import.export(tiny("uni_cxr")[1], "uni_cxr")
    return {n.removeprefix(_BACKBONE): v for n, v in released.items() if n.startswith(_BACKBONE)}


def _load_tiny(state_dict: dict, method: str = "medfuse", num_labels: int = NUM_LABELS):
    return torch_import.load(state_dict, method, num_labels, **TINY)


def _assert_same_bits(a, b):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _refused(call, *args) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return caught.value


def test_data_parallel_names_are_read_and_mixed_names_refused():
    state_dict = _tiny_state_dict()
    wrapped = {f"module.{name}": value for name, value in state_dict.items()}
    jax.tree.map(_assert_same_bits, _load_tiny(wrapped)[1], _load_tiny(state_dict)[1])
    some = dict(list(wrapped.items())[:1])
    assert _refused(_load_tiny, {**state_dict, **some}).value == list(some)


@pytest.mark.parametrize("method", released_methods())
def test_load_inverts_export_to_the_bit(method):
    model, variables = _tiny(method)
    variables = jax.tree.map(lambda x: x.at[..., :2].set(jnp.array([-0.0, 0.0])), variables)  # both zeros, too
    state_dict = torch_import.export(variables, method)
    loaded_model, loaded = _load_tiny(state_dict, method)
    assert loaded_model == model
    jax.tree.map(_assert_same_bits, loaded, variables)
    assert {v.dtype for v in state_dict.values()} <= {np.dtype("float32"), np.dtype("int64")}


@pytest.mark.parametrize("method", ["uni_cxr", "medfuse", "mmtm3", "daft3"])
def test_a_resnet_50_is_exported_and_read_back(method):
    _, variables = _tiny_50(method)
    state_dict = torch_import.export(variables, method)
    assert (
        f"{_BACKBONE}layer1.0.downsample.0.weight" in state_dict and f"{_BACKBONE}layer1.0.conv3.weight" in state_dict
    )
    _, loaded = torch_import.load(state_dict, method, NUM_LABELS, **TINY, cxr_kind="resnet50")
    jax.tree.map(_assert_same_bits, loaded, variables)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("tiny", "other"), [(_tiny, "resnet50"), (_tiny_50, "resnet34")])
def test_a_resnet_of_another_kind_is_refused_by_the_field_to_set(tiny, other, bare):
    model = registry.build("uni_cxr", NUM_LABELS, **TINY, cxr_kind=other)
    if bare:
        error = _refused(torch_import.fill_backbone, model, _bare_resnet(tiny))
    else:
        error = _refused(torch_import.fill, model, "uni_cxr", torch_import.export(tiny("uni_cxr")[1], "uni_cxr"))
    assert (error.field, error.value) == ("config.model.cxr_encoder", other)
    assert {error.nearest, other} == {"resnet34", "resnet50"}


@pytest.mark.parametrize(
    ("method", "missing"), [("early", "learnt"), ("joint_learnable", "zeros"), ("joint", "learnt")]
)
def test_missing_token_follows_the_model_not_the_methods_name(method, missing):
    """config.model.missing_cxr=learnt adds a vector, which is exported and read back."""
    options = {**TINY, "missing": missing}
    variables = random_variables(registry.build(method, NUM_LABELS, **options))
    state_dict = torch_import.export(variables, method)
    assert ("missing_token" in state_dict) == (missing == "learnt")
    _, loaded = torch_import.load(state_dict, method, NUM_LABELS, **options)
    jax.tree.map(_assert_same_bits, loaded, variables)
    token = {"missing_token": np.zeros(8, np.float32)}
    unused = torch_import.unused({**state_dict, **token}, method, TINY["resnet_stage_sizes"], missing)
    assert ("missing_token" in unused) == (missing == "zeros")


def test_variable_without_a_released_name_is_refused():
    variables = _tiny("medfuse")[1]
    more = {**variables, "params": {**variables["params"], "notes_encoder": {"kernel": np.zeros((3, 8), np.float32)}}}
    assert _refused(torch_import.export, more, "medfuse").value == ["params/notes_encoder/kernel"]


def test_method_that_was_not_released_is_refused():
    for call, args in (
        (_load_tiny, ({}, "medfuse_attention")),
        (torch_import.export, ({"params": {}}, "medfuse_attention")),
    ):
        error = _refused(call, *args)
        assert (error.value, error.nearest) == ("medfuse_attention", "")
    assert _refused(_load_tiny, {}, "medfusion").nearest == "medfuse"


@pytest.mark.parametrize("method", released_methods())
def test_each_name_and_each_variable_is_in_the_table_once(method):
    rows = torch_import.table(method)
    names = [name for row in rows for name in row.names]
    paths = [row.path for row in rows]
    assert len(set(names)) == len(names) and len(set(paths)) == len(paths)


def test_layouts_match_torch():
    state_dict = _tiny_state_dict()
    assert state_dict["ehr_model.layer0.weight_ih_l0"].shape == (4 * 8, 76)
    assert state_dict[f"{_BACKBONE}conv1.weight"].shape == (4, 3, 7, 7)
    assert state_dict[f"{_BACKBONE}layer2.0.downsample.0.weight"].shape == (8, 4, 1, 1)
    kernel = _load_tiny(state_dict)[1]["params"]["cxr_encoder"]["stem_conv"]["kernel"]
    assert kernel[2, 5, 1, 3] == state_dict[f"{_BACKBONE}conv1.weight"][3, 1, 2, 5]


def test_the_two_biases_are_added():
    state_dict = _tiny_state_dict()
    first, second = "ehr_model.layer1.bias_ih_l0", "ehr_model.layer1.bias_hh_l0"
    state_dict[second] = np.arange(32, dtype=np.float32)
    bias = _load_tiny(state_dict)[1]["params"]["ehr_encoder"]["layer1"]["bias"]
    np.testing.assert_allclose(bias, state_dict[first] + state_dict[second], rtol=1e-6)


def test_modules_of_other_methods_are_ignored_and_listed():
    state_dict = _tiny_state_dict()
    more = {"fused_cls.0.weight": np.zeros((3, 16), np.float32), "cls_token": np.zeros(8, np.float32)}
    more["ehr_model.dense_layer.bias"] = np.full(3, np.nan, np.float32)  # not read, so not checked
    _load_tiny({**state_dict, **more})
    listed = torch_import.unused({**state_dict, **more}, "medfuse", TINY["resnet_stage_sizes"])
    assert [name for name in listed if "num_batches_tracked" not in name] == list(more)


_PROJECTION, _HEAD, _VAR = "projection.weight", "lstm_fused_cls.0.weight", f"{_BACKBONE}bn1.running_var"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (_PROJECTION, np.zeros((8, 31)), (8, 31)),
        (_PROJECTION, np.zeros((32, 8)), (32, 8)),
        (_PROJECTION, np.zeros((8, 32), np.int64), np.dtype("int64")),
        (_PROJECTION, np.full((8, 32), 1e300), 256),
        (_PROJECTION, np.full((8, 32), np.nan, np.float32), 256),
        (_VAR, -np.ones(4), 4),
        (_HEAD, np.zeros((25, 8)), (25, 8)),
    ],
)
def test_wrong_value_names_its_entry(name, value, problem):
    error = _refused(_load_tiny, {**_tiny_state_dict(), name: value})
    assert (error.field, error.value) == (name, problem)
    assert ("25 labels" in str(error)) == (name == _HEAD)


@pytest.mark.parametrize("state_dict", ["model.pth.tar", None, [("a", 1)], {1: np.zeros(3)}])
def test_what_is_no_state_dict_is_one_clear_line(state_dict):
    with refused(field="state_dict"):
        torch_import.load(state_dict, "uni_ehr", NUM_LABELS)


def test_a_tensor_that_numpy_cannot_read_is_named():
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(NUM_LABELS, dtype=torch.bfloat16), torch.zeros(NUM_LABELS, requires_grad=True)):
        with refused(field="lstm_fused_cls.0.bias", value="Tensor"):
            _load_tiny(_tiny_state_dict() | {"lstm_fused_cls.0.bias": tensor})


def test_missing_and_unknown_names_are_listed():
    state_dict = _tiny_state_dict()
    assert _refused(_load_tiny, {**state_dict, "projektion.weight": np.zeros(3)}).value == ["projektion.weight"]
    del state_dict[_PROJECTION]
    assert _refused(_load_tiny, state_dict).value == [_PROJECTION]
    assert len(_refused(_load_tiny, {}).value) > 50
    assert "bare ResNet" in str(_refused(_load_tiny, {"conv1.weight": np.zeros(3)}))
    both = _tiny_state_dict("medfuse") | _tiny_state_dict("uni_cxr")
    assert str(_refused(_load_tiny, both, "joint")).endswith("all weights of uni_cxr, medfuse")


def test_own_number_of_labels_of_another_head_is_named():
    name = "cxr_model.classifier.0.weight"
    error = _refused(_load_tiny, {**_tiny_state_dict("unified"), name: np.zeros((5, 32))}, "unified")
    assert error.field == name and "5 labels, not 14" in str(error)


def test_imagenet_weights_fill_the_cxr_encoder():
    imagenet = _bare_resnet()
    imagenet |= {"fc.weight": np.zeros((1000, 32), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    model, variables = _tiny("uni_cxr")
    assert torch_import.is_backbone(imagenet) and not torch_import.is_backbone(_tiny_state_dict("uni_cxr"))
    expected = {group: {"cxr_encoder": variables[group]["cxr_encoder"]} for group in variables}
    jax.tree.map(np.testing.assert_array_equal, torch_import.fill_backbone(model, imagenet), expected)
    daft3 = registry.build("daft3", NUM_LABELS, **TINY)  # which has no stage 4 to fill
    assert set(torch_import.fill_backbone(daft3, imagenet)["params"]["cxr_encoder"]) == {
        name for name in expected["params"]["cxr_encoder"] if not name.startswith("stage4")
    }


@pytest.mark.parametrize(
    ("method", "changes", "field", "value"),
    [
        ("uni_cxr", {"layer3.0.conv1.weight": None}, "", ["layer3.0.conv1.weight"]),
        ("uni_cxr", {"layer3.1.conv1.weight": np.zeros(3)}, "", ["layer3.1.conv1.weight"]),
        ("medfuse", {"bn1.weight": np.zeros(5)}, "bn1.weight", (5,)),
        ("uni_ehr", {}, "method", None),
    ],
)
def test_imagenet_weights_that_do_not_match_are_refused(method, changes, field, value):
    imagenet = {name: x for name, x in (_bare_resnet() | changes).items() if x is not None}
    error = _refused(torch_import.fill_backbone, registry.build(method, NUM_LABELS, **TINY), imagenet)
    assert (error.field, error.value) == (field, value)


@pytest.mark.parametrize("kind", ["resnet34", "resnet50"])
def test_tiny_resnet_equals_torchs(kind):
    """As torchvision's ResNet, whose bottleneck has its stride in the 3x3 convolution."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functional = torch.nn.functional
    model, variables = {"resnet34": _tiny, "resnet50": _tiny_50}[kind]("uni_cxr")
    released = torch_import.export(variables, "uni_cxr")
    state_dict = {n: torch.from_numpy(np.array(v)) for n, v in released.items()}

    def norm(x, name):
        mean, var, scale, bias = (state_dict[f"{_BACKBONE}{name}.{p}"] for p in _NORM_PARTS)
        return functional.batch_norm(x, mean.clone(), var.clone(), scale, bias, training=False)

    def conv(x, name, stride=1):
        kernel = state_dict[f"{_BACKBONE}{name}.weight"]
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    image_PHW = np.random.default_rng(0).standard_normal((2, 48, 48)).astype(np.float32)
    x = functional.relu(norm(conv(torch.from_numpy(image_PHW)[:, None].repeat(1, 3, 1, 1), "conv1", 2), "bn1"))
    x = functional.max_pool2d(x, 3, 2, 1)
    for i in range(1, 5):
        block, stride = f"layer{i}.0.", 2 if i > 1 else 1
        strides, is_projected = ([stride, 1], i > 1) if kind == "resnet34" else ([1, stride, 1], True)
        y = x
        for n, stride_n in enumerate(strides, start=1):
            y = norm(conv(y, f"{block}conv{n}", stride_n), f"{block}bn{n}")
            y = functional.relu(y) if n < len(strides) else y
        shortcut = norm(conv(x, f"{block}downsample.0", stride), f"{block}downsample.1") if is_projected else x
        x = functional.relu(y + shortcut)
    got = fast_jit(model.apply)(variables, image=image_PHW)
    np.testing.assert_allclose(got["cxr_features"], x.mean((2, 3)).numpy(), rtol=1e-4, atol=1e-4)


_NORM_PARTS = ("running_mean", "running_var", "weight", "bias")


@functools.cache
def _apply(model):
    return fast_jit(lambda variables, **batch: model.apply(variables, **batch, train=False))


def _outputs(real_data, case: str) -> dict:
    method, num_labels, all_paired = _CASES[case]
    model, variables = torch_import.load(reference_state_dict(real_data, case), method, num_labels)
    equal_lengths = method[:4] in ("mmtm", "daft")
    ehr, length, image, paired, _ = reference_module(real_data).inputs(seed=100, full=equal_lengths)
    has_cxr = np.ones_like(paired) if all_paired else paired
    outputs = _apply(model)(variables, ehr=ehr, length=length, image=image, has_cxr=has_cxr)
    return {**outputs, "probs": jax.nn.sigmoid(outputs["logits"])}


def _worst(real_data, case: str) -> dict[str, float]:
    """Return {name: largest deviation from the released model's output}."""
    ours, released = _outputs(real_data, case), reference_outputs(real_data, case)
    assert released, f"the reference has no case {case}"
    return {name: float(np.abs(ours[_OUTPUT_NAMES.get(name, name)] - x).max()) for name, x in released.items()}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in _ALIKE else c for c in _CASES])
def test_outputs_equal_the_released_models(real_data, case):
    worst = _worst(real_data, case)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", _CASES)
def test_released_checkpoint_is_split_into_needed_and_unused_entries(real_data, case):
    state_dict = reference_shapes(real_data, case)  # the names matter here
    method, _, _ = _CASES[case]
    needed = {name for row in torch_import.table(method) for name in row.names}
    unused = torch_import.unused(state_dict, method)
    assert len(needed) + len(unused) == len(state_dict) and needed.isdisjoint(unused)
    assert set(unused) <= torch_import.known_names()


def _swap_gates(monkeypatch):
    split = jax.numpy.split

    def swapped(gates, parts, axis):
        i, f, g, o = split(gates, parts, axis=axis)
        return i, f, o, g

    monkeypatch.setattr(ehr_encoder.jnp, "split", swapped)


def _same_padding(monkeypatch):
    def conv(ops, x, kernel, stride, padding):
        return jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    monkeypatch.setattr(resnet, "_conv", conv)


def _another_epsilon(monkeypatch):
    monkeypatch.setattr(batch_norm, "EPSILON", 1e-3)


@pytest.mark.parametrize(
    ("case", "plant"),
    [("uni_ehr", _swap_gates), ("uni_cxr", _same_padding), ("uni_cxr", _another_epsilon)],
)
def test_parity_notices_a_planted_error(real_data, monkeypatch, case, plant):
    plant(monkeypatch)
    _apply.cache_clear()
    try:
        assert max(_worst(real_data, case).values()) > 5 * TOLERANCE
    finally:
        _apply.cache_clear()


# Largest deviations of one training step: relative ones, but for the stem's running mean.
_STEP_TOLERANCES = {"loss": 1e-3, "gradient norms": 1e-3, "stem mean": 1e-5, "stem variance": 1e-4}


@functools.cache
def _training_step(model):
    """Return two functions, for ((loss, batch_stats), gradients) and for the stem's statistics, which compiles fast."""

    def loss(params, batch_stats, batch, labels):
        outputs, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, **batch, train=True, mutable=["batch_stats"]
        )
        return optax.sigmoid_binary_cross_entropy(outputs["logits"], labels).mean(), updated["batch_stats"]

    # Not fast_jit: without vectorised sums the gradients of the first stage's biases are off by 5e-4.
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step, jax.jit(lambda *args: loss(*args)[1]["cxr_encoder"]["stem_norm"])


@pytest.fixture(scope="module")
def released_medfuse(real_data):
    return torch_import.load(reference_state_dict(real_data, "medfuse"), "medfuse", 25, dropout=0.0)


def _step_inputs(real_data, released_medfuse, plant=None):
    model, variables = released_medfuse
    variables = jax.tree.map(lambda x: x, variables)  # new dicts, which `plant` may change
    ehr, length, image, _, labels = reference_module(real_data).inputs(seed=100)
    batch = {"ehr": ehr, "length": length, "image": image}
    if plant:
        plant(variables, batch, labels)
    return model, (variables["params"], variables["batch_stats"], batch, labels)


def _stem_deviations(released, stem) -> dict[str, float]:
    return {
        "stem mean": np.abs(stem["mean"] - released["bn1_running_mean"]).max(),
        "stem variance": np.abs(stem["var"] / released["bn1_running_var"] - 1).max(),
    }


def _step_deviations(real_data, model, inputs) -> dict[str, float]:
    """Return how far one paired training step, without dropout, is from the released model's."""
    (value, stats), gradients = _training_step(model)[0](*inputs)
    released = reference_outputs(real_data, "train_paired")
    flat = {("params", *path): leaf for path, leaf in traverse_util.flatten_dict(gradients).items()}
    paths = {name: row.path for row in torch_import.table("medfuse") for name in row.names}
    norms = {name.removeprefix("gradnorm/"): x for name, x in released.items() if name.startswith("gradnorm/")}
    assert set(norms) == {name for name, path in paths.items() if path[0] == "params"}
    return {
        "loss": abs(value / released["loss"] - 1),
        "gradient norms": max(abs(np.linalg.norm(np.ravel(flat[paths[name]])) / norms[name] - 1) for name in norms),
        **_stem_deviations(released, stats["cxr_encoder"]["stem_norm"]),
    }


def test_one_paired_training_step_equals_the_released_models(real_data, released_medfuse):
    """Loss, gradient norms and batch statistics, all rows paired."""
    deviations = _step_deviations(real_data, *_step_inputs(real_data, released_medfuse))
    assert all(deviations[name] < tolerance for name, tolerance in _STEP_TOLERANCES.items()), deviations


def _halve_a_bias(variables, batch, labels):
    cell = variables["params"]["fusion_lstm"]["cell"]
    cell["bias"] = cell["bias"] / 2


def _flip_a_label(variables, batch, labels):
    labels[0, 0] = 1 - labels[0, 0]


def _shift_images_by_a_grey_level(variables, batch, labels):
    batch["image"] = batch["image"] + 1 / 255 / 0.229  # ImageNet's standardisation


def _scale_images_as_another_channel(variables, batch, labels):
    batch["image"] = batch["image"] * (0.229 / 0.225)  # ImageNet's red and blue


def _swap_gates_of_one_kernel(variables, batch, labels):
    layer = variables["params"]["ehr_encoder"]["layer1"]
    i, f, g, o = jnp.split(layer["recurrent_kernel"], 4, axis=-1)
    layer["recurrent_kernel"] = jnp.concatenate([i, f, o, g], axis=-1)


@pytest.mark.parametrize(
    ("plant", "noticed_by"),
    [
        (_halve_a_bias, ["loss", "gradient norms"]),
        (_flip_a_label, ["gradient norms"]),
        (_swap_gates_of_one_kernel, ["gradient norms"]),
    ],
)
def test_training_step_notices_a_planted_error(real_data, released_medfuse, plant, noticed_by):
    deviations = _step_deviations(real_data, *_step_inputs(real_data, released_medfuse, plant))
    assert all(deviations[name] > 2 * _STEP_TOLERANCES[name] for name in noticed_by), deviations


@pytest.mark.parametrize(
    ("plant", "noticed_by"),
    [
        (lambda *_: None, []),
        (_scale_images_as_another_channel, ["stem variance"]),
        (_shift_images_by_a_grey_level, ["stem mean"]),
    ],
)
def test_stem_statistics_notice_planted_errors_in_images(real_data, released_medfuse, plant, noticed_by):
    model, inputs = _step_inputs(real_data, released_medfuse, plant)
    stem = _training_step(model)[1](*inputs)
    deviations = _stem_deviations(reference_outputs(real_data, "train_paired"), stem)
    assert all(deviations[name] > 2 * _STEP_TOLERANCES[name] for name in noticed_by), deviations
    assert noticed_by or all(value < _STEP_TOLERANCES[name] for name, value in deviations.items())
