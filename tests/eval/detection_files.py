"""Small data sets in VOC's and COCO's exact layout: coloured squares.  Not a test."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.eval.detection.data import Picture

NAMES = ("car", "dog")


COLOURS = np.array([[255, 60, 60], [60, 60, 255]])


XML = """<annotation>
	<folder>VOC2007</folder>
	<filename>{name}.jpg</filename>
	<source><database>The VOC2007 Database</database></source>
	<size><width>{w}</width><height>{h}</height><depth>3</depth></size>
	<segmented>0</segmented>
{objects}</annotation>
"""


OBJECT = """	<object>
		<name>{0}</name>
		<pose>Left</pose>
		<truncated>1</truncated>
		<difficult>{1}</difficult>
		<bndbox><xmin>{2}</xmin><ymin>{3}</ymin><xmax>{4}</xmax><ymax>{5}</ymax></bndbox>
		<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
	</object>
"""


def squares(rng, w=64, h=48):
    """An image with one or two squares, red cars and blue dogs, and their (class, x0, y0, x1, y1)."""
    pixels = rng.integers(90, 160, (h, w, 3)).astype(np.uint8)
    found = []
    for half in range(rng.integers(1, 3)):
        side, kind = int(rng.integers(18, 28)), int(rng.integers(0, 2))
        x, y = int(half * w // 2 + rng.integers(0, w // 2 - side + 1)), int(rng.integers(0, h - side + 1))
        pixels[y : y + side, x : x + side] = COLOURS[kind]
        found.append((kind, x, y, x + side, y + side))
    return pixels, found


def write_voc(root, splits, seed=0):
    """VOCdevkit with `splits` {"VOC2007/trainval": images}; everything is in the files of that layout."""
    rng, number = np.random.default_rng(seed), 0
    for split, count in splits.items():
        year, name = split.split("/")
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        ids = []
        for _ in range(count):
            ids.append(f"{number:06d}")
            number += 1
            pixels, found = squares(rng)
            Image.fromarray(pixels).save(root / year / "JPEGImages" / f"{ids[-1]}.jpg", quality=95)
            objects = "".join(OBJECT.format(NAMES[k], 0, x0 + 1, y0 + 1, x1, y1) for k, x0, y0, x1, y1 in found)
            text = XML.format(name=ids[-1], w=64, h=48, objects=objects)
            (root / year / "Annotations" / f"{ids[-1]}.xml").write_text(text)
        (root / year / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(i + "\n" for i in ids))
    return root


def write_coco(root, splits, seed=0):
    rng, n = np.random.default_rng(seed), 0
    (root / "annotations").mkdir(parents=True)
    for split, count in splits.items():
        (root / split).mkdir()
        images, found = [], []
        for i in range(count):
            pixels, objects = squares(rng)
            images.append({"id": 10 * i + 7, "file_name": f"{i:012d}.jpg", "width": 64, "height": 48, "license": 1})
            Image.fromarray(pixels).save(root / split / images[-1]["file_name"], quality=95)
            for kind, x0, y0, x1, y1 in objects:
                n += 1
                found.append(
                    {
                        "id": n,
                        "image_id": 10 * i + 7,
                        "category_id": (18, 3)[kind],
                        "iscrowd": 0,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": 0.8 * (x1 - x0) * (y1 - y0),
                        "segmentation": [[x0, y0, x1, y0, x1, y1]],
                    }
                )
        data = {
            "info": {},
            "licenses": [],
            "images": images,
            "annotations": found,
            "categories": [
                {"id": 18, "name": "dog", "supercategory": "animal"},
                {"id": 3, "name": "car", "supercategory": "vehicle"},
            ],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


@pytest.fixture(scope="module", name="voc")
def voc_fixture(tmp_path_factory):
    return write_voc(
        tmp_path_factory.mktemp("VOCdevkit"), {"VOC2007/trainval": 24, "VOC2012/trainval": 24, "VOC2007/test": 13}
    )


def picture(*objects):
    """Objects are (label, box) or (label, box, "difficult" or "crowd")."""
    out = Picture(Path("x.jpg"), None)
    for label, box, *kind in objects:
        out.add("x", box, label, difficult="difficult" in kind, crowd="crowd" in kind)
    return out
