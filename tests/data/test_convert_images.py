"""What each kind of image becomes: against the original bytes, and against Pillow's decoding of them."""

import io

import numpy as np
import pytest
from conftest import read_image
from convert_tools import Stock, convert, converted, photo, save, shared
from PIL import Image

from fastssl.data_prep.image import Options, store, target_size


def one(tmp_path, *options) -> Stock:
    return converted("imagefolder", tmp_path / "in", tmp_path / "out.beton", *options)


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 75},
        {"quality": 90, "progressive": True},
        {"quality": 100, "subsampling": 0},
        {"quality": 80, "keep_rgb": True},
        {"quality": 80, "restart_marker_blocks": 2},
    ],
    ids=str,
)
def test_jpegs_are_stored_unchanged(tmp_path, options):
    path = save(tmp_path / "in" / "a.jpg", photo(height=37, width=51), **options)
    stock = one(tmp_path)
    assert stock.payload(0) == path.read_bytes()
    assert stock.table["image"][0].item()[:3] == (0, 51, 37)
    assert stock.card["copied"] == stock.card["jpeg"] == 1


def test_a_grey_jpeg_is_stored_unchanged_and_ffcv_decodes_it_to_rgb(tmp_path):
    from fastssl.data_prep.ffcv_format import decode_jpeg

    path = save(tmp_path / "in" / "a.jpg", photo()[..., 0], quality=90)
    stock = one(tmp_path)
    assert stock.payload(0) == path.read_bytes()
    decoded = decode_jpeg(stock.payload(0), 48, 64)
    grey = np.asarray(read_image(path)).astype(int)
    assert np.ptp(decoded, axis=2).max() == 0
    assert abs(decoded[..., 0] - grey).max() <= 2  # the decoders differ in the inverse cosine transform


def test_the_sample_photographs_are_stored_unchanged():
    import tarfile

    with tarfile.open(shared("imagenet_sample_1000.tar")) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    changed = []
    for name, data in members:
        stored = store(data, Options())
        if stored.payload != data:
            changed.append((name, Image.open(io.BytesIO(data)).getexif().get(0x0112)))
    assert len(members) == 1000
    assert [turn for _, turn in changed] == [6], changed  # the only photograph with a rotation in its EXIF


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_with_exif_rotation_are_stored_upright(tmp_path, turn):
    upright = photo(height=40, width=64)
    inverse = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / "in" / "a.jpg", np.ascontiguousarray(inverse(upright)), quality=98, subsampling=0, exif=exif)
    stock = one(tmp_path)
    assert stock.pixels(0).shape == upright.shape
    assert abs(stock.pixels(0).astype(int) - upright).mean() < 2
    assert (stock.payload(0) == path.read_bytes()) == (turn == 1)


def test_an_invalid_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 0
    path = save(tmp_path / "in" / "a.jpg", quality=90, exif=exif)
    assert one(tmp_path).payload(0) == path.read_bytes()


def test_png_is_stored_losslessly(tmp_path):
    save(tmp_path / "in" / "a.png")
    stock = one(tmp_path)
    assert np.array_equal(stock.pixels(0), photo())
    assert stock.card["raw"] == 1


def test_cmyk(tmp_path):
    rgb = photo()
    path = save(tmp_path / "in" / "a.jpg", Image.fromarray(rgb).convert("CMYK"), quality=98, subsampling=0)
    assert read_image(path).mode == "CMYK"
    assert abs(one(tmp_path).pixels(0).astype(int) - rgb).mean() < 3


@pytest.mark.parametrize("name", ["rgba.png", "la.png", "palette.gif", "rgba.webp"])
def test_transparency_is_white(tmp_path, name):
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[:, :10] = (200, 0, 0, 255)
    pixels[:, 20:] = (0, 0, 0, 128)  # black, half transparent
    image = Image.fromarray(pixels)
    if name == "la.png":
        image = image.convert("LA")
    save(tmp_path / "in" / name, image, **({"lossless": True} if name.endswith("webp") else {}))
    out = one(tmp_path).pixels(0)
    assert (out[:, 10:20] == 255).all()
    assert tuple(out[5, 5]) == ((60, 60, 60) if name == "la.png" else (200, 0, 0))
    if name != "palette.gif":  # GIF has no partial transparency
        assert (abs(out[:, 20:].astype(int) - 127) <= 1).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    for suffix in ("png", "tif", "pgm"):
        save(tmp_path / "in" / f"a.{suffix}", Image.fromarray(grey))
    stock = one(tmp_path)
    for row in range(3):
        assert abs(stock.pixels(row)[..., 1] - grey / 257.0).max() <= 0.51


def test_16_bit_rgb_png(tmp_path):
    import cv2

    rgb = photo().astype(np.uint16) * 257
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), rgb[..., ::-1])
    assert abs(one(tmp_path).pixels(0).astype(int) - photo()).max() <= 1


def test_palette_bilevel_and_float(tmp_path):
    save(tmp_path / "in" / "a.png", Image.fromarray(photo()).quantize(16))
    save(tmp_path / "in" / "b.png", Image.fromarray(photo()[..., 0]).convert("1"))
    save(tmp_path / "in" / "c.tif", Image.fromarray(photo()[..., 0].astype(np.float32) / 255))
    stock = one(tmp_path)
    assert np.array_equal(stock.pixels(0), np.asarray(read_image(tmp_path / "in" / "a.png").convert("RGB")))
    assert set(np.unique(stock.pixels(1))) == {0, 255}
    assert np.array_equal(stock.pixels(2)[..., 0], photo()[..., 0])


def test_a_jpeg_that_only_pillow_reads_is_decoded_and_counted(tmp_path, capsys):
    path = save(tmp_path / "in" / "a.jpg", quality=95, subsampling=0)
    data = path.read_bytes()
    scan = data.index(b"\xff\xda")
    path.write_bytes(data[:scan] + b"\x00\x17\x2a" + data[scan:])  # libjpeg warns: extraneous bytes before marker
    expected = np.asarray(read_image(path).convert("RGB")).astype(int)
    stock = one(tmp_path)
    assert stock.card["distrusted"] == 1 and "decoded by Pillow" in capsys.readouterr().out
    assert abs(stock.pixels(0) - expected).mean() < 1


def test_modes(tmp_path):
    path = save(tmp_path / "in" / "a.jpg", quality=90)
    save(tmp_path / "in" / "b.png")
    stock = one(tmp_path, "--mode", "raw")
    assert (stock.table["image"]["mode"] == 1).all()
    assert np.array_equal(stock.pixels(0), np.asarray(read_image(path)))
    stock = one(tmp_path, "--mode", "jpg", "--quality", "97", "--force")
    assert (stock.table["image"]["mode"] == 0).all() and stock.payload(0) == path.read_bytes()
    assert abs(stock.pixels(1).astype(int) - photo()).mean() < 1.5
    for quality in (97, 40):  # quantisation tables of that quality, no chroma subsampling
        stored = one(tmp_path, "--mode", "jpg", "--quality", quality, "--force").payload(1)
        save(tmp_path / "expected.jpg", quality=quality)
        image = Image.open(io.BytesIO(stored))
        assert image.quantization == read_image(tmp_path / "expected.jpg").quantization
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def test_short_side_shrinks_only_larger_images(tmp_path):
    big = save(tmp_path / "in" / "a.jpg", photo(height=100, width=150), quality=95)
    small = save(tmp_path / "in" / "b.jpg", photo(height=30, width=40), quality=95)
    stock = one(tmp_path, "--short-side", 40)
    assert stock.pixels(0).shape == (40, 60, 3) and stock.payload(1) == small.read_bytes()
    expected = read_image(big).resize((60, 40), Image.Resampling.BOX)
    assert abs(stock.pixels(0).astype(int) - np.asarray(expected)).mean() < 3
    assert stock.card["resized"] == stock.card["copied"] == 1
    assert one(tmp_path, "--short-side", 40, "--upscale", "--force").pixels(1).shape == (40, 53, 3)


def test_a_note_if_short_side_changes_no_image(tmp_path, capsys):
    save(tmp_path / "in" / "a.png")
    one(tmp_path, "--short-side", 500)
    assert "none is larger (--upscale" in capsys.readouterr().out


def test_long_images_are_shrunk_with_a_note(tmp_path, capsys):
    save(tmp_path / "in" / "a.png", photo(height=50, width=1000))
    stock = one(tmp_path, "--short-side", 40)
    height, width, _ = stock.pixels(0).shape
    assert 0.9 * 4 * 40 * 40 < height * width <= 4 * 40 * 40 and 19 < width / height < 22
    assert "--max-aspect 4: 1 long images were shrunk to the area of 160 by 40" in capsys.readouterr().out
    assert one(tmp_path, "--short-side", 40, "--max-aspect", 30, "--force").pixels(0).shape == (40, 800, 3)
    assert one(tmp_path, "--force").pixels(0).shape == (50, 1000, 3)


def test_target_size_is_within_its_limits():
    rng = np.random.default_rng(0)
    for _ in range(5000):
        width, height = (int(v) for v in np.exp(rng.uniform(0, 9, 2)).astype(int))
        side, limit = int(rng.integers(1, 400)), int(rng.integers(1, 100_000))
        options = Options(short_side=side, max_pixels=limit, upscale=bool(rng.integers(2)))
        new_width, new_height, _ = target_size(width, height, options)
        assert min(new_width, new_height) >= 1 and new_width * new_height <= min(limit, 4 * side * side)
        new_width, new_height, bounded = target_size(width, height, Options(short_side=side))
        assert bounded or min(new_width, new_height) == min(side, width, height)
        if width * height <= limit:
            assert target_size(width, height, Options(max_pixels=limit)) == (width, height, False)


def test_a_side_of_more_than_16_bits_is_refused(tmp_path, capsys):
    save(tmp_path / "in" / "a.png", np.zeros((1, 70000, 3), np.uint8))
    assert convert("imagefolder", tmp_path / "in", tmp_path / "out.beton") == 2
    assert "--max-pixels" in capsys.readouterr().err
    assert one(tmp_path, "--max-pixels", 5000).pixels(0).shape == (1, 5000, 3)


@pytest.mark.parametrize("name", ["slide.png", "slide.jpg"])
def test_an_image_over_pillows_limit_is_read_only_if_it_is_made_smaller(tmp_path, capsys, monkeypatch, name):
    """Pillow's limit and ours are lowered for the test."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr("fastssl.data_prep.image.LARGE", 20_000)
    save(tmp_path / "in" / name, photo(1, 300, 400))
    assert convert("imagefolder", tmp_path / "in", tmp_path / "o.beton") == 2
    assert "--max-pixels" in capsys.readouterr().err
    for option, value, size in (("--short-side", 60, (60, 80)), ("--max-pixels", 1200, (30, 40))):
        pixels = converted("imagefolder", tmp_path / "in", tmp_path / "o.beton", option, value, "--force").pixels(0)
        small = np.asarray(Image.fromarray(photo(1, 300, 400)).resize(size[::-1], Image.Resampling.BICUBIC))
        assert pixels.shape == (*size, 3) and abs(pixels.astype(int) - small).mean() < 3
    assert Image.MAX_IMAGE_PIXELS == 10_000
