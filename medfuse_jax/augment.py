"""Turn stored X-rays (uint8) into the network's input, inside the jitted step.

Shapes: P X-rays, S stored side, R resized side, C cropped side, all in pixels.

Flip, rotation, scaling, translation and crop are done in one bilinear sampling. Differs from MedFuse
(datasets/cxr_dataset.py): its affine transform takes the nearest pixel.
"""

import dataclasses

import jax
import jax.numpy as jnp


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


def prepare_augmented(key: jax.Array, image_id_P: jax.Array, image_PSS: jax.Array, options: ImageOptions) -> jax.Array:
    """Resize and augment X-rays for training: uint8 [P, S, S] -> float32 [P, C, C, 2], black outside the X-ray.

    Each X-ray has its own key, fold_in(key, image_id), so its augmentation does not depend on its place in the batch.
    """

    def augment(image_id, grey_RR):
        return _sample(grey_RR, *_draw_affine(jax.random.fold_in(key, image_id), options), options.crop_px)

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
    from_centre = jnp.arange(crop_px) - (crop_px - 1) / 2
    y_CC, x_CC = jnp.meshgrid(from_centre, from_centre, indexing="ij")
    centre = (grey_RR.shape[0] - 1) / 2
    image_y = matrix[0, 0] * y_CC + matrix[0, 1] * x_CC + offset[0] + centre
    image_x = matrix[1, 0] * y_CC + matrix[1, 1] * x_CC + offset[1] + centre
    return jax.scipy.ndimage.map_coordinates(grey_RR, [image_y, image_x], order=1, mode="constant", cval=0.0)


def _with_ones(grey_PCC: jax.Array) -> jax.Array:
    return jnp.stack([grey_PCC, jnp.ones_like(grey_PCC)], -1)
