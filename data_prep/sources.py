"""Where images come from: each `open_*` returns a Source, whose items are (name, reference, label) in a fixed order.

A reference is what a worker turns into an image: encoded bytes, pixels (H, W, 3), or an object with `.read()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .file_sources import ARCHIVE_ERRORS, FileSource, open_files
from .plainpickle import read_pickle

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
DIGITS_TRAIN = 1437  # the first four fifths; the writers of the last fifth are mostly others


@dataclass
class Source:
    kind: str
    path: str  # as the user gave it
    label: str  # "int", "multi" or "none"
    classes: list[str] | None
    count: int
    items: Callable[[], Iterator[tuple[str, object, object]]]
    notes: list[str] = field(default_factory=list)  # what was left out, to be printed


def _source_of(
    kind: str, files: FileSource, given: str, labels: dict[str, object], label: str, classes, notes
) -> Source:
    """A Source over files: `labels` maps each name to its label, in order (a stream keeps its own)."""

    def items():
        if files.streams:
            for name, data in files.read(labels):
                yield name, data, labels[name]
        else:
            for name, value in labels.items():
                yield name, files.ref(name), value

    return Source(kind, given, label, classes, len(labels), items, notes)


def open_images(kind: str, path: str, files: FileSource, split: str | None = None, labels: str = "auto") -> Source:
    """Images in a folder, tar or zip.  With `labels="auto"` the first folder names the class, if there are folders."""
    images = [name for name in files.names if name.lower().endswith(SUFFIXES)]
    notes = []
    if other := len(files.names) - len(images):
        first = next(name for name in files.names if not name.lower().endswith(SUFFIXES))
        notes.append(f"left out {other} files without an image's suffix, such as {first}")
    if files.hidden:
        notes.append(f"left out {files.hidden} hidden files and links")
    if not images:
        raise ValueError(f"{path} holds no image" + (f" ({notes[0]})" if notes else ""))
    inner = _relative(files, images, split, path)
    if labels == "none":
        return _source_of(kind, files, path, dict.fromkeys(inner, -1), "none", None, notes)
    flat = [name for name in inner if "/" not in inner[name]]
    if len(flat) == len(inner):
        return _source_of(kind, files, path, dict.fromkeys(inner, -1), "none", None, notes)
    if flat:
        raise ValueError(
            f"{path} holds images both outside of any class folder (such as {flat[0]}) and inside of "
            "some: move them, or give --labels none"
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
    return _source_of(kind, files, path, values, "int", classes, notes)


def _relative(files: FileSource, images: list[str], split: str | None, path: str) -> dict[str, str]:
    """{name: name below the split}.  An archive may wrap everything in one folder of its own name; a folder not."""
    inner = {name: name for name in images}
    while True:
        if split:
            prefix = split.strip("/") + "/"
            chosen = {name: rest[len(prefix) :] for name, rest in inner.items() if rest.startswith(prefix)}
            if chosen:
                return chosen
        tops = {rest.split("/")[0] for rest in inner.values() if "/" in rest}
        if not files.archive or len(tops) != 1 or any("/" not in rest for rest in inner.values()):
            break
        inner = {name: rest.split("/", 1)[1] for name, rest in inner.items()}
    if split:
        raise ValueError(f"there is no folder {split!r} with images in {path}: it holds {', '.join(sorted(tops)[:8])}")
    return inner


CIFAR = {  # batches of each split, the file with the class names, its key, the key of the labels
    "cifar10": (
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        "batches.meta",
        b"label_names",
        b"labels",
    ),
    "cifar100": ({"train": ["train"], "test": ["test"]}, "meta", b"fine_label_names", b"fine_labels"),
}


def open_cifar(kind: str, path: str, split: str | None = None) -> Source:
    """CIFAR-10 or CIFAR-100: the original python archive (packed or not), or class folders of images below splits."""
    batches, meta, names_key, labels_key = CIFAR[kind]
    files = open_files(Path(path))
    metas = [name for name in files.names if name.split("/")[-1] == meta]
    if not metas:
        splits = any("train" in name.split("/")[:-1] for name in files.names)
        source = open_images(kind, path, files, split or ("train" if splits else None))
        if len(source.classes or []) != int(kind[5:]):
            raise ValueError(f"{path} is not {kind}: it holds {len(source.classes or [])} class folders")
        return source
    split = split or "train"
    if split not in batches:
        raise ValueError(f"{kind} has no split {split!r}: train or test")
    base = metas[0][: -len(meta)]
    wanted = [base + name for name in batches[split]]
    if missing := [name for name in wanted if name not in files.names]:
        raise ValueError(f"{path} holds {metas[0]} and no {missing[0]}: the download is incomplete")
    members = {
        name: read_pickle(data if isinstance(data, bytes) else data.read(), f"{path}: {name}")
        for name, data in files.read([metas[0], *wanted])
    }
    classes = members[metas[0]].get(names_key)
    if not isinstance(classes, list) or not all(isinstance(name, bytes | str) for name in classes):
        raise ValueError(f"{path}: {metas[0]} has no {names_key.decode()!r}, a list of names")
    classes = [name if isinstance(name, str) else name.decode("utf-8", "replace") for name in classes]
    parts = [_cifar_batch(members[name], labels_key, len(classes), f"{path}: {name}") for name in wanted]
    return _from_arrays(kind, path, split, *map(np.concatenate, zip(*parts)), classes)


def _cifar_batch(batch: dict, key: bytes, classes: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 32, 32, 3) and int64 (N,), checked."""
    pixels, labels = batch.get(b"data"), batch.get(key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise ValueError(f"{name} has no 'data' of shape (N, 3072), uint8")
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if (
        not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not labels
        or not all(type(label) is int and 0 <= label < classes for label in labels)
    ):
        raise ValueError(f"{name} has no {key.decode()!r} of {len(pixels)} numbers from 0 to {classes - 1}")
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), np.array(labels, np.int64)


def _from_arrays(kind: str, path: str, split: str, pixels: np.ndarray, labels: np.ndarray, classes: list) -> Source:
    def items():
        for row, (image, label) in enumerate(zip(pixels, labels)):
            yield f"{split}/{row}", image, int(label)

    return Source(kind, path, "int", classes, len(pixels), items)


def open_digits(path: str, split: str | None = None) -> Source:
    """scikit-learn's 1,797 grey 8x8 digits.  PATH is the split: train (the first 1,437), test (the rest) or all."""
    from sklearn.datasets import load_digits  # a second to import, and only this source needs it

    if split and path not in ("-", split):
        raise ValueError(f"PATH is {path!r} and --split is {split!r}: for digits, PATH is the split")
    split = split or (path if path != "-" else "train")
    rows = {"train": slice(0, DIGITS_TRAIN), "test": slice(DIGITS_TRAIN, None), "all": slice(None)}.get(split)
    if rows is None:
        raise ValueError(f"digits has no split {split!r}: train, test or all")
    digits = load_digits()
    grey = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    return _from_arrays("digits", path, split, pixels, digits.target[rows], [str(i) for i in range(10)])


def open_voc2007(path: str, split: str | None = None) -> Source:
    """VOC2007 (VOCdevkit, the VOC2007 folder, or an archive of them): 20 labels, 1 present, 0 absent, -1 difficult.

    They come from ImageSets/Main/CLASS_SPLIT.txt, where 1 is present, -1 absent and 0 difficult."""
    split = split or "trainval"
    files = open_files(Path(path))
    ending = f"ImageSets/Main/{split}.txt"
    found = [name for name in files.names if name == ending or name.endswith("/" + ending)]
    found = [name for name in found if "VOC2007" in name] or found
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {len(found) or 'no'} {ending}: give the VOC2007 folder or its archive, and "
            "--split train, val, trainval or test"
        )
    base = found[0][: -len(ending)]
    lists = [
        name for name in files.names if name.startswith(f"{base}ImageSets/Main/") and name.endswith(f"_{split}.txt")
    ]
    if not lists:
        raise ValueError(f"{path} has no class lists beside {found[0]} (such as ImageSets/Main/cat_{split}.txt)")
    try:
        texts = {
            name: (data if isinstance(data, bytes) else data.read()).decode()
            for name, data in files.read([found[0], *lists])
        }
    except ARCHIVE_ERRORS as error:
        raise ValueError(f"cannot read the class lists of {path}: {error}") from error
    ids = [line.split()[0] for line in texts[found[0]].splitlines() if line.strip()]
    classes = sorted(name.split("/")[-1][: -len(f"_{split}.txt")] for name in lists)
    table = np.zeros((len(ids), len(classes)), np.float32)
    rows = {name: row for row, name in enumerate(ids)}
    for column, label in enumerate(classes):
        name = f"{base}ImageSets/Main/{label}_{split}.txt"
        lines = [line.split() for line in texts[name].splitlines() if line.strip()]
        if len(lines) != len(ids) or {words[0] for words in lines} != set(ids):
            raise ValueError(f"{path}: {name} does not list the images of {split}.txt")
        for words in lines:
            value = {"1": 1, "-1": 0, "0": -1}.get(words[1] if len(words) == 2 else "")
            if value is None:
                raise ValueError(f"{path}: {name} has a line that is not 'image 1|0|-1': {' '.join(words)!r}")
            table[rows[words[0]], column] = value
    images = {f"{base}JPEGImages/{name}.jpg": table[row] for name, row in rows.items()}
    names = set(files.names)
    if missing := [name for name in images if name not in names]:
        raise ValueError(f"{path} lacks {len(missing)} images of {split}.txt, such as {missing[0]}")
    return _source_of("voc2007", files, path, images, "multi", classes, [])


KINDS = {
    "imagefolder": "a folder of images; its sub-folders, if any, are the classes",
    "tar": "a tar of images, compressed or not, classes as in a folder",
    "zip": "a zip of images, classes as in a folder",
    "list": 'a text file with "path" or "path label" on each line, or a CSV; labels are numbers (-1: none) or names',
    "cifar10": "CIFAR-10: the original python archive, or class folders of images (--split train or test)",
    "cifar100": "CIFAR-100, likewise, with its 100 fine classes",
    "voc2007": "VOC2007 with its 20 labels an image (--split trainval, train, val or test)",
    "digits": "scikit-learn's handwritten digits, no download; PATH is train, test or all",
}


def open_source(
    kind: str,
    path: str,
    *,
    split: str | None = None,
    root: str | None = None,
    labels: str = "auto",
    label_columns: str | None = None,
    classes: str | None = None,
) -> Source:
    """The Source for the words of `fastssl convert KIND PATH`; ValueError for an option the kind has no use for."""
    if kind not in KINDS:
        raise ValueError(f"unknown source {kind!r}: one of {', '.join(KINDS)}")
    for option, value in (("--root", root), ("--label-columns", label_columns), ("--classes", classes)):
        if value is not None and kind != "list":
            raise ValueError(f"{option} is for list files, not for {kind}")
    if labels != "auto" and kind not in ("imagefolder", "tar", "zip"):
        raise ValueError(f"--labels is for folders and archives of images, not for {kind}")
    if kind == "digits":
        return open_digits(path, split)
    if not Path(path).exists():
        raise ValueError(f"there is no file or folder {path}")
    if kind == "list":
        if split is not None:
            raise ValueError("--split is not for list files: a list is a split")
        from .lists import open_list

        return open_list(path, root, label_columns, classes)
    if kind in CIFAR:
        return open_cifar(kind, path, split)
    if kind == "voc2007":
        return open_voc2007(path, split)
    if (kind == "imagefolder") != Path(path).is_dir():
        raise ValueError(f"{path} is {'a folder' if Path(path).is_dir() else 'a file'}: not a source for {kind!r}")
    return open_images(kind, path, open_files(Path(path)), split, labels)
