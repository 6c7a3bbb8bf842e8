"""Labels of a test file in the numbers of the training file, matched by class name.

Every evaluation and monitor that compares the labels of two files calls `match` first: a number may stand for different
classes in them, where a folder lacks a class or a list has another order.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fastssl import dist
from fastssl.loader import Loader

Labelled = Literal["all", "test", "none"]


def match(train: Loader, test: Loader, labelled: Labelled = "all") -> None:
    """Change the labels of `test` to the class numbers of `train`, and print a line about every change.

    The class names of `test` must be among those of `train`.  A file without names (no data card, or a list whose
    classes are called 0, 1, ...) is assumed to number its classes as the other file does.  `labelled`: which images
    must have a label: "all", "test" (all of the test file, some of the training file), or "none" (files without labels
    are left as they are).  ValueError where classes do not match, labels are missing, or `train` has only one class.
    """
    y, test_y = train.labels(), test.labels()
    if labelled == "none" and any(part.ndim == 1 and (part < 0).all() for part in (y, test_y)):
        return
    for loader, numbers, strict in ((train, y, labelled == "all"), (test, test_y, labelled != "none")):
        _check_labels(loader, numbers, strict)
    if y.ndim != test_y.ndim:
        first, second = ("one class", "several labels") if y.ndim == 1 else ("several labels", "one class")
        raise ValueError(f"{train.path} has {first} an image and {test.path} {second}: they cannot be compared")
    known, found = _count(train, y), _count(test, test_y)
    if y.ndim == 1 and known == 1 and labelled != "none":
        raise ValueError(
            f"{train.path} has one class{_named(train)}, so that every prediction would be right: convert a "
            "folder with a sub-folder for each class"
        )
    names, test_names = list(train.classes or ()), list(test.classes or ())
    if names and names == test_names:
        return
    if names and test_names and set(test_names) <= set(names) and _unique(names) and _unique(test_names):
        return _by_name(train, names, test, test_names, y.ndim == 2)
    if names and test_names and not _are_numbers(names) and not _are_numbers(test_names):
        unknown = [name for name in test_names if name not in names]
        why = f"{_some(unknown)} of the first {'are' if unknown[1:] else 'is'} not among {_some(names)} of the second"
        why = why if unknown else "some names occur twice"
        raise ValueError(f"{test.path} and {train.path} have different classes: {why}; give files of one data set")
    # A folder that lacks a class numbers the later classes lower; without names in the other file this is not noticed.
    if found > known or (found < known and test_names and not _are_numbers(test_names)):
        raise ValueError(
            f"{test.path} has {found} classes{_named(test)} and {train.path} {known}{_named(train)}: "
            "without class names in both files they are compared by number, and their numbers of classes "
            "differ; convert both from class folders"
        )
    bare, other = (test, train) if names and not _are_numbers(names) else (train, test)
    if other.classes and not _are_numbers(other.classes):
        first = ", ".join(f"{i} = {name}" for i, name in enumerate(other.classes[:3]))
        dist.print_main(
            f"{bare.path} has no class names: its labels are taken as numbers of the classes of {other.path} "
            f"({first}{', ...' if len(other.classes) > 3 else ''})"
        )


def _check_labels(loader: Loader, labels: np.ndarray, strict: bool) -> None:
    missing = int((labels < 0).sum()) if labels.ndim == 1 else 0
    if missing == len(labels) or (strict and missing):
        count = "no labels" if missing == len(labels) else f"{missing} of {len(labels)} images without label"
        raise ValueError(
            f"{loader.path} has {count}, and this needs the class of each image: convert labelled data, "
            "such as a folder with a sub-folder for each class"
        )
    top = labels.shape[1] - 1 if labels.ndim == 2 else int(labels.max())
    if loader.classes and top >= len(loader.classes):
        raise ValueError(
            f"{loader.path} has label {top}, and its data card names {len(loader.classes)} classes: convert it again"
        )


def _by_name(train: Loader, names: list[str], test: Loader, test_names: list[str], multi: bool) -> None:
    missing = [name for name in names if name not in test_names]
    if multi and missing:
        raise ValueError(
            f"{test.path} does not have the labels {_some(missing)} of {train.path}: with several labels "
            "an image both files must have the same"
        )
    test.relabel(np.array([names.index(name) for name in test_names]), names)
    what = f"it lacks {_some(missing)}, {len(missing)} of {len(names)}" if missing else "they are in another order"
    dist.print_main(f"{test.path}: its classes are matched by name with those of {train.path} ({what})")


def _unique(names: list) -> bool:
    return len(set(names)) == len(names)


def _count(loader: Loader, labels: np.ndarray) -> int:
    """How many classes a file has, by its labels and its card."""
    top = labels.shape[1] if labels.ndim == 2 else int(labels.max(initial=-1)) + 1
    return max(top, len(loader.classes or ()))


def _are_numbers(names: list) -> bool:
    """Whether the names are "0", "1", ..., which a list without names gives its classes."""
    return [str(name) for name in names] == [str(i) for i in range(len(names))]


def _named(loader: Loader) -> str:
    return f" ({_some(loader.classes)})" if loader.classes else ""


def _some(names: list) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
