"""Transformer layers over the tokens of a stay's series and of its X-ray, either of which may be missing.

Shapes: B rows, P images, S tokens of a row, N tokens of an image, D token width, Q queries, C keys, T time.

Tokens of images are packed: a layer computes those of the P images that exist, not of the B rows.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from medfuse_jax.models.presence import Images

_MAX_HEADS = 4
_LONGEST_PERIOD = 10_000  # of the positions' sines, in tokens (Vaswani et al. 2017)


def masked_softmax(score_BM: jax.Array, mask_BM: jax.Array) -> jax.Array:
    """Compute the softmax over the unmasked positions of the last axis [..., M]; 0 for fully masked rows."""
    highest_B1 = jnp.max(jnp.where(mask_BM, score_BM, -jnp.inf), axis=-1, keepdims=True, initial=-1e30)
    exp_BM = jnp.where(mask_BM, jnp.exp(jnp.where(mask_BM, score_BM - jax.lax.stop_gradient(highest_B1), 0)), 0)
    sum_B1 = jnp.sum(exp_BM, axis=-1, keepdims=True)
    # Not a maximum of the sum and 1: at a single position, whose sum is 1, its gradient would be half of the sum's.
    return exp_BM / jnp.where(sum_B1 > 0, sum_B1, 1)


def num_heads(width: int) -> int:
    """Return the number of attention heads: four, or fewer if that does not divide the width."""
    return math.gcd(width, _MAX_HEADS)


def positions(num_tokens: int, width: int) -> jax.Array:
    """Return sines and cosines of each token's position [S, D] (Vaswani et al. 2017, 3.5)."""
    num_periods = (width + 1) // 2
    rate = _LONGEST_PERIOD ** -(jnp.arange(num_periods) / max(num_periods, 1))
    angle = jnp.arange(num_tokens)[:, None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :width]


def grid_positions(height: int, width: int, channels: int) -> jax.Array:
    """Return the positions of an image's cells [N, D], row by row: half of the channels for each axis."""
    of_row = jnp.repeat(positions(height, channels - channels // 2), width, axis=0)
    of_column = jnp.tile(positions(width, channels // 2), (height, 1))
    return jnp.concatenate([of_row, of_column], axis=-1)


def attend(query_BQD, key_BCD, value_BCD, mask_BC, dtype=jnp.float32, causal: bool = False) -> jax.Array:
    """Return each query's weighted mean of the values [B, Q, D], by heads; zeros for rows without an unmasked key.

    causal: a query reads no key after its own place.
    """
    heads = num_heads(query_BQD.shape[-1])
    query, key, value = (x.reshape(*x.shape[:2], heads, -1).astype(dtype) for x in (query_BQD, key_BCD, value_BCD))
    score_BHQC = jnp.einsum("bqhd,bchd->bhqc", query, key).astype(jnp.float32) / math.sqrt(query.shape[-1])
    mask = mask_BC[:, None, None]
    if causal:
        mask = mask & jnp.tril(jnp.ones(score_BHQC.shape[2:], bool))
    weight_BHQC = masked_softmax(score_BHQC, mask)
    mean = jnp.einsum("bhqc,bchd->bqhd", weight_BHQC.astype(dtype), value).astype(jnp.float32)
    return mean.reshape(query_BQD.shape)


def to_rows(images: Images, x_PND: jax.Array) -> jax.Array:
    """Scatter tokens of images to their rows [B, N, D]; rows without an image get zeros."""
    return images.to_rows(x_PND.reshape(len(x_PND), -1)).reshape(-1, *x_PND.shape[1:])


def from_rows(images: Images, x_BSD: jax.Array) -> jax.Array:
    """Gather tokens of rows for their images [P, S, D]; empty slots get zeros."""
    return images.from_rows(x_BSD.reshape(len(x_BSD), -1)).reshape(-1, *x_BSD.shape[1:])


class Layer(nn.Module):
    """A pre-norm transformer layer in which a row's tokens and those of its image attend to each other.

    hidden: units of the feed-forward part. dtype: of the products; the tokens stay float32. causal: a token reads none
    that comes after it; for rows alone, without images.
    """

    hidden: int
    dtype: jnp.dtype = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self, row_BSD, mask_BS, image_PND, images: Images | None, first_only: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the next tokens of rows and images. mask_BS: which tokens of a row are there.

        image_PND: the tokens of all image slots, or None for a batch without any. Those of empty slots mean nothing.
        first_only: compute each row's first token alone [B, 1, D], and none of images: a class token in the last layer.
        """
        width = row_BSD.shape[-1]
        dense = {"dtype": self.dtype}
        norm, qkv = nn.LayerNorm(name="attention_norm"), nn.Dense(3 * width, name="qkv", **dense)
        out, up = nn.Dense(width, name="out", **dense), nn.Dense(self.hidden, name="up", **dense)
        down, mlp_norm = nn.Dense(width, name="down", **dense), nn.LayerNorm(name="mlp_norm")

        def project(x):
            return jnp.split(qkv(norm(x)), 3, axis=-1)

        def finish(x, mean):
            x = x + out(mean).astype(jnp.float32)
            return x + down(nn.gelu(up(mlp_norm(x)))).astype(jnp.float32)

        query_BSD, key_BSD, value_BSD = project(row_BSD)
        if first_only:
            row_BSD, query_BSD = row_BSD[:, :1], query_BSD[:, :1]
        if images is None:
            return finish(row_BSD, attend(query_BSD, key_BSD, value_BSD, mask_BS, self.dtype, self.causal)), None
        assert not self.causal, "an image has no place among a row's tokens"
        query_PND, key_PND, value_PND = project(image_PND)
        has_image_BN = jnp.repeat(images.present_rows()[:, None], image_PND.shape[1], axis=1)
        has_image_PN = jnp.repeat(images.valid_P[:, None], image_PND.shape[1], axis=1)

        def of_rows(x_BSD, x_PND):
            return jnp.concatenate([x_BSD, to_rows(images, x_PND)], axis=1)

        def of_images(x_BSD, x_PND):
            return jnp.concatenate([from_rows(images, x_BSD), x_PND], axis=1)

        mask_BC = jnp.concatenate([mask_BS, has_image_BN], axis=1)
        mean_BSD = attend(query_BSD, of_rows(key_BSD, key_PND), of_rows(value_BSD, value_PND), mask_BC, self.dtype)
        if first_only:
            return finish(row_BSD, mean_BSD), None
        mask_PC = jnp.concatenate([from_rows(images, mask_BS[..., None])[..., 0], has_image_PN], axis=1)
        mean_PND = attend(query_PND, of_images(key_BSD, key_PND), of_images(value_BSD, value_PND), mask_PC, self.dtype)
        return finish(row_BSD, mean_BSD), finish(image_PND, mean_PND)
