"""Drawn X-rays show their latents."""

import numpy as np
import pytest

from data_prep.synthetic import draw, signal


def test_images_show_their_latents():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((80, len(signal.IMAGE_LATENTS)))
    drawn = np.stack([draw.draw(z, "AP", (0, i)) for i, z in enumerate(latents)])
    by_name = dict(zip(signal.IMAGE_LATENTS, latents.T, strict=True))
    centre = drawn[:, 60:240, 80:310]
    features = {
        "device": (centre > 222).mean(axis=(1, 2)),
        "lucency": (centre < 30).mean(axis=(1, 2)),
        "haze": -((centre > 30) & (centre < 90)).mean(axis=(1, 2)),  # a clear lung is dark
    }
    for name, feature in features.items():
        assert np.corrcoef(feature, by_name[name])[0, 1] > 0.6, name
        assert abs(np.corrcoef(feature, by_name["effusion"])[0, 1]) < 0.45, name


def test_an_image_follows_from_its_latents_and_seed():
    middle = np.zeros(len(signal.IMAGE_LATENTS))
    image = draw.draw(middle, "AP", (0, 1))
    assert image.shape == (320, 390) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, draw.draw(middle, "AP", (0, 1)))
    for i in range(len(middle)):
        more = draw.draw(middle + 2 * np.eye(len(middle))[i], "AP", (0, 1))
        assert np.abs(more.astype(int) - image).mean() > 0.4, signal.IMAGE_LATENTS[i]
    assert len({draw.draw(middle, v, (0, 1)).tobytes() for v in ("AP", "PA", "LATERAL")}) == 3


@pytest.mark.parametrize("view", ["AP", "PA", "LATERAL"])
def test_nothing_is_cut_off_at_the_edge_of_its_part(monkeypatch, view):
    """Whatever is drawn lies within the part of the X-ray that its code looks at."""
    latents = np.random.default_rng(0).normal(0, 2, (20, len(signal.IMAGE_LATENTS)))
    part = draw._part

    def drawn():
        return np.stack([draw.draw(z, view, (1, i)) for i, z in enumerate(latents)]).astype(int)

    in_parts = drawn()
    monkeypatch.setattr(draw, "_part", lambda x, y, *_, **__: ((slice(None), slice(None)), x, y))
    whole = drawn()
    assert np.abs(in_parts - whole).max() <= 1 and (in_parts != whole).mean() < 1e-4  # rounding

    def smaller(x, y, left, right, top=-np.inf, bottom=np.inf):
        return part(x, y, left + 0.05, right - 0.05, top + 0.05, bottom - 0.05)

    monkeypatch.setattr(draw, "_part", smaller)  # planted error
    assert np.abs(drawn() - whole).max() > 20
