"""Transfer to detection: torchvision's Faster R-CNN with a feature pyramid on the backbone, all of it fine-tuned on VOC
or COCO, and average precision.

Data are read as they are downloaded, not from a .beton.  The published figures are detectron2's (C4 for VOC), whose
recipes are in configs/detection/.  This protocol needs torchvision and pycocotools alone; compare its figures with each
other.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from fastssl import dist
from fastssl.backbones import ResNet
from fastssl.config import Optim
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.detection import data
from fastssl.eval.detection.average_precision import average_precision, import_pycocotools
from fastssl.eval.detection.data import Picture
from fastssl.eval.detection.faster_rcnn import build, without_decay
from fastssl.eval.detection.loop import detect, fit

NEEDS = None  # no .beton
SCHEDULES = {  # steps of 16 images, the steps where the rate falls tenfold, steps of warm-up
    "24k": (24_000, (18_000.0, 22_000.0), 100),  # MoCo's for VOC
    "1x": (90_000, (60_000.0, 80_000.0), 1000),
    "2x": (180_000, (120_000.0, 160_000.0), 1000),
}


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    _check(target, args)
    import_pycocotools()  # an error before hours of training
    train, test, classes = read(args)
    steps, milestones, warmup = schedule(args)
    sizes = args.min_size or tuple(range(480 if args.voc else 640, 801, 32))
    model = build(
        target.backbone,
        len(classes),
        bn=args.bn,
        min_size=sizes,
        max_size=args.max_size,
        mean=target.view.mean,
        std=target.view.std,
        seed=args.seed,
    )
    optim = Optim(
        name="sgd",
        lr=args.lr,
        base_batch=16,
        batch=args.train_batch,
        epochs=steps,
        momentum=0.9,
        weight_decay=args.weight_decay,
        schedule="step",
        milestones=milestones,
        gamma=0.1,
        warmup_epochs=warmup,
        warmup_ratio=1e-3,
        precision=args.precision,
        paramwise=without_decay(model),
    )
    with ThreadPoolExecutor(args.workers or 4, "decode") as pool:
        fit(model, train, optim, device=args.device, pool=pool, seed=args.seed)
        found = detect(
            model,
            test,
            device=args.device,
            pool=pool,
            batch=max(1, args.train_batch // dist.world()),
            precision=args.precision,
        )
    name = "VOC" if args.voc else "COCO"
    rows = [{"data": name, "metric": "coco", **average_precision(test, len(classes), found)}]
    if args.voc:
        rows += [{"data": name, "metric": "voc07", **average_precision(test, len(classes), found, eleven=True)}]
    options = {
        **{key: getattr(args, key) for key in ("lr", "weight_decay", "bn", "max_size", "seed")},
        "steps": steps,
        "milestones": list(milestones),
        "warmup_steps": warmup,
        "batch": args.train_batch,
        "min_size": list(sizes),
        "train": len(train),
        "test": len(test),
        "classes": len(classes),
    }
    return {"protocol": "detection", "options": options, "results": rows}


def _check(target: EvalTarget, args: argparse.Namespace) -> None:
    if bool(args.voc) == bool(args.coco):
        raise ValueError("give --voc FOLDER or --coco FOLDER, one of them")
    if args.train or args.test:
        raise ValueError(f"detection reads --voc or --coco, not {args.train or args.test}: leave out --train, --test")
    if args.coco and args.classes:
        raise ValueError("--classes is for VOC's format: COCO's files name their classes")
    if not isinstance(target.backbone, ResNet):
        raise ValueError("detection needs one of our ResNets or ResNeXts: the feature pyramid is built on their stages")
    if args.steps is not None and args.schedule:
        raise ValueError("--steps and --schedule both say how long to train: give one of them")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be positive")
    if args.train_batch < 1 or args.train_batch % dist.world():
        raise ValueError(f"--train-batch {args.train_batch} must be a positive multiple of the {dist.world()} ranks")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be positive")
    if args.lr <= 0 or args.weight_decay < 0:
        raise ValueError(f"--lr {args.lr} must be positive, --weight-decay {args.weight_decay} not negative")
    if args.min_size and not 0 < min(args.min_size) <= max(args.min_size) <= args.max_size:
        raise ValueError(f"--min-size {args.min_size} must be positive and at most --max-size {args.max_size}")


def read(args: argparse.Namespace) -> tuple[list[Picture], list[Picture], tuple[str, ...]]:
    """Training pictures with at least one object, test pictures, class names."""
    if args.voc:
        classes = tuple(args.classes.split(",")) if args.classes else data.VOC
        train_splits = (args.train_split or "VOC2007/trainval,VOC2012/trainval").split(",")
        both = [
            data.read_voc(args.voc, tuple(splits), classes, args.drop_empty)
            for splits in (train_splits, (args.test_split or "VOC2007/test").split(","))
        ]
    else:
        splits = args.train_split or "train2017", args.test_split or "val2017"
        (train, classes), (test, others) = (data.read_coco(args.coco, split, args.drop_empty) for split in splits)
        if classes != others:
            raise ValueError(f"the splits of {args.coco} name other categories: {len(classes)} and {len(others)}")
        both = [train, test]
    train = [picture for picture in both[0] if not all(picture.crowd)]
    if not train:
        raise ValueError("none of the training images has an object")
    return train, both[1], classes


def schedule(args: argparse.Namespace) -> tuple[int, tuple[float, ...], int]:
    """Steps, milestones, warm-up; the last two in proportion when --steps shortens them."""
    steps, milestones, warmup = SCHEDULES[args.schedule or ("24k" if args.voc else "1x")]
    if args.steps is None:
        return steps, milestones, warmup
    return args.steps, tuple(round(m * args.steps / steps) for m in milestones), warmup * args.steps // steps
