"""ResNet-34 without its head (He et al. 2016, as torchvision has it), over the X-rays of a batch.

Shapes: P X-rays, H W pixels, C channels, E X-ray features (8 * width).

Every padding is explicit: torch pads (3, 3) and (1, 1), which `SAME` is not at stride 2.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models.cpu.conv import conv
from medfuse_jax.models.cpu.max_pool import max_pool

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9  # torch calls this 0.1

# Of the three equal channels that the reference feeds: torchvision's ImageNet statistics.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torchvision's


def _conv(x_PHWC: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return conv(x_PHWC, kernel.astype(x_PHWC.dtype), stride, padding)


class Conv(nn.Module):
    """A square convolution without bias, torch's padding; the kernel is float32 [k, k, in, out]."""

    features: int
    size_px: int
    stride: int = 1

    @nn.compact
    def __call__(self, x_PHWC: jax.Array) -> jax.Array:
        shape = (self.size_px, self.size_px, x_PHWC.shape[-1], self.features)
        return _conv(x_PHWC, self.param("kernel", _conv_init, shape), self.stride, self.size_px // 2)


class StemConv(nn.Module):
    """The 7x7 stem, for three channels or for what three equal grey channels were made of.

    3 channels: as they are. 1: one standardised channel that stands for three equal ones.
    2: grey in 0..1 and ones inside the X-ray; ImageNet's mean and deviation are folded into the
    kernel. Exact at the borders too: the zero padding of the ones cancels the mean there.
    The parameter is [7, 7, 3, features] always.
    """

    features: int

    @nn.compact
    def __call__(self, image_PHWC: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _conv_init, (7, 7, 3, self.features))
        channels = image_PHWC.shape[-1]
        assert channels in (1, 2, 3), f"an X-ray has 1, 2 or 3 channels, not {channels}"
        if channels == 1:
            kernel = kernel.sum(axis=2, keepdims=True)
        elif channels == 2:
            kernel_of_grey = kernel / jnp.array(IMAGENET_STD)[:, None]
            kernel_of_ones = -kernel_of_grey * jnp.array(IMAGENET_MEAN)[:, None]
            kernel = jnp.stack([kernel_of_grey.sum(axis=2), kernel_of_ones.sum(axis=2)], axis=2)
        return _conv(image_PHWC, kernel, stride=2, padding=3)


def _masked_moments(x_PHWC: jax.Array, valid_P: jax.Array, axis_name: str | None):
    """Mean [C], biased variance [C] and count of the valid X-rays' pixels, over all devices of the axis.

    Centred squares, in float32: the difference of two large sums would lose the variance.
    """

    def total(values):
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    x_PHWC = x_PHWC.astype(jnp.float32)
    _, height, width, _ = x_PHWC.shape
    valid_P111 = valid_P[:, None, None, None]
    count = total(jnp.sum(valid_P111) * (height * width)).astype(jnp.float32)
    divisor = jnp.maximum(count, 1)
    mean_C = total(jnp.sum(jnp.where(valid_P111, x_PHWC, 0), axis=(0, 1, 2))) / divisor
    centred_PHWC = jnp.where(valid_P111, x_PHWC - mean_C, 0)
    variance_C = total(jnp.sum(jnp.square(centred_PHWC), axis=(0, 1, 2))) / divisor
    return mean_C, variance_C, count


class BatchNorm(nn.Module):
    """Batch normalisation over the valid X-rays only.

    In training the statistics are those of the valid X-rays of all devices of `axis_name`;
    where there is not one, the running statistics are used and kept. As in torch the running
    variance is updated with the unbiased one. Scale, bias and statistics are float32.
    """

    @nn.compact
    def __call__(
        self, x_PHWC: jax.Array, train: bool = False, valid_P: jax.Array | None = None, axis_name: str | None = None
    ) -> jax.Array:
        features = (x_PHWC.shape[-1],)
        scale_C = self.param("scale", nn.initializers.ones_init(), features)
        bias_C = self.param("bias", nn.initializers.zeros_init(), features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        running_var = self.variable("batch_stats", "var", jnp.ones, features)
        mean_C, var_C = running_mean.value, running_var.value
        if not train or self.is_initializing():
            return _normalised(x_PHWC, mean_C, var_C, scale_C, bias_C)
        if valid_P is None:
            valid_P = jnp.ones(x_PHWC.shape[0], bool)
        y_PHWC, moments = _batch_normalised(axis_name, x_PHWC, scale_C, bias_C, valid_P, mean_C, var_C)
        if self.is_mutable_collection("batch_stats"):
            batch_mean_C, batch_var_C, count = jax.lax.stop_gradient(moments)
            unbiased_C = batch_var_C * count / jnp.maximum(count - 1, 1)
            running_mean.value = jnp.where(count > 0, _updated(mean_C, batch_mean_C), mean_C)
            running_var.value = jnp.where(count > 0, _updated(var_C, unbiased_C), var_C)
        return y_PHWC


def _normalised(x_PHWC, mean_C, var_C, scale_C, bias_C) -> jax.Array:
    normal_PHWC = (x_PHWC.astype(jnp.float32) - mean_C) * (jax.lax.rsqrt(var_C + BATCH_NORM_EPSILON) * scale_C)
    return (normal_PHWC + bias_C).astype(x_PHWC.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_normalised(axis_name, x_PHWC, scale_C, bias_C, valid_P, running_mean_C, running_var_C):
    """(x normalised by its own valid X-rays, their moments); by the running statistics where there is none.

    The gradient is written out: autodiff passes over the X-rays twice as often. None goes through the moments.
    """
    return _batch_normalised_saving(axis_name, x_PHWC, scale_C, bias_C, valid_P, running_mean_C, running_var_C)[0]


def _batch_normalised_saving(axis_name, x_PHWC, scale_C, bias_C, valid_P, running_mean_C, running_var_C):
    moments = _masked_moments(x_PHWC, valid_P, axis_name)
    count = moments[2]
    mean_C = jnp.where(count > 0, moments[0], running_mean_C)
    var_C = jnp.where(count > 0, moments[1], running_var_C)
    y_PHWC = _normalised(x_PHWC, mean_C, var_C, scale_C, bias_C)
    return (y_PHWC, moments), (x_PHWC, scale_C, valid_P, mean_C, var_C, count)


def _batch_normalised_backward(axis_name, saved, cotangents):
    x_PHWC, scale_C, valid_P, mean_C, var_C, count = saved
    d_y_PHWC = cotangents[0].astype(jnp.float32)
    inverse_C = jax.lax.rsqrt(var_C + BATCH_NORM_EPSILON)
    centred_PHWC = x_PHWC.astype(jnp.float32) - mean_C
    d_bias_C = jnp.sum(d_y_PHWC, axis=(0, 1, 2))
    d_scale_C = jnp.sum(d_y_PHWC * centred_PHWC, axis=(0, 1, 2)) * inverse_C
    # Every X-ray is normalised by the moments, so all add to their gradient; only the valid ones made them.
    sums = (d_bias_C, d_scale_C) if axis_name is None else jax.lax.psum((d_bias_C, d_scale_C), axis_name)
    mean_part_C, var_part_C = (total_C / jnp.maximum(count, 1) for total_C in sums)
    through_moments_PHWC = mean_part_C + centred_PHWC * (inverse_C * var_part_C)
    d_x_PHWC = d_y_PHWC - jnp.where(valid_P[:, None, None, None], through_moments_PHWC, 0)
    d_x_PHWC = (d_x_PHWC * (inverse_C * scale_C)).astype(x_PHWC.dtype)
    return d_x_PHWC, d_scale_C, d_bias_C, None, None, None


_batch_normalised.defvjp(_batch_normalised_saving, _batch_normalised_backward)


def _updated(running_C: jax.Array, batch_C: jax.Array) -> jax.Array:
    return BATCH_NORM_MOMENTUM * running_C + (1 - BATCH_NORM_MOMENTUM) * batch_C


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is projected where the shape changes."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x_PHWC: jax.Array, *norm_args) -> jax.Array:
        shortcut_PHWC = x_PHWC
        if self.stride != 1 or x_PHWC.shape[-1] != self.features:
            shortcut_PHWC = Conv(self.features, 1, self.stride, name="shortcut_conv")(x_PHWC)
            shortcut_PHWC = BatchNorm(name="shortcut_norm")(shortcut_PHWC, *norm_args)
        y_PHWC = Conv(self.features, 3, self.stride, name="conv1")(x_PHWC)
        y_PHWC = nn.relu(BatchNorm(name="norm1")(y_PHWC, *norm_args))
        y_PHWC = Conv(self.features, 3, name="conv2")(y_PHWC)
        y_PHWC = BatchNorm(name="norm2")(y_PHWC, *norm_args)
        return nn.relu(y_PHWC + shortcut_PHWC)


class ResNet(nn.Module):
    """stem, four stages of basic blocks, mean over the pixels.

    stage_sizes: blocks a stage, (3, 4, 6, 3) is ResNet-34; width: channels of the first stage,
    doubled by each next one. dtype: of the convolutions; parameters and statistics are float32.
    frozen_stats: the running statistics are used, and kept, in training too.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    dtype: jnp.dtype = jnp.float32
    frozen_stats: bool = False

    def setup(self):
        self.stem_conv = StemConv(self.width)
        self.stem_norm = BatchNorm()
        for i, num_blocks in enumerate(self.stage_sizes, start=1):
            for j in range(num_blocks):
                stride = 2 if i > 1 and j == 0 else 1
                setattr(self, f"stage{i}_block{j}", BasicBlock(self.width * 2 ** (i - 1), stride))

    def stem(self, image_PHWC, train: bool = False, valid_P=None, axis_name: str | None = None) -> jax.Array:
        """X-rays to the input of stage 1, a quarter of their size."""
        x_PHWC = self.stem_conv(image_PHWC.astype(self.dtype))
        x_PHWC = nn.relu(self.stem_norm(x_PHWC, train and not self.frozen_stats, valid_P, axis_name))
        return max_pool(x_PHWC)

    def stage(self, i: int, x_PHWC, train: bool = False, valid_P=None, axis_name: str | None = None) -> jax.Array:
        """Stage i = 1..4."""
        for j in range(self.stage_sizes[i - 1]):
            block = getattr(self, f"stage{i}_block{j}")
            x_PHWC = block(x_PHWC, train and not self.frozen_stats, valid_P, axis_name)
        return x_PHWC

    def until(self, last: int, image_PHWC, train: bool = False, valid_P=None, axis_name=None) -> jax.Array:
        """X-rays to the feature maps [P, h, w, C] after stage `last`."""
        x_PHWC = self.stem(image_PHWC, train, valid_P, axis_name)
        for i in range(1, last + 1):
            x_PHWC = self.stage(i, x_PHWC, train, valid_P, axis_name)
        return x_PHWC

    def __call__(self, image_PHWC, train: bool = False, valid_P=None, axis_name: str | None = None) -> jax.Array:
        """X-rays [P, H, W, C] -> features [P, E], float32.

        valid_P: which X-rays count in the batch statistics. The others must be finite.
        """
        return pooled(self.until(len(self.stage_sizes), image_PHWC, train, valid_P, axis_name))


def pooled(x_PHWC: jax.Array) -> jax.Array:
    """The mean over the pixels [P, C], float32."""
    return jnp.mean(x_PHWC.astype(jnp.float32), axis=(1, 2))
