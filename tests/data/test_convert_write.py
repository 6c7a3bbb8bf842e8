"""The file as a whole: the same bytes for any number of workers, and stock FFCV reads it."""

import json

import numpy as np
import pytest
from conftest import read_image
from convert_tools import (
    Stock,
    convert,
    converted,
    folder,
    mixed_fixture,  # noqa: F401
    photo,
    save,
)

from fastssl.data_prep import beton_writer, encoding, ffcv_format, sources
from fastssl.data_prep.image import Options, Stored
from fastssl.files.datacard import DataCard


def test_layout_is_that_of_ffcv():
    from ffcv import types
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert types.HeaderType == ffcv_format.HEADER and types.CURRENT_VERSION == ffcv_format.VERSION
    assert types.ALLOC_TABLE_TYPE == ffcv_format.ALLOCATION and types.FieldDescType == ffcv_format.FIELD
    assert (IMAGE_MODES["jpg"], IMAGE_MODES["raw"]) == (ffcv_format.JPG, ffcv_format.RAW)
    for classes, label in ((None, IntField()), (20, NDArrayField(np.dtype("<f4"), (20,)))):
        fields = {"image": RGBImageField(), "index": IntField(), "label": label}
        assert ffcv_format.sample_table(1, classes is not None).dtype == types.get_metadata_type(list(fields.values()))
        for ours, (name, field) in zip(ffcv_format.field_descriptions(classes), fields.items()):
            assert types.TYPE_ID_HANDLER[ours["type_id"]] is type(field)
            assert bytes(ours["name"]).rstrip(b"\0").decode() == name
            assert np.array_equal(ours["arguments"], field.to_binary()[0])


@pytest.mark.parametrize("options", [[], ["--short-side", "16"], ["--mode", "jpg"], ["--mode", "raw"]], ids=str)
def test_the_file_is_the_same_for_any_number_of_workers(mixed, tmp_path, options):
    for workers in (1, 4):
        assert convert("imagefolder", mixed, tmp_path / f"{workers}.beton", *options, workers=workers) == 0
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "4.beton").read_bytes()
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "4.json").read_bytes()


def test_the_skipped_images_are_the_same_for_any_number_of_workers(mixed, tmp_path):
    root = folder(tmp_path / "in", 80)
    for i in range(0, 80, 9):
        (root / "cat" / f"{i}.jpg").write_bytes(b"broken")
    for workers in (1, 4):
        assert convert("imagefolder", root, tmp_path / f"{workers}.beton", "--max-bad", 9, workers=workers) == 0
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "4.beton").read_bytes()
    assert Stock(tmp_path / "4.beton").table["index"].tolist() == list(range(151))


def stock_loader(path, label, **options):
    """FFCV's Loader with its own decoders; label: the name of that of the labels."""
    from ffcv.fields import decoders
    from ffcv.loader import Loader, OrderOption

    kinds = {"image": "SimpleRGBImageDecoder", "index": "IntDecoder", "label": label}
    pipelines = {name: [getattr(decoders, kind)()] for name, kind in kinds.items()}
    return Loader(str(path), num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines, **options)


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_ffcv_loads_every_image(tmp_path, monkeypatch, os_cache):
    """With both of its memory managers, over many pages."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (97, 64, 48, 3), dtype=np.uint8)
    vectors = rng.integers(-1, 2, (97, 5)).astype(np.float32)
    monkeypatch.setattr(beton_writer, "MIN_PAGE", 1 << 17)  # 14 images per page, so that there are several pages
    with open(tmp_path / "o.beton", "wb") as file:
        beton = beton_writer.BetonWriter(file, 97, 5)
        for image, vector in zip(pixels, vectors):
            beton.add(Stored(image.tobytes(), ffcv_format.RAW, 64, 48), vector)
        beton.finish()
    options = {"batch_size": 10, "drop_last": False, "os_cache": os_cache}
    loader = stock_loader(tmp_path / "o.beton", "NDArrayDecoder", **options)
    seen = [[part.copy() for part in batch] for batch in loader]
    images, index, labels = (np.concatenate(parts) for parts in zip(*seen))
    assert np.array_equal(images, pixels)
    assert index.ravel().tolist() == list(range(97))
    assert np.array_equal(labels, vectors)


def test_stock_ffcv_decodes_jpegs_that_are_stored_unchanged(tmp_path):
    for i in range(20):
        pixels = photo(i)[..., 0] if i % 5 == 0 else photo(i)
        save(tmp_path / "in" / f"c{i % 2}" / f"{i:02d}.jpg", pixels, quality=90, progressive=i % 3 == 0)
    save(tmp_path / "in" / "c1" / "z.png", photo(99))
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 0
    images, _, labels = next(iter(stock_loader(tmp_path / "o.beton", "IntDecoder", batch_size=21)))
    for image, path in zip(images, sorted((tmp_path / "in").rglob("*.*"))):
        assert abs(image.astype(int) - np.asarray(read_image(path).convert("RGB"))).mean() < 1.5, path
    assert labels.ravel().tolist() == [0] * 10 + [1] * 11


def test_the_page_size_grows_for_a_large_image(tmp_path):
    """Samples before it, placed for small pages, do not cross a large page either."""
    small, large = np.zeros((900, 1000, 3), np.uint8), np.arange(27_000_000, dtype=np.uint8).reshape(3000, 3000, 3)
    for i, pixels in enumerate([small, small, small, small, large, small, small]):
        save(tmp_path / "in" / f"{i}.png", pixels, compress_level=0)
    stock = converted("imagefolder", tmp_path / "in", tmp_path / "o.beton")
    assert np.array_equal(stock.pixels(4), large)
    page = int(stock.reader.page_size)
    assert page == 1 << 25
    table = stock.reader.alloc_table
    assert (table["ptr"] // page == (table["ptr"] + table["size"] - 1) // page).all()


def test_data_card(mixed, tmp_path):
    import hashlib

    assert convert("imagefolder", mixed, tmp_path / "o.beton") == 0
    card = json.loads((tmp_path / "o.json").read_text())
    data = (tmp_path / "o.beton").read_bytes()
    sizes = [read_image(p).size if p.name != "030.jpg" else read_image(p).size[::-1] for p in mixed.rglob("*.*")]
    areas = [w * h for w, h in sizes]
    assert card["format"] == 1 and card["kind"] == "imagefolder" and card["source"] == str(mixed)
    assert card["samples"] == 300 and card["classes"] == ["c0", "c1", "c2"]
    assert (card["max_width"], card["max_height"]) == tuple(max(side) for side in zip(*sizes))
    assert card["max_pixels"] == max(areas) and card["mean_pixels"] == pytest.approx(np.mean(areas))
    assert card["min_side"] == min(min(s) for s in sizes)
    assert card["raw"] == 43 and card["jpeg"] == 257 and card["copied"] == 256
    assert card["bytes"] == len(data) and card["sha256"] == hashlib.sha256(data).hexdigest()
    assert card["ffcv"] == "1.0.2" and card["fastssl"] and card["options"]["mode"] is None
    assert " ".join(card) == (  # the order since the first version
        "format source kind samples classes label max_height max_width max_pixels min_side mean_pixels jpeg raw copied "
        "resized bounded distrusted bad bytes options sha256 fastssl ffcv"
    )
    read = DataCard.read(tmp_path / "o.beton")
    assert read == DataCard(**card)
    read.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "o.json").read_bytes()


@pytest.mark.parametrize("bound, most", [(1 << 20, 6), (0, 1)])
def test_images_that_wait_for_a_worker_are_limited_in_bytes(tmp_path, monkeypatch, bound, most):
    """For a compressed tar, whose images are in memory: chunks that were read and are not yet written."""
    monkeypatch.setattr(encoding, "WAITING_BYTES", bound)
    monkeypatch.setattr(encoding, "CHUNK_SAMPLES", 1)
    data, ahead, written = save(tmp_path / "a.jpg").read_bytes(), [], 0

    def items():
        for i in range(20):
            ahead.append(i - written)
            yield f"{i}", data, -1

    source = sources.Source("tar", "x", "none", None, 20, items)
    for _ in encoding.encode(source, Options(), 2):
        written += 1
    assert written == 20 and max(ahead) == most - 1
