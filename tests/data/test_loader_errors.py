"""Wrong batches, damaged files and images, too little memory, and data cards of another file."""

import json

import numpy as np
import pytest
from conftest import photo, write_beton
from loader_tools import open_loader

import fastssl.loader
from fastssl.decode import BetonReader
from fastssl.files.datacard import DataCard


def test_an_error_of_the_decoder_is_raised_in_the_caller(beton, monkeypatch):
    loader = open_loader(beton)
    monkeypatch.setattr(loader._beton, "labels", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.epoch(0))


def test_resident_warns_if_the_images_do_not_fit(beton, monkeypatch):
    monkeypatch.setattr(fastssl.loader, "free_memory", lambda device: 600_000)
    with pytest.warns(UserWarning, match=r"resident: .*photos.beton needs 0.00 GiB .*decoded in each epoch instead"):
        loader = open_loader(beton, resident=True)
    assert len(list(loader.epoch(0))) == 6


def test_errors_of_wrong_batches_suggest_a_fix(beton):
    for options, message in [
        ({"batch": 20, "world": 2, "micro_per_step": 4}, r"batch=20 .*2 \* 4; the nearest batch that is: 16"),
        ({"batch": 0}, "batch=0 "),
        ({"batch": 1, "world": 4}, "the nearest batch that is: 4"),
        ({"batch": 128}, r"batch=128 is larger than .*\(103 samples\); use at most 103"),
        ({"batch": 128, "world": 4}, "use at most 100"),
        ({"batch": 128, "world": 64, "micro_per_step": 2}, r"103 samples, fewer than the 64 \* 2 .*: use fewer ranks"),
        ({"rank": 2, "world": 2}, "rank=2"),
        ({"workers": -1}, "workers=-1"),
        ({"micro_per_step": 0}, "micro_per_step=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_loader(beton, **{"batch": 16, **options})
    loader = open_loader(beton)
    for start in (-1, 7):
        with pytest.raises(ValueError, match=f"start={start}"):
            loader.epoch(0, start=start)


def test_missing_and_damaged_files_are_named(beton, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.beton: no such file; `fastssl convert"):
        open_loader(tmp_path / "nowhere.beton")
    whole, path = beton.read_bytes(), tmp_path / "part.beton"
    for length in (0, 10, 24, 500, 5000, len(whole) // 2, len(whole) - 24, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"part.beton.*(truncated|damaged)"):
            open_loader(path)
    path.write_bytes(np.random.default_rng(0).bytes(10_000))
    with pytest.raises(ValueError, match=r"not a \.beton file"):
        open_loader(path)


def test_a_batch_that_cannot_fit_names_the_largest_image_and_the_options(beton, monkeypatch):
    monkeypatch.setattr("fastssl.loader.free_memory", lambda device: 1000)
    with pytest.raises(
        ValueError,
        match=r"the largest image \(.* megapixels\) needs .* GiB for 4 micro-batches of 16 .*"
        "--max-pixels or --short-side",
    ):
        open_loader(beton)


def test_a_damaged_image_is_named(beton, photos, tmp_path):
    whole, victim = beton.read_bytes(), photos[5]
    at = whole.index(victim)
    for i, hurt in enumerate((b"\0" * len(victim), victim[:200] + b"\0" * (len(victim) - 200))):
        path = tmp_path / f"hurt{i}.beton"  # a new file, since threads of the loader before may still read the old one
        path.write_bytes(whole[:at] + hurt + whole[at + len(victim) :])
        reason = ("not a JPEG", "cannot load this image")[i]
        with pytest.raises(ValueError, match=rf"hurt.\.beton: image 5 is damaged \({reason}\); convert"):
            list(open_loader(path, shuffle=False).epoch(0))


def test_missing_fields_are_named(tmp_path):
    path = write_beton(tmp_path / "old.beton", [photo(np.random.default_rng(0), 8, 8)] * 4, fields=("image", "label"))
    with pytest.raises(ValueError, match="'index' missing"):
        open_loader(path, 4)


def test_card(beton, tmp_path):
    path, card = tmp_path / "photos.beton", tmp_path / "photos.json"
    path.write_bytes(beton.read_bytes())
    facts = {"samples": 103, "max_pixels": BetonReader(path).max_pixels, "bytes": path.stat().st_size}
    assert open_loader(path).card == DataCard(**facts) and open_loader(path).classes is None
    good = {"format": 1, **facts, "classes": ["cat", "dog"], "fastssl": None, "a later field": 3}
    card.write_text(json.dumps(good))
    assert open_loader(path).classes == ["cat", "dog"]
    assert open_loader(path).card == DataCard(**facts, classes=["cat", "dog"])
    other = r"photos\.beton belongs to another file"
    for change, message in (
        ({"samples": 102}, other),
        ({"bytes": 5}, other),
        ({"format": 2}, "json has format 2"),
        ({"max_pixels": None}, "photos.json is not a data card: max_pixels is None"),
    ):
        card.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            open_loader(path)
    card.write_text("{")
    with pytest.raises(ValueError, match=r"photos\.json is not valid JSON"):
        open_loader(path)
