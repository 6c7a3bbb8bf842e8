"""The FFCV operation that decodes each image once, whatever the number of views, and the checked opening of a .beton.

Image i lies in the first h*w pixels of row i of a fixed canvas (B, P, 3), row-major and without padding; what lies
behind it is left as it was.  FFCV ignores what its `imdecode` returns; here a damaged image is marked by height 0.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fastssl.files import untrusted

_threads = torch.get_num_threads()
from ffcv.fields import IntField, NDArrayField, RGBImageField  # noqa: E402
from ffcv.fields.rgb_image import IMAGE_MODES  # noqa: E402
from ffcv.libffcv import imdecode, memcpy  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from ffcv.reader import Reader  # noqa: E402
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType  # noqa: E402

Images = tuple[np.ndarray, np.ndarray]  # pixels and sizes
StorageState = tuple[np.ndarray, np.ndarray, np.ndarray]  # the file's bytes, pointers into it and the lengths there

MIN_SAMPLE = 16  # bytes of an image's entry in the table of samples

torch.set_num_threads(_threads)  # importing ffcv sets PyTorch to one thread


class DecodeOnce(Operation):
    """RGBImageField (JPEG or raw) -> pixels uint8 (B, P, 3) and sizes int32 (B, 2) = (h, w)."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape = (max_pixels(self.metadata), 3)
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("<u1"))
        return state, (AllocationQuery(shape, np.dtype("<u1")), AllocationQuery((2,), np.dtype("<i4")))

    def generate_code(self) -> Callable:
        read, raw = self.memory_read, IMAGE_MODES["raw"]
        imdecode_c, memcpy_c = Compiler.compile(imdecode), Compiler.compile(memcpy)

        # A plain range: the loader runs this on threads of its own.  As fast as numba's prange here, and it needs none
        # of numba's threading layers, which abort on concurrent use (workqueue) or do not survive a fork (OpenMP, TBB).
        def decode(rows: np.ndarray, destination: Images, metadata: np.ndarray, storage_state: StorageState) -> Images:
            pixels, sizes = destination
            for i in range(len(rows)):
                field = metadata[rows[i]]
                data = read(field["data_ptr"], storage_state)
                h, w = np.int64(field["height"]), np.int64(field["width"])
                if field["mode"] == raw:
                    good = data.size == 3 * h * w
                    if good:
                        memcpy_c(data, pixels[i])
                else:
                    good = imdecode_c(data, pixels[i], h, w, h, w, 0, 0, 1, 1, False, False) == 0
                sizes[i, 0] = h if good else 0
                sizes[i, 1] = w
            return pixels[: len(rows)], sizes[: len(rows)]

        return decode


def max_pixels(metadata: np.ndarray) -> int:
    return int((metadata["height"].astype(np.int64) * metadata["width"]).max())


class BetonReader:
    """A .beton opened for reading: `image` metadata (N,), `index` int64 (N,), labels by row, and `decode`."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        reader = _open(self.path)
        self._identity = _identity(self.path)
        fields = {"image": RGBImageField, "index": IntField, "label": (IntField, NDArrayField)}
        wrong = [name for name, kind in fields.items() if not isinstance(reader.handlers.get(name), kind)]
        if wrong:
            raise ValueError(
                f"{path}: field {' and field '.join(map(repr, wrong))} missing or of another type, it has "
                f"{ {k: type(v).__name__ for k, v in reader.handlers.items()} }; needed: image (RGBImageField), "
                "index (IntField), label (IntField or NDArrayField); `fastssl convert` writes them"
            )
        columns = dict(zip(reader.handlers, reader.metadata.dtype.names))
        self.image = np.ascontiguousarray(reader.metadata[columns["image"]])
        self.index = np.ascontiguousarray(reader.metadata[columns["index"]])
        self.samples, self.max_pixels = len(self.image), max_pixels(self.image)
        if not np.array_equal(self.index, np.arange(self.samples)):
            raise ValueError(f"{path}: the index field must hold the row numbers 0..{self.samples - 1}; convert again")

        table = np.sort(reader.alloc_table, order="ptr")
        self.pointers, self.lengths = np.ascontiguousarray(table["ptr"]), np.ascontiguousarray(table["size"])
        self.bytes = np.memmap(self.path, "uint8", "r")
        self._label, self._label_field = reader.metadata[columns["label"]], reader.handlers["label"]
        self._check_pointers(self.image["data_ptr"])
        if isinstance(self._label_field, NDArrayField):
            self._check_pointers(self._label)
            self._check_vectors()

    def _check_vectors(self) -> None:
        """Label vectors of numbers, each as long as the field says."""
        dtype, shape = self._label_field.dtype, self._label_field.shape
        lengths = self.lengths[np.searchsorted(self.pointers, self._label)]
        if dtype.kind not in "fiu" or math.prod(map(int, shape)) * dtype.itemsize != lengths[0] or np.ptp(lengths):
            raise ValueError(f"{self.path} is damaged: its labels are not of {dtype} and shape {shape}; convert again")

    @cached_property
    def fingerprint(self) -> str:
        """What tells this file from another one of the same name: a hash of sizes, places and lengths of all images."""
        digest = hashlib.sha256()
        for part in (self.image, self.pointers, self.lengths):
            digest.update(part.tobytes())
        return f"{self.samples} images, {self.bytes.size} bytes, index {digest.hexdigest()[:12]}"

    def check_unchanged(self) -> None:
        """ValueError if the path no longer leads to the file that was opened, as it was then.  A file that is cut short
        kills the process with SIGBUS as soon as it reads what is gone, and another one's bytes are not what the index
        says."""
        try:
            now = _identity(self.path)
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be read any more ({error.strerror}): it was moved, or its file system has gone; "
                "bring it back and continue with --resume"
            ) from None
        if now != self._identity:
            raise ValueError(
                f"{self.path} was changed or replaced while it was read: bring the file of before back and continue "
                "with --resume, or start a new run (name=...)"
            )

    def _check_pointers(self, pointers: np.ndarray) -> None:
        """A pointer that leads past the end of a mapped file kills the process with SIGBUS."""
        at = np.searchsorted(self.pointers, pointers)
        found = at < len(self.pointers)
        found[found] = self.pointers[at[found]] == pointers[found]
        size = np.uint64(self.bytes.size)
        if not found.all() or (self.lengths > size).any() or (self.pointers > size - self.lengths).any():
            raise ValueError(f"{self.path} is damaged: its table points outside the file; convert again")

    def decode(self, rows: np.ndarray, pixels: np.ndarray, sizes: np.ndarray) -> None:
        """Rows int64 (n,) into pixels (n, P, 3) and sizes (n, 2).  Releases the GIL.  ValueError: a damaged image."""
        _compiled()(rows, (pixels, sizes), self.image, (self.bytes, self.pointers, self.lengths))
        for i in np.flatnonzero(sizes[:, 0] == 0):
            sizes[i] = self._decode_carefully(rows[i], pixels[i])

    def _decode_carefully(self, row: int, pixels: np.ndarray) -> tuple[int, int]:
        """libjpeg reports warnings (stray bytes in many real files) like errors; Pillow tells them apart."""
        field = self.image[row]
        try:
            if field["mode"] == IMAGE_MODES["raw"]:
                raise OSError("raw image of a wrong length")
            stored = io.BytesIO(self.stored(field["data_ptr"]).data)
            image = np.asarray(Image.open(stored, formats=("JPEG",)).convert("RGB"))
            if image.shape[:2] != (field["height"], field["width"]):
                raise OSError(f"its size is {image.shape[:2]}, the file says {field['height'], field['width']}")
        except (OSError, SyntaxError) as error:
            reason = "not a JPEG" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{self.path}: image {row} is damaged ({reason}); convert the data again") from None
        pixels[: image.shape[0] * image.shape[1]] = image.reshape(-1, 3)
        return image.shape[:2]

    def stored(self, pointer: np.uint64) -> np.ndarray:
        return self.bytes[pointer : pointer + self.lengths[np.searchsorted(self.pointers, pointer)]]

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """int64 (n,), or float32 (n, C) for multi-labels."""
        if isinstance(self._label_field, IntField):
            return self._label[rows]
        parts = [self.stored(p).view(self._label_field.dtype) for p in self._label[rows]]
        return np.array(parts, dtype=np.float32).reshape(len(rows), -1)


def _read(address: int, state: StorageState) -> np.ndarray:
    data, pointers, lengths = state
    return data[address : address + lengths[np.searchsorted(pointers, address)]]


@cache
def _compiled() -> Callable:
    """One compilation a process (1 s): FFCV's own loader compiles anew for every loader."""
    operation = DecodeOnce()
    operation.accept_globals(None, Compiler.compile(_read))
    return Compiler.compile(operation.generate_code())


def _identity(path: str) -> tuple[int, ...]:
    info = os.stat(path)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _open(path: str) -> Reader:
    """FFCV's reader behind the checks that it lacks."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; `fastssl convert SOURCE PATH {path}` makes it")
    size = untrusted.regular_file_size(path)
    broken = ValueError(f"{path} ({size} bytes) is truncated or not a .beton file; convert the data again")
    header = np.fromfile(path, HeaderType, count=1)
    if not len(header):
        raise broken
    start = HeaderType.itemsize + int(header["num_fields"][0]) * FieldDescType.itemsize
    table = int(header["alloc_table_ptr"][0])
    if not start <= table < size or (size - table) % ALLOC_TABLE_TYPE.itemsize or not header["num_samples"][0]:
        raise broken
    if int(header["num_samples"][0]) * MIN_SAMPLE > table - start:  # before a table of that size is allocated
        raise broken
    try:
        reader = Reader(path)
    except Exception as error:  # FFCV's parsing of field descriptions raises nearly anything on damaged ones
        raise broken from error
    if len(reader.metadata) != header["num_samples"][0]:
        raise broken
    return reader
