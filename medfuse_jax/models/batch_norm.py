"""Batch normalisation over the X-rays of a batch, with what follows it: a ReLU, a shortcut's sum, the stem's max pool.

Shapes: P X-rays, H W pixels, C channels, h w pixels after the pool.

Accelerators wait for memory here, so for them the gradient is written out to pass over the pixels as rarely as it can.
Forward: one pass for both moments (in bfloat16), one for the output. Backward: one for both sums, one for the gradient.
Only the input and the output are kept for it. Over several devices, each way sums once. On a CPU, jax's own gradient is
faster.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models import max_pool
from medfuse_jax.models.weight import weight

EPSILON = 1e-5
MOMENTUM = 0.9  # 0.1 in torch's convention


class BatchNorm(nn.Module):
    """Batch normalisation over the valid X-rays only, then the shortcut's sum and the ReLU if asked for.

    Training uses the statistics of the valid X-rays on all devices of `axis_name`. Without any valid X-ray it uses the
    running statistics and leaves them unchanged. As in torch, the running variance is updated with the unbiased batch
    variance. Scale, bias and statistics are float32. relu: end with a ReLU. ops: as the ResNet's. pool: end with the
    stem's max pool and a ReLU, for GPUs and TPUs.
    """

    relu: bool = False
    ops: str = "plain"
    pool: bool = False

    @nn.compact
    def __call__(
        self,
        x_PHWC: jax.Array,
        train: bool = False,
        valid_P: jax.Array | None = None,
        axis_name: str | None = None,
        shortcut_PHWC: jax.Array | None = None,
    ) -> jax.Array:
        features = (x_PHWC.shape[-1],)
        scale_C = weight(self, "scale", nn.initializers.ones_init(), features)
        bias_C = weight(self, "bias", nn.initializers.zeros_init(), features)
        mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        var = self.variable("batch_stats", "var", jnp.ones, features)
        running, is_gpu = (mean.value, var.value), self.ops == "gpu"
        if not train or self.is_initializing():
            y_PHWC = _output(self.relu, x_PHWC, shortcut_PHWC, scale_C, bias_C, *running)
            pool = max_pool.max_pool if is_gpu else max_pool.plain
            return nn.relu(pool(y_PHWC)) if self.pool else y_PHWC
        if valid_P is None:
            valid_P = jnp.ones(x_PHWC.shape[0], bool)
        if self.pool:
            y_PHWC, used = _normalise_and_pool(is_gpu, axis_name, x_PHWC, scale_C, bias_C, running, valid_P)
        else:
            args = (x_PHWC, shortcut_PHWC, scale_C, bias_C, running, valid_P)
            normalise = _normalise_by_rule if self.ops in ("gpu", "tpu") else _normalise
            y_PHWC, used = normalise(self.relu, is_gpu, axis_name, *args)
        mean_C, var_C, count = used
        if self.is_mutable_collection("batch_stats"):
            unbiased_C = var_C * count / jnp.maximum(count - 1, 1)
            mean.value = jnp.where(count > 0, _updated(mean.value, mean_C), mean.value)
            var.value = jnp.where(count > 0, _updated(var.value, unbiased_C), var.value)
        return y_PHWC


def _updated(running_C: jax.Array, batch_C: jax.Array) -> jax.Array:
    return MOMENTUM * running_C + (1 - MOMENTUM) * batch_C


def _normalise(relu, is_gpu, axis_name, x_PHWC, shortcut_PHWC, scale_C, bias_C, running, valid_P):
    """Return the output, and the mean, biased variance [C] and pixel count that it used.

    No gradient reaches the statistics. running: (mean, variance), used if no X-ray is valid.
    """
    return _forward(relu, is_gpu, axis_name, x_PHWC, shortcut_PHWC, scale_C, bias_C, running, valid_P)[0]


def _forward(relu, is_gpu, axis_name, x_PHWC, shortcut_PHWC, scale_C, bias_C, running, valid_P):
    mean_C, var_C, count = _moments(x_PHWC, valid_P, running, axis_name)
    y_PHWC = _output(relu, x_PHWC, shortcut_PHWC, scale_C, bias_C, mean_C, var_C)
    if relu and is_gpu:
        # Otherwise XLA computes a block's output again for the next block's sum, or writes it in float32 too.
        y_PHWC = jax.lax.optimization_barrier(y_PHWC)
    has_shortcut = None if shortcut_PHWC is None else ()  # a truth value would become an array
    used = (mean_C, var_C, count)
    return (y_PHWC, used), (x_PHWC, y_PHWC if relu else None, has_shortcut, scale_C, bias_C, used, valid_P)


def _backward(relu, is_gpu, axis_name, saved, cotangents):
    x_PHWC, y_PHWC, has_shortcut, scale_C, bias_C, used, valid_P = saved
    d_PHWC, _ = cotangents
    moments = used[:2]
    if relu and is_gpu and has_shortcut is None:
        d_scale_C, d_bias_C = _sums(_where_positive(d_PHWC, x_PHWC, scale_C, bias_C, *moments), x_PHWC, *moments)
        # Otherwise XLA writes in the first pass what the second reads.
        x_PHWC, d_PHWC = jax.lax.optimization_barrier((x_PHWC, d_PHWC))
        d_PHWC = _where_positive(d_PHWC, x_PHWC, scale_C, bias_C, *moments)
    else:
        d_PHWC = jnp.where(y_PHWC > 0, d_PHWC, 0) if relu else d_PHWC
        d_scale_C, d_bias_C = _sums(d_PHWC, x_PHWC, *moments)
    d_x_PHWC = _through(d_PHWC, x_PHWC, scale_C, d_scale_C, d_bias_C, used, valid_P, axis_name)
    return d_x_PHWC, None if has_shortcut is None else d_PHWC, d_scale_C, d_bias_C, None, None


_normalise_by_rule = jax.custom_vjp(_normalise, nondiff_argnums=(0, 1, 2))
_normalise_by_rule.defvjp(_forward, _backward)


def _where_positive(d_PHWC, x_PHWC, scale_C, bias_C, mean_C, var_C):
    """Return the gradient where the normalised x is positive, and 0 elsewhere.

    One comparison a pixel, with the x whose output is 0: anything longer, and XLA writes the mask in a pass of its own.
    """
    factor_C = jax.lax.rsqrt(var_C + EPSILON) * scale_C
    zero_C = mean_C - bias_C / factor_C
    zero_C = jnp.where(factor_C == 0, jnp.where(bias_C > 0, -jnp.inf, jnp.inf), zero_C)
    # Where the output falls with x, x = zero_C must count as larger, so that neither sign lets an output of 0 through.
    zero_C = jnp.where(factor_C < 0, jnp.nextafter(zero_C, -jnp.inf), zero_C)
    return jnp.where((x_PHWC.astype(jnp.float32) > zero_C) != (factor_C < 0), d_PHWC, 0)


def _sums(d_PHWC, x_PHWC, mean_C, var_C):
    """Return the gradients of scale and bias on this device."""
    d_bias_C = jnp.sum(d_PHWC, axis=(0, 1, 2), dtype=jnp.float32)
    d_scale_C = jnp.sum(d_PHWC * (x_PHWC.astype(jnp.float32) - mean_C), axis=(0, 1, 2))
    return d_scale_C * jax.lax.rsqrt(var_C + EPSILON), d_bias_C


def _through(d_PHWC, x_PHWC, scale_C, d_scale_C, d_bias_C, used, valid_P, axis_name):
    """Return the gradient of x. By way of the mean and the variance, every valid pixel changes every output."""
    mean_C, var_C, count = used
    inverse_C = jax.lax.rsqrt(var_C + EPSILON)
    of_mean_C, of_var_C = _total(jnp.stack([d_bias_C, d_scale_C]), axis_name) / jnp.maximum(count, 1)
    through_PHWC = of_mean_C + (x_PHWC.astype(jnp.float32) - mean_C) * (inverse_C * of_var_C)
    through_PHWC = jnp.where(valid_P[:, None, None, None], through_PHWC, 0)
    return ((d_PHWC - through_PHWC) * (inverse_C * scale_C)).astype(x_PHWC.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise_and_pool(is_gpu, axis_name, x_PHWC, scale_C, bias_C, running, valid_P):
    """Return what `_normalise` does, then the stem's max pool and a ReLU.

    The pool comes first, of -x where the scale is negative, which changes no output: only a quarter of the pixels are
    then normalised, and summed for the gradient. Where the scale is 0, all pixels of a window tie, and its largest x
    counts in the scale's gradient.
    """
    return _forward_and_pool(is_gpu, axis_name, x_PHWC, scale_C, bias_C, running, valid_P)[0]


def _forward_and_pool(is_gpu, axis_name, x_PHWC, scale_C, bias_C, running, valid_P):
    used = _moments(x_PHWC, valid_P, running, axis_name)
    signed_PHWC = x_PHWC * _sign(scale_C, x_PHWC.dtype)
    x_PhwC, winner_PhwC = max_pool.largest(signed_PHWC) if is_gpu else (max_pool.plain(signed_PHWC), None)
    x_PhwC *= _sign(scale_C, x_PHWC.dtype)
    y_PhwC = _output(True, x_PhwC, None, scale_C, bias_C, *used[:2])
    if is_gpu:
        winner_PhwC = jnp.where(y_PhwC > 0, winner_PhwC, max_pool.NONE)
        # Otherwise XLA writes a mask for each of the nine pixels of a window.
        y_PhwC, winner_PhwC, x_PhwC = jax.lax.optimization_barrier((y_PhwC, winner_PhwC, x_PhwC))
    return (y_PhwC, used), (x_PHWC, winner_PhwC, x_PhwC, scale_C, bias_C, used, valid_P)


def _backward_and_pool(is_gpu, axis_name, saved, cotangents):
    x_PHWC, winner_PhwC, x_PhwC, scale_C, bias_C, used, valid_P = saved
    d_PhwC, _ = cotangents
    if is_gpu:  # the winners are read anyway
        positive_PhwC = jnp.where(winner_PhwC == max_pool.NONE, 0, d_PhwC)
        d_PHWC = max_pool.gradient(winner_PhwC, d_PhwC, *x_PHWC.shape[1:3])
    else:
        positive_PhwC = _where_positive(d_PhwC, x_PhwC, scale_C, bias_C, *used[:2])
        _, gradient_of_pool = jax.vjp(max_pool.plain, x_PHWC * _sign(scale_C, x_PHWC.dtype))
        (d_PHWC,) = gradient_of_pool(positive_PhwC)
    d_scale_C, d_bias_C = _sums(positive_PhwC, x_PhwC, *used[:2])
    d_x_PHWC = _through(d_PHWC, x_PHWC, scale_C, d_scale_C, d_bias_C, used, valid_P, axis_name)
    return d_x_PHWC, d_scale_C, d_bias_C, None, None


_normalise_and_pool.defvjp(_forward_and_pool, _backward_and_pool)


def _sign(scale_C, dtype):
    return jnp.where(scale_C < 0, -1, 1).astype(dtype)


def _output(relu, x_PHWC, shortcut_PHWC, scale_C, bias_C, mean_C, var_C):
    factor_C = jax.lax.rsqrt(var_C + EPSILON) * scale_C
    y_PHWC = (x_PHWC.astype(jnp.float32) - mean_C) * factor_C + bias_C
    if shortcut_PHWC is not None:
        y_PHWC += shortcut_PHWC
    return (nn.relu(y_PHWC) if relu else y_PHWC).astype(x_PHWC.dtype)


def _moments(x_PHWC, valid_P, running, axis_name):
    """Return mean [C], biased variance [C] and pixel count of the valid X-rays on all devices of the axis.

    In bfloat16, one pass and one sum over devices: sums of x and x^2, both from the running mean, since the difference
    of two large sums would lose precision. In float32 even that loss shows, so the squares are summed from the mean.
    """
    _, height, width, _ = x_PHWC.shape
    valid_P111 = valid_P[:, None, None, None]

    def sum_from(origin_C, power: int):
        shifted_PHWC = jnp.where(valid_P111, x_PHWC.astype(jnp.float32) - origin_C, 0)
        return jnp.sum(shifted_PHWC**power, axis=(0, 1, 2))

    running_mean_C, running_var_C = running
    one_pass = x_PHWC.dtype != jnp.float32
    sums = [sum_from(running_mean_C, power) for power in ((1, 2) if one_pass else (1,))]
    count = jnp.sum(valid_P, dtype=jnp.float32) * (height * width)
    totals = _total(jnp.concatenate([*sums, count[None]]), axis_name)
    sums, count = totals[:-1].reshape(len(sums), -1), totals[-1]
    divisor = jnp.maximum(count, 1)
    from_running_C = sums[0] / divisor
    mean_C = running_mean_C + from_running_C
    if one_pass:
        var_C = jnp.maximum(sums[1] / divisor - jnp.square(from_running_C), 0)
    else:
        # The derivative of the variance by the mean is zero, so stopping it is exact and saves a pass over the X-rays.
        var_C = _total(sum_from(jax.lax.stop_gradient(mean_C), 2), axis_name) / divisor
    return mean_C, jnp.where(count > 0, var_C, running_var_C), count


def _total(values, axis_name):
    return values if axis_name is None else jax.lax.psum(values, axis_name)
