"""Schematic chest radiographs that show six latents.

A latent sets sizes, shapes, brightness or texture, never a position or a side, so that it stays visible after
downscaling to 64 px, flips, rotation, scaling and shifts. Body coordinates: x to the right, y down, the middle of the
chest at (0, 0), the short side of an X-ray from -1 to 1.

`python -m data_prep.synthetic.draw FOLDER SEED` draws the X-rays that cxr.py lists on its standard input. It imports
little, so that it starts at once.

Shapes: H, W pixels of the drawing.
"""

import io
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_LATENTS = ("heart", "effusion", "haze", "device", "nodule", "lucency")
ROWS_PX, COLUMNS_PX = 320, 390  # of an X-ray's file; real ones are about 2,500 x 3,000
_COARSE = 2  # drawn at half the size and enlarged: four times faster, and as soft as a real X-ray
JPEG_QUALITY = 90

AIR, BODY, LUNG, FLUID, HEART, BONE, METAL = 0.03, 0.60, 0.17, 0.68, 0.79, 0.82, 1.0  # brightness


Part = tuple[tuple[slice, slice], np.ndarray, np.ndarray]  # rows and columns of the drawing, their x and y


def _share(latent: float) -> float:
    """Map a latent to (0, 1), as a Python float, so that float32 images stay float32."""
    return 1 / (1 + math.exp(-1.2 * latent))


def _above(value: np.ndarray, edge: float) -> np.ndarray:
    """Return 1 where `value` is positive and 0 where it is negative, with a ramp `edge` wide between them."""
    ramp = value / edge
    ramp += 0.5
    return np.clip(ramp, 0, 1, out=ramp)


def _inside(distance: np.ndarray, edge: float) -> np.ndarray:
    """Return 1 where `distance` < 1, 0 elsewhere, with a soft rim of +-`edge`."""
    return _above(1 - distance, 2 * edge)


def _part(x, y, left: float, right: float, top: float = -np.inf, bottom: float = np.inf) -> Part:
    """Return the smallest part of the drawing that covers a rectangle of the body, to paint only there."""
    margin = 0.01  # for rounding
    ends_y, ends_x = y[:, [0, -1]], x[[0, -1]]  # both coordinates are linear
    rows = np.flatnonzero((ends_y.max(1) > top - margin) & (ends_y.min(1) < bottom + margin))
    columns = np.flatnonzero((ends_x.max(0) > left - margin) & (ends_x.min(0) < right + margin))
    if not len(rows) or not len(columns):
        rows = columns = np.array([0])  # off the drawing: any one pixel, where the shape has no opacity
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return window, x[window].copy(), y[window].copy()  # operations on copies are twice as fast as on views


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return np.hypot(x, y), in two thirds of its time."""
    return np.sqrt(np.square(x, dtype=np.float64) + np.square(y, dtype=np.float64)).astype(np.float32)


def _over(image, colour, opacity):
    """Paint `colour` over the image in place."""
    change = colour - image
    change *= opacity
    image += change


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


def _lung_shapes(x, y, lateral: bool) -> list[tuple[Part, np.ndarray, float]]:
    """Return (part, mask in it, centre x) of each lung: two from the front, one from the side."""
    lungs = [(0.02, 0.52)] if lateral else [(-0.46, 0.37), (0.46, 0.37)]
    shapes = []
    for centre, half_width in lungs:
        reach = 1.28 * half_width + 0.1
        part = _, x_in, y_in = _part(x, y, centre - reach, centre + reach, -0.87, 0.91)
        width = half_width * (1.0 + 0.24 * y_in)  # narrower at the top
        side = 0 if lateral else math.copysign(1, centre)
        outwards = 0.6 * np.abs(x_in) if lateral else side * (x_in - centre)
        floor = 0.56 + 0.30 * outwards + 0.5 * outwards * np.abs(outwards)  # the dome of the diaphragm
        mask = _inside(_distance((x_in - centre - 0.10 * side * y_in) / width, (y_in - 0.02) / 0.84), 0.05)
        shapes.append((part, mask * _above(floor - y_in, 0.04), centre))
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


def _draw_lungs(image, rng, lungs, haze: float, lucency: float) -> None:
    """Draw the lungs with vessels: haze whitens and mottles them; lucency collapses one from the top."""
    fog = _share(haze)
    collapsed = rng.integers(len(lungs))
    mottle = _smooth_noise(rng, image.shape, 34)
    for i, ((window, x_in, y_in), mask, centre) in enumerate(lungs):
        vessels = np.exp(-np.abs(np.abs(x_in) - 0.14) * 4.0)
        texture = LUNG + 0.10 * vessels + 0.40 * fog * (1 - 0.2 * y_in) + (0.02 + 0.06 * fog) * mottle[window]
        if i == collapsed:  # black air above the lung's edge, which is a thin bright line
            edge = -0.88 + 1.05 * _share(lucency) + 0.5 * (x_in - centre) ** 2
            texture += _above(edge - y_in, 0.05) * (0.07 - texture)
            texture += 0.12 * _inside(np.abs(y_in - edge) / 0.02, 0.5)
        _over(image[window], texture, mask)


def _draw_bones(image, x, y, lungs, lateral: bool) -> None:
    """Draw ribs, collar bones and spine."""
    drop = 0.45 * x if lateral else 0.25 * np.abs(x) + 0.32 * x * x
    phase = (y - drop) / 0.215
    ribs = _inside(np.abs(phase - np.floor(phase) - 0.5) / 0.25, 0.35)
    chest = np.zeros_like(image)
    for (window, _, _), mask, _ in lungs:
        chest[window] += mask
    image += 0.07 * (np.minimum(chest, 1) + 0.25) * ribs * (image > 2 * AIR) * _above(0.7 - y, 0.2)
    if lateral:
        window, x_in, y_in = _part(x, y, -0.82, -0.32)
        _over(image[window], BONE, 0.6 * _inside(np.abs(x_in + 0.66 - 0.12 * y_in * y_in) / 0.12, 0.3))
        return
    window, x_in, y_in = _part(x, y, -0.88, 0.88, -0.77, -0.52)
    aside = np.abs(x_in)
    collar = np.abs(y_in + 0.70 - 0.30 * aside + 0.20 * aside * aside)
    ends = _above(0.35 - np.abs(aside - 0.47), 0.1)
    _over(image[window], BONE, 0.4 * _inside(collar / 0.04, 0.4) * ends)
    window, x_in, y_in = _part(x, y, -0.17, 0.17)
    vertebra = 0.8 + 0.2 * np.cos(2 * np.pi * y_in / 0.17)
    _over(image[window], BONE, 0.7 * vertebra * _inside(np.abs(x_in) / 0.12, 0.4))


def _draw_ellipse(image, x, y, brightness, opacity, centre, radius, edge, lean=0.0) -> None:
    """Draw an ellipse with a soft rim; it leans to the right, towards the feet, by `lean`."""
    (centre_x, centre_y), (radius_x, radius_y) = centre, radius
    reach_y = radius_y * (1 + edge)
    reach_x = radius_x * (1 + edge) + abs(lean) * reach_y
    window, x_in, y_in = _part(x, y, centre_x - reach_x, centre_x + reach_x, centre_y - reach_y, centre_y + reach_y)
    x_in = x_in - lean * (y_in - centre_y)
    distance = _distance((x_in - centre_x) / radius_x, (y_in - centre_y) / radius_y)
    _over(image[window], brightness, opacity * _inside(distance, edge))


def _draw_heart(image, x, y, size: float, lateral: bool) -> None:
    half_width = 0.20 + 0.30 * _share(size)
    centre_x, lean = (0.25, -0.2) if lateral else (0.12, 0.25)
    _draw_ellipse(image, x, y, HEART, 0.95, (centre_x, 0.30), (half_width, 0.78 * half_width + 0.07), 0.05, lean)
    _draw_ellipse(image, x, y, HEART, 0.7, (0.02, -0.24), (0.14, 0.36), 0.3)  # the great vessels


def _draw_effusion(image, lungs, amount: float) -> None:
    """Draw fluid at the base of each lung, its surface rising towards the wall."""
    surface = 0.66 - 0.75 * _share(amount)
    for (window, x_in, y_in), mask, centre in lungs:
        level = surface - 0.6 * (x_in - centre) ** 2
        _over(image[window], FLUID, 0.97 * mask * _above(y_in - level, 0.07))


def _draw_nodules(image, x, y, rng, lungs, size: float) -> None:
    """Draw a round density at a random place in each lung, all of the same size."""
    radius = 0.03 + 0.22 * _share(size)
    for _, _, centre in lungs:
        centre_x, centre_y = centre * 1.05 + rng.uniform(-0.08, 0.08), rng.uniform(-0.35, 0.1)
        reach = 1.32 * radius
        window, x_in, y_in = _part(x, y, centre_x - reach, centre_x + reach, centre_y - reach, centre_y + reach)
        x_in, y_in = x_in - centre_x, y_in - centre_y
        wobble = 1 + 0.10 * np.sin(3 * np.arctan2(y_in, x_in) + rng.uniform(0, 6))
        _over(image[window], 0.86, 0.95 * _inside(_distance(x_in, y_in) / (radius * wobble), 0.2))


def _draw_device(image, x, y, rng, load: float) -> None:
    """Draw a pacemaker with its lead, and a tube: the larger the load, the more metal."""
    share = _share(load)
    side = int(rng.choice([-1, 1]))
    opacity = min(1.0, 0.3 + 1.5 * share)
    size = 0.03 + 0.18 * share
    reach = 1.15 * size
    window, x_in, y_in = _part(x, y, side * 0.62 - reach, side * 0.62 + reach, -0.42 - reach, -0.42 + reach)
    box = np.maximum(np.abs(x_in - side * 0.62), np.abs(y_in + 0.42)) / size
    _over(image[window], METAL, opacity * _inside(box, 0.15))
    width = 0.012 + 0.05 * share
    left, right = sorted((side * 0.08, side * 0.66))
    window, x_in, y_in = _part(x, y, left, right, -0.42 - 1.5 * width, 0.48 + 1.5 * width)
    lead_y = -0.42 + 0.9 * np.clip((0.62 - side * x_in) / 0.5, 0, 1) ** 2
    lead = np.abs(y_in - lead_y) / width + 50 * np.clip(np.abs(side * x_in - 0.37) - 0.26, 0, None)
    _over(image[window], METAL, opacity * _inside(lead, 0.5))
    window, x_in, y_in = _part(x, y, -0.02 - 1.5 * width, -0.02 + 1.5 * width, bottom=-0.19)
    tube = np.abs(x_in + 0.02) / width + 50 * np.clip(y_in + 0.22, 0, None)
    _over(image[window], METAL, opacity * _inside(tube, 0.5))


def draw(latents: Sequence[float], view: str, seed: tuple[int, ...]) -> np.ndarray:
    """Draw one X-ray, uint8 [320, 390].

    latents: one value per name in IMAGE_LATENTS; view: 'AP', 'PA' or 'LATERAL'.
    """
    rng = np.random.default_rng(seed)
    value = dict(zip(IMAGE_LATENTS, map(float, latents), strict=True))
    lateral = view == "LATERAL"
    x, y = _coordinates(rng)
    if view == "PA":  # standing, from behind: a smaller heart shadow, a deeper breath
        value["heart"] -= 0.2
        y = y * 0.96
    image = _draw_body(x, y, rng, lateral)
    lungs = _lung_shapes(x, y, lateral)
    _draw_lungs(image, rng, lungs, value["haze"], value["lucency"])
    _draw_bones(image, x, y, lungs, lateral)
    _draw_effusion(image, lungs, value["effusion"])
    _draw_heart(image, x, y, value["heart"], lateral)
    _draw_nodules(image, x, y, rng, lungs, value["nodule"])
    _draw_device(image, x, y, rng, value["device"])
    exposure = rng.uniform(0.96, 1.04)
    assert image.dtype == np.float32, image.dtype  # twice as fast as float64
    grey = Image.fromarray(np.clip(image * exposure * 235, 0, 255).astype(np.uint8))
    fine = np.asarray(grey.resize((COLUMNS_PX, ROWS_PX), Image.Resampling.BICUBIC), np.int16)
    fine = fine + rng.integers(-4, 5, fine.shape, dtype=np.int8)  # grain
    return np.clip(fine, 0, 255, out=fine).astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    """Return the X-ray as a grey JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def main(folder: str, seed: str) -> None:
    """Draw the X-rays listed on standard input, a JSON line each: its number, path below `folder`, view and latents.

    The exit status is the error number of a failed write.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    try:
        for line in sys.stdin:
            number, name, view, latents = json.loads(line)
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(draw(latents, view, (int(seed), 3, number))))
    except OSError as error:
        sys.exit(error.errno or 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
