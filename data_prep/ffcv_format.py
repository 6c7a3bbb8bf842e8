"""FFCV's file layout (version 2) and its JPEG decoder, without importing ffcv.

`import ffcv` compiles numba code and imports torch, which takes 8 s of CPU time.  A test compares every definition
here with ffcv's own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

VERSION = 2
JPG, RAW = 0, 1  # values of `mode`
MAX_SIDE = 65535  # height and width have 16 bits
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
INT, RGB_IMAGE, NDARRAY = 1, 2, 4  # field types


SAMPLE_FIELDS = ("f0", "f1", "f2")  # FFCV's names of image, index and label in the table of samples


def sample_table(samples: int, label_vector: bool) -> np.ndarray:
    """The table of samples, with the fields image, index and label; a label vector is stored as a pointer."""
    types = (IMAGE, "<i8", "<u8" if label_vector else "<i8")
    return np.zeros(samples, np.dtype(list(zip(SAMPLE_FIELDS, types)), align=True))


def field_descriptions(classes: int | None) -> np.ndarray:
    """Of the fields image, index and label, which is a float32 vector of `classes` numbers, or one integer for None."""
    fields = np.zeros(3, FIELD)
    types = (RGB_IMAGE, INT, INT if classes is None else NDARRAY)
    for field, name, type_id in zip(fields, ("image", "index", "label"), types):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    if classes is not None:
        shape = np.zeros(32, "<u8")
        shape[0] = classes
        dtype = json.dumps(np.dtype("<f4").descr).encode()
        arguments = shape.tobytes() + np.uint64(len(dtype)).tobytes() + dtype
        fields[2]["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return fields


@cache
def _imdecode() -> Callable:
    """The decoder in ffcv's library."""
    spec = importlib.util.find_spec("ffcv")  # does not import it
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError("ffcv is not installed: pip install ffcv==1.0.2")
    (library,) = Path(spec.submodule_search_locations[0]).glob("_libffcv*.so")
    function = ctypes.CDLL(str(library)).imdecode
    number, pointer = ctypes.c_uint32, ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_uint64, number, number, pointer, *[number] * 6, ctypes.c_bool, ctypes.c_bool]
    return function


def decode_jpeg(data: bytes | np.ndarray, height: int, width: int) -> np.ndarray | None:
    """RGB pixels (height, width, 3) as FFCV decodes them; None if its decoder reports an error or a warning."""
    source = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    pixels = np.empty((height, width, 3), np.uint8)
    code = _imdecode()(
        source.ctypes.data, source.size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, False, False
    )
    return pixels if code == 0 else None
