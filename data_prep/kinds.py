"""The kinds of sources that `fastssl convert` knows."""

from __future__ import annotations

from pathlib import Path

from .datasets import CIFAR, open_cifar, open_digits, open_voc2007
from .file_sources import open_files
from .lists import open_list
from .sources import Source, open_images

KINDS = {
    "imagefolder": "a folder of images; its sub-folders, if any, are the classes",
    "tar": "a tar of images, compressed or not, classes as in a folder",
    "zip": "a zip of images, classes as in a folder",
    "list": 'a text file with "path" or "path label" on each line, or a CSV; labels are numbers (-1: none) or names',
    "cifar10": "CIFAR-10: the original python archive, or class folders of images (--split train or test)",
    "cifar100": "CIFAR-100 in the same forms, with its 100 fine classes",
    "voc2007": "VOC2007 with 20 labels per image (--split trainval, train, val or test)",
    "digits": "scikit-learn's handwritten digits, without a download; PATH is train, test or all",
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
    """The Source of `fastssl convert KIND PATH`; ValueError for an option that this kind does not have."""
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
            raise ValueError("--split is not for list files: give the list of the split")
        return open_list(path, root, label_columns, classes)
    if kind in CIFAR:
        return open_cifar(kind, path, split)
    if kind == "voc2007":
        return open_voc2007(path, split)
    if (kind == "imagefolder") != Path(path).is_dir():
        raise ValueError(f"{path} is {'a folder' if Path(path).is_dir() else 'a file'}: not a source for {kind!r}")
    return open_images(kind, path, open_files(Path(path)), split, labels)
