"""Writing FFCV's file format, in the order of the samples."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from .ffcv_format import ALLOCATION, HEADER, SAMPLE_FIELDS, VERSION, field_descriptions, sample_table
from .image import Stored

MIN_PAGE = 1 << 23  # FFCV's default page of 8 MiB; a sample never crosses a page
MAX_PAGE = 1 << 31


class BetonWriter:
    """A file for up to `capacity` samples: header, table of samples, pages, table of allocations.  The tables are
    written by `finish`."""

    def __init__(self, file: BinaryIO, capacity: int, classes: int | None):
        """`classes`: the length of the label vector, or None for one integer per sample."""
        self.file, self.samples, self.page = file, 0, MIN_PAGE
        self.vectors = classes is not None
        self.fields = field_descriptions(classes)
        self.table = sample_table(capacity, self.vectors)
        self.image, self.index, self.label = (self.table[name] for name in SAMPLE_FIELDS)
        self.allocations = np.zeros((capacity, 1 + self.vectors), ALLOCATION)
        self.offset = HEADER.itemsize + self.fields.nbytes + self.table.nbytes  # of the next sample
        self.file.seek(self.offset)

    def add(self, stored: Stored, label: int | np.ndarray) -> None:
        """`label`: one integer, or (classes,) numbers."""
        vector = np.asarray(label, "<f4").tobytes() if self.vectors else b""
        size, row = len(stored.payload) + len(vector), self.samples
        while size > self.page:  # no sample crosses a small page, so none crosses a page of twice the size
            self.page *= 2
        if self.page > MAX_PAGE:
            raise ValueError(f"image {row} takes {size} bytes, FFCV stores at most {MAX_PAGE}: use --max-pixels")
        if self.offset % self.page + size > self.page:
            gap = -self.offset % self.page
            self.file.write(bytes(gap))
            self.offset += gap
        self.file.write(stored.payload + vector)
        self.image[row] = (stored.mode, stored.width, stored.height, self.offset)
        self.allocations[row, 0] = (row, self.offset, len(stored.payload))
        self.index[row] = row
        if self.vectors:
            self.label[row] = self.offset + len(stored.payload)
            self.allocations[row, 1] = (row, self.label[row], len(vector))
        else:
            self.label[row] = label
        self.offset += size
        self.samples += 1

    def finish(self) -> None:
        header = np.zeros(1, HEADER)
        header["version"], header["num_fields"] = VERSION, len(self.fields)
        header["page_size"], header["num_samples"], header["alloc_table_ptr"] = self.page, self.samples, self.offset
        self.file.write(self.allocations[: self.samples].tobytes())
        self.file.seek(0)
        self.file.write(header.tobytes() + self.fields.tobytes() + self.table[: self.samples].tobytes())
