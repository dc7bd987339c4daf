"""With the same weights and batch, the PyTorch peers score as ours do, so that their times compare."""

import functools

import jax
import model_cases
import numpy as np
import pytest

from medfuse_jax import augment, losses, torch_import
from medfuse_jax.models import registry

torch = pytest.importorskip("torch", reason="the peers need torch: pip install '.[torch]'")
torch_augment = pytest.importorskip("medfuse_jax.bench.torch_augment")
torch_peer = pytest.importorskip("medfuse_jax.bench.torch_peer")

_SIZES = {**model_cases.TINY, "resnet_stage_sizes": (1, 1, 1, 1), "dropout": 0.0}
_TOLERANCE = 2e-5
_ALIKE = ("early", "joint", "joint_zeros", "mmtm3", "daft4")  # each differs from another method in one value
_ROWS = 4


def _batch():
    """Return a batch for one device with two X-rays and an empty slot, and the X-rays as three channels."""
    rng = np.random.default_rng(0)
    image_row, image_mask = np.array([[2, 0, 0]], np.int32), np.array([[True, True, False]])
    batch = {
        "ehr": rng.standard_normal((1, _ROWS, 6, 76)).astype(np.float32),
        "length": np.array([[5, 2, 4, 1]], np.int32),
        "label": rng.integers(0, 2, (1, _ROWS, 3)).astype(np.float32),
        "valid": np.array([[True, True, True, False]]),
        "image_row": image_row,
        "image_mask": image_mask,
    }
    return batch, rng.standard_normal((3, 3, 32, 32)).astype(np.float32)


def _ours(model, variables, batch, image_PCHW, train=False):
    images = {name: batch[name][0] for name in ("image_row", "image_mask")}
    images["image"] = image_PCHW.transpose(0, 2, 3, 1)
    ehr = {"ehr": batch["ehr"][0], "length": batch["length"][0]}
    mutable = ["batch_stats"] if train else False
    out = jax.jit(lambda v: model.apply(v, **ehr, **images, train=train, mutable=mutable))(variables)
    return out[0] if train else out


def _peer(variant, method, variables):
    peer = torch_peer.Peer(method, 3, packed=variant.packed, **_SIZES)
    state = {name: torch.tensor(value) for name, value in torch_import.export(variables, method).items()}
    missing, unknown = peer.load_state_dict(state, strict=False)
    heads = {"ehr_model.dense_layer", "cxr_model.classifier.0"}  # unused in a fusion model
    assert not unknown and {name.rpartition(".")[0] for name in missing} <= heads
    return peer.to(torch_peer.device())


def _scores(peer, placed):
    with torch.no_grad():
        return peer(*(placed.get(n) for n in ("ehr", "length", "image", "row", "has_cxr"))).cpu().numpy()


@functools.cache  # compiled once for both variants
def _our_scores(method):
    model = registry.build(method, 3, **_SIZES)
    variables = model_cases.random_variables(model)
    return variables, np.asarray(_ours(model, variables, *_batch())["logits"])


def _placed(variant, batch, image_PCHW):
    return torch_peer.batch_for(variant, batch, image_PCHW, np.zeros(76, np.float32), np.ones(76, np.float32))


@pytest.mark.parametrize("variant", torch_peer.VARIANTS.values(), ids=torch_peer.VARIANTS)
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow) if m in _ALIKE else m for m in torch_peer.PEERS]
)
def test_peer_scores_as_ours(method, variant):
    variables, ours_BK = _our_scores(method)
    placed = _placed(variant, *_batch())
    peer = _peer(variant, method, variables).eval()
    scored = [0, 2] if method == "uni_cxr" else slice(None)  # it scores only rows with an X-ray
    np.testing.assert_allclose(_scores(peer, placed)[scored], ours_BK[scored], atol=_TOLERANCE, rtol=_TOLERANCE)
    if method != "uni_cxr":
        placed["length"][0] -= 1
        assert np.abs(_scores(peer, placed)[0] - ours_BK[0]).max() > 10 * _TOLERANCE, "a time step changes the scores"


def test_tuned_training_step_has_our_loss_and_zero_images_change_it():
    model = registry.build("medfuse", 3, **_SIZES)
    variables = model_cases.random_variables(model)
    batch, image_PCHW = _batch()
    batch |= {name: batch[name][:, :2] for name in ("image_row", "image_mask")}
    image_PCHW = image_PCHW[:2]
    logits_BK = _ours(model, variables, batch, image_PCHW, train=True)["logits"]
    ours = float(losses.mean_bce(logits_BK, batch["label"][0], batch["valid"][0], 3))
    loss_of = {}
    for name, variant in torch_peer.VARIANTS.items():
        peer = _peer(variant, "medfuse", variables).train()
        before = peer.projection.weight.detach().clone()
        optimizer = torch.optim.Adam(peer.parameters(), lr=1e-3)
        placed = _placed(variant, batch, image_PCHW)
        loss_of[name] = float(torch_peer.train_step(peer, optimizer, placed, "float32").detach())
        assert not torch.equal(before, peer.projection.weight), "the step changes the weights"
    assert abs(loss_of["torch_tuned"] - ours) < _TOLERANCE
    assert abs(loss_of["torch_released"] - ours) > 10 * _TOLERANCE  # its zero images enter the batch statistics


def test_early_fusion_keeps_its_encoders_frozen():
    peer = torch_peer.Peer("early", 3, packed=False, **_SIZES).to(torch_peer.device()).train()
    frozen = {n: p.detach().clone() for n, p in peer.state_dict().items() if n.startswith(("ehr_model", "cxr_model"))}
    placed = _placed(torch_peer.TUNED, *_batch())
    torch_peer.train_step(peer, torch.optim.Adam(peer.parameters(), lr=1e-3), placed, "float32")
    assert all(torch.equal(value, peer.state_dict()[name]) for name, value in frozen.items())


def test_only_the_released_batch_has_zero_images():
    released, tuned = (_placed(variant, *_batch()) for variant in torch_peer.VARIANTS.values())
    assert released["image"].shape[0] == _ROWS and tuned["image"].shape[0] == 3
    assert not released["image"][[1, 3]].any() and torch.equal(released["image"][2], tuned["image"][0])
    assert tuned["image"].is_contiguous(memory_format=torch.channels_last)


def _stored_batch():
    batch, _ = _batch()
    return batch | {"image": np.random.default_rng(1).integers(0, 256, (1, 3, 48, 48), np.uint8)}


def test_stored_images_are_augmented_on_the_device_and_reach_their_rows():
    options = augment.ImageOptions(
        resize_px=40, crop_px=32, crop="random", flip=True, rotation_deg=45.0, scale=(0.8, 1.2), translation=0.1
    )
    prepared = {}
    for name, variant in torch_peer.VARIANTS.items():
        torch.manual_seed(0)
        prepared[name] = torch_augment.images_for(
            variant.zero_images, variant.channels_last, _placed(variant, _stored_batch(), None), options
        )
    released, tuned = (prepared[name]["image"] for name in ("torch_released", "torch_tuned"))
    assert released.shape == (_ROWS, 3, 32, 32) and tuned.shape == (3, 3, 32, 32)
    assert torch.equal(released[2], tuned[0]) and torch.equal(released[0], tuned[1]) and not released[[1, 3]].any()
    assert prepared["torch_released"]["row"].tolist() == [0, 1, 2, 3]
    assert tuned.is_contiguous(memory_format=torch.channels_last)


def test_runner_trains_from_stored_images():
    options = augment.ImageOptions(
        resize_px=32, crop_px=32, crop="center", flip=True, rotation_deg=45.0, scale=(0.8, 1.2), translation=0.1
    )
    for variant in torch_peer.VARIANTS.values():
        placed = [_placed(variant, _stored_batch(), None)]
        run, facts = torch_peer.runner(variant, "medfuse", 3, placed, "float32", _SIZES, options)
        run()
        assert facts["torch_form"] == "eager" or torch_peer.device().type == "cuda"
