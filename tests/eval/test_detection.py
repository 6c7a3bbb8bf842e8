"""Detection: the network against torchvision's, its schedules and batches, and the command on coloured squares."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from detection_files import (
    COLOURS,
    NAMES,
    voc_fixture,  # noqa: F401
    write_coco,
)
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import fastssl.eval
from fastssl import backbones, dist
from fastssl.config import Backbone, Optim
from fastssl.eval import detection
from fastssl.eval.detection import faster_rcnn
from fastssl.eval.detection.data import VOC, read_voc
from fastssl.eval.detection.loop import batches, detect, fit

NET = ["--backbone", "resnet10", "--width", 8, "--features", "untrained"]


SMALL = ["--min-size", 64, "--max-size", 96, "--train-batch", 4]


NORMS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.mark.parametrize("bn", ["sync", "frozen"])
def test_the_feature_pyramid_equals_torchvisions(bn):
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


def test_norms_have_no_weight_decay():
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


def test_schedules_are_shortened_in_proportion():
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


def test_the_detector_learns_to_find_squares(small, voc, tmp_path, capsys):
    rows = {}
    for steps in (1, 100):
        argv = ["--voc", voc, "--classes", "car,dog", *SMALL, "--steps", steps, "--lr", 0.04]
        assert call(*argv, "--out", tmp_path / "a.json") == 0, capsys.readouterr().err
        rows[steps] = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [row["metric"] for row in rows[1]] == ["coco", "voc07"]
    assert rows[100][0]["ap50"] > max(80, rows[1][0]["ap50"] + 40), rows
    assert "AP50 %" in capsys.readouterr().out


def test_the_coco_command_trains_with_frozen_batch_norm(small, tmp_path, capsys):
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
def test_wrong_arguments_raise(small, voc, capsys, argv, text):
    assert call(*(voc if word == "VOC" else word for word in argv)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") == 1 and re.search(text, err), err


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
