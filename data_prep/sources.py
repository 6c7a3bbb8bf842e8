"""Where images come from: each `open_*` returns a Source, whose items come in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.files.datacard import LabelKind

from .file_sources import FileSource

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".pgm",
    ".pbm",
    ".jp2",
    ".avif",
)
SPLIT_NAMES = {"train", "test", "val", "valid", "validation", "trainval", "unlabeled"}

# (name, reference, label).  The reference is what a worker turns into an image: encoded bytes, pixels (H, W, 3), or an
# object with `.read()` that returns encoded bytes.  The label is an integer, or (C,) numbers for several labels.
Item = tuple[str, Any, Any]


@dataclass
class Source:
    """Images with their labels, from which `write.convert` makes a file."""

    kind: str
    path: str  # as the user gave it
    label: LabelKind
    classes: list[str] | None
    count: int
    items: Callable[[], Iterator[Item]]
    notes: list[str] = field(default_factory=list)  # to be printed: what was left out


def source_of_files(kind: str, path: str, files: FileSource, labels: dict[str, Any], **options: Any) -> Source:
    """A Source of the files that are the keys of `labels`, in this order, or that of the archive if it is streamed.
    `options`: further fields of Source."""

    def items() -> Iterator[Item]:
        if files.streams:
            for name, data in files.read(labels):
                yield name, data, labels[name]
        else:
            for name, value in labels.items():
                yield name, files.ref(name), value

    return Source(kind, path, count=len(labels), items=items, **options)


def source_of_arrays(kind: str, path: str, split: str, pixels: np.ndarray, labels: np.ndarray, classes: list) -> Source:
    """A Source of pixels (N, H, W, 3) and labels (N,)."""

    def items() -> Iterator[Item]:
        for row, (image, label) in enumerate(zip(pixels, labels)):
            yield f"{split}/{row}", image, int(label)

    return Source(kind, path, "int", classes, len(pixels), items)


def open_images(kind: str, path: str, files: FileSource, split: str | None = None, labels: str = "auto") -> Source:
    """Images in a folder, tar or zip.  With `labels="auto"` the sub-folders are the classes, if there are any."""
    images = [name for name in files.names if name.lower().endswith(SUFFIXES)]
    notes = []
    if other := len(files.names) - len(images):
        first = next(name for name in files.names if not name.lower().endswith(SUFFIXES))
        notes.append(f"left out {other} files without an image's suffix, such as {first}")
    if files.hidden:
        notes.append(f"left out {files.hidden} hidden files and links")
    if not images:
        raise ValueError(f"{path} holds no image" + (f" ({notes[0]})" if notes else ""))
    inner = _names_in_split(files, images, split, path)
    outside = [name for name in inner if "/" not in inner[name]]
    if labels == "none" or len(outside) == len(inner):
        unlabelled = dict.fromkeys(inner, -1)
        return source_of_files(kind, path, files, unlabelled, label="none", classes=None, notes=notes)
    if outside:
        raise ValueError(
            f"{path} holds images both in class folders and outside of them (such as {outside[0]}): move them, or "
            "give --labels none"
        )
    classes = sorted({rest.split("/")[0] for rest in inner.values()})
    if len(set(classes) & SPLIT_NAMES) > 1:
        raise ValueError(f"{path} holds the splits {', '.join(classes)}: choose one, such as --split {classes[-1]}")
    if not files.archive:
        empty = sorted(
            entry.name
            for entry in Path(path, split or "").iterdir()
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in classes
        )
        if empty:
            raise ValueError(
                f"the class folder {empty[0]!r} in {path} holds no image: remove or fill it (an empty "
                "class would be missing from the labels)"
            )
    number = {name: i for i, name in enumerate(classes)}
    values = {name: number[rest.split("/")[0]] for name, rest in inner.items()}
    return source_of_files(kind, path, files, values, label="int", classes=classes, notes=notes)


def _names_in_split(files: FileSource, images: list[str], split: str | None, path: str) -> dict[str, str]:
    """{name: path below the folder of the split}.  Folders of an archive that hold everything are left out, since many
    archives have such a folder of their own name."""
    inner = {name: name for name in images}
    while True:
        if split:
            prefix = split.strip("/") + "/"
            chosen = {name: rest[len(prefix) :] for name, rest in inner.items() if rest.startswith(prefix)}
            if chosen:
                return chosen
        folders = {rest.split("/")[0] for rest in inner.values() if "/" in rest}
        if not files.archive or len(folders) != 1 or any("/" not in rest for rest in inner.values()):
            break
        inner = {name: rest.split("/", 1)[1] for name, rest in inner.items()}
    if split:
        raise ValueError(f"{path} has no folder {split!r} with images: it holds {', '.join(sorted(folders)[:8])}")
    return inner
