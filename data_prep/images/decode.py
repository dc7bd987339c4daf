"""Decode one X-ray to a square of 256 x 256 grey pixels."""

import stat
import struct
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from medfuse_jax import schema

DECODER = f"Pillow {PIL.__version__}"  # another version may give other pixels
VERSION = 5  # increment when the same file gives other pixels
FORMATS = ("JPEG", "PNG", "TIFF")  # whatever the file's name; for an EPS, Pillow would start Ghostscript
MAX_BYTES = 256 << 20
MAX_PIXELS = 80_000_000  # Pillow warns above 89 million
_MODES = ("L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits
_MODES_16 = ("I;16", "I;16L", "I;16B", "I")
_DEPTHS = (8, 10, 12, 14, 16)  # bits of a detector
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF's tag PhotometricInterpretation, and its value where 0 is white
_MAX_16_BIT, _MAX_14_BIT = (1 << 16) - 1, (1 << 14) - 1
_FULL_16_BIT = 1 << 14 - 8  # the upper 8 bits of the largest pixel, if it needs more than 14


def decode(path: Path, image_shape: str) -> np.ndarray:
    """Return the X-ray as uint8 [256, 256]; raise OSError if it cannot be read as what it shows.

    JPEG, PNG or TIFF by content, with 8 or 16 bits, turned upright as its EXIF data say. Not read: floats, one bit,
    transparency, and anything that is not a regular file.
    libjpeg decodes at its smallest scale (1/8 to 1) that keeps 256 px on both sides, several times faster than a
    full decode; the result is then resized.
    image_shape: 'squash' scales both sides to 256 px, as the paper says, which changes the aspect ratio. 'crop'
        scales the shorter side to 256 px and cuts out the centre square, a superset of what the released test
        transform sees (resize to 256, centre crop of 224).
    """
    size = schema.IMAGE_SIZE_PX
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:  # opening a named pipe would wait for ever
            raise OSError("not a regular file of at most 256 MiB")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise OSError(f"more than {MAX_PIXELS:,} pixels")
            is_16_bit = "16" in str(image.tile[0][3]) if image.tile else False
            image.draft("L", (size, size))
            white_is_zero = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
            image = _grey(ImageOps.exif_transpose(image), is_16_bit, white_is_zero)
    except OSError:
        raise
    except (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError, EOFError, struct.error) as error:
        raise OSError(f"not a readable image ({type(error).__name__})") from None
    except Image.DecompressionBombError as error:
        raise OSError(f"not a readable image ({type(error).__name__})") from None
    box = None
    if image_shape == "crop":
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _grey(image: Image.Image, is_16_bit: bool, white_is_zero: bool) -> Image.Image:
    """Return an 8-bit grey image; raise OSError for a kind that has no such reading.

    is_16_bit: whether the file has 16 bits in a channel. white_is_zero: whether its 0 is white; of 8 bits, Pillow has
    inverted such pixels already.
    """
    if image.mode in _MODES_16:
        pixels_HW = np.asarray(image)
        if white_is_zero and pixels_HW.max() > _MAX_14_BIT:  # turned over in 16 bits, whatever the detector's depth
            return _scaled(_MAX_16_BIT - pixels_HW.astype(np.int64))
        scaled = _scaled(pixels_HW)
        return ImageOps.invert(scaled) if white_is_zero else scaled
    if image.mode not in _MODES:
        raise OSError(f"pixels of the kind {image.mode!r}")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise OSError("transparent")
    grey = image.convert("L")
    if is_16_bit and grey.getextrema()[1] < _FULL_16_BIT:  # of colours, Pillow keeps the upper 8 bits of the 16
        raise OSError("colours of less than 16 bits in 16 bits")
    return grey


def _scaled(pixels_HW: np.ndarray) -> Image.Image:
    """Scale 16-bit pixels to 8 bits, by the smallest depth of a detector that holds the largest."""
    low, high = int(pixels_HW.min()), int(pixels_HW.max())
    depth = next((depth for depth in _DEPTHS if low >= 0 and high < 1 << depth), None)
    if depth is None:
        raise OSError(f"pixels from {low} to {high}, not of 16 bits")
    scaled_HW = pixels_HW.astype(np.float32) * (255 / ((1 << depth) - 1))
    return Image.fromarray(np.round(scaled_HW).astype(np.uint8))
