"""The data card: what NAME.json says about NAME.beton.  `data_prep` writes it, everything else reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from fastssl import files
from fastssl.files import untrusted

LabelKind = Literal["none", "int", "multi"]  # no labels, one class an image, several classes an image
REQUIRED = ("format", "samples", "bytes", "max_pixels")


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """The fields in the order of the JSON file.  Numbers are 0 or more; None: the card does not say."""

    format: int = 1
    source: str | None = None  # the path that was converted
    kind: str | None = None  # of the source, such as "imagefolder"
    samples: int
    classes: list[str] | None = None
    label: LabelKind | None = None
    max_height: int | None = None
    max_width: int | None = None
    max_pixels: int  # height x width of the largest image
    min_side: int | None = None
    mean_pixels: float | None = None
    jpeg: int | None = None  # images stored as JPEG
    raw: int | None = None  # images stored as pixels
    copied: int | None = None  # JPEGs stored bit for bit
    resized: int | None = None
    bounded: int | None = None  # images shrunk further because of --max-aspect
    distrusted: int | None = None  # JPEGs that FFCV's decoder reports errors or warnings for, decoded by Pillow
    bad: int | None = None  # images that could not be read and were left out
    bytes: int  # size of the .beton
    options: dict | None = None  # of the conversion
    sha256: str | None = None  # of the .beton
    fastssl: Any = None  # the versions that wrote the file
    ffcv: Any = None

    @classmethod
    def read(cls, path: str | Path) -> DataCard:
        """The card at `path`, or that of the .beton at `path`.  ValueError for a file that is not a data card: its
        fields are checked, because anyone may have made it.  Unknown ones are ignored."""
        path = Path(path).with_suffix(".json")
        values = untrusted.read_json(path)
        if not isinstance(values, dict):
            kind = type(values).__name__
            raise ValueError(f"{path} is not a data card: it holds a {kind}; convert again, or copy it too")
        if missing := [name for name in REQUIRED if name not in values]:
            raise ValueError(f"{path} is not a data card: {missing[0]} is missing; convert again, or copy it too")
        values = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name, kind in get_type_hints(cls).items():
            if name in values and name not in ("classes", "label") and not _is(values[name], kind):
                raise ValueError(f"{path} is not a data card: {name} is {values[name]!r:.60}")
        if values["format"] != 1:
            raise ValueError(f"{path} has format {values['format']}, this version reads 1: convert again")
        classes, label = values.get("classes"), values.get("label")
        if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError(f"{path} is not a data card: classes is {classes!r:.60}, not a list of names")
        if label not in (None, *get_args(LabelKind)) or (label == "multi" and not classes):
            raise ValueError(f"{path} is not a data card: label is {label!r:.60} with classes {classes!r:.60}")
        if values["samples"] == 0:
            raise ValueError(f"{path} is not a data card: samples is 0")
        return cls(**values)

    def write(self, path: str | Path) -> None:
        files.write_json(path, asdict(self))


def _is(value: Any, annotation: Any) -> bool:
    """Whether a JSON value has the type of a field, int, str, `int | None` and so on."""
    if annotation is Any:
        return True
    kinds = get_args(annotation) or (annotation,)
    if value is None:
        return type(None) in kinds
    if kinds[0] in (int, float):
        return type(value) in (int, kinds[0]) and 0 <= value < 1 << 62  # not isinstance: a bool is an int for it
    return type(value) is kinds[0]
