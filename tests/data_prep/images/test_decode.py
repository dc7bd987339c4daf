"""X-rays' pixels, and files that cannot be decoded."""

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
