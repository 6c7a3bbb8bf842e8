"""Fine-tuning of the whole network on all labels; the accuracy is that of the last epoch.

timm's transformers follow the recipe for ViT-B in FINETUNE.md of MAE's repository (https://arxiv.org/abs/2111.06377):
AdamW, layer-wise decay of the rate, with --mixup and --cutmix.  Other networks follow SimCLR's
(https://arxiv.org/abs/2002.05709, appendix B.5): SGD with Nesterov's momentum, no weight decay, one rate.  Views are a
random-resized crop and a flip; MAE's published figures also use RandAugment and random erasing.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from torch import nn

from fastssl import dist
from fastssl.config import Optim, Precision
from fastssl.eval.common import finetuning
from fastssl.eval.common.target import EvalTarget

NEEDS = ("train", "test")
DEFAULTS: dict[str, tuple[Any, Any]] = {  # of timm's transformers, and of other networks
    "optimizer": ("adamw", "sgd"),
    "lr": (5e-4, 0.05),
    "train_batch": (1024, 256),
    "epochs": (100, 30),
    "warmup_epochs": (5.0, 0.0),
    "weight_decay": (0.05, 0.0),
    "layer_decay": (0.65, 1.0),
    "drop_path": (0.1, 0.0),
    "smoothing": (0.1, 0.0),
}
TRANSFORMER, OTHER = ({key: pair[i] for key, pair in DEFAULTS.items()} for i in (0, 1))
LR_END = 1e-6  # MAE's min_lr


def run(target: EvalTarget, args: argparse.Namespace) -> dict:
    defaults = TRANSFORMER if hasattr(getattr(target.backbone, "body", None), "patch_embed") else OTHER
    given: dict[str, Any] = {key: getattr(args, key) for key in (*defaults, "mixup", "cutmix", "clip", "pool", "seed")}
    chosen: dict[str, Any] = {key: defaults.get(key) if value is None else value for key, value in given.items()}
    _check(chosen)
    backbone = copy.deepcopy(target.backbone)
    if args.pool:
        finetuning.transformer_blocks(backbone, "--pool")
        backbone.body.reset_classifier(0, args.pool)
    if chosen["drop_path"]:
        finetuning.drop_path_(backbone, chosen["drop_path"])
    loader, test = finetuning.training_loader(target, chosen["train_batch"]), target.loader(target.test)
    classes = finetuning.count_classes(loader)
    if (args.mixup or args.cutmix) and loader.batch // dist.world() // loader.sampler.micro_per_step % 2:
        raise ValueError("--mixup and --cutmix mix pairs: the images per rank and pass must be even")
    optim = optim_config(backbone, chosen, args.precision)
    model = finetuning.train(
        backbone,
        loader,
        finetuning.training_view(target.view),
        optim,
        classes=classes,
        options=finetuning.TrainingOptions(args.seed, chosen["smoothing"], args.mixup, args.cutmix),
    )
    row = finetuning.accuracy(model, test, target.view, classes=classes, precision=args.precision)
    options = {**chosen, "train": loader.samples, "test": test.samples, "classes": classes}
    row = {"optimizer": chosen["optimizer"], "epochs": chosen["epochs"], **row}
    return {"protocol": "finetune", "options": options, "results": [row]}


def optim_config(backbone: nn.Module, chosen: dict, precision: Precision) -> Optim:
    """config.Optim of these options; for transformers with a rate for each layer and no decay of norms and biases."""
    lr, batch = chosen["lr"], chosen["train_batch"]
    paramwise: dict[str, dict[str, Any]] = {}
    if chosen["layer_decay"] != 1:
        paramwise |= finetuning.layer_decay(backbone, chosen["layer_decay"])
    if hasattr(backbone, "body") and chosen["weight_decay"]:
        exempt: set[str] = getattr(backbone.body, "no_weight_decay", set)()
        names = {name for name, _ in backbone.body.named_parameters()}
        paramwise |= {"ndim<=1": {"weight_decay": 0.0}}
        paramwise |= {rf"^backbone\.body\.{name}$": {"weight_decay": 0.0} for name in sorted(exempt & names)}
    return Optim(
        name=chosen["optimizer"],
        nesterov=chosen["optimizer"] == "sgd",
        batch=batch,
        base_batch=256,
        lr_end=min(1.0, LR_END / (lr * batch / 256)),
        warmup_ratio=0.0,
        precision=precision,
        paramwise=paramwise,
        **{key: chosen[key] for key in ("lr", "epochs", "weight_decay", "warmup_epochs", "clip")},
    )


def _check(values: dict) -> None:
    for key in ("lr", "train_batch", "epochs", "layer_decay"):
        if not values[key] > 0:
            raise ValueError(f"--{key.replace('_', '-')} {values[key]} must be positive")
    for key in ("warmup_epochs", "weight_decay", "mixup", "cutmix", "clip"):
        if not values[key] >= 0:
            raise ValueError(f"--{key.replace('_', '-')} {values[key]} must not be negative")
    for key in ("drop_path", "smoothing"):
        if not 0 <= values[key] < 1:
            raise ValueError(f"--{key.replace('_', '-')} {values[key]} must be at least 0 and below 1")
    if values["warmup_epochs"] >= values["epochs"]:
        raise ValueError(f"--warmup-epochs {values['warmup_epochs']:g} must be less than --epochs {values['epochs']}")
    if values["layer_decay"] > 1:
        raise ValueError(f"--layer-decay {values['layer_decay']} must be at most 1")
