"""List files: each line has the path of an image and its label or labels.

Columns are separated by tabs, commas (CSV, with quotes) or spaces, depending on the first line.  Labels are whole
numbers from 0, with -1 for none, or names.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastssl.files import untrusted
from fastssl.files.datacard import DataCard, LabelKind

from .file_sources import FileRef
from .sources import SUFFIXES, Item, Source

MAX_LIST = 1 << 30  # bytes; ImageNet's lists have 50 MB
WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)


def open_list(
    path: str, root: str | None = None, label_columns: str | None = None, classes: str | None = None
) -> Source:
    """The Source of a list.  Paths are relative to `root` (default: the folder of the list).  `label_columns`: "2" (one
    label per image), "2-4" or "2-" (several).  `classes`: as in `read_classes`."""
    base = Path(root) if root else Path(path).parent
    if not base.is_dir():
        raise ValueError(f"--root {base} is not a folder")
    columns = _columns(label_columns)
    known = read_classes(classes) if classes else None
    notes: list[str] = []
    rows = list(_rows(path, base, columns, notes))
    if not rows:
        raise ValueError(f"{path} lists no image")
    names = [name for _, name, _ in rows]
    if not any(os.path.exists(base / name) for name in names):  # False, too, for a name that is too long
        hint = "give another --root" if root else "give the folder of the images by --root"
        raise ValueError(f"{path}: none of its {len(rows)} images exists, the first is {base / names[0]}: {hint}")
    multi = columns is not None and columns[1] != columns[0] + 1
    kind: LabelKind
    if all(labels is None for *_, labels in rows):
        if known:
            raise ValueError(f"--classes {classes}: {path} has no labels")
        kind, found, numbers = "none", [], [[-1]] * len(rows)
    else:
        texts = [(number, label) for number, _, labels in rows for label in labels or ()]
        found = known or _names(path, texts, len(rows))
        numbers = _numbers(path, rows, found, classes)
        kind = "multi" if multi else "int" if max(row[0] for row in numbers) >= 0 else "none"
    used = {number for row in numbers for number in row} - {-1}
    if kind == "int" and len(found) > 1 and len(used) == 1:
        notes.append(f"all images with a label are of one class, {found[max(used)]!r}")

    def items() -> Iterator[Item]:
        for name, row in zip(names, numbers):
            label = _multi_hot(row, len(found)) if kind == "multi" else row[0]
            yield name, FileRef(str(base / name)), label

    return Source("list", path, kind, None if kind == "none" else found, len(rows), items, notes)


def _multi_hot(numbers: list[int], classes: int) -> np.ndarray:
    """float32 (classes,): 1 for these classes, 0 for the others; numbers below 0 are ignored."""
    vector = np.zeros(classes, np.float32)
    vector[[number for number in numbers if number >= 0]] = 1
    return vector


def read_classes(path: str) -> list[str]:
    """Class names in order, from a text file with one per line, or from the data card of a .beton."""
    if Path(path).suffix in (".beton", ".json"):
        names = DataCard.read(path).classes
        if not names:
            raise ValueError(f"--classes {path}: the file has no classes")
        return names
    names = [line.strip() for line in _lines(path) if line.strip()]
    if not names:
        raise ValueError(f"--classes {path}: the file is empty")
    if len(set(names)) < len(names):
        repeated = min(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"--classes {path}: the name {repeated!r} occurs more than once")
    return names


def _columns(text: str | None) -> tuple[int, int | None] | None:
    """(first, end) of the label columns, counted from 0; end None: to the last column."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,4})(-(\d{0,4}))?", text, re.ASCII)
    first = int(match[1]) if match else 0
    last = first if match and match[2] is None else int(match[3]) if match and match[3] else None
    if first < 2 or (last is not None and last < first):
        raise ValueError(f"--label-columns {text}: give a column from 2 on, such as 2, or several, such as 2-4 or 2-")
    return first - 1, last


def _lines(path: str) -> list[str]:
    if untrusted.regular_file_size(path) > MAX_LIST:
        raise ValueError(f"{path} is larger than {MAX_LIST >> 30} GiB: it is not a list")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows writes a byte order mark
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is not a text file: a list has a path, or a path and a label, on each line")
    return text.splitlines()


def _rows(
    path: str, base: Path, columns: tuple[int, int | None] | None, notes: list[str]
) -> Iterator[tuple[int, str, list[str] | None]]:
    """(line number, path, labels or None) of each line that is not empty."""
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not lines:
        return
    separator = _separator(lines[0][1], base)
    cells = list(_cells(path, lines, separator, columns, base))
    if separator and len(cells) > 1 and not (cells[0][0].lower().endswith(SUFFIXES) or _is_file(base / cells[0][0])):
        notes.append(f"line {lines[0][0]} of {path} was read as the names of the columns: {lines[0][1].strip()!r}")
        lines, cells = lines[1:], cells[1:]
    labelled = len(cells[0]) > 1
    for (number, line), row in zip(lines, cells):
        name, *rest = row
        if not name:
            raise ValueError(f"{path}, line {number}: the path is empty: {line.strip()[:80]!r}")
        if bool(rest) != labelled and columns is None:
            raise ValueError(f"{path}, line {number}: some lines have a label and some have none: {line.strip()!r}")
        if columns is None and len(rest) > 1:
            raise ValueError(
                f"{path}, line {number} has {len(row)} columns: give those with labels, --label-columns 2 "
                "for one label per image, 2- for several"
            )
        if columns is not None:
            first, end = columns
            if len(row) <= first and end == first + 1:
                raise ValueError(f"{path}, line {number} has {len(row)} columns, and --label-columns is {first + 1}")
            rest = row[first:end]
            if end != first + 1:
                rest = [label.strip() for cell in rest for label in re.split("[;|]", cell) if label.strip()]
        yield number, name, rest if labelled or columns else None


def _separator(line: str, base: Path) -> str | None:
    """Tab or comma; None for spaces.  A path may contain commas."""
    if "\t" in line:
        return "\t"
    text = line.strip()
    in_path = _is_file(base / text) or _is_file(base / text.rpartition(" ")[0])
    return "," if "," in text and not in_path else None


def _cells(
    path: str, lines: list, separator: str | None, columns: tuple[int, int | None] | None, base: Path
) -> Iterator[list[str]]:
    if separator:
        for number, line in lines:
            try:
                row = next(csv.reader([line], delimiter=separator, strict=True, skipinitialspace=True), [])
            except csv.Error as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield [cell.strip() for cell in row]
        return
    if columns is not None:
        yield from (line.split() for _, line in lines)
        return
    first = lines[0][1].split()
    if len(first) > 2 and _is_file(base / first[0]):
        yield first  # several columns: _rows raises an error that explains --label-columns
        return
    for _, line in lines:
        words = line.strip().rsplit(maxsplit=1)
        no_label = len(words) == 1 or (
            not WHOLE_NUMBER.fullmatch(words[1])
            and (words[1].lower().endswith(SUFFIXES) or _is_file(base / line.strip()))
        )
        yield [line.strip()] if no_label else words  # the path may contain spaces


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long
        return False


def _names(path: str, labels: list[tuple[int, str]], images: int) -> list[str]:
    """The classes according to the labels: 0 to the largest number, or the sorted names."""
    is_number = [bool(WHOLE_NUMBER.fullmatch(label)) for _, label in labels]
    if not any(is_number):
        for number, label in labels:
            if not label or re.fullmatch(r"[+-]?\d*\.\d+", label):
                raise ValueError(f"{path}, line {number}: the label {label!r} is neither a whole number nor a name")
        return sorted({label for _, label in labels})
    if not all(is_number):
        number, label = labels[is_number.index(not is_number[0])]
        raise ValueError(
            f"{path}, line {number}: the label {label!r} is {'not a' if is_number[0] else 'a'} number, "
            "unlike those before; with --classes FILE a number can be a name"
        )
    largest = max(int(label) for _, label in labels)
    if largest >= max(1000, 10 * images):
        raise ValueError(f"{path}: the label {largest} is too large for {images} lines: labels count from 0")
    return [str(i) for i in range(largest + 1)]


def _numbers(path: str, rows: list, names: list[str], given: str | None) -> list[list[int]]:
    """The labels of each row as numbers of `names`: a label is one of the names, or otherwise a number."""
    number_of = {name: i for i, name in enumerate(names)}
    out: list[list[int]] = []
    for number, _, labels in rows:
        out.append([])
        for label in labels:
            value = number_of.get(label)
            if value is None and WHOLE_NUMBER.fullmatch(label) and -1 <= int(label) < len(names):
                value = int(label)
            if value is None and WHOLE_NUMBER.fullmatch(label) and not given:
                raise ValueError(f"{path}, line {number}: the label {label!r} is below 0 (-1: no label)")
            if value is None:
                raise ValueError(
                    f"{path}, line {number}: the label {label!r} is not one of the {len(names)} classes of "
                    f"--classes {given}"
                )
            out[-1].append(value)
    return out
