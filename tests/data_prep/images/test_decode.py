"""X-rays' pixels, and files that cannot be decoded."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images import decode as decoding


def _image(path, width, height, column=None, row=None):
    """Return a black X-ray with a white stripe, 32 px wide, that ends at `column`, or at `row`."""
    pixels = np.zeros((height, width), np.uint8)
    if column is not None:
        pixels[:, column - 32 : column] = 255
    if row is not None:
        pixels[row - 32 : row] = 255
    Image.fromarray(pixels).save(path, quality=95)
    return path


def test_squash_keeps_every_part_and_crop_the_aspect_ratio(tmp_path):
    wide = _image(tmp_path / "wide.jpg", 1024, 512, column=32)  # at the left edge
    squashed, cropped = decoding.decode(wide, "squash"), decoding.decode(wide, "crop")
    assert squashed.shape == cropped.shape == (256, 256) and squashed.dtype == np.uint8
    assert (squashed[:, :7] > 200).all() and not (squashed[:, 10:] > 50).any()
    assert not (cropped > 50).any()
    centre = _image(tmp_path / "centre.jpg", 1024, 512, column=528)
    assert (decoding.decode(centre, "squash") > 128).sum(1).tolist() == [8] * 256
    assert (decoding.decode(centre, "crop") > 128).sum(1).tolist() == [16] * 256
    tall = _image(tmp_path / "tall.jpg", 512, 1024, row=528)
    assert (decoding.decode(tall, "crop") > 128).sum(0).tolist() == [16] * 256


def test_reduced_decoding_is_close_to_full_decoding(tmp_path):
    y, x = np.mgrid[:1000, :1200] / 1000
    smooth = (127 + 100 * np.sin(9 * x + 5 * y)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        whole = np.asarray(image.convert("L").resize((256, 256), Image.Resampling.BILINEAR)).astype(int)
    difference = np.abs(decoding.decode(tmp_path / "a.jpg", "squash") - whole)
    assert difference.max() <= 6
    assert np.abs(decoding.decode(tmp_path / "a.jpg", "crop") - whole).max() > 20  # planted error: another geometry


def test_colour_and_small_images_are_readable(tmp_path):
    Image.new("RGB", (50, 60), (200, 200, 200)).save(tmp_path / "rgb.jpg")
    assert np.abs(decoding.decode(tmp_path / "rgb.jpg", "crop").astype(int) - 200).max() <= 2


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0" + b"\x00" * 40, "truncated"])
def test_an_unreadable_image_raises_oserror(tmp_path, content):
    path = tmp_path / "a.jpg"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)).save(path)
        content = path.read_bytes()[:5000]
    path.write_bytes(content)
    with pytest.raises(OSError):
        decoding.decode(path, "crop")


def test_an_oversized_image_raises_oserror(tmp_path, monkeypatch):
    Image.new("L", (300, 300)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="DecompressionBombError"):
        decoding.decode(tmp_path / "a.jpg", "crop")


def test_a_missing_image_raises_oserror(tmp_path):
    with pytest.raises(OSError):
        decoding.decode(tmp_path / "missing.jpg", "crop")


RAMP = np.tile(np.linspace(10, 245, 256).round().astype(np.uint8), (256, 1))  # dark at the left


def _save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)


def _sideways(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    _save(path, np.rot90(RAMP).copy(), format="JPEG", quality=95, exif=exif)


def _white_is_zero(path, pixels):
    """Write a TIFF whose 0 is white; its tag is changed in the file, because Pillow writes no such one of 16 bits."""
    _save(path, pixels, format="TIFF")
    black, white = (struct.pack("<HHIHH", 262, 3, 1, value, 0) for value in (1, 0))
    content = path.read_bytes()
    assert content.count(black) == 1
    path.write_bytes(content.replace(black, white))


def _colour_png(path, pixels_HW):
    """Write a 16-bit RGB PNG, which Pillow can read and not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = [b"\0" + row.repeat(3).astype(">u2").tobytes() for row in pixels_HW.astype(np.uint16)]
    header = struct.pack(">IIBBBBB", *pixels_HW.shape[::-1], 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


KINDS = {
    "JPEG": lambda path: _save(path, RAMP, format="JPEG", quality=95),
    "colour JPEG": lambda path: Image.fromarray(RAMP).convert("RGB").save(path, format="JPEG", quality=95),
    "CMYK JPEG": lambda path: Image.fromarray(RAMP).convert("RGB").convert("CMYK").save(path, "JPEG", quality=95),
    "JPEG on its side": _sideways,
    "PNG": lambda path: _save(path, RAMP, format="PNG"),
    "opaque PNG": lambda path: Image.fromarray(RAMP).convert("LA").save(path, format="PNG"),
    "palette PNG": lambda path: Image.fromarray(RAMP).convert("P").save(path, format="PNG"),
    "16-bit PNG": lambda path: _save(path, RAMP.astype(np.uint16) * 257, format="PNG"),
    "16-bit colour PNG": lambda path: _colour_png(path, RAMP.astype(int) * 257),
    "12-bit PNG": lambda path: _save(path, RAMP.astype(np.uint16) * 16, format="PNG"),
    "16-bit TIFF": lambda path: _save(path, RAMP.astype(np.uint16) * 257, format="TIFF"),
    "8-bit TIFF in which 0 is white": lambda path: _white_is_zero(path, 255 - RAMP),
    "16-bit TIFF in which 0 is white": lambda path: _white_is_zero(path, (255 - RAMP).astype(np.uint16) * 257),
    "12-bit TIFF in which 0 is white": lambda path: _white_is_zero(path, (255 - RAMP).astype(np.uint16) * 16),
    "12 bits at the upper end of a 16-bit TIFF in which 0 is white": lambda path: _white_is_zero(
        path, 65535 - RAMP.astype(np.uint16) * 16
    ),
    "32-bit TIFF of 16 bits": lambda path: _save(path, RAMP.astype(np.int32) * 257, format="TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_any_kind_is_the_ramp_upright(tmp_path, kind):
    KINDS[kind](tmp_path / "a.jpg")
    difference = np.abs(decoding.decode(tmp_path / "a.jpg", "squash").astype(int) - RAMP)
    assert difference.max() <= 4
    assert np.abs(decoding.decode(tmp_path / "a.jpg", "squash").astype(int) - RAMP.T).max() > 200


def _transparent(path):
    pixels = np.stack([RAMP] * 3 + [np.where(np.arange(256) < 64, 0, 255)[None].repeat(256, 0)], axis=-1)
    _save(path, pixels.astype(np.uint8), format="PNG")


NOT_X_RAYS = {
    "float TIFF": lambda path: _save(path, RAMP.astype(np.float32) / 255, format="TIFF"),
    "negative TIFF": lambda path: _save(path, RAMP.astype(np.int32) - 100, format="TIFF"),
    "32-bit TIFF": lambda path: _save(path, RAMP.astype(np.int32) * 70_000, format="TIFF"),
    "12-bit colour PNG": lambda path: _colour_png(path, RAMP.astype(int) * 16),  # Pillow reads it as black
    "1-bit PNG": lambda path: Image.fromarray(RAMP).convert("1").save(path, format="PNG"),
    "transparent PNG": _transparent,
    "a picture in the transparency": lambda path: Image.merge(
        "LA", [Image.new("L", (256, 256), 255), Image.fromarray(RAMP)]
    ).save(path, format="PNG"),
    "GIF": lambda path: _save(path, RAMP, format="GIF"),
    "EPS": lambda path: _save(path, RAMP, format="EPS"),
    "named pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", NOT_X_RAYS)
def test_what_shows_no_x_ray_is_unreadable(tmp_path, kind):
    NOT_X_RAYS[kind](tmp_path / "a.jpg")
    with pytest.raises(OSError):
        decoding.decode(tmp_path / "a.jpg", "squash")


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_PIXELS"])
def test_files_and_pictures_have_a_largest_size(tmp_path, monkeypatch, limit):
    KINDS["JPEG"](tmp_path / "a.jpg")
    decoding.decode(tmp_path / "a.jpg", "squash")
    monkeypatch.setattr(decoding, limit, 1000)
    with pytest.raises(OSError):
        decoding.decode(tmp_path / "a.jpg", "squash")
