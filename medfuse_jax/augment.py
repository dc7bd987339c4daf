"""Turn stored X-rays (uint8) into the network's input, inside the jitted step.

Shapes: P X-rays, S stored side, R resized side, C cropped side, all in pixels.

Flip, rotation, scaling, translation and crop are done in one bilinear sampling. Differs from MedFuse
(datasets/cxr_dataset.py): its affine transform takes the nearest pixel.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

_TILE_PX = 28  # a patch is then 48 px wide by default: half the time of tiles of 56 px, by the TPU compiler's estimate


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Options for resizing, augmenting and cropping X-rays: the fields of config.image.

    Differs from the paper (A.1): no shear. The paper gives no shear angle, and the released code does not shear.
    """

    resize_px: int
    crop_px: int
    crop: str
    flip: bool
    rotation_deg: float
    scale: tuple[float, float]
    translation: float


def prepare(image_PSS: jax.Array, options: ImageOptions) -> jax.Array:
    """Resize and centre-crop X-rays for evaluation: uint8 [P, S, S] -> float32 [P, C, C, 2].

    Channel 0 is the grey value in 0..1, channel 1 is all ones. The model folds ImageNet's standardisation of three
    equal channels into its stem; the ones keep this exact at the borders, where the convolution pads with zeros.
    """
    grey_PRR = _resize(image_PSS, options.resize_px)
    start = (options.resize_px - options.crop_px) // 2
    window = slice(start, start + options.crop_px)
    return _with_ones(grey_PRR[:, window, window])


def prepare_augmented(
    key: jax.Array, image_id_P: jax.Array, image_PSS: jax.Array, options: ImageOptions, ops: str = "plain"
) -> jax.Array:
    """Resize and augment X-rays for training: uint8 [P, S, S] -> float32 [P, C, C, 2], black outside the X-ray.

    Each X-ray has its own key, fold_in(key, image_id), so its augmentation does not depend on its place in the batch.
    ops: as the model's (`resnet.ops_for`); it changes no number beyond rounding.
    """

    def augment(image_id, grey_RR):
        affine = _draw_affine(jax.random.fold_in(key, image_id), options)
        if ops == "tpu":
            return _sample_by_products(grey_RR, *affine, options)
        return _sample(grey_RR, *affine, options.crop_px)

    return _with_ones(jax.vmap(augment)(image_id_P, _resize(image_PSS, options.resize_px)))


def _resize(image_PSS: jax.Array, size_px: int) -> jax.Array:
    grey_PSS = image_PSS.astype(jnp.float32) / 255.0
    if grey_PSS.shape[1] == size_px:
        return grey_PSS
    return jax.image.resize(grey_PSS, (grey_PSS.shape[0], size_px, size_px), "linear", antialias=True)


def _draw_affine(key: jax.Array, options: ImageOptions) -> tuple[jax.Array, jax.Array]:
    """Draw the map from a pixel of the crop to the X-ray: (matrix [2, 2], offset [2]), for (y, x) from the centre."""
    # Draw all seven numbers at once: every call to jax.random compiles its own copy of the generator.
    u_7 = jax.random.uniform(key, (7,))
    angle = jnp.deg2rad(options.rotation_deg) * (2 * u_7[0] - 1)
    scale = options.scale[0] + (options.scale[1] - options.scale[0]) * u_7[1]
    shift = options.translation * options.resize_px * (2 * u_7[2:4] - 1)
    mirror = jnp.where(options.flip & (u_7[4] < 0.5), -1.0, 1.0)
    slack = (options.resize_px - options.crop_px) / 2
    crop = slack * (2 * u_7[5:] - 1) * (options.crop == "random")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # The inverse of transforming the X-ray: mirror @ rotate(-angle) @ (pixel + crop - shift) / scale.
    inverse = jnp.array([[cos, sin], [-sin, cos]]) / scale
    inverse = inverse * jnp.stack([jnp.ones(2), jnp.full(2, mirror)])
    return inverse, jnp.matmul(inverse, crop - shift, precision="highest")


def _sample(grey_RR: jax.Array, matrix: jax.Array, offset: jax.Array, crop_px: int) -> jax.Array:
    """Sample the crop [C, C] from an X-ray, bilinearly."""
    at = _coordinates(matrix, offset, len(grey_RR), crop_px, crop_px)
    return jax.scipy.ndimage.map_coordinates(grey_RR, at, order=1, mode="constant", cval=0.0)


def _coordinates(matrix, offset, size_px: int, crop_px: int, padded_px: int) -> list[jax.Array]:
    """Return where in the X-ray the crop's pixels are: y and x, each [padded_px, padded_px]."""
    from_centre = jnp.arange(padded_px) - (crop_px - 1) / 2
    y_CC, x_CC = jnp.meshgrid(from_centre, from_centre, indexing="ij")
    centre = (size_px - 1) / 2
    return [matrix[i, 0] * y_CC + matrix[i, 1] * x_CC + offset[i] + centre for i in (0, 1)]


def _sample_by_products(grey_RR: jax.Array, matrix: jax.Array, offset: jax.Array, options: ImageOptions) -> jax.Array:
    """Sample as `_sample` does, by matrix products alone: a TPU reads single pixels one by one.

    T tiles of the crop, N pixels each. A tile lies within a patch of K x K pixels of the X-ray, cut out by products
    with ones and zeros. A pixel's value is the patch times its weights for every column and every row of the patch, of
    which all but two are zero.
    """
    num_tiles = math.ceil(options.crop_px / _TILE_PX)
    size_px = len(grey_RR)

    def tiles(pixel_CC):
        pixel = pixel_CC.reshape(num_tiles, _TILE_PX, num_tiles, _TILE_PX).swapaxes(1, 2)
        return pixel.reshape(num_tiles**2, _TILE_PX**2)

    coordinates = _coordinates(matrix, offset, size_px, options.crop_px, num_tiles * _TILE_PX)
    patch_px = min(_patch_px(options), size_px)
    patch_at_K = jnp.arange(patch_px, dtype=jnp.float32)
    cuts, weights = [], []
    for at_TN in map(tiles, coordinates):
        # A patch that is moved into the X-ray still holds all of the tile's pixels that the X-ray has.
        start_T = jnp.clip(jnp.floor(at_TN.min(axis=1)), 0, size_px - patch_px)
        cuts.append(start_T[:, None, None] + patch_at_K[:, None] == jnp.arange(size_px))
        weights.append(jnp.maximum(1 - jnp.abs(at_TN[..., None] - start_T[:, None, None] - patch_at_K), 0))
    (rows_TKR, columns_TKR), (row_TNK, column_TNK) = (jnp.stack(cuts).astype(jnp.float32), weights)

    def product(names: str, *arrays):
        return jnp.einsum(names, *arrays, precision="highest")

    strip_TKR = product("tkr,rs->tks", rows_TKR, grey_RR)
    patch_TKK = product("tls,tks->tlk", columns_TKR, strip_TKR)
    value_TN = jnp.sum(product("tnl,tlk->tnk", column_TNK, patch_TKK) * row_TNK, axis=-1)
    value = value_TN.reshape(num_tiles, num_tiles, _TILE_PX, _TILE_PX).swapaxes(1, 2)
    return value.reshape(num_tiles * _TILE_PX, -1)[: options.crop_px, : options.crop_px]


def _patch_px(options: ImageOptions) -> int:
    """Return the side of a square in the X-ray that holds any tile's pixels and their neighbours."""
    angle = math.radians(min(options.rotation_deg, 45))
    side = (_TILE_PX - 1) * (math.cos(angle) + math.sin(angle)) / options.scale[0]
    return math.ceil(side) + 2


def _with_ones(grey_PCC: jax.Array) -> jax.Array:
    return jnp.stack([grey_PCC, jnp.ones_like(grey_PCC)], -1)
