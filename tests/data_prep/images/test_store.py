"""The cache of decoded X-rays, and unreadable files."""

import damage
import numpy as np
import pytest
from PIL import Image
from raw_tables import image, image_path, write_mimic_cxr
from refusals import refused

from data_prep.images import decode as decoding
from data_prep.images import store as store_module
from medfuse_jax.runtime.errors import UserError


def _store(root, folder, workers=2):
    return store_module.ImageStore(folder, root, "crop", workers)


def _jobs(images):
    return [(row["dicom_id"], image_path(row)) for row in images]


def _replace(path):
    """Write another X-ray to a file."""
    Image.new("L", (40, 40)).save(path)


def test_the_cache_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_IMAGES", 7)
    images = [image(n, 1) for n in range(20)]
    root = write_mimic_cxr(tmp_path / "cxr", images)
    cached = {}
    for workers in (1, 3):
        store = _store(root, tmp_path / f"w{workers}", workers)
        store.add(_jobs(images[::-1] if workers == 3 else images))
        cached[workers] = {p.name: p.read_bytes() for p in (tmp_path / f"w{workers}").iterdir()}
        for row in images:
            np.testing.assert_array_equal(store[row["dicom_id"]], decoding.decode(root / image_path(row), "crop"))
    assert cached[1] == cached[3] and len(cached[1]) == 6


@pytest.mark.parametrize(
    ("suffix", "harm"),
    [
        (".json", lambda path: path.write_text("")),
        (".json", lambda path: path.unlink()),
        (".json", lambda path: path.write_text("[]")),
        (".npy", damage.cut),
        (".npy", lambda path: path.write_bytes(path.read_bytes()[:300])),
        (".npy", lambda path: path.write_bytes(path.read_bytes() + b"0")),
        (".npy", lambda path: path.write_bytes(b"")),
    ],
)
def test_a_damaged_chunk_is_decoded_again(tmp_path, monkeypatch, suffix, harm):
    monkeypatch.setattr(store_module, "CHUNK_IMAGES", 3)
    images = [image(n, 1) for n in range(6)]
    root = write_mimic_cxr(tmp_path / "cxr", images, size=(16, 16))
    folder = tmp_path / "images"
    _store(root, folder).add(_jobs(images))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    harm(min(folder.glob(f"*{suffix}")))
    decoded = _count_decodes(monkeypatch)
    store = _store(root, folder)
    store.add(_jobs(images))
    assert len(decoded) == 3 and {path: path.read_bytes() for path in folder.iterdir()} == before
    for row in images:
        np.testing.assert_array_equal(store[row["dicom_id"]], decoding.decode(root / image_path(row), "crop"))


def _count_decodes(monkeypatch):
    decoded, decode = [], decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda path, shape: decoded.append(path.stem) or decode(path, shape))
    return decoded


def test_an_image_is_decoded_once_unless_its_file_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_IMAGES", 5)
    images = [image(n, 1) for n in range(10)]
    root = write_mimic_cxr(tmp_path / "cxr", images)
    _store(root, tmp_path / "images").add(_jobs(images))
    decoded = _count_decodes(monkeypatch)
    _store(root, tmp_path / "images").add(_jobs(images))
    assert decoded == []
    _replace(root / image_path(images[7]))
    store = _store(root, tmp_path / "images")
    store.add(_jobs(images))
    assert decoded == ["image-0007-00"]
    for row in images:
        np.testing.assert_array_equal(store[row["dicom_id"]], decoding.decode(root / image_path(row), "crop"))
    store.remove_unusable()
    assert len(list((tmp_path / "images").glob("*.npy"))) == 3


def test_cached_images_are_found_in_any_chunk_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_IMAGES", 5)
    images = [image(n, 1) for n in range(20)]
    root = write_mimic_cxr(tmp_path / "cxr", images)
    (root / image_path(images[3])).write_bytes(b"broken")
    monkeypatch.setattr(store_module, "MAX_UNREADABLE", 0.5)
    _store(root, tmp_path / "images").add(_jobs(images))
    before = sorted((tmp_path / "images").iterdir())
    decoded = _count_decodes(monkeypatch)
    store = _store(root, tmp_path / "images")
    store.add(_jobs(images[1:4] + images[9:11]))  # a build with fewer X-rays, in other chunks
    np.testing.assert_array_equal(store["image-0010-00"], decoding.decode(root / image_path(images[10]), "crop"))
    assert decoded == ["image-0010-00"] and list(store.unreadable) == ["image-0003-00"]
    store.remove_unusable()
    assert sorted((tmp_path / "images").iterdir()) == before


def test_unusable_chunks_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_IMAGES", 2)
    images = [image(n, 1) for n in range(4)]
    root = write_mimic_cxr(tmp_path / "cxr", images)
    store_module.ImageStore(tmp_path / "images", root, "squash", 1).add(_jobs(images))
    for suffix in (".json", ".npy"):
        (tmp_path / "images" / f".stopped{suffix}.1-1.partial{suffix}").write_bytes(b"")
    store = _store(root, tmp_path / "images")
    store.add(_jobs(images))
    crop = {path for path, _ in store._place.values()}
    assert len(list((tmp_path / "images").glob("[!.]*.npy"))) == 4
    store.remove_unusable()
    assert set((tmp_path / "images").glob("*.npy")) == crop and len(list((tmp_path / "images").iterdir())) == 4
    for row in images[:2]:
        _replace(root / image_path(row))
    store = _store(root, tmp_path / "images")
    store.add(_jobs(images))
    store.remove_unusable()
    assert len(crop & set((tmp_path / "images").glob("*.npy"))) == 1
    assert len(list((tmp_path / "images").glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("change", "says"), [("upper", "of another case"), ("folder", "--cxr_layout"), ("link", "a link"), ("", "")]
)
def test_where_an_x_ray_is_missing_the_error_says_what_is_there(tmp_path, change, says):
    row = image(0, 1)
    root = write_mimic_cxr(tmp_path / "cxr", [row])
    path = root / image_path(row)
    if change == "folder":
        path.parent.rename(path.parent.with_name("other"))
    else:
        path.rename(path.with_suffix(".JPG") if change == "upper" else path.with_name("another.jpg"))
    if change == "link":
        path.symlink_to("annexed.jpg")
    with refused(path=path, value=row["dicom_id"]) as caught:
        _store(root, tmp_path / "images").add(_jobs([row]))
    assert says in str(caught.value) and (f"{path.name});" in str(caught.value)) == (change == "")


def test_blank_images_are_counted(tmp_path):
    images = [image(n, 1) for n in range(3)]
    root = write_mimic_cxr(tmp_path / "cxr", images)
    _replace(root / image_path(images[1]))  # black
    for _ in range(2):  # decoded, then from the cache
        store = _store(root, tmp_path / "images")
        store.add(_jobs(images))
        assert store.num_blank() == 1 and "image-0001-00" in store


def test_signatures_detect_replaced_and_missing_images(tmp_path):
    images = [image(n, 1) for n in range(3)]
    root = write_mimic_cxr(tmp_path / "cxr", images)
    before = store_module.signatures(root, _jobs(images), 2)
    assert before == {row["dicom_id"]: store_module.signature(root / image_path(row)) for row in images}
    _replace(root / image_path(images[1]))
    (root / image_path(images[2])).unlink()
    after = store_module.signatures(root, _jobs(images), 2)
    assert after["image-0000-00"] == before["image-0000-00"] and after["image-0002-00"] is None
    assert after["image-0001-00"] not in (before["image-0001-00"], None)


def test_at_most_one_percent_may_be_unreadable(tmp_path):
    images = [image(n, 1) for n in range(200)]
    root = write_mimic_cxr(tmp_path / "cxr", images, size=(16, 16))
    (root / image_path(images[3])).write_bytes(b"broken")
    (root / image_path(images[150])).unlink()
    store = _store(root, tmp_path / "images")
    store.add(_jobs(images))
    assert sorted(store.unreadable) == ["image-0003-00", "image-0150-00"] and store.unreadable["image-0150-00"] is None
    assert "image-0003-00" not in store and "image-0004-00" in store
    (root / image_path(images[4])).write_bytes(b"broken")
    with pytest.raises(UserError) as raised:
        _store(root, tmp_path / "images").add(_jobs(images))
    first = root / image_path(images[150])  # the missing one
    assert (raised.value.path, raised.value.value) == (first, "image-0150-00") and str(first) in str(raised.value)
