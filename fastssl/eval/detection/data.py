"""Images with boxes, read from the layouts of PASCAL VOC and COCO as they are downloaded.

Boxes are x0, y0, x1, y1 in pixels from 0 (VOC's left and upper edges, which count from 1, are reduced by one, as
in detectron2).  A mistake in the data is a ValueError that names the file.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastssl.files import untrusted

COCO_BYTES = 4 << 30  # the boxes of COCO's training set have 0.45 GB
VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass
class Picture:
    """One image file and its objects; `labels` count from 1, 0 is the background."""

    file: Path
    size: tuple[int, int] | None  # (width, height) as annotated
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)  # COCO: a region of many objects, not trained on
    difficult: list[bool] = field(default_factory=list)  # VOC: trained on, neither right nor wrong in a test

    def add(
        self,
        where: str,
        box: tuple[float, float, float, float],
        label: int,
        *,
        area: float | None = None,
        crowd: bool = False,
        difficult: bool = False,
        drop_empty: bool = False,
    ) -> None:
        """Add an object; `where`: the file and entry, for errors."""
        x0, y0, x1, y1 = box
        if not all(map(math.isfinite, box)):
            raise ValueError(f"{where}: the box {box} is not finite")
        if x1 <= x0 or y1 <= y0:
            if drop_empty:
                return
            raise ValueError(f"{where}: the box {box} (x0, y0, x1, y1) has no area: repair it, or give --drop-empty")
        self.boxes.append(box)
        self.labels.append(label)
        self.areas.append((x1 - x0) * (y1 - y0) if area is None else area)
        self.crowd.append(crowd)
        self.difficult.append(difficult)

    def read(self) -> Tensor:
        """The image, float32 (3, H, W) in 0 to 1."""
        try:
            with Image.open(self.file) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self.file} does not decode: {error}") from None
        if self.size and pixels.shape[:2] != self.size[::-1]:
            raise ValueError(
                f"{self.file} is {pixels.shape[1]} x {pixels.shape[0]} and its annotation says "
                f"{self.size[0]} x {self.size[1]}: the boxes belong to another image"
            )
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

    def target(self, flip: bool, width: int) -> dict[str, Tensor]:
        """Boxes and labels for torchvision's detectors, without crowds; mirrored with `flip`."""
        rows = [i for i, crowd in enumerate(self.crowd) if not crowd]
        boxes = torch.tensor([self.boxes[i] for i in rows], dtype=torch.float32).view(-1, 4)
        if flip:
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        return {"boxes": boxes, "labels": torch.tensor([self.labels[i] for i in rows], dtype=torch.int64)}


def read_voc(
    root: str, splits: tuple[str, ...], classes: tuple[str, ...] = VOC, drop_empty: bool = False
) -> list[Picture]:
    """Pictures of `splits` such as "VOC2007/trainval" of a VOCdevkit: YEAR/ImageSets/Main/SPLIT.txt,
    YEAR/Annotations/ID.xml, YEAR/JPEGImages/ID.jpg."""
    pictures = []
    for split in splits:
        year, _, name = split.rpartition("/")
        base = Path(root) / year
        listed = base / "ImageSets" / "Main" / f"{name}.txt"
        if not listed.is_file():
            raise ValueError(
                f"{listed} does not exist: --voc is the folder that holds VOC2007, and a split is named like "
                "VOC2007/trainval"
            )
        ids = [line.split()[0] for line in untrusted.read_lines(listed)]
        if not ids:
            raise ValueError(f"{listed} lists no image")
        pictures += [_voc(base, name, classes, drop_empty) for name in ids]
    return pictures


def _voc(base: Path, name: str, classes: tuple[str, ...], drop_empty: bool) -> Picture:
    file, image = base / "Annotations" / f"{name}.xml", base / "JPEGImages" / f"{name}.jpg"
    for needed in (file, image):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing")
    try:
        tree = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # of encodings: LookupError, ValueError
        raise ValueError(f"{file} is not XML: {error}") from None
    size = None
    if tree.find("size") is not None:
        size = int(_number(file, tree, "size/width")), int(_number(file, tree, "size/height"))
    picture = Picture(image, size)
    for item in tree.findall("object"):
        label = (item.findtext("name") or "").strip()
        if label not in classes:
            raise ValueError(
                f"{file}: {label!r} is not among the {len(classes)} classes ({', '.join(classes[:3])}, "
                "...): name all with --classes"
            )
        box = [_number(file, item, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        difficult = item.find("difficult") is not None and _number(file, item, "difficult") != 0
        picture.add(
            str(file),
            (box[0] - 1, box[1] - 1, box[2], box[3]),
            classes.index(label) + 1,
            difficult=difficult,
            drop_empty=drop_empty,
        )
    return picture


def _number(file: Path, node: ElementTree.Element, path: str) -> float:
    text = node.findtext(path)
    try:
        value = float(text or "")
        if not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        what = "has no" if text is None else f"has {text.strip()!r:.40} for"
        raise ValueError(f"{file} {what} {node.tag}/{path}") from None


def read_coco(root: str, split: str, drop_empty: bool = False) -> tuple[list[Picture], tuple[str, ...]]:
    """Pictures of annotations/instances_SPLIT.json and SPLIT/, and the classes by rising category id."""
    file = Path(root) / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: --coco is the folder that holds annotations/ and the images' folders")
    try:
        data = untrusted.read_json(file, COCO_BYTES)
        images, annotations, categories = data["images"], data["annotations"], data["categories"]
        known = {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}
        pictures = {i["id"]: Picture(Path(root) / split / i["file_name"], (i["width"], i["height"])) for i in images}
        label = {key: n for n, key in enumerate(known, 1)}
        for a in annotations:
            where = f"{file}, annotation {a['id']}"
            if a["category_id"] not in known:
                raise ValueError(f"{where}: there is no category {a['category_id']}")
            if a["image_id"] not in pictures:
                raise ValueError(f"{where}: there is no image {a['image_id']}")
            x, y, w, h = map(float, a["bbox"])
            pictures[a["image_id"]].add(
                where,
                (x, y, x + w, y + h),
                label[a["category_id"]],
                area=a.get("area"),
                crowd=bool(a.get("iscrowd", 0)),
                drop_empty=drop_empty,
            )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not an instances file of COCO: {error!r}") from None
    if not pictures:
        raise ValueError(f"{file} lists no image")
    present = set(os.listdir(Path(root) / split)) if (Path(root) / split).is_dir() else set()
    missing = [p.file for p in pictures.values() if p.file.name not in present and not p.file.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images of {file} are missing, such as {missing[0]}")
    return list(pictures.values()), tuple(known.values())
