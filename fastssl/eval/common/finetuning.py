"""Training a backbone and a new classifier on labels, for `semisup` and `finetune`.

The loop is plain PyTorch with DistributedDataParallel.  The view of a sample depends on the seed, the epoch and its
number alone, and batch norm sees the global batch: the trained network does not depend on the number of ranks (except
with mixup and drop path, which draw other numbers on each rank).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist, norm, views
from fastssl import optim as optims
from fastssl.amp import autocast
from fastssl.config import Optim, Precision
from fastssl.eval.common.features import Extractor
from fastssl.eval.common.metrics import count_correct, percentages, top_ks
from fastssl.eval.common.target import EvalTarget
from fastssl.kernels.augment import View, make_views
from fastssl.loader import Batch, Loader
from fastssl.sampler import Sampler, permutation

BEFORE_BLOCKS = "cls_token|reg_token|dist_token|pos_embed|patch_embed|norm_pre"  # of timm's transformers


class Diverged(ValueError):
    """The loss became NaN or infinite."""


class Classifier(nn.Module):
    """(B, 3, H, W) -> logits (B, classes): a backbone and a linear head N(0, 0.01) with zero bias (OpenSelfSup's)."""

    def __init__(self, backbone: nn.Module, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@dataclass(frozen=True)
class TrainingOptions:
    """How `train` uses labels.  `name` is printed before the losses."""

    seed: int = 0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    name: str = ""


def train(
    backbone: nn.Module,
    loader: Loader,
    view: View,
    optim: Optim,
    *,
    classes: int,
    rows: np.ndarray | None = None,
    options: TrainingOptions = TrainingOptions(),
) -> Classifier:
    """A copy of `backbone` with a head, trained on `rows` of the file (default: all) by `optim`, in evaluation mode.

    `loader` shuffles and has the batch of `optim`.  The last batch of an epoch over `rows` is filled up from the
    epoch's beginning; without `rows` it is dropped.  Diverged when the loss is not finite.
    """
    rows, seed = np.arange(loader.samples) if rows is None else rows, options.seed
    steps = min(-(-len(rows) // optim.batch), loader.steps)
    device = loader.device
    torch.manual_seed(seed)
    model = norm.convert_sync_bn(Classifier(copy.deepcopy(backbone), classes).to(device), device)
    optimizer, schedule = optims.build(model.named_parameters(), optim, steps_per_epoch=steps)
    parallel = nn.parallel.DistributedDataParallel(model) if dist.world() > 1 else model
    scaler = torch.amp.GradScaler(device.type, enabled=optim.precision == "fp16")
    mix = _mixing(options, classes)
    smoothing = 0.0 if mix else options.smoothing  # Mixup smooths, too
    torch.manual_seed(seed + 1 + dist.rank())  # drop path

    def add_gradient(batch: Batch, last: bool) -> Tensor:
        """Backward of a micro-batch; returns its loss."""
        (x,) = make_views(batch.pixels, batch.sizes, batch.index, (view,), seed=seed, epoch=batch.epoch)
        x, labels = mix(x, batch.label) if mix else (x, batch.label)
        sync = contextlib.nullcontext() if last or parallel is model else parallel.no_sync()
        with sync, autocast(device, optim.precision):
            loss = F.cross_entropy(parallel(x).float(), labels, label_smoothing=smoothing)
            scaler.scale(loss / loader.sampler.micro_per_step).backward()
        return loss.detach().double()

    def update() -> None:
        if optim.clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    model.train()
    for epoch in range(optim.epochs):
        total = torch.zeros((), dtype=torch.float64, device=device)
        order = np.resize(rows[permutation(len(rows), seed, epoch)], loader.samples)
        with contextlib.closing(loader.epoch(epoch, order=order)) as batches:
            for step in range(steps):
                schedule.set_lr(optimizer, epoch * steps + step)
                for i, batch in enumerate(islice(batches, loader.sampler.micro_per_step), 1):
                    total += add_gradient(batch, last=i == loader.sampler.micro_per_step) / (
                        steps * loader.sampler.micro_per_step
                    )
                update()
        mean = dist.mean(total).item()
        dist.print_main(f"{options.name}epoch {epoch + 1}/{optim.epochs}: loss {mean:.4f}")
        if not np.isfinite(mean):
            raise Diverged(
                f"the loss is {mean} in epoch {epoch + 1}: lower the rate {schedule.lr:g}, or use "
                "--precision fp32 or bf16"
            )
    return model.eval()


def _mixing(options: TrainingOptions, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix, one draw a batch, or None.  It draws from NumPy's global generator."""
    if not options.mixup and not options.cutmix:
        return None
    from timm.data import Mixup

    np.random.seed(options.seed + dist.rank())  # other numbers on each rank
    return Mixup(options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=classes)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    loader: Loader,
    view: View,
    *,
    classes: int,
    rows: np.ndarray | None = None,
    precision: Precision = "fp32",
) -> dict[str, float]:
    """{"top1", "top5" (more than five classes)} in percent on `rows` of the file (default: all), equal on all ranks.

    `loader` is one for evaluation (file order, nothing dropped).
    """
    count = loader.samples if rows is None else len(rows)
    order = np.arange(loader.samples) if rows is None else np.resize(rows, loader.samples)
    correct = torch.zeros(len(top_ks(classes)), dtype=torch.int64, device=loader.device)
    logits_of = Extractor(model, view, precision=precision)  # a classifier's output are logits
    for batch, (logits,) in logits_of.batches(loader, stop=-(-count // loader.batch), order=order):
        valid = slice(max(0, count - (batch.position or 0)))  # repetitions of `rows` follow
        correct += count_correct(logits[valid], batch.label[valid])
    return percentages(dist.sum_(correct.to(dist.device())).tolist(), count)


def layer_decay(backbone: nn.Module, decay: float) -> dict[str, dict]:
    """optim.paramwise for a timm transformer: block i of depth (from 0) has the rate lr decay^(depth - i), what comes
    before the blocks lr decay^(depth + 1), the norm and head after them lr.

    MAE's rule (util/lr_decay.py of https://github.com/facebookresearch/mae): decay^(depth + 1 - layer), where block i
    is layer i + 1 and the patch embedding layer 0.
    """
    depth = len(transformer_blocks(backbone, "layer-wise decay"))
    rates = {rf"^backbone\.body\.({BEFORE_BLOCKS})": depth + 1}
    rates |= {rf"^backbone\.body\.blocks\.{i}\.": depth - i for i in range(depth)}
    return {pattern: {"lr_mult": decay**power} for pattern, power in rates.items()}


def transformer_blocks(backbone: nn.Module, what: str) -> nn.Module:
    """The list of blocks of a timm transformer; `what` needs it, for the error."""
    body = getattr(backbone, "body", None)
    if body is None or not hasattr(body, "blocks") or not hasattr(body, "patch_embed"):
        raise ValueError(f"{what} needs a timm transformer with patch_embed and blocks, such as vit_base_patch16_224")
    return body.blocks


def drop_path_(backbone: nn.Module, rate: float) -> None:
    """Stochastic depth in place, from 0 in the first block linearly to `rate` in the last (timm's drop_path_rate)."""
    from timm.layers import DropPath

    layers = transformer_blocks(backbone, "drop path")
    for block, p in zip(layers, np.linspace(0, rate, len(layers)).tolist()):
        names = [name for name in ("drop_path", "drop_path1", "drop_path2") if hasattr(block, name)]
        if not names:
            raise ValueError(f"the blocks of {backbone.spec.name} have no drop path: leave out --drop-path")
        for name in names:
            setattr(block, name, DropPath(p) if p else nn.Identity())


def training_view(view: View) -> View:
    """A random-resized crop and flip, with size and normalisation of the evaluation view."""
    return views.supervised(view.size, mean=view.mean, std=view.std, interpolation=view.interpolation)[0]


def training_loader(target: EvalTarget, batch: int) -> Loader:
    """Shuffled batches of `batch` images on all ranks together."""
    args, batch_local = target.args, batch // dist.world()
    size = args.micro_batch or max(batch_local, 1)
    if batch < 1 or size < 1 or batch % dist.world() or batch_local % size:
        raise ValueError(
            f"--train-batch {batch} must be a positive multiple of the {dist.world()} ranks"
            + (f" times --micro-batch {size}" if args.micro_batch else "")
        )
    sampler = Sampler(args.seed, micro_per_step=batch_local // size)
    return Loader(target.train, batch, sampler, device=args.device, workers=args.workers)


def class_labels(loader: Loader) -> np.ndarray:
    """int64 (N,), one class for each image; ValueError for a file that has several labels an image, or none."""
    found = loader.labels()
    if found.ndim != 1 or (found < 0).any():
        what = f"has {(found < 0).sum()} images without label" if found.ndim == 1 else "has several labels an image"
        raise ValueError(f"{loader.path} {what}: training a classifier needs one class for each image")
    return found


def count_classes(train: Loader) -> int:
    """Number of classes of the training file, which include those of the test file (classes.match)."""
    return max(int(class_labels(train).max()) + 1, len(train.classes or ()))


def with_head_rate(optim: Optim, lr: float, mult: float) -> Optim:
    """`optim` with rate `lr` for the backbone and `mult` times that for the head."""
    return replace(optim, lr=lr, paramwise={**optim.paramwise, r"^head\.": {"lr_mult": mult}})
