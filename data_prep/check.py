"""`fastssl convert check NAME.beton`: compares the file with its data card and decodes all images.

It also measures the speed of decoding, and draws NAME.png, a contact sheet of images and their labels, to look at.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastssl import files
from fastssl.files.datacard import DataCard

from .ffcv_format import ALLOCATION, FIELD, HEADER, RAW, SAMPLE_FIELDS, VERSION, decode_jpeg, sample_table
from .write import Progress, Target, geometry, hash_progress

CHUNK = 256  # images that a thread decodes at once
COLUMNS, ROWS, CELL, CAPTION = 10, 8, 112, 16  # of the contact sheet; the sizes of a cell and its text in pixels


class BetonInspector:
    """A converted file mapped into memory: its tables, and its images decoded by FFCV's decoder.  ValueError for a file
    that is damaged or does not match its data card."""

    def __init__(self, path: str | Path):
        self.target = Target(Path(path))
        if not self.target.beton.is_file():
            raise ValueError(f"there is no file {path}")
        if not self.target.card.is_file():
            raise ValueError(f"{path} has no data card {self.target.card}: convert again, or copy it too")
        self.card = DataCard.read(self.target.card)
        required = ("label", "copied", "sha256", *(["classes"] if self.card.label != "none" else []))
        if missing := [name for name in required if getattr(self.card, name) is None]:
            raise ValueError(f"{self.target.card} has no {missing[0]}: convert again")
        self.samples, self.classes, multi = self.card.samples, self.card.classes or [], self.card.label == "multi"
        self.require("bytes", self.target.beton.stat().st_size)
        if self.card.bytes < HEADER.itemsize:
            raise ValueError(f"{path} is damaged: it is too short for a header")
        self.data = np.memmap(self.target.beton, np.uint8, "r")
        header = self.data[: HEADER.itemsize].view(HEADER)[0]
        if header["version"] != VERSION or header["num_fields"] != 3:
            raise ValueError(f"{path} is not an FFCV file with the fields image, index, label")
        self.require("samples", int(header["num_samples"]))
        dtype = sample_table(0, multi).dtype
        start = HEADER.itemsize + 3 * FIELD.itemsize
        end, pointer = start + self.samples * dtype.itemsize, int(header["alloc_table_ptr"])
        if not end <= pointer or self.data.size - pointer != self.samples * (1 + multi) * ALLOCATION.itemsize:
            raise ValueError(f"{path} is damaged: its tables do not have the sizes that {self.samples} images need")
        table = self.data[start:end].view(dtype)
        self.images, self.index, self.labels = (table[name] for name in SAMPLE_FIELDS)
        allocations = self.data[pointer:].view(ALLOCATION).reshape(self.samples, -1)
        self.sizes = allocations["size"][:, 0]
        self._check_pointers(self.images["data_ptr"], self.sizes)
        if multi:
            size = 4 * len(self.classes)  # bytes of a label vector
            self._check_pointers(self.labels, np.full(self.samples, size, np.uint64))
            self.labels = np.stack([self.data[p : p + size].view("<f4") for p in self.labels.tolist()])

    def _check_pointers(self, pointers: np.ndarray, sizes: np.ndarray) -> None:
        if (sizes > self.data.size).any() or (pointers > self.data.size - sizes).any():
            raise ValueError(f"{self.target.beton} is damaged: its table points outside the file")

    def require(self, name: str, found: object) -> None:
        """ValueError unless the field `name` of the card is `found`."""
        if (stated := getattr(self.card, name)) != found:
            raise ValueError(
                f"{self.target.beton} does not match its data card: {name} is {found}, the card says {stated}: "
                "convert or copy it again"
            )

    def image(self, row: int) -> np.ndarray | None:
        """RGB pixels (height, width, 3), or None if they cannot be decoded."""
        mode, width, height, pointer = self.images[row].item()
        if not width * height:
            return None
        data = self.data[pointer : pointer + int(self.sizes[row])]
        if mode == RAW:
            return np.array(data).reshape(height, width, 3) if data.size == height * width * 3 else None
        return decode_jpeg(data, height, width)

    def caption(self, row: int) -> str:
        """The names of its classes; without labels, the row."""
        label = self.labels[row]
        if self.card.label == "multi":
            return " ".join(name for name, value in zip(self.classes, label) if value == 1)
        return self.classes[label] if self.classes and label >= 0 else f"{row}"


def check(path: str | Path, *, workers: int = 1, progress: Progress = lambda *_: None) -> str:
    """The report that `fastssl convert check` prints.  ValueError, with a message of one line, for a damaged file."""
    beton = BetonInspector(path)
    beton.require("sha256", files.sha256(beton.target.beton, hash_progress(progress)))
    for key, value in geometry(beton.images["mode"], beton.images["height"], beton.images["width"]).items():
        beton.require(key, value)
    if not np.array_equal(beton.index, np.arange(beton.samples)):
        raise ValueError(f"{path} is damaged: the index of its samples is not 0, 1, 2, ...")
    _check_labels(beton)
    rate = _decode_all(beton, workers, progress)
    sheet = beton.target.beton.with_suffix(".png")
    contact_sheet(beton).save(sheet)
    card = beton.card
    return "\n".join(
        [
            f"{path}: no errors. {card.samples} images ({card.jpeg} JPEG, {card.raw} raw), sizes up to "
            f"{card.max_height}x{card.max_width}, {card.bytes / 1e6:.1f} MB, hash and every image verified",
            f"decoded {rate:.0f} images/s, "
            f"{rate * card.bytes / card.samples / 1e6:.1f} MB/s on {workers} threads, "
            "from the page cache",
            f"contact sheet: {sheet}",
        ]
    )


def _check_labels(beton: BetonInspector) -> None:
    largest = {"none": -1, "int": len(beton.classes) - 1, "multi": 1}[beton.card.label or "int"]
    low, high = beton.labels.min(), beton.labels.max()
    if not (low >= -1 and high <= largest):  # with `not`, so that NaN is an error, too
        raise ValueError(
            f"{beton.target.beton} is damaged: labels from {low} to {high}, the data card allows -1 to {largest}"
        )


def _decode_all(beton: BetonInspector, workers: int, progress: Progress) -> float:
    """Images per second; ValueError if some cannot be decoded.  Threads suffice, since the decoder releases the GIL."""

    def decode(start: int) -> list[int]:
        return [row for row in range(start, min(start + CHUNK, beton.samples)) if beton.image(row) is None]

    damaged: list[int] = []
    begin = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for chunk, rows in enumerate(pool.map(decode, range(0, beton.samples, CHUNK)), 1):
            damaged += rows
            progress("images", min(chunk * CHUNK, beton.samples), beton.samples)
    if damaged:
        raise ValueError(
            f"{beton.target.beton} is damaged: {len(damaged)} images do not decode, the first is row {damaged[0]}"
        )
    return beton.samples / (time.perf_counter() - begin)


def contact_sheet(beton: BetonInspector) -> Image.Image:
    """Up to 80 images, evenly spread over the file, each with its label."""
    count = min(COLUMNS * ROWS, beton.samples)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for cell, row in enumerate(np.linspace(0, beton.samples - 1, count).astype(int).tolist()):
        image = Image.fromarray(np.ascontiguousarray(beton.image(row)))
        scale = (CELL - 4) / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        # NEAREST shows the pixels of a small image: a blurred 8x8 digit would look like a mistake of the conversion
        image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
        x, y = cell % columns * CELL, cell // columns * (CELL + CAPTION)
        sheet.paste(image, (x + (CELL - size[0]) // 2, y + 2 + (CELL - 4 - size[1]) // 2))
        text = beton.caption(row)
        while font.getlength(text) > CELL - 4:
            text = text[:-1]
        draw.text((x + 3, y + CELL), text, fill="black", font=font)
    return sheet
