"""Augmentation of X-rays in PyTorch, on the device, as ours (`medfuse_jax.augment`) does it: one bilinear sampling.

Shapes: P X-rays, S stored side, R resized side, C cropped side, B rows.
"""

import math

import torch
from torch.nn import functional

from medfuse_jax.augment import ImageOptions
from medfuse_jax.models import resnet

_STATISTICS = (resnet.IMAGENET_MEAN, resnet.IMAGENET_STD)


def images_for(zero_images: bool, channels_last: bool, batch: dict, options: ImageOptions) -> dict:
    """Return the batch with X-rays augmented from the stored ones. zero_images: one for each row without an X-ray."""
    if "stored" not in batch:
        return batch
    image_PCHW, row_P, num_rows = augment(batch["stored"], options), batch["row"], len(batch["valid"])
    if zero_images:
        zeros = image_PCHW.new_zeros(num_rows + 1, *image_PCHW.shape[1:])  # the last takes the empty slots
        image_PCHW = zeros.index_copy(0, row_P, image_PCHW)[:num_rows]
        row_P = torch.arange(num_rows, device=row_P.device)
    if channels_last:
        image_PCHW = image_PCHW.contiguous(memory_format=torch.channels_last)
    return batch | {"image": image_PCHW, "row": row_P}


def augment(image_PSS: torch.Tensor, options: ImageOptions) -> torch.Tensor:
    """Turn stored X-rays (uint8) into augmented ones with ImageNet's statistics: float32 [P, 3, C, C]."""
    grey_PRR = image_PSS.float() / 255
    if grey_PRR.shape[-1] != options.resize_px:
        size = (options.resize_px, options.resize_px)
        grey_PRR = functional.interpolate(grey_PRR[:, None], size, mode="bilinear", antialias=True)[:, 0]
    u_P7 = torch.rand(len(grey_PRR), 7, device=grey_PRR.device)
    grey_PCC = sample(grey_PRR, *affine(u_P7, options), options.crop_px)
    mean_3, std_3 = (torch.tensor(x, device=grey_PCC.device)[:, None, None] for x in _STATISTICS)
    return (grey_PCC[:, None] - mean_3) / std_3


def affine(u_P7: torch.Tensor, options: ImageOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maps from a pixel of the crop to the X-ray (matrix [P, 2, 2], offset [P, 2]) of seven numbers each."""
    angle_P = math.radians(options.rotation_deg) * (2 * u_P7[:, 0] - 1)
    scale_P = options.scale[0] + (options.scale[1] - options.scale[0]) * u_P7[:, 1]
    shift_P2 = options.translation * options.resize_px * (2 * u_P7[:, 2:4] - 1)
    mirror_P = torch.where((u_P7[:, 4] < 0.5) & options.flip, -1.0, 1.0)
    crop_P2 = (options.resize_px - options.crop_px) / 2 * (2 * u_P7[:, 5:] - 1) * (options.crop == "random")
    cos_P, sin_P = angle_P.cos(), angle_P.sin()
    matrix_P4 = torch.stack([cos_P, sin_P, -sin_P * mirror_P, cos_P * mirror_P], 1)
    matrix_P22 = (matrix_P4 / scale_P[:, None]).view(-1, 2, 2)
    return matrix_P22, (matrix_P22 @ (crop_P2 - shift_P2)[..., None])[..., 0]


def sample(grey_PRR: torch.Tensor, matrix_P22: torch.Tensor, offset_P2: torch.Tensor, crop_px: int) -> torch.Tensor:
    """Sample the crops [P, C, C] bilinearly, black outside the X-ray."""
    at_C = torch.arange(crop_px, device=grey_PRR.device) - (crop_px - 1) / 2
    yx_CC2 = torch.stack(torch.meshgrid(at_C, at_C, indexing="ij"), -1)
    source_PCC2 = torch.einsum("pij,yxj->pyxi", matrix_P22, yx_CC2) + offset_P2[:, None, None]
    # grid_sample takes (x, y), from -1 to 1 between the outer edges of the X-ray's pixels.
    grid_PCC2 = source_PCC2.flip(-1) * (2 / grey_PRR.shape[-1])
    return functional.grid_sample(grey_PRR[:, None], grid_PCC2, align_corners=False)[:, 0]
