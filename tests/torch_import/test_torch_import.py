"""Released weights: which names are read, and what is refused. Parity: test_torch_parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import (
    NUM_LABELS,
    TINY,
    fast_jit,
    random_variables,
)
from refusals import refused

from medfuse_jax import torch_import
from medfuse_jax.models import registry
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.torch_import.names import released_methods

_BACKBONE = "cxr_model.vision_backbone."
_NORM_PARTS = ("running_mean", "running_var", "weight", "bias")


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
