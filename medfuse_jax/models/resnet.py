"""ResNet-34 and ResNet-50 without their classifier head (He et al. 2016, as in torchvision), over a batch's X-rays.

Shapes: P X-rays, H W pixels, C channels, E X-ray features.

All padding is explicit: torch pads (3, 3) and (1, 1), which differs from `SAME` at stride 2.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import max_pool
from medfuse_jax.models.batch_norm import BatchNorm
from medfuse_jax.models.cpu import conv as cpu_conv
from medfuse_jax.models.weight import weight

# torchvision's ImageNet statistics, for the three equal channels that the released code feeds.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torchvision's


def ops_for(platform: str) -> str:
    """Return the `ops` of models that run on devices of this platform."""
    return platform if platform in ("cpu", "tpu") else "gpu"


def _conv(ops: str, x_PHWC: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    conv = cpu_conv.conv if ops == "cpu" else plain_conv
    return conv(x_PHWC, kernel.astype(x_PHWC.dtype), stride, padding)


def plain_conv(x_PHWC: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolve with a square kernel [k, k, in, out] and equal padding on every side."""
    pads = ((padding, padding), (padding, padding))
    return jax.lax.conv_general_dilated(
        x_PHWC, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _relu_and_max_pool(ops: str, x_PHWC: jax.Array) -> jax.Array:
    """Apply a ReLU, and pool 3x3 windows with stride 2 and torch's padding."""
    if ops == "cpu":  # the pool would compute what comes before it once for each of its nine pixels
        return max_pool.max_pool(nn.relu(x_PHWC))
    return nn.relu(max_pool.plain(x_PHWC))  # in this order, which changes nothing, its mask has a quarter of the pixels


class Conv(nn.Module):
    """A square convolution without bias, with torch's padding; the kernel is float32 [k, k, in, out]."""

    features: int
    size_px: int
    stride: int = 1
    ops: str = "plain"

    @nn.compact
    def __call__(self, x_PHWC: jax.Array) -> jax.Array:
        shape = (self.size_px, self.size_px, x_PHWC.shape[-1], self.features)
        stride = self.stride
        if self.size_px == 1 and self.ops == "gpu":
            # cuDNN would write the gradient of every pixel, though only those that the stride visits have one.
            x_PHWC, stride = x_PHWC[:, ::stride, ::stride], 1
        return _conv(self.ops, x_PHWC, weight(self, "kernel", _conv_init, shape), stride, self.size_px // 2)


class StemConv(nn.Module):
    """The 7x7 stem. Its kernel is [7, 7, 3, features] for any number of input channels:

    3: used as given.
    1: one standardised channel, which stands for three equal ones.
    2: grey in 0..1, and a mask that is one inside the X-ray. ImageNet's mean and deviation are folded into the kernel.
       The mask keeps this exact at the borders: the mean must not be subtracted from the zero padding.
    """

    features: int
    ops: str = "plain"

    @nn.compact
    def __call__(self, image_PHWC: jax.Array) -> jax.Array:
        kernel = weight(self, "kernel", _conv_init, (7, 7, 3, self.features))
        channels = image_PHWC.shape[-1]
        assert channels in (1, 2, 3), f"an X-ray has 1, 2 or 3 channels, not {channels}"
        if channels == 1:
            kernel = kernel.sum(axis=2, keepdims=True)
        elif channels == 2:
            kernel_of_grey = kernel / jnp.array(IMAGENET_STD)[:, None]
            kernel_of_ones = -kernel_of_grey * jnp.array(IMAGENET_MEAN)[:, None]
            kernel = jnp.stack([kernel_of_grey.sum(axis=2), kernel_of_ones.sum(axis=2)], axis=2)
        return _conv(self.ops, image_PHWC, kernel, stride=2, padding=3)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is projected if the shape changes."""

    expansion: ClassVar[int] = 1  # output channels for each of `features`

    features: int
    stride: int = 1
    ops: str = "plain"

    @nn.compact
    def __call__(self, x_PHWC: jax.Array, *norm_args) -> jax.Array:
        shortcut_PHWC = x_PHWC
        if self.stride != 1 or x_PHWC.shape[-1] != self.features:
            shortcut_PHWC = Conv(self.features, 1, self.stride, self.ops, name="shortcut_conv")(x_PHWC)
            shortcut_PHWC = BatchNorm(ops=self.ops, name="shortcut_norm")(shortcut_PHWC, *norm_args)
        y_PHWC = Conv(self.features, 3, self.stride, self.ops, name="conv1")(x_PHWC)
        y_PHWC = BatchNorm(True, self.ops, name="norm1")(y_PHWC, *norm_args)
        y_PHWC = Conv(self.features, 3, ops=self.ops, name="conv2")(y_PHWC)
        return BatchNorm(True, self.ops, name="norm2")(y_PHWC, *norm_args, shortcut_PHWC=shortcut_PHWC)


class BottleneckBlock(nn.Module):
    """A 3x3 convolution between two 1x1 ones, and a shortcut, which is projected if the shape changes.

    As in torchvision (ResNet v1.5), the 3x3 convolution has the stride; He et al. give it to the first 1x1 one.
    """

    expansion: ClassVar[int] = 4

    features: int
    stride: int = 1
    ops: str = "plain"

    @nn.compact
    def __call__(self, x_PHWC: jax.Array, *norm_args) -> jax.Array:
        shortcut_PHWC, num_out = x_PHWC, self.features * self.expansion
        if self.stride != 1 or x_PHWC.shape[-1] != num_out:
            shortcut_PHWC = Conv(num_out, 1, self.stride, self.ops, name="shortcut_conv")(x_PHWC)
            shortcut_PHWC = BatchNorm(ops=self.ops, name="shortcut_norm")(shortcut_PHWC, *norm_args)
        y_PHWC = Conv(self.features, 1, ops=self.ops, name="conv1")(x_PHWC)
        y_PHWC = BatchNorm(True, self.ops, name="norm1")(y_PHWC, *norm_args)
        y_PHWC = Conv(self.features, 3, self.stride, self.ops, name="conv2")(y_PHWC)
        y_PHWC = BatchNorm(True, self.ops, name="norm2")(y_PHWC, *norm_args)
        y_PHWC = Conv(num_out, 1, ops=self.ops, name="conv3")(y_PHWC)
        return BatchNorm(True, self.ops, name="norm3")(y_PHWC, *norm_args, shortcut_PHWC=shortcut_PHWC)


# By config.model.cxr_encoder. Both have (3, 4, 6, 3) blocks; only their kind differs.
BLOCKS: dict[str, type[BasicBlock | BottleneckBlock]] = {"resnet34": BasicBlock, "resnet50": BottleneckBlock}


def num_features(kind: str, stage_sizes: tuple[int, ...], width: int) -> int:
    """Return E, the channels after the last stage."""
    return width * 2 ** (len(stage_sizes) - 1) * BLOCKS[kind].expansion


class ResNet(nn.Module):
    """The stem, four stages of blocks, and the mean over the pixels.

    stage_sizes: blocks per stage. width: channels of the first stage (ResNet-50: a quarter of them); each later stage
    doubles them. kind: of the blocks, a key of `BLOCKS`. dtype: of the convolutions; parameters and statistics are
    float32. frozen_stats: training uses the running statistics and leaves them unchanged. ops: 'plain' for XLA's own
    operations, or the forms that suit a 'cpu', 'gpu' or 'tpu'.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dtype: jnp.dtype = jnp.float32
    frozen_stats: bool = False
    ops: str = "plain"
    kind: str = "resnet34"

    def setup(self):
        self.stem_conv = StemConv(self.width, self.ops)
        self.stem_norm = BatchNorm(ops=self.ops, pool=self.ops in ("gpu", "tpu"))
        for i, num_blocks in enumerate(self.stage_sizes, start=1):
            for j in range(num_blocks):
                stride = 2 if i > 1 and j == 0 else 1
                setattr(self, f"stage{i}_block{j}", BLOCKS[self.kind](self.width * 2 ** (i - 1), stride, self.ops))

    def stem(self, image_PHWC, train: bool = False, valid_P=None, axis_name: str | None = None) -> jax.Array:
        """Turn X-rays into the input of stage 1, at a quarter of their height and width."""
        x_PHWC = self.stem_conv(image_PHWC.astype(self.dtype))
        x_PHWC = self.stem_norm(x_PHWC, train and not self.frozen_stats, valid_P, axis_name)
        return x_PHWC if self.stem_norm.pool else _relu_and_max_pool(self.ops, x_PHWC)

    def stage(self, i: int, x_PHWC, train: bool = False, valid_P=None, axis_name: str | None = None) -> jax.Array:
        """Apply stage i = 1..4."""
        for j in range(self.stage_sizes[i - 1]):
            block = getattr(self, f"stage{i}_block{j}")
            x_PHWC = block(x_PHWC, train and not self.frozen_stats, valid_P, axis_name)
        return x_PHWC

    def until(self, last: int, image_PHWC, train: bool = False, valid_P=None, axis_name=None) -> jax.Array:
        """Turn X-rays into the feature maps [P, h, w, C] after stage `last`."""
        x_PHWC = self.stem(image_PHWC, train, valid_P, axis_name)
        for i in range(1, last + 1):
            x_PHWC = self.stage(i, x_PHWC, train, valid_P, axis_name)
        return x_PHWC

    def __call__(self, image_PHWC, train: bool = False, valid_P=None, axis_name: str | None = None) -> jax.Array:
        """Turn X-rays [P, H, W, C] into features [P, E], float32.

        valid_P: which X-rays count in the batch statistics. The pixels of the others must be finite.
        """
        return pooled(self.until(len(self.stage_sizes), image_PHWC, train, valid_P, axis_name))


def pooled(x_PHWC: jax.Array) -> jax.Array:
    """Return the mean over the pixels [P, C], float32."""
    return jnp.mean(x_PHWC.astype(jnp.float32), axis=(1, 2))
