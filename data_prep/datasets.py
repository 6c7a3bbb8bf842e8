"""Datasets in the form in which their authors publish them: CIFAR-10 and CIFAR-100, VOC2007, scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .file_sources import ARCHIVE_ERRORS, open_files
from .plainpickle import read_pickle
from .sources import Source, open_images, source_of_arrays, source_of_files

DIGITS_TRAIN = 1437  # the first four fifths; most writers of the last fifth are not among them
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
        raise ValueError(f"{path} holds {metas[0]} but not {missing[0]}: the download is incomplete")
    members = {name: read_pickle(data, f"{path}: {name}") for name, data in files.contents([metas[0], *wanted])}
    classes = members[metas[0]].get(names_key)
    if not isinstance(classes, list) or not all(isinstance(name, bytes | str) for name in classes):
        raise ValueError(f"{path}: {metas[0]} has no {names_key.decode()!r}, a list of names")
    classes = [name if isinstance(name, str) else name.decode("utf-8", "replace") for name in classes]
    parts = [_cifar_batch(members[name], labels_key, len(classes), f"{path}: {name}") for name in wanted]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    return source_of_arrays(kind, path, split, pixels, labels, classes)


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
    return source_of_arrays("digits", path, split, pixels, digits.target[rows], [str(i) for i in range(10)])


def open_voc2007(path: str, split: str | None = None) -> Source:
    """VOC2007 (VOCdevkit, the VOC2007 folder, or an archive of them): 20 labels per image, 1 present, 0 absent, -1
    difficult.  In the files ImageSets/Main/CLASS_SPLIT.txt, from which they are read, 0 is difficult and -1 absent."""
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
        texts = {name: data.decode() for name, data in files.contents([found[0], *lists])}
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
    return source_of_files("voc2007", path, files, images, label="multi", classes=classes)
