"""Images in memory or from a Dataset as a Source: NumPy arrays, tensors, PIL images.

They are stored as raw pixels, without loss, or as JPEG with mode="jpg".  For images in files, `fastssl convert` is
better: it stores JPEGs unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fastssl.files.datacard import LabelKind

from .image import to_rgb
from .sources import Source

IMAGE_TYPES = "a PIL image, a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4), or a uint8 tensor of shape (C, H, W)"


def open_memory(images: Any, labels: Any = None, classes: Sequence[str] | None = None) -> Source:
    """A Source of `images`: anything with len() and [i], such as a list, an array (N, H, W, 3) or a torch Dataset,
    whose items may be pairs (image, label).  `labels`: (N,) whole numbers from 0, -1 for none, or names; (N, C) of 0
    and 1 for several labels per image; None: those of the pairs, if any.  `classes`: their names; default: those of the
    Dataset, or the numbers.  ValueError, with the number of the item, for anything else."""
    count = _length(images)
    if not count:
        raise ValueError("images is empty")
    paired = isinstance(images[0], tuple | list) and len(images[0]) == 2
    own = getattr(images, "classes", None)
    if classes is None and paired and labels is None and isinstance(own, list | tuple):
        classes = [str(name) for name in own]
    kind: LabelKind = "int" if paired else "none"
    values = None
    if labels is not None:
        kind, values, classes = _labels(labels, count, classes)
    names = None if classes is None else [str(name) for name in classes]
    source = Source("memory", type(images).__name__, kind, names, count, lambda: iter(()))

    def items() -> Iterator[tuple[str, np.ndarray, Any]]:
        largest = -1
        for i in range(count):
            item = images[i]
            image, label = item if paired else (item, -1)
            label = _whole_number(label, i) if values is None else values[i]
            if kind == "int":
                largest = max(largest, int(label))
                if source.classes is not None and label >= len(source.classes):
                    raise ValueError(f"item {i}: the label {label} is too large for {len(source.classes)} classes")
            yield f"item {i}", pixels(image, i), label
        if kind == "int" and source.classes is None:
            source.classes = [str(c) for c in range(largest + 1)]

    source.items = items
    return source


def _length(images: Any) -> int:
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__") or isinstance(images, str | bytes | dict):
        raise ValueError(
            f"images of type {type(images).__name__}: give a list, an array or a Dataset, with len() and [i]"
        )
    return len(images)


def _labels(labels: Any, count: int, classes: Sequence[str] | None) -> tuple[LabelKind, np.ndarray, Sequence[str]]:
    values = np.asarray(labels)
    if len(values) != count or values.ndim not in (1, 2):
        raise ValueError(
            f"labels of shape {values.shape} for {count} images: give one per image, or a row of 0 and 1 per image"
        )
    if values.ndim == 2:
        if not np.isin(values, (0, 1)).all():
            raise ValueError("labels with several columns must be 0 or 1 for each class")
        names = classes or [str(c) for c in range(values.shape[1])]
        if len(names) != values.shape[1]:
            raise ValueError(f"{len(names)} classes for labels with {values.shape[1]} columns")
        return "multi", values.astype(np.float32), names
    if values.dtype.kind in "US" or values.dtype == object:
        names = list(classes) if classes else sorted({str(v) for v in values})
        number = {name: i for i, name in enumerate(names)}
        unknown = next((str(v) for v in values if str(v) not in number), None)
        if unknown is not None:
            raise ValueError(f"the label {unknown!r} is not one of the classes {', '.join(names[:8])}")
        return "int", np.array([number[str(v)] for v in values]), names
    if values.dtype.kind not in "iu" or values.min() < -1:
        raise ValueError(f"labels of type {values.dtype} from {values.min()}: give whole numbers from 0 (-1: none)")
    return "int", values, classes or [str(c) for c in range(values.max() + 1)]


def _whole_number(label: Any, i: int) -> int:
    try:
        value = int(label)
    except (TypeError, ValueError):
        value = None
    if value is None or value != label or value < -1:
        raise ValueError(f"item {i}: the label {label!r} is not a whole number from 0 (-1: none); give labels=...")
    return value


def pixels(image: Any, i: int) -> np.ndarray:
    """uint8 (H, W, 3) of one image."""
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    tensor = not isinstance(image, np.ndarray) and hasattr(image, "numpy")
    array = image.numpy() if tensor else image
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(image).__name__
        hint = "; use a Dataset without ToTensor and other transforms: the views are computed later, on the device"
        raise ValueError(f"item {i} is {got}: give {IMAGE_TYPES}{hint}")
    if tensor and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"item {i} has shape {array.shape}: give {IMAGE_TYPES}")
    return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(array))))
