"""Transfer to detection: torchvision's Faster R-CNN with a feature pyramid on the backbone, all of it fine-tuned on VOC
or COCO, and average precision.

Data are read as they are downloaded, no .beton.  The published figures are detectron2's (C4 for VOC): see
configs/detection/ for its recipes; this one needs torchvision and pycocotools alone, so compare it with itself.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

from fastssl import dist, norm
from fastssl import optim as optims
from fastssl.amp import DTYPES
from fastssl.backbones import ResNet
from fastssl.config import Optim
from fastssl.eval.common.finetuning import Diverged
from fastssl.eval.common.target import EvalTarget
from fastssl.eval.detection import boxes
from fastssl.eval.detection.boxes import Picture
from fastssl.loader import permutation
from fastssl.parsing import comma_separated

NEEDS = None  # no .beton
WITHOUT = ("cache", "no_cache", "size", "resize", "batch")  # images go in whole, at --min-size
SCHEDULES = {  # steps of 16 images, the steps where the rate falls tenfold, steps of warm-up
    "24k": (24_000, (18_000.0, 22_000.0), 100),  # MoCo's for VOC
    "1x": (90_000, (60_000.0, 80_000.0), 1000),
    "2x": (180_000, (120_000.0, 160_000.0), 1000),
}
CHANNELS = 256  # of the pyramid
EVERY = 20  # steps between looks at the loss
AHEAD = 2  # batches decoded before they are asked for


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--voc", metavar="FOLDER", help="VOCdevkit: holds VOC2007, VOC2012 (Annotations, ImageSets, JPEGImages)")
    add("--coco", metavar="FOLDER", help="holds annotations/instances_SPLIT.json and the images in SPLIT/")
    add("--train-split", help="default: VOC2007/trainval,VOC2012/trainval or train2017")
    add("--test-split", help="default: VOC2007/test or val2017")
    add("--classes", help="names for other data in VOC's format, comma-separated; default: VOC's 20")
    add("--drop-empty", action="store_true", help="leave out boxes without area instead of refusing the file")
    add("--schedule", choices=tuple(SCHEDULES), help="default: 24k for VOC, 1x for COCO")
    add("--steps", type=int, help="instead of --schedule, with its milestones and warm-up in proportion")
    add("--train-batch", type=int, default=16, help="images of all ranks together")
    add("--lr", type=float, default=0.02, help="for 16 images, scaled linearly")
    add("--weight-decay", type=float, default=1e-4, help="not of norms")
    add(
        "--bn",
        choices=("sync", "frozen"),
        default="sync",
        help="batch norm over all ranks, also in the pyramid (MoCo), or as pretrained",
    )
    add(
        "--min-size",
        type=comma_separated(int),
        help="short sides drawn from in training, the last in tests; default: 480 to "
        "800 by 32 for VOC, from 640 for COCO",
    )
    add("--max-size", type=int, default=1333, help="of the long side")


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    _check(target, args)
    boxes._pycocotools()  # before hours of training
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
    data = "VOC" if args.voc else "COCO"
    rows = [{"data": data, "metric": "coco", **boxes.average_precision(test, len(classes), found)}]
    if args.voc:
        rows += [{"data": data, "metric": "voc07", **boxes.average_precision(test, len(classes), found, eleven=True)}]
    options = {
        "steps": steps,
        "milestones": list(milestones),
        "warmup_steps": warmup,
        "lr": args.lr,
        "batch": args.train_batch,
        "weight_decay": args.weight_decay,
        "bn": args.bn,
        "min_size": list(sizes),
        "max_size": args.max_size,
        "seed": args.seed,
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
        raise ValueError("detection needs a ResNet or ResNeXt of ours: torchvision has a feature pyramid for no other")
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
    """Training pictures that have an object, test pictures, class names."""
    if args.voc:
        classes = tuple(args.classes.split(",")) if args.classes else boxes.VOC
        train_splits = (args.train_split or "VOC2007/trainval,VOC2012/trainval").split(",")
        both = [
            boxes.read_voc(args.voc, tuple(splits), classes, args.drop_empty)
            for splits in (train_splits, (args.test_split or "VOC2007/test").split(","))
        ]
    else:
        splits = args.train_split or "train2017", args.test_split or "val2017"
        (train, classes), (test, others) = (boxes.read_coco(args.coco, split, args.drop_empty) for split in splits)
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


def build(
    backbone: ResNet, classes: int, *, bn: str, min_size: tuple[int, ...], max_size: int, mean, std, seed: int
) -> FasterRCNN:
    """Faster R-CNN with a feature pyramid on a copy of `backbone`, whose layer1 to layer4 it sees."""
    torch.manual_seed(seed)
    net = copy.deepcopy(backbone)
    if bn == "frozen":
        freeze(net)
    body = BackboneWithFPN(
        net,
        {f"layer{i}": str(i - 1) for i in range(1, 5)},
        list(net.stages[1:]),
        CHANNELS,
        norm_layer=nn.BatchNorm2d if bn == "sync" else None,
    )
    return FasterRCNN(body, classes + 1, min_size=min_size, max_size=max_size, image_mean=mean, image_std=std)


def freeze(module: nn.Module) -> None:
    """Every batch norm becomes torchvision's frozen one, with the same output as in evaluation."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze(child)


def without_decay(model: nn.Module) -> dict[str, dict]:
    """optim.paramwise that exempts norms, as detectron2's WEIGHT_DECAY_NORM = 0 does (biases of others decay)."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    names = [
        f"{name}.{own}"
        for name, m in model.named_modules()
        if isinstance(m, kinds)
        for own, _ in m.named_parameters(recurse=False)
    ]
    return {f"^({'|'.join(map(re.escape, names))})$": {"weight_decay": 0.0}} if names else {}


def fit(
    model: FasterRCNN, pictures: list[Picture], optim: Optim, *, device, pool: ThreadPoolExecutor, seed: int
) -> None:
    """Train `model` in place for optim.epochs steps (milestones and warm-up are steps, too)."""
    dtype = DTYPES[optim.precision]
    model = norm.convert_sync_bn(model.to(device), device).train()
    optimizer, rates = optims.build(model.named_parameters(), optim, steps_per_epoch=1)
    parallel = nn.parallel.DistributedDataParallel(model) if dist.world() > 1 else model
    scaler = torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16")
    torch.manual_seed(seed + 1 + dist.rank())  # the short side of each image, the sampled proposals
    total = torch.zeros((), dtype=torch.float64, device=device)
    for step, (images, targets) in enumerate(batches(pictures, optim.batch, optim.epochs, pool, seed)):
        rates.set_lr(optimizer, step)
        images = [image.to(device) for image in images]
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = sum(parallel(images, targets).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        total += loss.detach()
        if (step + 1) % EVERY == 0 or step + 1 == optim.epochs:
            mean = dist.mean(total).item() / (step % EVERY + 1)
            total.zero_()
            if not np.isfinite(mean):
                raise Diverged(f"the loss is {mean} at step {step + 1}: lower --lr {optim.lr:g}")
            if dist.is_main():
                print(f"step {step + 1}/{optim.epochs}: loss {mean:.4f}", flush=True)


def batches(
    pictures: list[Picture], batch: int, steps: int, pool: ThreadPoolExecutor, seed: int
) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """This rank's share of `steps` batches: permutation after permutation, half of the images mirrored."""
    share = batch // dist.world()
    order: dict[int, np.ndarray] = {}

    def sample(place: int) -> tuple[Tensor, dict]:
        epoch, at = divmod(place, len(pictures))
        picture, image = pictures[order[epoch][at]], pictures[order[epoch][at]].read()
        flip = np.random.Generator(np.random.Philox(key=[seed, place])).random() < 0.5
        return (image.flip(2) if flip else image), picture.target(flip, image.shape[2])

    waiting: deque = deque()
    for step in range(steps + AHEAD):
        if step < steps:
            places = range(step * batch + dist.rank() * share, step * batch + (dist.rank() + 1) * share)
            for epoch in {place // len(pictures) for place in places} - order.keys():
                order[epoch] = permutation(len(pictures), seed, epoch)
            waiting.append([pool.submit(sample, place) for place in places])
        if step >= AHEAD:
            images, targets = zip(*(future.result() for future in waiting.popleft()))
            yield list(images), list(targets)


@torch.no_grad()
def detect(
    model: FasterRCNN, pictures: list[Picture], *, device, pool: ThreadPoolExecutor, batch: int, precision: str
) -> np.ndarray:
    """float64 (n, 7) rows of picture, label, score, x0, y0, x1, y1 in order of the pictures, those of all ranks."""
    model.eval()
    dtype, rows = DTYPES[precision], [torch.zeros(0, 7, dtype=torch.float64, device=device)]
    mine = range(dist.rank(), len(pictures), dist.world())
    for start in range(0, len(mine), batch):
        part = mine[start : start + batch]
        images = [image.to(device) for image in pool.map(lambda i: pictures[i].read(), part)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = model(images)
        for i, out in zip(part, found):
            columns = [
                torch.full_like(out["scores"], i)[:, None].double(),
                out["labels"][:, None].double(),
                out["scores"][:, None].double(),
                out["boxes"].double(),
            ]
            rows.append(torch.cat(columns, 1))
    rows = dist.gather_ragged(torch.cat(rows)).cpu().numpy()
    return rows[np.argsort(rows[:, 0], kind="stable")]
