"""Schematic chest radiographs that show six latents.

A latent sets sizes, shapes, brightness or texture, never a position or a side: what it draws survives downscaling to
64 px, flips, rotation, scaling and shifts. Body coordinates: x to the right, y down, the middle of the chest at (0, 0),
the short side of an X-ray from -1 to 1.

Shapes: H, W pixels of the drawing.
"""

import io
import math

import numpy as np
from PIL import Image
from scipy.special import expit

from data_prep.synthetic.signal import IMAGE_LATENTS

ROWS_PX, COLUMNS_PX = 320, 390  # of an X-ray's file; real ones are about 2,500 x 3,000
_COARSE = 2  # drawn at half the size and enlarged: four times faster, and as soft as a real X-ray
JPEG_QUALITY = 90

AIR, BODY, LUNG, FLUID, HEART, BONE, METAL = 0.03, 0.60, 0.17, 0.68, 0.79, 0.82, 1.0  # brightness


def _share(latent: float) -> float:
    """Map a latent to (0, 1), as a Python float, so that float32 images stay float32."""
    return float(expit(1.2 * latent))


def _above(value: np.ndarray, edge: float) -> np.ndarray:
    """Return 1 where `value` is positive and 0 where it is negative, with a ramp `edge` wide between them."""
    return np.clip(0.5 + value / edge, 0, 1)


def _inside(distance: np.ndarray, edge: float) -> np.ndarray:
    """Return 1 where `distance` < 1, 0 elsewhere, with a soft rim of +-`edge`."""
    return _above(1 - distance, 2 * edge)


def _ellipse(x, y, centre_x, centre_y, radius_x, radius_y, edge=0.06):
    return _inside(np.hypot((x - centre_x) / radius_x, (y - centre_y) / radius_y), edge)


def _over(image, colour, opacity):
    """Paint `colour` over the image in place."""
    image += opacity * (colour - image)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Return mottle of about `cells` patches across the X-ray, roughly in [-1, 1], shape [H, W]."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))


def _coordinates(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the body coordinates of every pixel, for a patient slightly off centre, tilted and scaled."""
    rows, columns = ROWS_PX // _COARSE, COLUMNS_PX // _COARSE
    scale = 2 / rows / rng.uniform(0.93, 1.07)
    y = ((np.arange(rows) - rows / 2) * scale + rng.uniform(-0.05, 0.05)).astype(np.float32)[:, None]
    x = ((np.arange(columns) - columns / 2) * scale + rng.uniform(-0.05, 0.05)).astype(np.float32)[None, :]
    tilt = np.float32(np.deg2rad(rng.uniform(-4, 4)))
    return x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)


def _lung_shapes(x, y, lateral: bool) -> list[tuple[np.ndarray, float, float]]:
    """Return (mask [H, W], centre x, centre y) of each lung: two from the front, one from the side."""
    lungs = [(0.02, 0.52)] if lateral else [(-0.46, 0.37), (0.46, 0.37)]
    shapes = []
    for centre, half_width in lungs:
        width = half_width * (1.0 + 0.24 * y)  # narrower at the top
        side = 0 if lateral else math.copysign(1, centre)
        outwards = 0.6 * np.abs(x) if lateral else side * (x - centre)
        floor = 0.56 + 0.30 * outwards + 0.5 * outwards * np.abs(outwards)  # the dome of the diaphragm
        mask = _inside(np.hypot((x - centre - 0.10 * side * y) / width, (y - 0.02) / 0.84), 0.05)
        shapes.append((mask * _above(floor - y, 0.04), centre, 0.0))
    return shapes


def _draw_body(x, y, rng, lateral: bool) -> np.ndarray:
    """Draw the body without lungs, float32 [H, W]."""
    image = np.full(np.broadcast_shapes(x.shape, y.shape), AIR, np.float32)
    half = 0.86 if lateral else 1.04
    neck = _above(-y - 0.84, 0.36)
    shoulders = 1 - 0.42 * neck * neck * (3 - 2 * neck)
    torso = _inside(np.abs(x) / (half * shoulders * (1 + 0.05 * y)), 0.04)
    thinner = 1 - 0.28 * (x / half) ** 2  # less tissue towards the sides
    belly = 0.12 * _above(y - 0.55, 0.4)
    _over(image, (BODY + belly) * thinner, torso)
    return image + 0.025 * _smooth_noise(rng, image.shape, 7) * torso


def _draw_lungs(image, x, y, rng, lungs, haze: float, lucency: float) -> None:
    """Draw the lungs with vessels: haze whitens and mottles them; lucency collapses one from the top."""
    fog = _share(haze)
    collapsed = rng.integers(len(lungs))
    vessels = np.exp(-np.abs(np.abs(x) - 0.14) * 4.0)
    mottle = _smooth_noise(rng, image.shape, 34)
    tissue = LUNG + 0.10 * vessels + 0.40 * fog * (1 - 0.2 * y) + (0.02 + 0.06 * fog) * mottle
    for i, (mask, centre, middle) in enumerate(lungs):
        texture = tissue
        if i == collapsed:  # black air above the lung's edge, which is a thin bright line
            edge = middle - 0.88 + 1.05 * _share(lucency) + 0.5 * (x - centre) ** 2
            texture = tissue + _above(edge - y, 0.05) * (0.07 - tissue)
            texture += 0.12 * _inside(np.abs(y - edge) / 0.02, 0.5)
        _over(image, texture, mask)


def _draw_bones(image, x, y, lungs, lateral: bool) -> None:
    """Draw ribs, collar bones and spine."""
    drop = 0.45 * x if lateral else 0.25 * np.abs(x) + 0.32 * x * x
    phase = (y - drop) / 0.215
    ribs = _inside(np.abs(phase - np.floor(phase) - 0.5) / 0.25, 0.35)
    chest = np.clip(sum(mask for mask, _, _ in lungs), 0, 1)
    image += 0.07 * (chest + 0.25) * ribs * (image > 2 * AIR) * _above(0.7 - y, 0.2)
    if lateral:
        _over(image, BONE, 0.6 * _inside(np.abs(x + 0.66 - 0.12 * y * y) / 0.12, 0.3))
        return
    collar = np.abs(y + 0.70 - 0.30 * np.abs(x) + 0.20 * x * x)
    ends = _above(0.35 - np.abs(np.abs(x) - 0.47), 0.1)
    _over(image, BONE, 0.4 * _inside(collar / 0.04, 0.4) * ends)
    vertebra = 0.8 + 0.2 * np.cos(2 * np.pi * y / 0.17)
    _over(image, BONE, 0.7 * vertebra * _inside(np.abs(x) / 0.12, 0.4))


def _draw_heart(image, x, y, size: float, lateral: bool) -> None:
    half_width = 0.20 + 0.30 * _share(size)
    centre_x, lean = (0.25, -0.2) if lateral else (0.12, 0.25)
    leaning = x - lean * (y - 0.3)
    _over(image, HEART, 0.95 * _ellipse(leaning, y, centre_x, 0.30, half_width, 0.78 * half_width + 0.07, 0.05))
    _over(image, HEART, 0.7 * _ellipse(x, y, 0.02, -0.24, 0.14, 0.36, 0.3))  # the great vessels


def _draw_effusion(image, x, y, lungs, amount: float) -> None:
    """Draw fluid at the base of each lung, its surface rising towards the wall."""
    surface = 0.66 - 0.75 * _share(amount)
    for mask, centre, _ in lungs:
        level = surface - 0.6 * (x - centre) ** 2
        _over(image, FLUID, 0.97 * mask * _above(y - level, 0.07))


def _draw_nodules(image, x, y, rng, lungs, size: float) -> None:
    """Draw a round density at a random place in each lung, all of the same size."""
    radius = 0.03 + 0.22 * _share(size)
    for _, centre, middle in lungs:
        centre_x, centre_y = centre * 1.05 + rng.uniform(-0.08, 0.08), middle + rng.uniform(-0.35, 0.1)
        wobble = 1 + 0.10 * np.sin(3 * np.arctan2(y - centre_y, x - centre_x) + rng.uniform(0, 6))
        _over(image, 0.86, 0.95 * _inside(np.hypot(x - centre_x, y - centre_y) / (radius * wobble), 0.2))


def _draw_device(image, x, y, rng, load: float) -> None:
    """Draw a pacemaker with its lead, and a tube: the larger the load, the more metal."""
    share = _share(load)
    side = int(rng.choice([-1, 1]))
    opacity = min(1.0, 0.3 + 1.5 * share)
    box = np.maximum(np.abs(x - side * 0.62), np.abs(y + 0.42)) / (0.03 + 0.18 * share)
    _over(image, METAL, opacity * _inside(box, 0.15))
    width = 0.012 + 0.05 * share
    lead_y = -0.42 + 0.9 * np.clip((0.62 - side * x) / 0.5, 0, 1) ** 2
    lead = np.abs(y - lead_y) / width + 50 * np.clip(np.abs(side * x - 0.37) - 0.26, 0, None)
    _over(image, METAL, opacity * _inside(lead, 0.5))
    tube = np.abs(x + 0.02) / width + 50 * np.clip(y + 0.22, 0, None)
    _over(image, METAL, opacity * _inside(tube, 0.5))


def draw(latents: np.ndarray, view: str, seed: tuple[int, ...]) -> np.ndarray:
    """Draw one X-ray, uint8 [320, 390].

    latents: one value per name in IMAGE_LATENTS; view: 'AP', 'PA' or 'LATERAL'.
    """
    rng = np.random.default_rng(seed)
    value = dict(zip(IMAGE_LATENTS, latents.tolist(), strict=True))
    lateral = view == "LATERAL"
    x, y = _coordinates(rng)
    if view == "PA":  # standing, from behind: a smaller heart shadow, a deeper breath
        value["heart"] -= 0.2
        y = y * 0.96
    image = _draw_body(x, y, rng, lateral)
    lungs = _lung_shapes(x, y, lateral)
    _draw_lungs(image, x, y, rng, lungs, value["haze"], value["lucency"])
    _draw_bones(image, x, y, lungs, lateral)
    _draw_effusion(image, x, y, lungs, value["effusion"])
    _draw_heart(image, x, y, value["heart"], lateral)
    _draw_nodules(image, x, y, rng, lungs, value["nodule"])
    _draw_device(image, x, y, rng, value["device"])
    exposure = rng.uniform(0.96, 1.04)
    assert image.dtype == np.float32, image.dtype  # twice as fast as float64
    grey = Image.fromarray(np.clip(image * exposure * 235, 0, 255).astype(np.uint8))
    fine = np.asarray(grey.resize((COLUMNS_PX, ROWS_PX), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-4, 5, fine.shape, dtype=np.int8)
    return np.clip(fine + grain, 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    """Return the X-ray as a grey JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
