"""X-rays: times, labels, pixels, the cache, and unreadable files."""

import damage
import numpy as np
import polars as pl
import pytest
from PIL import Image
from raw_tables import image, image_path, write_mimic_cxr, write_table

from data_prep.images import decode as decoding
from data_prep.images import metadata
from data_prep.images import store as store_module
from data_prep.raw import tables
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError


def _raw(root, images, **options):
    return tables.mimic_cxr(write_mimic_cxr(root, images, **options))


def test_study_times_may_lack_leading_zeros(tmp_path):
    images = [image(1, 0.5 + 42 / 3600), image(2, 15), image(3, 1, StudyTime="246060.0"), image(4, 1, StudyDate="")]
    table, counts = metadata.read_metadata(_raw(tmp_path, images))
    assert table["time"].cast(pl.String).to_list()[:2] == ["2150-01-01 00:30:42.000000", "2150-01-01 15:00:00.000000"]
    assert table["time"].to_list()[2:] == [None, None]
    assert counts["X-rays without a valid time (never paired)"] == 2
    assert table["path"].to_list() == [image_path(row) for row in images]
    assert all((tmp_path / path).is_file() for path in table["path"])


@pytest.mark.parametrize(
    ("changes", "with_ids", "without_time"),
    [
        ({"subject_id": "1000000x"}, 1, 0),
        ({"dicom_id": ""}, 1, 0),
        ({"study_id": ""}, 1, 0),
        ({"study_id": "99999999999999999999"}, 1, 0),
        ({"StudyTime": "noon"}, 2, 1),
        ({"StudyDate": "21501345"}, 2, 1),
    ],
)
def test_invalid_rows_are_counted(tmp_path, changes, with_ids, without_time):
    write_table(
        tmp_path / "mimic-cxr-2.0.0-chexpert.csv", "subject_id,study_id," + ",".join(schema.RADIOLOGY_LABELS), []
    )
    header = "dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime"
    write_table(tmp_path / "mimic-cxr-2.0.0-metadata.csv", header, [image(1, 1), image(2, 1) | changes])
    table, counts = metadata.read_metadata(tables.mimic_cxr(tmp_path))
    assert counts == {
        "rows of metadata": 2,
        "X-rays with ids": with_ids,
        "X-rays without a valid time (never paired)": without_time,
    }
    assert table["time"].drop_nulls().len() == 1 and table["dicom_id"][0] == "image-0001-00"


def test_a_metadata_table_without_valid_rows_is_reported(tmp_path):
    with pytest.raises(UserError) as raised:
        metadata.read_metadata(_raw(tmp_path, [image(1, 1) | {"study_id": ""}]))
    assert raised.value.path.name == "mimic-cxr-2.0.0-metadata.csv.gz"


def test_only_a_positive_finding_is_1(tmp_path):
    row = image(1, 1, Edema="1.0", Fracture="0.0", Pneumonia="-1.0", **{"No Finding": "1"})
    labels = metadata.read_labels(_raw(tmp_path, [row]))
    positive = {name for name in schema.RADIOLOGY_LABELS if labels[name][0]}
    assert positive == {"Edema", "No Finding"} and labels.columns == ["study_id", *schema.RADIOLOGY_LABELS]


def test_a_missing_column_or_table_is_reported(tmp_path):
    _raw(tmp_path, [image(1, 1)], gz=False)
    path = tmp_path / "mimic-cxr-2.0.0-chexpert.csv"
    path.write_text(path.read_text().replace("Edema", "Oedema"))
    with pytest.raises(UserError) as raised:
        metadata.read_labels(tables.mimic_cxr(tmp_path))
    assert (raised.value.path, raised.value.field) == (path, "Edema")
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").unlink()
    with pytest.raises(UserError, match=r"mimic-cxr-2\.0\.0-metadata\.csv\.gz"):
        tables.mimic_cxr(tmp_path)


def test_an_image_without_a_metadata_row_is_reported_and_counted(tmp_path, capsys):
    images = [image(1, 1), image(2, 1)]
    raw = _raw(tmp_path, images, gz=False)
    header = "dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime"
    write_table(
        tmp_path / "mimic-cxr-2.0.0-metadata.csv", header, [{c: images[0][c] for c in header.split(",")}], gz=False
    )
    table, counts = metadata.read_metadata(raw)
    assert table["dicom_id"].to_list() == ["image-0001-00"]
    assert counts["X-rays without a metadata row"] == 1
    assert counts["dicom_ids without a metadata row"] == ["image-0002-00"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "image-0002-00" in line and "metadata.csv" in line


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


def _store(root, folder, workers=2):
    return store_module.ImageStore(folder, root, "crop", workers)


def _jobs(images):
    return [(row["dicom_id"], image_path(row)) for row in images]


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
    _image(root / image_path(images[7]), 40, 40, column=36)
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
    (tmp_path / "images" / "stopped.npy.1-1.partial").write_bytes(b"")
    store = _store(root, tmp_path / "images")
    store.add(_jobs(images))
    crop = {path for path, _ in store._place.values()}
    assert len(list((tmp_path / "images").glob("*.npy"))) == 4
    store.remove_unusable()
    assert set((tmp_path / "images").glob("*.npy")) == crop and len(list((tmp_path / "images").iterdir())) == 4
    for row in images[:2]:
        _image(root / image_path(row), 40, 40)
    store = _store(root, tmp_path / "images")
    store.add(_jobs(images))
    store.remove_unusable()
    assert len(crop & set((tmp_path / "images").glob("*.npy"))) == 1
    assert len(list((tmp_path / "images").glob("*.npy"))) == 2


def test_signatures_detect_replaced_and_missing_images(tmp_path):
    images = [image(n, 1) for n in range(3)]
    root = write_mimic_cxr(tmp_path / "cxr", images)
    before = store_module.signatures(root, _jobs(images), 2)
    assert before == {row["dicom_id"]: store_module.signature(root / image_path(row)) for row in images}
    _image(root / image_path(images[1]), 40, 40)
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
    assert (raised.value.path, raised.value.value) == (root / "files", "image-0003-00")
