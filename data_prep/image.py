"""One image: from the bytes of any format to what the file stores, a JPEG or raw RGB pixels.

A JPEG that needs no change is stored unchanged if FFCV's decoder reads it without errors, since the loader uses that
decoder.  Other images are decoded by Pillow, rotated upright, put on a white background and converted to 8-bit RGB.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from .ffcv_format import JPG, MAX_SIDE, RAW, decode_jpeg

# Recognised by content, not by name.  Pillow's other readers are not used; that of EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
LARGE = 2 * (1 << 30) // 12  # pixels (179 million), above which Pillow refuses an image as a decompression bomb
MAX_READ = 1 << 30  # pixels, 3 GiB when decoded
MAX_STORED = (1 << 31) // 3  # pixels that fit into one of FFCV's pages


@dataclass(frozen=True)
class Options:
    short_side: int | None = None
    upscale: bool = False
    max_pixels: int | None = None
    max_aspect: float = 4.0  # used with short_side only, see target_size
    quality: int = 95
    mode: Literal["jpg", "raw"] | None = None  # None: JPEGs are stored as JPEG, images in lossless formats as raw


class Stored(NamedTuple):
    """What the file stores for an image.  The data card has the numbers of images with each of the last four."""

    payload: bytes
    mode: int  # JPG or RAW
    height: int
    width: int
    copied: bool = False  # a JPEG, stored unchanged
    resized: bool = False
    bounded: bool = False  # smaller than short_side asks for, because of max_aspect
    distrusted: bool = False  # a JPEG for which FFCV's decoder reports errors, and Pillow does not


class Bad(NamedTuple):
    """An image that cannot be read."""

    reason: str


def target_size(width: int, height: int, options: Options) -> tuple[int, int, bool]:
    """(width, height) to store, and whether max_aspect made it smaller.

    In a batch of the loader, every image takes the memory of the largest one in the file.  With short side S, one
    panorama would multiply it; such an image is shrunk to the area of max_aspect * S by S pixels and not cropped."""
    scale, limit, bounded = 1.0, options.max_pixels or math.inf, False
    if options.short_side:
        scale = options.short_side / min(width, height)
        scale = scale if options.upscale else min(scale, 1.0)
        max_area = options.max_aspect * options.short_side**2
        limit, bounded = (max_area, True) if max_area < limit else (limit, False)
    new_width, new_height = round(width * scale), round(height * scale)
    if new_width * new_height <= limit:
        return new_width, new_height, False
    scale = math.sqrt(limit / (width * height))
    short = max(1, int(min(width, height) * scale))
    long = min(int(max(width, height) * scale), int(limit // short))
    return (long, short, bounded) if width >= height else (short, long, bounded)


def store(source: bytes | np.ndarray, options: Options) -> Stored:
    """`source`: encoded bytes in one of FORMATS, or uint8 pixels (H, W, 3).  Raises ValueError, and for damaged images
    what Pillow raises."""
    if isinstance(source, np.ndarray):
        image: Image.Image = Image.fromarray(source)
    else:
        image = Image.open(io.BytesIO(source), formats=_formats())
    rotation = orientation(image)
    width, height = image.size[::-1] if rotation >= 5 else image.size  # 5 to 8 exchange the sides
    new_width, new_height, bounded = target_size(width, height, options)
    resized = (new_width, new_height) != (width, height)
    if width * height > LARGE:
        _check_large(width * height, options)
        if image.format == "JPEG" and resized:  # decode it at 1/2, 1/4 or 1/8 of its size, at least twice the new one
            twice = (2 * new_width, 2 * new_height)
            image.draft(None, twice[::-1] if rotation >= 5 else twice)
    if max(new_width, new_height) > MAX_SIDE or new_width * new_height > MAX_STORED:
        raise ValueError(
            f"{new_width}x{new_height} pixels, FFCV stores at most {MAX_SIDE} a side and {MAX_STORED} in all: "
            "use --max-pixels"
        )
    jpeg = image.format in ("JPEG", "MPO")
    distrusted = False
    unchanged = rotation == 1 and not resized and image.mode in ("RGB", "L")
    if isinstance(source, bytes) and jpeg and options.mode != "raw" and unchanged:
        if decode_jpeg(source, height, width) is not None:
            return Stored(source, JPG, height, width, copied=True)
        distrusted = True
    rgb = to_rgb(ImageOps.exif_transpose(image) if rotation != 1 else image)
    if resized:
        rgb = rgb.resize((new_width, new_height), Image.Resampling.BICUBIC)
    facts = {"resized": resized, "bounded": bounded, "distrusted": distrusted}
    if (options.mode or ("jpg" if jpeg else "raw")) == "raw":
        return Stored(rgb.tobytes(), RAW, new_height, new_width, **facts)
    buffer = io.BytesIO()
    # Without chroma subsampling: at short side 256, quality 92 then has 37.6 dB in 42 kB, and quality 95 with 4:2:0 has
    # 35.8 dB in 43 kB.
    rgb.save(buffer, "JPEG", quality=options.quality, subsampling=0)
    return Stored(buffer.getvalue(), JPG, new_height, new_width, **facts)


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # Pillow may be built without one


def _check_large(pixels: int, options: Options) -> None:
    size = f"{pixels / 1e6:.0f} megapixels"
    if pixels > MAX_READ:
        raise ValueError(f"{size}: at most {MAX_READ / 1e6:.0f} are read; make it smaller first")
    if not (options.short_side or options.max_pixels):
        raise ValueError(
            f"{size}: an image of more than {LARGE / 1e6:.0f} is read only if it is made smaller: give --max-pixels or "
            "--short-side"
        )


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if there is none, or an invalid one."""
    try:
        value = image.getexif().get(0x0112, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, EOFError):
        return 1  # damaged metadata around an intact image
    return value if value in range(2, 9) else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB.  Transparency becomes white; grey values of 16 bits and floats are scaled to 0..255, not clipped."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        low, high = float(grey.min()), float(grey.max())
        white = 1.0 if image.mode == "F" else 65535.0
        if not (low >= 0 and high <= white):
            raise ValueError(f"grey values from {low:g} to {high:g}: only 0..{white:g} can be converted")
        return Image.fromarray(np.round(grey * (255.0 / white)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow refuses images of more than LARGE pixels, also if they are made smaller; `store` has limits of its own."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def store_many(refs: list, options: Options) -> list[Stored | Bad]:
    """`store` for the references of a chunk, in a worker.  Damaged images are returned as Bad, not raised."""
    results: list[Stored | Bad] = []
    with warnings.catch_warnings(), _without_pillows_limit():
        warnings.simplefilter("ignore")  # Pillow's warnings about metadata, thousands of them in images from the web
        for ref in refs:
            try:
                results.append(store(ref if isinstance(ref, (bytes, np.ndarray)) else ref.read(), options))
            except MemoryError:
                raise
            except Exception as error:  # Pillow raises a dozen types on damaged files
                results.append(Bad(_reason(error)))
    return results


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())
