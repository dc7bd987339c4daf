"""Train the same models in plain PyTorch (`torch_models`), to compare ours with on the same batches.

Shapes: B rows (stays), P X-rays, C channels, H W pixels, K label.

The training step has two variants:

- RELEASED runs as the released code does: float32, NCHW, packed series, and a zero image through the ResNet for every
  stay without an X-ray.
- TUNED runs as a careful user would: channels_last, cuDNN's padded LSTM, TF32, cudnn.benchmark, fused Adam,
  bfloat16 autocast if requested, no zero images, and on a GPU the fastest of the ways to compile (`torch_forms`).

All contenders augment X-rays on the device, within the step (`torch_augment`), ours included. Differs from the released
code, which augments in its data loader.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from medfuse_jax.augment import ImageOptions
from medfuse_jax.bench import torch_augment, torch_forms
from medfuse_jax.bench.torch_models import EhrModel, Peer
from medfuse_jax.models import registry


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a peer runs. packed: packed, not padded, series. zero_images: a zero image for each row without an X-ray."""

    name: str
    packed: bool
    zero_images: bool
    channels_last: bool
    tuned_kernels: bool  # TF32, cudnn.benchmark, fused Adam, torch.compile on a GPU


RELEASED = Variant("torch_released", packed=True, zero_images=True, channels_last=False, tuned_kernels=False)
TUNED = Variant("torch_tuned", packed=False, zero_images=False, channels_last=True, tuned_kernels=True)
# The methods that the released code trains, which exclude `unified`.
PEERS = tuple(name for name, row in registry.METHODS.items() if row.has_peer)
VARIANTS = {variant.name: variant for variant in (RELEASED, TUNED)}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch_for(variant: Variant, batch: dict[str, np.ndarray], image_PCHW: np.ndarray | None, mean_F, std_F) -> dict:
    """Convert one of our one-device batches (`data.batches`) to the variant's inputs, on the peer's device.

    image_PCHW: its X-rays as three standardised channels; None: the step makes them from the stored ones, 'stored'.
    """
    num_rows = batch["valid"].shape[1]
    row_P, mask_P = (batch[n][0] if n in batch else np.zeros(0, np.int64) for n in ("image_row", "image_mask"))
    row_P = np.where(mask_P, row_P, num_rows)  # an empty slot points past the last row: `to_rows` drops it
    has_cxr_B = np.isin(np.arange(num_rows), row_P)
    out = {"label": batch["label"][0], "valid": batch["valid"][0], "has_cxr": has_cxr_B}
    if "ehr" in batch:
        out["ehr"] = (batch["ehr"][0] - mean_F) / std_F
        out["length"] = np.maximum(batch["length"][0], 1).astype(np.int64)  # a padded row has one step of zeros
        out["ehr"] = out["ehr"][:, : out["length"].max()]  # pad only to the batch's longest series
    if image_PCHW is not None:
        if variant.zero_images:
            out["image"] = np.zeros((num_rows, *image_PCHW.shape[1:]), np.float32)
            out["image"][row_P[row_P < num_rows]] = image_PCHW[row_P < num_rows]
            row_P = np.arange(num_rows)
        else:
            out["image"] = image_PCHW
        out["row"] = row_P.astype(np.int64)
    elif "image" in batch:
        out |= {"stored": batch["image"][0], "row": row_P.astype(np.int64)}
    on = {name: torch.as_tensor(np.ascontiguousarray(value)).to(device()) for name, value in out.items()}
    if variant.channels_last and "image" in on:
        on["image"] = on["image"].to(memory_format=torch.channels_last)
    if variant.packed and "length" in on:
        on["length"] = on["length"].cpu()  # packing needs lengths on the CPU
    return on


def train_step(forward: Callable, optimizer, batch: dict, precision: str):
    """Update the model once; return the loss as a tensor on the device. forward: the model, or a compiled one."""
    optimizer.zero_grad(set_to_none=True)
    with _autocast(precision):
        inputs = (batch.get(name) for name in ("ehr", "length", "image", "row", "has_cxr"))
        logits_BK = forward(*inputs)
    loss_BK = functional.binary_cross_entropy_with_logits(logits_BK.float(), batch["label"], reduction="none")
    loss = (loss_BK * batch["valid"][:, None]).sum() / (batch["valid"].sum() * loss_BK.shape[1])
    loss.backward()
    optimizer.step()
    return loss


def runner(
    variant: Variant,
    method: str,
    num_labels: int,
    batches: list[dict],
    precision: str,
    sizes: dict,
    image: ImageOptions,
    say: Callable = lambda text: None,
) -> tuple[Callable[[], None], dict]:
    """Return a function that trains once on `batches` (from `batch_for`) and waits until it is done, and how it runs.

    The released variant always runs in float32. sizes: fields of `Peer`. On a GPU the tuned variant is timed in each
    form of `torch_forms`, and the fastest is kept.
    """
    precision = precision if variant.tuned_kernels else "float32"

    def make(form: torch_forms.Form) -> Callable[[], None]:
        torch.manual_seed(0)
        model = Peer(method, num_labels, packed=variant.packed, **sizes).to(device()).train()
        if variant.channels_last:
            model = model.to(memory_format=torch.channels_last)
        fused = True if variant.tuned_kernels else None
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=fused)
        forward, prepare = (
            form(model),
            form.images(
                functools.partial(torch_augment.images_for, variant.zero_images, variant.channels_last, options=image)
            ),
        )

        def run() -> None:
            _set_kernels(variant)
            for batch in batches:
                form.begin_step()
                train_step(forward, optimizer, prepare(batch), precision)
            synchronise()

        return run

    if not variant.tuned_kernels or device().type == "cpu":
        return make(torch_forms.EAGER), {"torch_form": torch_forms.EAGER.name}
    return torch_forms.fastest(make, say)


def lstm_runner(
    variant: Variant, num_channels: int, hidden: int, batches: list[dict], precision: str
) -> Callable[[], None]:
    """Return a function that runs the EHR encoder alone, forward and backward, over `batches`."""
    model = EhrModel(num_channels, hidden, 1, 0.0, variant.packed).to(device())
    precision = precision if variant.tuned_kernels else "float32"

    def run() -> None:
        _set_kernels(variant)
        for batch in batches:
            model.zero_grad(set_to_none=True)
            with _autocast(precision):
                last_BD = model(batch["ehr"], batch["length"])
            last_BD.float().sum().backward()
        synchronise()

    return run


def _autocast(precision: str):
    if precision == "bfloat16":
        return torch.autocast(device().type, torch.bfloat16)
    return contextlib.nullcontext()


def _set_kernels(variant: Variant) -> None:
    """Set torch's global switches. Call it before each variant's turn."""
    torch.backends.cudnn.benchmark = variant.tuned_kernels
    torch.set_float32_matmul_precision("high" if variant.tuned_kernels else "highest")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment() -> dict:
    on_gpu = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
    }
