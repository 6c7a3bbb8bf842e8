"""Detection: files in VOC's and COCO's exact layout, average precision against hand-computed values and VOC2007's own
algorithm, the network against torchvision's, and the command on coloured squares."""

import ast
import json
import re
import runpy
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import fastssl.eval
from fastssl import backbones, dist
from fastssl.config import Backbone, Optim
from fastssl.eval import detection
from fastssl.eval.detection import faster_rcnn
from fastssl.eval.detection.average_precision import average_precision
from fastssl.eval.detection.data import VOC, Picture, read_coco, read_voc
from fastssl.eval.detection.loop import batches, detect, fit
from fastssl.weights.export.common import MEAN, STD

NAMES = ("car", "dog")
COLOURS = np.array([[255, 60, 60], [60, 60, 255]])
NET = ["--backbone", "resnet10", "--width", 8, "--features", "untrained"]
SMALL = ["--min-size", 64, "--max-size", 96, "--train-batch", 4]
NORMS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}

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


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(
        tmp_path_factory.mktemp("VOCdevkit"), {"VOC2007/trainval": 24, "VOC2012/trainval": 24, "VOC2007/test": 13}
    )


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
    (lambda f: f.write_text(re.sub("<xmax>\\d+", "<xmax>inf", f.read_text())), "000000.xml: the box .* is not finite"),
    (lambda f: edit(f, "<width>64", "<width>"), "000000.xml has '' for annotation/size/width"),
    (lambda f: (f.parents[1] / "ImageSets/Main/trainval.txt").write_text("\n"), "trainval.txt lists no image"),
    (lambda f: (f.parents[1] / "ImageSets/Main/trainval.txt").unlink(), "trainval.txt does not exist: --voc is"),
]


@pytest.mark.parametrize("damage, text", VOC_MISTAKES, ids=[text for _, text in VOC_MISTAKES])
def test_mistakes_in_voc(tmp_path, damage, text):
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
    (lambda r: (r / "annotations/instances_val2017.json").write_text("{"), "instances_val2017.json is not JSON"),
    (lambda r: (r / "annotations/instances_val2017.json").write_text("[]"), "is not an instances file of COCO"),
    (lambda r: (r / "annotations/instances_val2017.json").unlink(), "does not exist: --coco is the folder"),
    (lambda r: (r / "val2017/000000000001.jpg").unlink(), "1 images of .* are missing, such as .*000000000001.jpg"),
    (change(("annotations", 0, "category_id"), 5), "val2017.json, annotation 1: there is no category 5"),
    (change(("annotations", 0, "image_id"), 5), "val2017.json, annotation 1: there is no image 5"),
    (change(("annotations", 0, "bbox"), [1, 2, 0, 9]), "annotation 1: the box .* has no area: .* --drop-empty"),
    (change(("images",), []), "there is no image 7"),
]


@pytest.mark.parametrize("damage, text", COCO_MISTAKES, ids=[text for _, text in COCO_MISTAKES])
def test_mistakes_in_coco(tmp_path, damage, text):
    root = write_coco(tmp_path / "coco", {"val2017": 2})
    damage(root)
    with pytest.raises(ValueError, match=text):
        read_coco(str(root), "val2017")


def test_images_that_do_not_decode_or_have_another_size(tmp_path):
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


def picture(*objects):
    """Objects are (label, box) or (label, box, "difficult" or "crowd")."""
    out = Picture(Path("x.jpg"), None)
    for label, box, *kind in objects:
        out.add("x", box, label, difficult="difficult" in kind, crowd="crowd" in kind)
    return out


def test_average_precision_by_hand():
    """One object found exactly, nothing found, the other with an IoU of 0.62: precision 1, 1/2, 2/3."""
    truth = [picture((1, (0, 0, 100, 100))), picture((1, (0, 0, 100, 100)))]
    found = np.array([[0, 1, 0.9, 0, 0, 100, 100], [0, 1, 0.8, 200, 0, 250, 50], [1, 1, 0.7, 0, 0, 62, 100]])
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101  # of 101 recalls 51 are at most 1/2
    ours = average_precision(truth, 2, found)
    assert ours["ap50"] == pytest.approx(100 * both) and ours["ap75"] == pytest.approx(100 * one)
    assert ours["ap"] == pytest.approx(10 * (3 * both + 7 * one))
    eleven = average_precision(truth, 2, found, eleven=True)
    assert eleven["ap50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    # detections of a difficult object or in a crowd are neither right nor wrong
    truth[0].add("x", (200, 0, 250, 50), 1, difficult=True)
    assert average_precision(truth, 2, found)["ap50"] == pytest.approx(100)
    truth[0].difficult[1] = False
    assert average_precision(truth, 2, found)["ap50"] == pytest.approx(100)
    truth[0].boxes[1], truth[0].crowd[1] = (150, 0, 300, 300), True
    assert average_precision(truth, 2, found)["ap50"] == pytest.approx(100)
    assert average_precision(truth, 2, found[:0]) == {"ap": 0, "ap50": 0, "ap75": 0}
    with pytest.raises(ValueError, match="no object to find"):
        average_precision([picture()], 2, found[:1])


def voc07(truth, label, found, threshold):
    """The development kit's VOCevaldet: every detection is compared with its nearest object alone."""

    def iou(a, b):
        return (w := max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))) / (
            (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w
        )

    own = {(i, k) for i, p in enumerate(truth) for k, n in enumerate(p.labels) if n == label}
    taken, right = set(), []
    for row in sorted((row for row in found.tolist() if row[1] == label), key=lambda row: -row[2]):
        near = [(iou(row[3:], truth[int(row[0])].boxes[k]), i, k) for i, k in own if i == row[0]]
        best, *place = max(near, default=(0, None, None))
        if best >= threshold and truth[place[0]].difficult[place[1]]:
            continue
        right.append(best >= threshold and tuple(place) not in taken)
        taken.add(tuple(place) if best >= threshold else None)
    right = np.array(right)
    recall = right.cumsum() / sum(not truth[i].difficult[k] for i, k in own)
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    return np.mean([max(precision[recall >= t], default=0) for t in np.linspace(0, 1, 11)])


def test_eleven_points_are_voc2007s():
    """Objects apart from one another, so that the nearest is the one that COCO's matching takes, too."""
    rng = np.random.default_rng(0)
    truth, found = [], []
    for i in range(40):
        corners = [(100 * k, 0) for k in range(4)]
        objects = [
            (int(rng.integers(1, 4)), (x, y, x + 60, y + 60), "difficult" * (rng.random() < 0.2)) for x, y in corners
        ]
        truth.append(picture(*objects))
        for label, (x0, y0, x1, y1), _ in objects:
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 5, 4)
                guess = label if rng.random() < 0.8 else int(rng.integers(1, 4))
                found.append([i, guess, rng.random(), x0 + shift[0], y0 + shift[1], x1 + shift[2], y1 + shift[3]])
    found = np.array(found)
    ours = average_precision(truth, 3, found, eleven=True)
    for key, threshold in (("ap50", 0.5), ("ap75", 0.75)):
        want = 100 * np.mean([voc07(truth, label, found, threshold) for label in (1, 2, 3)])
        assert 5 < want < 90 and ours[key] == pytest.approx(want)


@pytest.mark.parametrize("bn", ["sync", "frozen"])
def test_the_pyramid_is_torchvisions(bn):
    torch.manual_seed(0)
    net = backbones.build(Backbone("resnet18"))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean), nn.init.uniform_(m.running_var, 0.5, 2), nn.init.uniform_(m.weight)
    model = faster_rcnn.build(net, 3, bn=bn, min_size=(64,), max_size=96, seed=0, **NORMS).eval()
    kind = nn.BatchNorm2d if bn == "sync" else FrozenBatchNorm2d
    theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=kind, trainable_layers=5)
    if bn == "sync":  # torchvision has no norm in its pyramid
        assert sum(isinstance(m, nn.BatchNorm2d) for m in model.backbone.fpn.modules()) == 8
        assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
        theirs.fpn = model.backbone.fpn
    else:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        theirs.fpn.load_state_dict(model.backbone.fpn.state_dict())
    state = {k: v for k, v in net.state_dict().items() if bn == "sync" or "num_batches" not in k}
    theirs.body.load_state_dict(state)
    x = torch.randn(2, 3, 64, 96)
    ours, want = model.backbone(x), theirs.eval()(x)
    assert list(ours) == list(want) == ["0", "1", "2", "3", "pool"]
    for a, b in zip(ours.values(), want.values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4 and model.transform.image_mean == (0.5,) * 3


def test_norms_do_not_decay():
    net = backbones.build(Backbone("resnet10", width=8))
    model = faster_rcnn.build(net, 2, bn="sync", min_size=(64,), max_size=96, seed=0, **NORMS)
    ((pattern, options),) = faster_rcnn.without_decay(model).items()
    matched = {name for name, _ in model.named_parameters() if re.search(pattern, name)}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(matched) == 2 * len(norms) and options == {"weight_decay": 0.0}
    assert {"backbone.body.layer2.0.downsample.1.weight", "backbone.fpn.inner_blocks.0.1.bias"} <= matched
    assert not any("conv" in name or "roi_heads" in name for name in matched)


def args(**given):
    return type("Args", (), {"schedule": None, "steps": None, "voc": None, **given})


def test_schedules():
    assert detection.schedule(args(voc="x")) == (24000, (18000, 22000), 100)
    assert detection.schedule(args()) == (90000, (60000, 80000), 1000)
    assert detection.schedule(args(voc="x", schedule="2x")) == (180000, (120000, 160000), 1000)
    assert detection.schedule(args(steps=90)) == (90, (60, 80), 1)


def test_batches_are_those_of_one_rank(voc, monkeypatch):
    pictures = read_voc(str(voc), ("VOC2007/test",))
    with ThreadPoolExecutor(2) as pool:
        whole = list(batches(pictures, 4, 7, pool, 3))
        monkeypatch.setattr(dist, "world", lambda: 2)
        for rank in range(2):
            monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
            for (images, targets), (all_images, all_targets) in zip(batches(pictures, 4, 7, pool, 3), whole):
                for k in range(2):
                    assert torch.equal(images[k], all_images[2 * rank + k])
                    assert torch.equal(targets[k]["boxes"], all_targets[2 * rank + k]["boxes"])
    seen = {image.sum().item() for images, _ in whole for image in images}
    assert len(whole) == 7 and len(seen) >= 13, "every image comes before any comes twice"
    for images, targets in whole:  # boxes are where the squares are, also in mirrored images
        for image, target in zip(images, targets):
            for (x0, y0, x1, y1), label in zip(target["boxes"].int().tolist(), target["labels"].tolist()):
                centre = image[:, (y0 + y1) // 2, (x0 + x1) // 2]
                kind = NAMES.index(VOC[label - 1])
                assert (centre * 255 - torch.from_numpy(COLOURS[kind])).abs().max() < 40


def shrink(set_):
    """A narrow pyramid and few proposals: seconds instead of minutes on a CPU."""
    few = {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 50}
    set_(faster_rcnn, "CHANNELS", 32)
    set_(faster_rcnn, "FasterRCNN", partial(FasterRCNN, **few))


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch.setattr)


def call(*argv):
    try:
        return fastssl.eval.main([str(word) for word in ("detection", *NET, "--workers", 2, "--device", "cpu", *argv)])
    except SystemExit as stop:
        return stop.code


def test_squares_are_found(small, voc, tmp_path, capsys):
    rows = {}
    for steps in (1, 100):
        argv = ["--voc", voc, "--classes", "car,dog", *SMALL, "--steps", steps, "--lr", 0.04]
        assert call(*argv, "--out", tmp_path / "a.json") == 0, capsys.readouterr().err
        rows[steps] = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [row["metric"] for row in rows[1]] == ["coco", "voc07"]
    assert rows[100][0]["ap50"] > max(80, rows[1][0]["ap50"] + 40), rows
    assert "AP50 %" in capsys.readouterr().out


def test_coco_and_frozen_statistics(small, tmp_path, capsys):
    root = write_coco(tmp_path / "coco", {"train2017": 6, "val2017": 3})
    out = tmp_path / "a.json"
    argv = ["--coco", root, *SMALL, "--steps", 2, "--bn", "frozen", "--precision", "bf16", "--out", out]
    assert call(*argv) == 0, capsys.readouterr().err
    result = json.loads(out.read_text())
    (row,) = result["results"]
    assert row["data"] == "COCO" and set(row) == {"data", "metric", "ap", "ap50", "ap75"}
    assert result["options"]["classes"] == 2 and result["options"]["train"] == 6


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "give --voc FOLDER or --coco FOLDER"),
        (["--voc", "VOC", "--coco", "VOC"], "one of them"),
        (["--voc", "VOC", "--train", "a.beton"], "leave out --train"),
        (["--voc", "VOC", "--steps", 9, "--schedule", "1x"], "give one of them"),
        (["--voc", "VOC", "--steps", 0], "--steps 0 must be positive"),
        (["--voc", "VOC", "--train-batch", 0], "--train-batch 0"),
        (["--voc", "VOC", "--workers", 0], "--workers 0 must be positive"),
        (["--voc", "VOC", "--lr", 0], "--lr 0.0 must be positive"),
        (["--voc", "VOC", "--min-size", "64", "--max-size", 32], "at most --max-size 32"),
        (["--voc", "VOC", "--test-split", "VOC2012/test"], "VOC2012/ImageSets/Main/test.txt does not exist"),
        (["--voc", "VOC", "--classes", "cat,dog"], "'car' is not among the 2 classes"),
        (["--coco", "VOC", "--classes", "cat,dog"], "is for VOC's format"),
        (["--coco", "VOC"], "instances_train2017.json does not exist"),
        (["--voc", "VOC", "--steps", 40, "--lr", 1e9, *SMALL], "lower --lr"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_mistakes(small, voc, capsys, argv, text):
    assert call(*(voc if word == "VOC" else word for word in argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1 and re.search(text, err), err


def test_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'fastssl[detection]'")):
        average_precision([picture((1, (0, 0, 9, 9)))], 1, np.zeros((0, 7)))


ROOT = Path(__file__).parents[2]


def recipe(name):
    """A recipe over its base as detectron2 merges them; tuples are written as it reads them, by literal_eval."""
    own = yaml.safe_load((ROOT / "configs/detection" / f"{name}.yaml").read_text())

    def merge(a, b):
        return {
            k: merge(a.get(k, {}), b.get(k, {})) if isinstance(b.get(k, a.get(k)), dict) else b.get(k, a.get(k))
            for k in a | b
        }

    def literal(v):
        return (
            {k: literal(x) for k, x in v.items()}
            if isinstance(v, dict)
            else (ast.literal_eval(v) if isinstance(v, str) and v.startswith("(") else v)
        )

    own = literal(own)
    return merge(recipe(own.pop("_BASE_").removesuffix(".yaml")), own) if "_BASE_" in own else own


RECIPES = {  # OpenSelfSup's: steps, milestones, short sides from, mask, head
    "pascal_voc_R_50_C4_24k": (24000, (18000, 22000), 480, False, "Res5ROIHeadsExtraNorm"),
    "coco_R_50_C4_1x": (90000, (60000, 80000), 640, True, "Res5ROIHeadsExtraNorm"),
    "coco_R_50_C4_2x": (180000, (120000, 160000), 640, True, "Res5ROIHeadsExtraNorm"),
    "coco_R_50_FPN_1x": (90000, (60000, 80000), 640, True, "StandardROIHeads"),
    "coco_R_50_FPN_2x": (180000, (120000, 160000), 640, True, "StandardROIHeads"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    steps, milestones, short, mask, heads = RECIPES[name]
    cfg = recipe(name)
    model, solver, source = cfg["MODEL"], cfg["SOLVER"], cfg["INPUT"]
    assert (solver["MAX_ITER"], solver["STEPS"], solver["IMS_PER_BATCH"], solver["BASE_LR"]) == (
        steps,
        milestones,
        16,
        0.02,
    )
    assert source["MIN_SIZE_TRAIN"] == tuple(range(short, 801, 32)) and source["MIN_SIZE_TEST"] == 800
    assert model["MASK_ON"] is mask and model["ROI_HEADS"]["NAME"] == heads and model["BACKBONE"]["FREEZE_AT"] == 0
    assert source["FORMAT"] == "RGB" and cfg["TEST"]["PRECISE_BN"]["ENABLED"] is True
    assert (model["RESNETS"]["NORM"], model["RESNETS"]["STRIDE_IN_1X1"]) == ("SyncBN", False)
    for key, values in (("PIXEL_MEAN", MEAN), ("PIXEL_STD", STD)):
        assert np.allclose(np.array(model[key]) / 255, values)
    if "voc" in name:
        assert cfg["DATASETS"] == {"TRAIN": ("voc_2007_trainval", "voc_2012_trainval"), "TEST": ("voc_2007_test",)}
        assert solver["WARMUP_ITERS"] == 100 and model["ROI_HEADS"]["NUM_CLASSES"] == 20
    else:
        assert cfg["DATASETS"] == {"TRAIN": ("coco_2017_train",), "TEST": ("coco_2017_val",)}
    if "FPN" in name:
        assert model["FPN"]["NORM"] == "SyncBN" and model["BACKBONE"]["NAME"] == "build_resnet_fpn_backbone"


def test_every_recipe_is_tested():
    files = {f.stem for f in (ROOT / "configs/detection").glob("*.yaml")}
    assert files == {*RECIPES, "Base-RCNN-C4-BN", "Base-RCNN-FPN-BN"}


def test_the_norm_behind_res5(monkeypatch):
    """tools/detectron2_train.py over stand-ins of the names that it imports: detectron2 is in no package index."""
    registered = {}

    class Res5ROIHeads(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self.res5 = nn.Sequential(nn.Conv2d(4, 6, 1))

    class Registry:
        def register(self):
            return lambda kind: registered.setdefault(kind.__name__, kind)

    known = {
        "checkpoint": ["DetectionCheckpointer"],
        "config": ["get_cfg"],
        "evaluation": ["COCOEvaluator", "PascalVOCDetectionEvaluator"],
        "layers": ["get_norm"],
        "modeling.roi_heads": ["ROI_HEADS_REGISTRY", "Res5ROIHeads"],
        "engine": ["DefaultTrainer", "default_argument_parser", "default_setup", "launch"],
        "": [],
        "modeling": [],
    }
    given = {
        "get_norm": lambda norm, channels: {"SyncBN": nn.BatchNorm2d}[norm](channels),
        "Res5ROIHeads": Res5ROIHeads,
        "ROI_HEADS_REGISTRY": Registry(),
        "DefaultTrainer": object,
    }
    for name, members in known.items():
        module = types.ModuleType(f"detectron2.{name}".rstrip("."))
        vars(module).update({member: given.get(member) for member in members})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    runpy.run_path(str(ROOT / "tools/detectron2_train.py"))
    cfg = types.SimpleNamespace(MODEL=types.SimpleNamespace(RESNETS=types.SimpleNamespace(NORM="SyncBN")))
    heads = registered["Res5ROIHeadsExtraNorm"](cfg, None)
    assert list(dict(heads.res5.named_children())) == ["0", "norm"]
    assert heads.res5(torch.randn(2, 4, 3, 3)).mean((0, 2, 3)).abs().max() < 1e-5


def on_two_ranks(root):
    """The weights of every rank after two steps, and what this one has of the detections."""
    shrink(setattr)
    device = torch.device("cpu")
    torch.manual_seed(0)
    net = backbones.build(Backbone("resnet10", width=8))
    model = faster_rcnn.build(net, 20, bn="sync", min_size=(64,), max_size=96, seed=0, **NORMS)
    pictures = read_voc(root, ("VOC2007/test",))
    with ThreadPoolExecutor(1) as pool:
        optim = Optim(batch=4, epochs=2, lr=0.01, schedule="constant")
        fit(model, pictures, optim, device=device, pool=pool, seed=0)
        model.roi_heads.score_thresh = 0.0
        found = detect(model, pictures, device=device, pool=pool, batch=2, precision="fp32")
    weights = torch.cat([p.detach().flatten() for p in model.state_dict().values()])
    return dist.gather(weights[None].double()), found
