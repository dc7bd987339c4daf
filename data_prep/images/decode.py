"""Decode one X-ray to a square of 256 x 256 grey pixels."""

import struct
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from medfuse_jax import schema

DECODER = f"Pillow {PIL.__version__}"  # another version may give other pixels
VERSION = 1  # increment when the same file gives other pixels


def decode(path: Path, image_shape: str) -> np.ndarray:
    """Return the X-ray as uint8 [256, 256]; raise OSError if it cannot be read.

    libjpeg decodes at its smallest scale (1/8 to 1) that keeps 256 px on both sides, several times faster than a
    full decode; the result is then resized.
    image_shape: 'squash' scales both sides to 256 px, as the paper says, which changes the aspect ratio. 'crop'
        scales the shorter side to 256 px and cuts out the centre square, a superset of what the released test
        transform sees (resize to 256, centre crop of 224).
    """
    size = schema.IMAGE_SIZE_PX
    try:
        with Image.open(path) as image:
            image.draft("L", (size, size))
            image = image.convert("L")
    except (SyntaxError, ValueError, IndexError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise OSError(f"not a readable image ({type(error).__name__})") from None
    box = None
    if image_shape == "crop":
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
