"""Files in VOC's and COCO's exact layout are read, and mistakes in them named."""

import json
import re

import numpy as np
import pytest
import torch
from detection_files import NAMES, OBJECT, XML, squares, write_coco, write_voc
from PIL import Image

from fastssl.eval.detection.data import VOC, read_coco, read_voc


def test_voc_is_read(tmp_path):
    root = write_voc(tmp_path, {"VOC2007/val": 2})
    hard = OBJECT.format("tvmonitor", 1, 1, 2, 64, 48) + OBJECT.format("person", 0, "8.5", 12, 30, 40)
    (root / "VOC2007/Annotations/000001.xml").write_text(XML.format(name="x", w=64, h=48, objects=hard))
    first, second = read_voc(str(root), ("VOC2007/val",))
    assert first.file == root / "VOC2007/JPEGImages/000000.jpg" and first.size == (64, 48)
    pixels, objects = squares(np.random.default_rng(0))
    assert [(VOC[n - 1], *box) for n, box in zip(first.labels, first.boxes)] == [
        (NAMES[k], *rest) for k, *rest in objects
    ]
    assert second.boxes == [(0, 1, 64, 48), (7.5, 11, 30, 40)] and second.labels == [20, 15]
    assert second.difficult == [True, False] and second.areas == [64 * 47, 22.5 * 29] and not any(second.crowd)
    assert (first.read() * 255 - torch.from_numpy(pixels).permute(2, 0, 1)).abs().mean() < 30  # JPEG's loss of noise
    plain, mirrored = first.target(False, 64), first.target(True, 64)
    assert plain["boxes"].tolist() == [list(map(float, box)) for box in first.boxes]
    x0, y0, x1, y1 = first.boxes[0]
    assert mirrored["boxes"][0].tolist() == [64 - x1, y0, 64 - x0, y1]


def test_coco_is_read(tmp_path):
    root = write_coco(tmp_path / "coco", {"val2017": 3})
    file = root / "annotations/instances_val2017.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(data))
    pictures, classes = read_coco(str(root), "val2017")
    assert classes == ("car", "dog") and len(pictures) == 3, "classes are sorted by category id"
    _, objects = squares(np.random.default_rng(0))
    assert pictures[0].boxes == [tuple(map(float, rest)) for _, *rest in objects]
    assert [classes[n - 1] for n in pictures[0].labels] == [("dog", "car")[k] for k, *_ in objects]
    assert pictures[0].crowd[0] and not any(pictures[1].crowd) and not any(pictures[0].difficult)
    assert pictures[1].areas[0] == data["annotations"][len(objects)]["area"]
    assert len(pictures[0].target(False, 64)["boxes"]) == len(objects) - 1


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


VOC_MISTAKES = [
    (lambda f: edit(f, "<object>", "<objct>"), "000000.xml is not XML: mismatched tag"),
    (lambda f: f.write_text(""), "000000.xml is not XML: no element found"),
    (lambda f: f.unlink(), "000000.xml is missing"),
    (lambda f: (f.parents[1] / "JPEGImages/000000.jpg").unlink(), "000000.jpg is missing"),
    (lambda f: f.write_text(re.sub("<name>(car|dog)", "<name>kart", f.read_text())), "000000.xml: 'kart' is not among"),
    (lambda f: f.write_text(re.sub("<xmax>.*?</xmax>", "", f.read_text())), "000000.xml has no object/bndbox/xmax"),
    (lambda f: f.write_text(re.sub("<xmax>\\d+", "<xmax>many", f.read_text())), "000000.xml has 'many' for object/bnd"),
    (lambda f: f.write_text(re.sub("<xmax>\\d+", "<xmax>0", f.read_text())), "000000.xml: the box .* has no area"),
    (
        lambda f: f.write_text(re.sub("<xmax>\\d+", "<xmax>inf", f.read_text())),
        "000000.xml has 'inf' for object/bndbox/xmax",
    ),
    (lambda f: edit(f, "<width>64", "<width>"), "000000.xml has '' for annotation/size/width"),
    (lambda f: (f.parents[1] / "ImageSets/Main/trainval.txt").write_text("\n"), "trainval.txt lists no image"),
    (lambda f: (f.parents[1] / "ImageSets/Main/trainval.txt").unlink(), "trainval.txt does not exist: --voc is"),
]


@pytest.mark.parametrize("damage, text", VOC_MISTAKES, ids=[text for _, text in VOC_MISTAKES])
def test_damaged_voc_data_raises(tmp_path, damage, text):
    root = write_voc(tmp_path, {"VOC2007/trainval": 1})
    damage(root / "VOC2007/Annotations/000000.xml")
    with pytest.raises(ValueError, match=text):
        read_voc(str(root), ("VOC2007/trainval",))


def change(path, value):
    def damage(root):
        file = root / "annotations/instances_val2017.json"
        data = json.loads(file.read_text())
        *inner, last = path
        place = data
        for key in inner:
            place = place[key]
        place[last] = value
        file.write_text(json.dumps(data))

    return damage


COCO_MISTAKES = [
    (lambda r: (r / "annotations/instances_val2017.json").write_text("{"), "instances_val2017.json is not valid JSON"),
    (lambda r: (r / "annotations/instances_val2017.json").write_text("[]"), "is not an instances file of COCO"),
    (lambda r: (r / "annotations/instances_val2017.json").unlink(), "does not exist: --coco is the folder"),
    (lambda r: (r / "val2017/000000000001.jpg").unlink(), "1 images of .* are missing, such as .*000000000001.jpg"),
    (change(("annotations", 0, "category_id"), 5), "val2017.json, annotation 1: there is no category 5"),
    (change(("annotations", 0, "image_id"), 5), "val2017.json, annotation 1: there is no image 5"),
    (change(("annotations", 0, "bbox"), [1, 2, 0, 9]), "annotation 1: the box .* has no area: .* --drop-empty"),
    (change(("images",), []), "there is no image 7"),
]


@pytest.mark.parametrize("damage, text", COCO_MISTAKES, ids=[text for _, text in COCO_MISTAKES])
def test_damaged_coco_data_raises(tmp_path, damage, text):
    root = write_coco(tmp_path / "coco", {"val2017": 2})
    damage(root)
    with pytest.raises(ValueError, match=text):
        read_coco(str(root), "val2017")


def test_images_that_do_not_decode_or_have_another_size_raise(tmp_path):
    root = write_voc(tmp_path, {"VOC2007/trainval": 2})
    (root / "VOC2007/JPEGImages/000000.jpg").write_bytes(b"no image")
    Image.new("RGB", (48, 64)).save(root / "VOC2007/JPEGImages/000001.jpg")
    one, two = read_voc(str(root), ("VOC2007/trainval",))
    with pytest.raises(ValueError, match="000000.jpg does not decode"):
        one.read()
    with pytest.raises(ValueError, match="000001.jpg is 48 x 64 and its annotation says 64 x 48"):
        two.read()


def test_empty_boxes_are_left_out_when_asked(tmp_path):
    root = write_coco(tmp_path / "coco", {"val2017": 1})
    change(("annotations", 0, "bbox"), [1, 2, 0, 9])(root)
    before = len(json.loads((root / "annotations/instances_val2017.json").read_text())["annotations"])
    ((picture,), _) = read_coco(str(root), "val2017", drop_empty=True)
    assert len(picture.boxes) == before - 1
