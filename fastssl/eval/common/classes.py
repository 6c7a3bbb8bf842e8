"""Labels of a test file in the numbers of the training file, matched by class name.

Every evaluation and every monitor that compares labels of two files calls `match` before it computes anything: the
same number may stand for another class where a folder lacks a class or a list has an order of its own.
"""

from __future__ import annotations

import numpy as np

from fastssl import dist
from fastssl.loader import Loader


def match(train: Loader, test: Loader, labelled: str = "all") -> None:
    """Change the labels of `test` to the class numbers of `train`, and print what was done where anything was.

    Names of `test` must be among those of `train`.  A file without names (no data card, or a list whose classes are
    called 0, 1, ...) is taken to number its classes as the other does.  `labelled`: which images must have a label:
    "all", "test" (all of the test file, some of the training file), or "none" (nothing is done for files without).
    ValueError where names or numbers cannot agree, labels are missing, or the training file has one class alone.
    """
    y, test_y = train.labels(), test.labels()
    if labelled == "none" and any(part.ndim == 1 and (part < 0).all() for part in (y, test_y)):
        return
    for loader, found, strict in ((train, y, labelled == "all"), (test, test_y, labelled != "none")):
        _check_labels(loader, found, strict)
    if y.ndim != test_y.ndim:
        one, other = ("one class", "several labels") if y.ndim == 1 else ("several labels", "one class")
        raise ValueError(f"{train.path} has {one} an image and {test.path} {other}: they cannot be compared")
    known, found = _count(train, y), _count(test, test_y)
    if y.ndim == 1 and known == 1 and labelled != "none":
        raise ValueError(
            f"{train.path} has one class{_named(train)}, so that every answer would be right: convert a "
            "folder in which each class has a folder of its own"
        )
    names, test_names = list(train.classes or ()), list(test.classes or ())
    if names and names == test_names:
        return
    if names and test_names and set(test_names) <= set(names) and _unique(names) and _unique(test_names):
        return _by_name(train, test, y.ndim == 2)
    if names and test_names and not _plain(names) and not _plain(test_names):
        strange = [name for name in test_names if name not in names]
        why = (
            f"{_some(strange)} of the first {'is' if len(strange) == 1 else 'are'} not among {_some(names)} of the "
            "second"
            if strange
            else "some names occur twice"
        )
        raise ValueError(f"{test.path} and {train.path} have other classes: {why}; give files of one data set")
    # A folder that lacks a class numbers the later ones lower, and without names on the other side nobody would see it.
    if found > known or (found < known and test_names and not _plain(test_names)):
        raise ValueError(
            f"{test.path} has {found} classes{_named(test)} and {train.path} {known}{_named(train)}: "
            "without class names in both files they are compared by number, and these numbers do not "
            "agree; convert both from class folders"
        )
    bare, other = (test, train) if names and not _plain(names) else (train, test)
    if other.classes and not _plain(other.classes):
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
            "such as a folder in which each class has a folder"
        )
    top = labels.shape[1] - 1 if labels.ndim == 2 else int(labels.max())
    if loader.classes and top >= len(loader.classes):
        raise ValueError(
            f"{loader.path} has label {top}, and its data card names {len(loader.classes)} classes: convert it again"
        )


def _by_name(train: Loader, test: Loader, multi: bool) -> None:
    names, test_names = train.classes, test.classes
    lacking = [name for name in names if name not in test_names]
    if multi and lacking:
        raise ValueError(
            f"{test.path} does not have the labels {_some(lacking)} of {train.path}: with several labels "
            "an image both files must have the same"
        )
    test.relabel(np.array([names.index(name) for name in test_names]), names)
    what = f"it lacks {_some(lacking)}, {len(lacking)} of {len(names)}" if lacking else "they are in another order"
    dist.print_main(f"{test.path}: its classes are matched by name with those of {train.path} ({what})")


def _unique(names: list) -> bool:
    return len(set(names)) == len(names)


def _count(loader: Loader, labels: np.ndarray) -> int:
    """How many classes a file has, by its labels and its card."""
    top = labels.shape[1] if labels.ndim == 2 else int(labels.max(initial=-1)) + 1
    return max(top, len(loader.classes or ()))


def _plain(names: list) -> bool:
    """Are these the numbers that a list without names gives its classes?"""
    return [str(name) for name in names] == [str(i) for i in range(len(names))]


def _named(loader: Loader) -> str:
    return f" ({_some(loader.classes)})" if loader.classes else ""


def _some(names: list) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
